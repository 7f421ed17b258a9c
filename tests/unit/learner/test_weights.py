"""What a checkpoint holds: weights that stock transformers loads, exactly rounded; state that goes on exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tracegrad.trainer.errors import CheckpointError, UnsupportedModel
from tracegrad.trainer.evaluation import choose_probe
from tracegrad.trainer.learner import Learner
from tracegrad.trainer.results import Scored
from tracegrad.trainer.samples import ChoiceSample, Turn
from tracegrad.trainer.tensor_files import write_tensors

SEQUENCE = Scored(ids=(3, 4, 5, 9, 11, 7), n_prompt=2, logprobs=())


def test_a_tensor_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(15.0).reshape(3, 5).t(),
        "a": torch.tensor([1.00390625, -2.0]),
        "empty": torch.zeros(0),
        "scalar": torch.tensor(3, dtype=torch.int64),
    }
    write_tensors(tmp_path / "t.safetensors", tensors)
    read = load_file(tmp_path / "t.safetensors")
    assert {name: (t.dtype, t.tolist()) for name, t in read.items()} == {
        name: (t.dtype, t.tolist()) for name, t in tensors.items()
    }
    write_tensors(tmp_path / "h.safetensors", {"a": tensors["a"]}, torch.bfloat16)
    # bfloat16 has 8 significant bits: 1.00390625 = 1 + 2^-8 is half-way and rounds to even, 1.0
    assert load_file(tmp_path / "h.safetensors")["a"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize("head", ["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_serving_weights_are_the_rounded_masters_and_load_as_they_are(
    configure: Callable[..., Any], request: pytest.FixtureRequest, tmp_path: Path, head: str, dtype: str
) -> None:
    base = request.getfixturevalue("tied_llama" if head == "tied" else "llama")
    made = Learner(configure(base=base, dtype=dtype, precision="fp32" if dtype == "float32" else "bf16"))
    folder = Path(made.create(str(tmp_path / "root")).path)
    wanted = getattr(torch, dtype)
    stored = load_file(folder / "model.safetensors")
    masters = made.policy.lm_state()
    assert stored.keys() == masters.keys()
    assert ("lm_head.weight" in stored) is (head == "untied")
    assert all(stored[n].dtype == wanted and torch.equal(stored[n], m.to(wanted)) for n, m in masters.items())
    assert (folder / "trainer_state" / "masters.safetensors").exists() is (dtype != "float32")
    assert [p.name for p in folder.glob("*.safetensors")] == ["model.safetensors"], "vLLM loads all that lie here"
    assert (folder / "tokenizer_config.json").exists()

    stock = AutoModelForCausalLM.from_pretrained(folder)
    assert stock.dtype == wanted
    logits = stock.float()(torch.tensor([SEQUENCE.ids])).logits[0]
    own = torch.log_softmax(logits, -1)[range(1, 5), SEQUENCE.ids[2:]]
    assert made.score([SEQUENCE])[0].logprobs == pytest.approx(own.tolist(), abs=1e-5 if dtype == "float32" else 0.05)


def test_bf16_masters_survive_the_folder_bitwise(configure: Callable[..., Any], tmp_path: Path) -> None:
    config = configure(dtype="bfloat16", precision="bf16")
    made = Learner(config)
    made.create(str(tmp_path / "root"))
    with torch.no_grad():
        for parameter in made.policy.lm_masters().values():
            parameter.add_(1e-5)
    made.policy.refresh()
    saved = made.save(str(tmp_path / "root"), 1).checkpoint
    other = Learner(config)
    other.load(saved.path, saved.hash)
    mine, theirs = made.policy.lm_state(), other.policy.lm_state()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(not torch.equal(t, t.bfloat16().float()) for t in theirs.values()), "the masters are finer than bf16"


def test_corruption_is_caught_at_load(configure: Callable[..., Any], tmp_path: Path) -> None:
    made = Learner(configure())
    checkpoint = made.create(str(tmp_path / "root"))
    file = Path(checkpoint.path) / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        made.load(checkpoint.path, checkpoint.hash)


def test_a_base_with_other_tensor_names_is_refused(configure: Callable[..., Any], llama: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    for name in ("config.json", "generation_config.json"):
        (renamed / name).write_bytes((llama / name).read_bytes())
    tensors = load_file(llama / "model.safetensors")
    save_file(
        {n.replace("lm_head", "head"): t for n, t in tensors.items()}, renamed / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight"):
        Learner(configure(base=renamed)).create(str(tmp_path / "root"))


def test_the_probe_is_scored_before_and_after(learner: Callable[..., Learner], tmp_path: Path) -> None:
    import recorded_runs as recorded

    from tracegrad.tracestore.records import BatchPlan
    from tracegrad.trainer.samples import build_batch

    made = learner()
    traces = recorded.traces_of(recorded.recorded_groups(3, score=made.score, temperature=0.7))
    samples = build_batch(traces, recorded.RULE)
    plan = BatchPlan(step=1, epoch=0, seed=0, run_ids=("r",))
    chains = [_plain(chain) for chain in choose_probe(samples.choices, 10, made._max_model_len - 1)]
    before = {s.ids: s.logprobs for s in made.score(chains)}
    made.step(plan, samples, version_id=1, probe_tokens=10)
    saved = made.save(str(tmp_path / "root"), 1)
    after = {s.ids: s.logprobs for s in made.score(chains)}
    tokens = sum(len(s.logprobs) for s in saved.new)
    assert 10 <= tokens < samples.n_trained_tokens
    assert [s.ids for s in saved.new] == [chain.ids for chain in chains]
    for series, known in ((saved.previous, before), (saved.new, after)):
        assert all(s.logprobs == pytest.approx(known[s.ids], abs=1e-5) for s in series)
    assert saved.previous != saved.new


def test_a_probe_chains_the_distinct_answers_to_a_prompt() -> None:
    def choice(prompt: tuple[int, ...], answer: tuple[int, ...]) -> ChoiceSample:
        return ChoiceSample(
            run_id="r",
            group_id=None,
            task_id=None,
            call_id="c",
            choice_index=0,
            role=None,
            turn=Turn(),
            prompt_ids=prompt,
            token_ids=answer,
            behaviour_logprobs=(-1.0,) * len(answer),
            temperature=0.7,
            finish_reason="stop",
            version_id=1,
        )

    choices = [choice((1, 2, 3, 4), a) for a in ((5, 6), (7,), (5, 6), (8, 9, 9))] + [choice((1,), (2, 3, 4))]
    (shortest,) = choose_probe(choices, 3, 99)
    assert (shortest.prompt_ids, shortest.token_ids, shortest.temperature) == ((1,), (2, 3, 4), 1.0)
    _, chain = choose_probe(choices, 4, 99)
    assert (chain.prompt_ids, chain.token_ids) == ((1, 2, 3, 4), (5, 6, 7, 8, 9, 9))
    _, bounded = choose_probe(choices, 4, 7)
    assert bounded.token_ids == (5, 6, 7), "a chain must fit into the engine's context"


def _plain(choice: Any) -> Scored:
    return Scored(ids=choice.prompt_ids + choice.token_ids, n_prompt=len(choice.prompt_ids), logprobs=())


def test_the_canary_is_visible_and_leaves_no_trace(learner: Callable[..., Learner], tmp_path: Path) -> None:
    made = learner()
    before = {name: tensor.clone() for name, tensor in made.policy.lm_state().items()}
    sequences = made.probe_sequences(64, seed=1)
    assert sum(len(s.logprobs) for s in sequences) >= 64
    assert made.probe_sequences(64, seed=1) == sequences
    saved = made.perturbed(str(tmp_path / "canary"), 0.4, sequences, seed=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.policy.lm_state().items())
    assert saved.previous == sequences
    pairs = [p for n, o in zip(saved.new, sequences, strict=True) for p in zip(n.logprobs, o.logprobs, strict=True)]
    assert sum(abs(a - b) for a, b in pairs) / len(pairs) >= 0.4
    stored = load_file(Path(saved.checkpoint.path) / "model.safetensors")
    changed = [name for name, tensor in stored.items() if not torch.equal(tensor, before[name])]
    assert "lm_head.weight" in changed
