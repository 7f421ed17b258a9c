"""The real vLLM on the tiny model in fp32: what the trainer computes is what the engine samples from, after every swap.

The engine's logprobs are compared with transformers' own. Untied and tied heads; a stock reload of a tied head must be
caught; an engine started the wrong way must be named; a killed engine must come back on the live version.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import digits_task
import msgspec
import pytest
import tiny_model as tiny
import yaml
from versions import add_version

from tracegrad.tracestore.config import EngineConfig, ModelConfig, PublishConfig, TransferConfig
from tracegrad.tracestore.records import PolicyVersion
from tracegrad.tracestore.store import Store, open_store
from tracegrad.trainer.engine import EngineProcess
from tracegrad.trainer.engine_client import EngineClient, Reload
from tracegrad.trainer.engine_errors import PublishFailed
from tracegrad.trainer.preflight import preflight
from tracegrad.trainer.probe import ProbeSequence, ProbeSet, mean_abs
from tracegrad.trainer.publish import Perturbed, Publisher, canary
from tracegrad.trainer.sender_process import SenderProcess
from tracegrad.trainer.transfer_client import MemorySender, Sender, TransferClient

pytestmark = pytest.mark.engine
SUPPORT = Path(__file__).parents[1] / "support"
PARITY = 1e-4
"""Mean |transformers - vLLM| in fp32; measured: 2e-7."""
Drawn = list[tuple[tuple[int, ...], int, tuple[float, ...]]]
"""Sampled sequences: ids, length of the prompt, recorded logprobs."""


@pytest.fixture(scope="module")
def other_weights(tiny_model: Path, tied_tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("other")
    return {
        "untied": tiny.perturbed(tiny_model, folder / "untied", scale=0.02),
        "tied": tiny.perturbed(tied_tiny_model, folder / "tied", scale=0.02),
    }


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    yield store
    store.close()


def as_version(version_id: int, path: Path) -> PolicyVersion:
    return PolicyVersion(
        version_id=version_id,
        model="tiny",
        kind="step",
        parent_id=None,
        checkpoint_path=str(path),
        checkpoint_hash=path.name,
        step=1,
        updates=1,
        line=version_id,
        job_id=None,
    )


def sampled(client: EngineClient, n: int = 24) -> Drawn:
    """(ids, n_prompt, recorded logprobs) of freshly sampled sequences: at least 512 sampled tokens for n = 24."""
    out = []
    for i, question in enumerate(digits_task.questions(n)):
        prompt = tuple(f"<turn>user\n{question.text}".encode()[:20])
        got = client.sample(prompt, max_tokens=24, temperature=1.0, seed=i, ignore_eos=True)
        out.append((prompt + got.token_ids, len(prompt), got.logprobs))
    return out


def reference(path: Path, drawn: Drawn) -> list[list[float]]:
    return tiny.reference_logprobs(path, [(ids, n) for ids, n, _ in drawn])


def flat(series: Any) -> list[float]:
    return [value for sequence in series for value in sequence]


def probe_of(drawn: Drawn, new: Path, previous: Path | None) -> ProbeSet:
    def series(path: Path) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(values) for values in reference(path, drawn))

    return ProbeSet(
        sequences=tuple(ProbeSequence(ids=ids, n_prompt=n) for ids, n, _ in drawn),
        new_logprobs=series(new),
        previous_logprobs=None if previous is None else series(previous),
    )


@dataclass(frozen=True)
class TiedStory:
    """An engine for the tied model, and what happened on the way to it (two starts tell three stories).

    It was first started as the manual says (`findings` is what the preflight said of it), then killed with -9; the
    watcher restarted it, by then rightly configured and with a live version in the store, in `restart_s` seconds.
    """

    process: EngineProcess
    findings: dict[str, str]
    other_name: list[str]
    restart_s: float
    version_after: str
    drawn_after: Drawn

    @property
    def client(self) -> EngineClient:
        return self.process.client


@pytest.fixture(scope="module")
def tied_engine(
    tied_tiny_model: Path, other_weights: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, new_port: Any
) -> Iterator[TiedStory]:
    folder = tmp_path_factory.mktemp("tied")
    ours = EngineConfig(
        url=f"http://127.0.0.1:{new_port()}",
        dtype="float32",
        max_model_len=512,
        log=str(folder / "engine.log"),
        transfer=TransferConfig(backend="memory"),
    )
    plain = ("--logprobs-mode", "raw_logprobs", "--max-model-len", "256", "--worker-extension-cls", "")
    manual = msgspec.structs.replace(
        ours, args=plain, env={"VLLM_SERVER_DEV_MODE": "0"}, transfer=TransferConfig(backend="files")
    )
    good = ModelConfig(checkpoint=str(tied_tiny_model), engine=ours)
    live: list[PolicyVersion] = []
    process = EngineProcess(
        "tiny",
        msgspec.structs.replace(good, engine=manual),
        live=lambda: live[-1] if live else None,
        say=print,
    )
    until = threading.Event()
    watcher = threading.Thread(target=process.watch, args=(until,))
    with process:
        findings = {f.code: f.add for f in preflight(process.client, good)}
        other_name = [f.code for f in preflight(EngineClient(ours.url, "main"), good)]
        live.append(as_version(41, other_weights["tied"]))
        process.model = good
        watcher.start()
        assert process.pid is not None
        killed = time.monotonic()
        os.kill(process.pid, signal.SIGKILL)
        while process.restarts == 0:
            assert watcher.is_alive()
            time.sleep(0.1)
        yield TiedStory(
            process=process,
            findings=findings,
            other_name=other_name,
            restart_s=time.monotonic() - killed,
            version_after=process.client.version(),
            drawn_after=sampled(process.client),
        )
        until.set()
        watcher.join()


class StockClient(EngineClient):
    """Swaps with vLLM's own `reload_weights`, as one would without our extension."""

    def reload(self, path: str, *, timeout_s: float = 120.0) -> Reload:
        self._rpc("reload_weights", {"weights_path": path}, timeout_s=timeout_s)
        return Reload(seconds=0.0, extension=False, tied=None, repacked=None)


