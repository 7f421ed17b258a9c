"""The preflight against an engine with one fault at a time: each is named with what to add."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, save_weight

from tracegrad.tracestore.config import EngineConfig, ModelConfig, TransferConfig
from tracegrad.trainer.engine_client import EngineClient, Sampled
from tracegrad.trainer.engine_errors import EngineNotReady, EngineRefused, EngineUnreachable
from tracegrad.trainer.preflight import _defaults, check, preflight, tied_head


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeEngine]:
    with FakeEngine(save_weight(tmp_path / "w", 1.5, tied=True)) as engine:
        yield engine


def findings(fake: FakeEngine, name: str = "main", *, in_flight: bool = False) -> dict[str, str]:
    model = ModelConfig(checkpoint=fake.root, engine=EngineConfig(url=fake.url, max_model_len=64))
    return {f.code: f.add for f in preflight(EngineClient(fake.url, name), model, in_flight=in_flight)}


def test_a_good_engine_has_no_findings(fake: FakeEngine) -> None:
    assert findings(fake, in_flight=True) == {}


def test_calls_go_on_through_publishes_only_where_versions_are_told(fake: FakeEngine) -> None:
    fake.tells_versions = False
    assert findings(fake) == {}
    (add,) = findings(fake, in_flight=True).values()
    assert "--middleware tracegrad.trainer.engine_spans.TracegradSpans" in add


@pytest.mark.parametrize(
    ("fault", "value", "code", "add"),
    [
        ("dev_mode", False, "dev_mode", "VLLM_SERVER_DEV_MODE=1"),
        ("extension", False, "tied_head", "--worker-extension-cls"),
        ("token_ids", False, "token_ids", "newer vLLM"),
        ("processed", False, "logprobs_mode", "--logprobs-mode processed_logprobs"),
        ("default_top_k", 3, "generation_config", "--generation-config vllm"),
        ("default_temperature", 0.6, "generation_config", "--generation-config vllm"),
        ("max_model_len", 63, "max_model_len", "--max-model-len 64"),
    ],
)
def test_each_fault_is_named_with_what_to_add(fake: FakeEngine, fault: str, value: object, code: str, add: str) -> None:
    assert hasattr(fake, fault)
    setattr(fake, fault, value)
    found = findings(fake)
    assert add in found.pop(code)
    assert set(found) <= {"tied_head"}


def test_rounding_is_not_taken_for_other_sampling(fake: FakeEngine) -> None:
    """And other sampling is seen through it."""
    client = EngineClient(fake.url, "main")
    fake.rounding = 0.09
    assert [_defaults(client, {"seed": seed}, 64) for seed in range(20)] == [[]] * 20
    fake.default_temperature = 0.9
    assert [len(_defaults(client, {"seed": seed}, 64)) for seed in range(5)] == [1] * 5
    fake.default_temperature, fake.default_top_k = 1.0, 5
    assert [len(_defaults(client, {"seed": seed}, 64)) for seed in range(5)] == [1] * 5


class Simulated:
    """An engine of 400 tokens, flat here and peaked there, that leaves `top_k` of them and rounds."""

    def __init__(self, top_k: int, rounding: float, seed: int) -> None:
        self._top_k, self._rounding, self._rng = top_k, rounding, random.Random(seed)
        self._own: list[dict[int, float]] = []

    def sample(self, ids: Sequence[int], *, max_tokens: int, top: int, **_: Any) -> Sampled:
        tokens, logprobs, tops = [], [], []
        for _place in range(max_tokens):
            spread = self._rng.uniform(0.5, 5.0)
            row = normalised([self._rng.gauss(0.0, spread) for _token in range(400)])
            likeliest = sorted(range(400), key=lambda token, row=row: -row[token])
            left = likeliest[: self._top_k]
            masked = dict(zip(left, normalised([row[token] for token in left]), strict=True))
            (token,) = self._rng.choices(left, [math.exp(masked[each]) for each in left])
            told = {each: masked[each] + self._rng.gauss(0.0, self._rounding) for each in {*left[:top], token}}
            tokens.append(token)
            logprobs.append(told[token])
            tops.append(told)
            self._own.append({each: row[each] for each in {*likeliest[:top], token}})
        return Sampled(token_ids=tuple(tokens), logprobs=tuple(logprobs), top=tuple(tops))

    def score_top(self, ids: Sequence[int], n_prompt: int, top: int) -> Sequence[Mapping[int, float]]:
        return self._own


def normalised(row: Sequence[float]) -> list[float]:
    total = math.log(math.fsum(map(math.exp, row)))
    return [value - total for value in row]


@pytest.mark.parametrize("rounding", [0.0, 0.03, 0.08])
@pytest.mark.parametrize(("top_k", "found"), [(400, 0), (20, 1), (50, 1)])
def test_a_mask_that_removes_none_of_the_likeliest_is_found(top_k: int, found: int, rounding: float) -> None:
    engines: list[Any] = [Simulated(top_k, rounding, seed) for seed in range(8)]
    assert [len(_defaults(each, {}, 2048)) for each in engines] == [found] * 8


def test_an_engine_that_was_not_started_to_be_sent_weights_is_named(fake: FakeEngine) -> None:
    by_nccl = EngineConfig(url=fake.url, max_model_len=64, transfer=TransferConfig(backend="nccl"))
    model = ModelConfig(checkpoint=fake.root, engine=by_nccl)
    for started, said in (("", "from files only"), ("tracegrad", "by memory")):
        fake.transfer_backend = started
        (found,) = preflight(EngineClient(fake.url, "main"), model)
        assert (found.code, said in found.what) == ("transfer", True)
        assert """--weight-transfer-config '{"backend": "nccl"}'""" in found.add
    fake.transfer_backend = "nccl"
    assert preflight(EngineClient(fake.url, "main"), model) == []


def test_an_untied_head_needs_no_extension(fake: FakeEngine) -> None:
    save_weight(Path(fake.root), 1.5, tied=False)
    fake.extension = False
    assert findings(fake) == {}


def test_another_name_is_the_only_thing_said(fake: FakeEngine) -> None:
    assert findings(fake, "other") == {"model": "--served-model-name other"}


def test_several_faults_are_named_at_once_and_stop_the_training(fake: FakeEngine) -> None:
    fake.dev_mode = fake.processed = False
    model = ModelConfig(checkpoint=fake.root, engine=EngineConfig(url=fake.url, max_model_len=64))
    with pytest.raises(EngineNotReady, match=r"VLLM_SERVER_DEV_MODE=1") as caught:
        check(EngineClient(fake.url, "main"), model)
    assert [f.code for f in caught.value.findings] == ["dev_mode", "tied_head", "logprobs_mode"]


def test_an_engine_that_is_down_is_one_finding(fake: FakeEngine) -> None:
    fake.close()
    assert list(findings(fake)) == ["health"]


def test_where_the_head_is_tied(tmp_path: Path) -> None:
    assert not tied_head(str(save_weight(tmp_path / "a", 1.0, tied=False)))
    (tmp_path / "a" / "config.json").write_text('{"text_config": {"tie_word_embeddings": true}}')
    assert tied_head(str(tmp_path / "a"))
    assert tied_head("a/remote-name")


def test_the_client_says_what_is_wrong(fake: FakeEngine) -> None:
    client = EngineClient(fake.url, "main", timeout_s=2)
    with pytest.raises(EngineRefused, match="at least one prompt token"):
        client.score([1, 2], 0)
    with pytest.raises(EngineRefused, match="400: longer than the maximum"):
        client.score([1] * 64, 1)
    fake.dev_mode = False
    with pytest.raises(EngineRefused, match="VLLM_SERVER_DEV_MODE=1") as caught:
        client.version()
    assert caught.value.status == 404
    fake.close()
    with pytest.raises(EngineUnreachable, match="ConnectionRefusedError"):
        client.models()
    with pytest.raises(EngineRefused, match="http://host:port"):
        EngineClient("localhost:8000", "main")


def test_scores_are_batched_and_in_order(fake: FakeEngine) -> None:
    client = EngineClient(fake.url, "main")
    sequences = [(tuple((i + j) % 11 for j in range(10)), 3) for i in range(20)]
    scores = client.score_many(sequences)
    assert fake.events.count("v1/completions") == 2
    assert scores == [client.score(*sequence) for sequence in sequences]
