"""The loop with an engine behind HTTP that loads and scores real folders: publish, probe, canary, and what fails."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import recorded_runs as recorded
from in_process import InProcess
from llama_engine import LlamaEngine
from versions import add_version

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.rules import ANY_STALENESS, lease_rule
from tracegrad.tracestore.store import Store
from tracegrad.trainer.controller import Controller, Surroundings
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.errors import EngineError, PublishError
from tracegrad.trainer.job_folder import JobFolder
from tracegrad.trainer.metrics import Console

PUBLISH = {"probe_tokens": 16, "probe_bound": 0.001, "drain_timeout_s": 5.0, "swap_timeout_s": 5.0}


@pytest.fixture
def config(configure: Callable[..., Config]) -> Config:
    return configure(steps=2, publish=PUBLISH, keep_checkpoints=1)


class Generates(InProcess):
    """Workers beside which traffic goes on: before each step the live version samples four groups."""

    def __init__(self, config: Config, store: Store) -> None:
        super().__init__(config)
        self.store, self.seed = store, len(store.list_runs())

    def traffic(self) -> None:
        live = self.store.live_version(recorded.MODEL)
        assert live is not None
        self.seed += 1
        recorded.fill(
            self.store,
            recorded.recorded_groups(2, score=self.score, version_id=live.version_id, seed=self.seed),
        )


def run(
    config: Config, store: Store, engine: LlamaEngine, workers: InProcess, phases: list[tuple[str, int]] | None = None
) -> list[str]:
    said: list[str] = []

    def echo(text: str) -> None:
        said.append(text)
        if " waits for runs" in text:
            workers.traffic()  # type: ignore[attr-defined]

    with JobFolder(config.trainer).held() as folder:
        around = Surroundings(
            store=store,
            workers=workers,
            folder=folder,
            console=Console(echo, steps=config.trainer.steps, as_json=False),
            engines={recorded.MODEL: [EngineClient(engine.url, recorded.MODEL)]},
            phase=lambda phase, step: None if phases is None else phases.append((phase, step)),
        )
        Controller(config, around).run()
    return said


def publishes(store: Store) -> list[tuple[str, int]]:
    last = store.last_publish(recorded.MODEL)
    return [] if last is None else [(last.state, store.get_version(last.version_id).step)]


def test_every_step_goes_live_proven(config: Config, store: Store, engine: LlamaEngine) -> None:
    phases: list[tuple[str, int]] = []
    said = run(config, store, engine, Generates(config, store), phases)
    assert phases == [("loading", 0), *((phase, n) for n in (1, 2) for phase in ("waiting", "training", "publishing"))]
    assert said[1] == f"proving the engines of {recorded.MODEL}: perturbed weights first, then version 1"
    assert said[2].startswith("version 1 is live")
    assert publishes(store) == [("live", 2)]
    last = store.last_publish(recorded.MODEL)
    assert last is not None
    assert last.probe is not None
    assert last.probe["result"]["verdict"] == "new"
    assert last.probe["result"]["n_tokens"] >= 16
    live = store.live_version(recorded.MODEL)
    assert live is not None
    assert engine.version == str(live.version_id)
    loaded = [name.split("-")[1] for name in engine.loaded]
    assert loaded == ["000000", "000000", "000001", "000002"], "canary, initial, two steps"
    kinds = [v.kind for v in store.list_versions(recorded.MODEL)]
    assert kinds == ["initial", "canary", "step", "step"]
    assert not (Path(config.trainer.output) / "test" / "canary").exists()
    metrics = (Path(config.trainer.output) / "test" / "metrics.jsonl").read_text()
    assert metrics.count('"verdict": "new"') == 2
    line = json.loads(metrics.splitlines()[-1])
    assert line["publish"]["paused_s"] == last.paused_s > 0
    period_s = line["seconds"]["wait"] + line["seconds"]["total"]
    assert line["engine_paused_share"] == last.paused_s / period_s
    assert line["fresh_wait_share"] == line["seconds"]["wait"] / period_s
    assert store.last_checkpoint("test").metrics["logprob_abs_diff"] < 1e-4  # type: ignore[union-attr]


def test_an_engine_that_keeps_its_weights_is_caught_by_the_canary(
    config: Config, store: Store, engine: LlamaEngine
) -> None:
    engine.ignore_reload = True
    with pytest.raises(PublishError, match="canary"):
        run(config, store, engine, Generates(config, store))
    assert publishes(store) == [("failed", 0)]


def test_a_failed_publish_stops_and_the_last_good_version_serves_on(
    config: Config, store: Store, engine: LlamaEngine
) -> None:
    class Breaks(Generates):
        def save(self, root: str, step: int) -> Any:
            if step == 2:
                engine.fail_reloads = 1
            return super().save(root, step)

    with pytest.raises((PublishError, EngineError), match="out of memory"):
        run(config, store, engine, Breaks(config, store))
    live = store.live_version(recorded.MODEL)
    assert live is not None
    assert (live.step, engine.version) == (1, str(live.version_id))
    assert store.last_checkpoint("test").step == 2  # type: ignore[union-attr]
    assert "out of memory" in (Path(config.trainer.output) / "test" / "metrics.jsonl").read_text()
    run(config, store, engine, Generates(config, store))
    assert publishes(store) == [("live", 2)], "the next start publishes what was committed"
    folders = sorted(p.name[:11] for p in (Path(config.trainer.output) / "test" / "checkpoints").iterdir())
    assert folders == ["step-000000", "step-000001", "step-000002"]


def test_a_death_inside_a_publish_is_ended_by_the_next_start(
    config: Config, store: Store, engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dies(Exception):
        pass

    def die(self: Controller, state: str) -> None:
        if state == "swapping" and self._step == 1:
            raise Dies

    with monkeypatch.context() as patched:
        patched.setattr(Controller, "_on_publish_state", die)
        with pytest.raises(Dies):
            run(config, store, engine, Generates(config, store))
    assert publishes(store) == [("swapping", 1)]
    said = run(config, store, engine, Generates(config, store))
    assert any("had not finished" in line for line in said)
    assert publishes(store) == [("live", 2)]
    assert [v.step for v in store.list_versions(recorded.MODEL) if v.kind == "step"] == [1, 2]


@pytest.mark.parametrize("left_in", ["draining", "swapping"])
def test_a_trainer_that_dies_while_it_loads_has_ended_what_another_left(
    configure: Callable[..., Config], store: Store, engine: LlamaEngine, left_in: str
) -> None:
    """Calls are held for it; what was swapped is put back from its folder, which needs no weights of ours."""

    class Dies(Exception):
        pass

    class CannotLoad(Generates):
        def load(self, path: str, expected_hash: str | None = None) -> int:
            raise Dies

    config = configure(steps=0, publish=PUBLISH)
    run(config, store, engine, Generates(config, store))
    live = store.live_version(recorded.MODEL)
    assert live is not None
    left = store.request_publish(add_version(store, "/gone", 1, model=recorded.MODEL).version_id)
    for state in ("draining", "swapping")[: 1 + (left_in == "swapping")]:
        store.advance_publish(left.publish_id, state)  # type: ignore[arg-type]
    engine.loaded.clear()
    with pytest.raises(Dies):
        run(config, store, engine, CannotLoad(config, store))
    assert (publishes(store), engine.version) == ([("failed", 1)], str(live.version_id))
    assert len(engine.loaded) == (left_in == "swapping"), "nothing had been swapped"


@pytest.mark.parametrize("case", [(0, False), (1, False), (0, True)], ids=["all", "half", "rolled back"])
def test_what_became_too_stale_since_the_lease_is_returned_or_left_out_with_a_count(
    config: Config, configure: Callable[..., Config], store: Store, engine: LlamaEngine, case: tuple[int, bool]
) -> None:
    """A trainer dies after leasing; the next one has a stricter bound. Step 2 is live, step 0 sampled the old runs, or
    weights of a later step that were rolled back to step 0."""
    fresh_groups, rolled_back = case
    worker = Generates(config, store)
    run(config, store, engine, worker)
    old, *_, live = store.list_versions(recorded.MODEL)
    if rolled_back:
        old = add_version(store, "/gone", 2, model=recorded.MODEL, parent_id=old.version_id)
        store.abandon_version(old.version_id)
    for version, count, seed in ((old, 2 - fresh_groups, 50), (live, fresh_groups, 51)):
        recorded.fill(
            store, recorded.recorded_groups(count, score=worker.score, version_id=version.version_id, seed=seed)
        )
    lax = replace(lease_rule(config), max_staleness=ANY_STALENESS)
    assert store.lease("test", lax, groups=2, lease_s=60.0, step=3, epoch=0, seed=1) is not None
    said = run(configure(steps=3, publish=PUBLISH, keep_checkpoints=1), store, engine, Generates(config, store))
    expected = "4 of 8 runs became too stale since they were leased and are left out"
    if not fresh_groups:
        expected = "8 of 8 runs became too stale since they were leased and are returned"
    assert any(expected in line for line in said)
    metrics = store.last_checkpoint("test").metrics  # type: ignore[union-attr]
    assert (metrics["step"], metrics["runs_stale"]) == (3, 4 * fresh_groups)
    report = store.consumption("test")
    assert report.excluded["too stale"] > 0
    assert report.stored == report.trained + sum(report.excluded.values())
    assert ("too stale" in metrics["tokens_excluded"]) == bool(fresh_groups)