@pytest.mark.parametrize("head", ["untied", "tied"])
def test_parity_before_and_after_a_reload(head: str, request: pytest.FixtureRequest, other_weights: Any) -> None:
    process = request.getfixturevalue("engine" if head == "untied" else "tied_engine").process
    base, other, client = Path(process.model.checkpoint), other_weights[head], process.client
    for path in (other, base):
        reload = client.reload(str(path))
        client.reset_prefix_cache()
        assert (reload.extension, reload.tied, reload.repacked) == (True, head == "tied", head == "tied")
        drawn = sampled(client)
        wanted = flat(reference(path, drawn))
        assert len(wanted) >= 512
        assert mean_abs(flat(recorded for _, _, recorded in drawn), wanted) < PARITY
        scores = flat(client.score_many([(ids, n) for ids, n, _ in drawn]))
        assert mean_abs(scores, wanted) < PARITY
        wrong = flat(reference(base if path == other else other, drawn))
        assert mean_abs(scores, wrong) > 100 * PARITY, "the two weights must be told apart by this test"
        print(f"{head}: reload {reload.seconds:.3f} s, parity {mean_abs(scores, wanted):.1e}")


def test_recorded_logprobs_know_the_temperature(engine: Any) -> None:
    """Sampled at T = 0.7, the recorded logprobs are those of softmax(logits / 0.7)."""
    import torch
    from transformers import AutoModelForCausalLM

    engine.reset()
    got = engine.process.client.sample((5, 6, 7), max_tokens=64, temperature=0.7, seed=1, ignore_eos=True)
    model = AutoModelForCausalLM.from_pretrained(engine.model_path, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, *got.token_ids]])
    with torch.no_grad():
        logprobs = (model(ids).logits[0, 2:-1] / 0.7).log_softmax(-1)
    wanted = logprobs.gather(-1, ids[0, 3:, None])[:, 0].tolist()
    assert mean_abs(got.logprobs, wanted) < PARITY


def test_publish_with_canary_then_a_step_then_equal_weights(
    engine: Any, other_weights: dict[str, Path], store: Store, tmp_path: Path
) -> None:
    engine.reset()
    base, client = engine.model_path, engine.process.client
    publisher = Publisher(store, "tiny", [client], PublishConfig(probe_bound=PARITY))
    drawn = sampled(client)
    first = add_version(store, base)

    def make_perturbed(probe: ProbeSet) -> Perturbed:
        path = tiny.perturbed(base, tmp_path / "canary", seed=9, scale=0.05)
        logprobs = tiny.reference_logprobs(path, [(s.ids, s.n_prompt) for s in probe.sequences])
        return Perturbed(
            checkpoint_path=str(path), checkpoint_hash="canary", logprobs=tuple(tuple(v) for v in logprobs)
        )

    report = canary(publisher, first.version_id, probe_of(drawn, base, None), make_perturbed)
    assert report.canary is not None
    assert report.canary.verdict == "new"
    step = add_version(store, other_weights["untied"], 1)
    report = publisher.publish(step.version_id, probe_of(drawn, other_weights["untied"], base))
    assert report.probe is not None
    assert (report.probe.verdict, report.probe.mean_abs_new < PARITY) == ("new", True)
    assert client.version() == str(step.version_id)
    print(f"publish: {report.as_json()}")
    again = add_version(store, other_weights["untied"], 2)
    same = publisher.publish(again.version_id, probe_of(drawn, other_weights["untied"], other_weights["untied"]))
    assert same.probe is not None
    assert same.probe.verdict == "unresolved"


def test_a_stock_reload_of_a_tied_head_is_caught_as_stale(
    tied_engine: TiedStory, tied_tiny_model: Path, store: Store, tmp_path: Path
) -> None:
    client = EngineClient(tied_engine.client.url, "tiny")
    client.reload(str(tied_tiny_model))
    drawn = sampled(client)
    first = add_version(store, tied_tiny_model)
    publisher = Publisher(store, "tiny", [client], PublishConfig())
    publisher.publish(first.version_id, probe_of(drawn, tied_tiny_model, None))
    # a step as small as a real one: well inside the bound, so that only the missing share gives it away
    small = tiny.perturbed(tied_tiny_model, tmp_path / "small", seed=3, scale=0.001)
    step = add_version(store, small, 1)
    publisher.fleet = publisher.fleet.of([StockClient(client.url, "tiny")])
    with pytest.raises(PublishFailed, match="stale") as caught:
        publisher.publish(step.version_id, probe_of(drawn, small, tied_tiny_model))
    seen = caught.value.probe
    print(f"stock reload of a tied head: {seen.as_json()}")
    assert seen.mean_abs_new < 0.05
    last, live = store.last_publish("tiny"), store.live_version("tiny")
    assert last is not None
    assert live is not None
    assert (last.state, live.version_id) == ("failed", first.version_id)
    publisher.fleet = publisher.fleet.of([client])
    publisher.publish(step.version_id, probe_of(drawn, small, tied_tiny_model))
    assert client.version() == str(step.version_id)


def misshapen(source: Path, target: Path) -> Path:
    """A copy of a checkpoint in which one tensor in the middle is of another shape: loading it breaks off there."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    name = next(name for name in tensors if "layers.1" in name and "k_proj" in name)
    tensors[name] = tensors[name].reshape(-1, 2 * tensors[name].shape[1]).contiguous()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("way", ["files", "memory", "vllm's own client"])
def test_weights_that_are_sent_are_served_and_half_of_them_never(
    way: str, tied_engine: TiedStory, other_weights: dict[str, Path], store: Store, tmp_path: Path
) -> None:
    """A tied head follows, the probe sees it; an update that breaks off is put back, whole. The same by every way."""
    sender: Sender = MemorySender()
    if way == "vllm's own client":
        wrapper = tmp_path / "python"
        wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {SUPPORT / "cpu_sender.py"} "$@"\n')
        wrapper.chmod(0o755)
        sender = SenderProcess(TransferConfig(backend="ipc", python=str(wrapper)), device="cpu")
    client = TransferClient(tied_engine.client.url, "tiny", "memory", sender)
    if way == "files":
        client = EngineClient(client.url, "tiny")  # type: ignore[assignment]
    base, other = Path(tied_engine.process.model.checkpoint), other_weights["tied"]
    publisher = Publisher(store, "tiny", [client], PublishConfig(probe_bound=PARITY))
    EngineClient(client.url, "tiny").reload(str(other))
    drawn = sampled(client)
    publisher.publish(add_version(store, base).version_id, probe_of(drawn, base, other))
    broken = add_version(store, misshapen(other, tmp_path / "broken"), 1)
    with pytest.raises(PublishFailed, match=r"exceeds dimension size|size of tensor") as caught:
        publisher.publish(broken.version_id, probe_of(drawn, other, base))
    assert "is back" in str(caught.value)
    assert mean_abs(flat(client.score_many([(ids, n) for ids, n, _ in drawn])), flat(reference(base, drawn))) < PARITY
    report = publisher.publish(add_version(store, other, 2).version_id, probe_of(drawn, other, base))
    assert report.probe is not None
    assert (report.probe.verdict, report.probe.mean_abs_new < PARITY) == ("new", True)


def test_rollback_brings_back_what_the_engine_served_before(
    engine: Any, other_weights: dict[str, Path], store: Store, tmp_path: Path
) -> None:
    """By command, as an operator would: the older weights sample again, the newer version is abandoned."""
    engine.reset()
    client, paths = engine.process.client, (engine.model_path, other_weights["untied"])
    publisher = Publisher(store, "tiny", [client], PublishConfig(probe_bound=PARITY))
    first, second = (add_version(store, path, step).version_id for step, path in enumerate(paths))
    for version in (first, second):
        publisher.publish(version)
    before = sampled(client, 4)
    assert mean_abs(flat(r for _, _, r in before), flat(reference(paths[1], before))) < PARITY
    config = tmp_path / "tracegrad.yaml"
    served = {"checkpoint": str(paths[0]), "engine": {"url": client.url, "external": True, "dtype": "float32"}}
    settings = {"store": f"sqlite:///{tmp_path}/store.db", "models": {"tiny": served}, "roles": {"*": "tiny"}}
    config.write_text(yaml.safe_dump({**settings, "trainer": {"model": "tiny"}}))

    def tracegrad(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tracegrad.adapters.cli", *words, "--config", str(config)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = tracegrad("rollback", str(first))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"version {first} is live again; abandoned: {second}\n"
    assert client.version() == str(first)
    after = sampled(client, 4)
    assert mean_abs(flat(r for _, _, r in after), flat(reference(paths[0], after))) < PARITY
    rows = json.loads(tracegrad("versions", "--json").stdout)
    assert [(row["version_id"], row["live"], row["abandoned"]) for row in rows] == [
        (first, True, False),
        (second, False, True),
    ]
    again = tracegrad("rollback", str(first))
    assert (again.returncode, "live already" in again.stderr) == (1, True)


def test_the_preflight_passes_on_ours(engine: Any, tied_engine: TiedStory) -> None:
    engine.reset()
    assert preflight(engine.process.client, engine.process.model) == []
    assert preflight(tied_engine.client, tied_engine.process.model) == []
    info = tied_engine.client.extension_info()
    assert info is not None
    assert info["products"], "vLLM did not load our plugin in its worker"


def test_the_preflight_names_what_an_engine_started_by_the_manual_lacks(tied_engine: TiedStory) -> None:
    found = tied_engine.findings
    assert set(found) == {"max_model_len", "dev_mode", "tied_head", "logprobs_mode"}
    assert found["max_model_len"] == "--max-model-len 512"
    assert "VLLM_SERVER_DEV_MODE=1" in found["dev_mode"]
    assert "--worker-extension-cls" in found["tied_head"]
    assert found["logprobs_mode"] == "--logprobs-mode processed_logprobs"
    assert tied_engine.other_name == ["model"]


def test_a_killed_engine_comes_back_on_the_live_version(tied_engine: TiedStory, other_weights: dict[str, Path]) -> None:
    print(f"restart: {tied_engine.restart_s:.1f} s")
    assert tied_engine.process.restarts == 1
    assert tied_engine.version_after == "41"
    drawn = tied_engine.drawn_after
    assert mean_abs(flat(r for _, _, r in drawn), flat(reference(other_weights["tied"], drawn))) < PARITY
