"""The step learns, normalises globally, repeats bitwise, and refuses what it must with the weights unchanged."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import recorded_runs as recorded
import torch
from safetensors.torch import load_file, save_file

from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.records import BatchPlan
from tracegrad.trainer.batches import PackedRow
from tracegrad.trainer.credit import token_starts
from tracegrad.trainer.errors import StepRefused
from tracegrad.trainer.evaluation import Before
from tracegrad.trainer.learner import Learner
from tracegrad.trainer.policy import EdgeOutputs
from tracegrad.trainer.results import Scored, StepResult
from tracegrad.trainer.samples import Samples, build_batch

MakeLearner = Callable[..., Learner]
GROUP = {"algorithm": {"credit": {"advantage": "grpo"}}}


def samples_of(learner: Learner, groups: int = 3, **kwargs: Any) -> tuple[BatchPlan, Samples]:
    traces = recorded.traces_of(recorded.recorded_groups(groups, score=learner.score, **kwargs))
    plan = BatchPlan(step=1, epoch=0, seed=5, run_ids=tuple(trace.run.run_id for trace in traces))
    return plan, build_batch(traces, recorded.RULE)


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    state = {**learner.policy.lm_state(), **learner.policy.value_state()}
    return {name: tensor.clone() for name, tensor in state.items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def apply(learner: Learner, plan: BatchPlan, samples: Samples, **kwargs: Any) -> StepResult:
    return learner.step(plan, samples, **{"version_id": 1, **kwargs})


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_a_bandit_is_learned(learner: MakeLearner, advantage: str) -> None:
    """On-policy: sample a token, reward the lucky one. By chance 1/24; after 25 steps it must exceed 3/4."""
    made = learner(algorithm={"credit": {"advantage": advantage}}, optimizer={"lr": 5e-3, "critic_lr": 5e-2})
    before, after = pull(made, steps=25)
    assert before < 0.1 and after > 0.75


def test_an_adapter_learns_a_bandit(configure: Callable[..., Config], llama: Path, tmp_path: Path) -> None:
    """Its base's head stays as it is, so it is given one that can say something aloud: a random one cannot."""
    base = tmp_path / "loud"
    shutil.copytree(llama, base)
    state = load_file(base / "model.safetensors")
    save_file({**state, "lm_head.weight": 20 * state["lm_head.weight"]}, base / "model.safetensors", {"format": "pt"})
    raw = msgspec.to_builtins(configure(optimizer={"lr": 1e-2}, **GROUP))
    raw["models"] = {
        "base": {"checkpoint": str(base), "trained": False, "engine": {"dtype": "float32"}},
        recorded.MODEL: {"adapter": {"of": "base", "rank": 4}},
    }
    made = Learner(parse_config(raw), recorded.MODEL)
    made.start()
    before, after = pull(made, steps=12)
    assert before < 0.25 and after > 0.75


def pull(made: Learner, *, steps: int) -> tuple[float, float]:
    """Let a learner play; return the probability of the lucky token before and after."""
    prompt = (3, 4, 5)
    generator = torch.Generator().manual_seed(0)

    def probability() -> float:
        lucky = Scored(ids=(*prompt, recorded.LUCKY), n_prompt=3, logprobs=())
        return float(np.exp(made.score([lucky])[0].logprobs[0]))

    before = probability()
    for step in range(1, steps + 1):
        with torch.no_grad():
            logits = made.policy.lm(input_ids=torch.tensor([prompt])).logits[0, -1]
        drawn = torch.multinomial(torch.softmax(logits, -1), 48, replacement=True, generator=generator).tolist()
        answers = made.score([Scored(ids=(*prompt, token), n_prompt=3, logprobs=()) for token in drawn])
        traces = []
        for member, (token, answer) in enumerate(zip(drawn, answers, strict=True)):
            draft = recorded.bandit_trace(f"s{step}", member, answer, reward=float(token == recorded.LUCKY))
            traces.append(draft)
        samples = build_batch(traces, recorded.RULE)
        apply(made, BatchPlan(step=step, epoch=0, seed=step, run_ids=("r",)), samples)
    return before, probability()


def test_lr_zero_changes_no_bit_and_ratios_stay_one(learner: MakeLearner) -> None:
    made = learner(optimizer={"lr": 0.0, "critic_lr": 0.0, "epochs": 3, "minibatches": 2}, **GROUP)
    before = weights(made)
    plan, samples = samples_of(made)
    metrics = apply(made, plan, samples).metrics
    assert equal(before, weights(made))
    assert metrics["updates"] == 6
    assert metrics["ratio_max"] == pytest.approx(1.0, abs=1e-3)
    assert metrics["logprob_abs_diff"] < 1e-5


def test_temperature_is_the_effective_one(learner: MakeLearner) -> None:
    made = learner(optimizer={"lr": 0.0}, **GROUP)
    plan, samples = samples_of(made, temperature=0.7)
    assert apply(made, plan, samples).metrics["logprob_abs_diff"] < 1e-5
    cold = replace(samples, choices=tuple(replace(choice, temperature=1.0) for choice in samples.choices))
    assert apply(made, plan, cold).metrics["logprob_abs_diff"] > 0.01


def test_rows_of_any_size_give_the_same_update(learner: MakeLearner) -> None:
    """Normalised by all trained tokens: the split into rows (micro-batches) must not matter. 6 rows against 1."""
    results = []
    for row_tokens in (512, 24, 8):
        made = learner(batch={"row_tokens": row_tokens}, optimizer={"lr": 0.0, "max_grad_norm": 1e9})
        plan, samples = samples_of(made, groups=6)
        metrics = apply(made, plan, samples).metrics
        results.append((metrics["loss"], metrics["grad_norm"]))
    assert results[1] == pytest.approx(results[0], rel=1e-5)
    assert results[2] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize(("limit", "clipped"), [(1e-3, True), (1e9, False)])
def test_gradients_are_no_longer_than_the_configuration_says(learner: MakeLearner, limit: float, clipped: bool) -> None:
    """AdamW's first moment after one step is (1 - beta1) times what it was given."""
    made = learner(optimizer={"betas": [0.9, 0.95], "max_grad_norm": limit}, **GROUP)
    plan, samples = samples_of(made)
    norm = apply(made, plan, samples).metrics["grad_norm"]
    moments = [state["exp_avg"] for state in made._optimizer_or_raise().state.values()]
    given = float(torch.cat([moment.flatten() for moment in moments]).norm()) / (1 - 0.9)
    assert norm > 1e-3 and given == pytest.approx(limit if clipped else norm, rel=1e-3)


def test_the_loss_is_a_mean_over_all_trained_tokens(learner: MakeLearner) -> None:
    """At ratio 1 and weight 1 without a critic: loss = -sum(advantages) / tokens = -mean advantage."""
    made = learner(optimizer={"lr": 0.0}, **GROUP)
    plan, samples = samples_of(made)
    metrics = apply(made, plan, samples).metrics
    assert metrics["loss"] == pytest.approx(-metrics["advantage"], abs=1e-5)
    starts = token_starts(samples.choices)
    assert metrics["tokens_trained"] == starts[-1] == samples.n_trained_tokens
    assert sum(role["tokens_trained"] for role in metrics["roles"].values()) == starts[-1]


def test_the_metrics_count_what_was_compared_for_all_and_each_role(learner: MakeLearner) -> None:
    """Three groups of four runs with a call of each role: a cell for each role in each group. No spans, so no edges."""
    made = learner(optimizer={"lr": 0.0}, algorithm={"credit": {"advantage": "rloo", "scope": "graph"}})
    plan, samples = samples_of(made)
    metrics = apply(made, plan, samples).metrics
    planner, writer = (metrics["roles"][role] for role in recorded.ROLES)
    assert (metrics["n_cells"], planner["n_cells"], writer["n_cells"]) == (6, 3, 3)
    assert (metrics["n_single_cells"], metrics["n_lone_runs"]) == (0, 0)
    assert metrics["n_unlinked_choices"] == metrics["choices"] == 24
    # The writer has a reward of its own role beside the run's: nothing else reaches either, so return and reward agree.
    assert metrics["return"] == metrics["reward"]
    style = [one.value for given in samples.rewards.values() for one in given if one.role is not None]
    assert writer["return"] - planner["return"] == pytest.approx(sum(style) / len(style))


def test_two_trainings_are_bitwise_equal(learner: MakeLearner) -> None:
    settings = {"optimizer": {"epochs": 2, "minibatches": 2, "lr": 1e-2}}
    final = []
    for _ in range(2):
        made = learner(**settings)
        before = weights(made)
        for step in (1, 2):
            plan, samples = samples_of(made, groups=4, seed=step)
            apply(made, replace(plan, step=step), samples)
        assert not equal(before, weights(made))
        final.append(weights(made))
    assert equal(*final)


def test_a_reloaded_learner_goes_on_bitwise(learner: MakeLearner, tmp_path: Path) -> None:
    made = learner()
    plan, samples = samples_of(made)
    apply(made, plan, samples)
    saved = made.save(str(tmp_path / "root"), 1).checkpoint
    second = samples_of(made, seed=9)
    apply(made, *second)
    other = learner()
    assert other.load(saved.path, saved.hash) == 1
    apply(other, *second)
    assert equal(weights(made), weights(other))
    assert made.save(str(tmp_path / "a"), 2).checkpoint.hash == other.save(str(tmp_path / "b"), 2).checkpoint.hash


@pytest.mark.parametrize("updates", [1, 4])
def test_not_finite_is_refused_and_nothing_moves(learner: MakeLearner, updates: int) -> None:
    """With several minibatches the first updates are applied before the bad one is met: they must be taken back."""
    made = learner(optimizer={"minibatches": updates, "lr": 1e-2}, **GROUP)
    warm = samples_of(made, groups=4)
    apply(made, *warm)
    before, moments = weights(made), moment_sum(made)
    plan, samples = samples_of(made, groups=4, seed=2)
    poisoned = replace(
        samples,
        choices=(*samples.choices[:-1], replace(samples.choices[-1], behaviour_logprobs=nan_like(samples.choices[-1]))),
    )
    with pytest.raises(StepRefused, match="not finite"):
        apply(made, plan, poisoned)
    assert equal(before, weights(made))
    assert moment_sum(made) == moments
    apply(made, plan, samples)


@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        ({"lr": 1e39}, r"step 1: after the update the weights are not finite in \d+ of the parameters, first in m"),
        ({"lr": 1e20}, r"the weights are finite, but what they compute is not.*Lower trainer.optimizer.lr \(1e\+20\)"),
        ({"critic_lr": 1e39}, r"not finite in 2 of the parameters, first in value_head\..*critic_lr \(1e\+39\)"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_that_ruins_the_weights_is_refused(
    learner: MakeLearner, optimizer: dict[str, float], says: str, precision: str
) -> None:
    """Loss and gradient are finite, and so are weights of 1e20, whose squares are beyond the end of fp32 (3.4e38)."""
    made = learner(optimizer=optimizer, precision=precision)
    with pytest.raises(StepRefused, match=says):
        apply(made, *samples_of(made))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_that_the_last_of_several_updates_ruins_are_put_back(learner: MakeLearner, precision: str) -> None:
    made = learner(optimizer={"minibatches": 4}, precision=precision)
    apply(made, *samples_of(made, groups=4))
    before, moments = weights(made), moment_sum(made)
    updates: list[int] = []

    def ruin(*_: Any) -> None:
        updates.append(1)
        if len(updates) == 4:
            made.policy.lm_masters()["model.norm.weight"].data[3] = float("nan")

    hook = made._optimizer_or_raise().register_step_post_hook(ruin)
    again = samples_of(made, groups=4, seed=2)
    with pytest.raises(StepRefused, match=r"not finite in 1 of the parameters, first in model\.norm\.weight"):
        apply(made, *again)
    assert len(updates) == 4
    assert equal(before, weights(made))
    assert moment_sum(made) == moments
    hook.remove()
    apply(made, *again)


def moment_sum(made: Learner) -> float:
    parameters = [p for group in made._optimizer.param_groups for p in group["params"]]
    return sum(float(made._optimizer.state[p]["exp_avg_sq"].sum()) for p in parameters if p in made._optimizer.state)


def nan_like(choice: Any) -> tuple[float, ...]:
    return tuple(float("nan") for _ in choice.token_ids)


def test_nothing_to_train_is_refused_with_the_reasons(learner: MakeLearner) -> None:
    made = learner()
    before = weights(made)
    traces = recorded.traces_of(recorded.recorded_groups(1, score=made.score))
    silent = [replace(trace, rewards=()) for trace in traces]
    samples = build_batch(silent, recorded.RULE)
    with pytest.raises(StepRefused, match=r"no reward: \d+ tokens that no counted reward reaches; reward the runs"):
        apply(made, BatchPlan(step=1, epoch=0, seed=0, run_ids=("r",)), samples)
    assert equal(before, weights(made))


def test_when_every_token_is_rejected_the_step_is_refused(learner: MakeLearner) -> None:
    made = learner(
        algorithm={"credit": {"advantage": "grpo"}, "correction": {"reject": [{"level": "token", "low": 1.5}]}}
    )
    before = weights(made)
    plan, samples = samples_of(made)
    with pytest.raises(
        StepRefused, match=r"step 1: all \d+ tokens of an update are rejected by trainer.algorithm.correct"
    ):
        apply(made, plan, samples)
    assert equal(before, weights(made))


def test_rejected_tokens_are_consumed_and_counted_by_reason(learner: MakeLearner) -> None:
    """Law 5: the loss mask selects them and their step is their step; their weight in it is 0."""
    made = learner(
        algorithm={"credit": {"advantage": "grpo"}, "correction": {"reject": [{"level": "token", "high": 1.5}]}}
    )
    plan, samples = samples_of(made)
    first = samples.choices[0]
    far = replace(first, behaviour_logprobs=tuple(value - 1.0 for value in first.behaviour_logprobs))
    result = apply(made, plan, replace(samples, choices=(far, *samples.choices[1:])))
    assert result.metrics["tokens_masked"] == {"token ratio low": 0, "token ratio high": len(first.token_ids)}
    assert result.metrics["roles"][str(first.role)]["tokens_masked"]["token ratio high"] == len(first.token_ids)
    assert sum(entry.trained_tokens for entry in result.consumption) == result.metrics["tokens_trained"]
    assert result.metrics["weight_mean"] < 1.0


@pytest.mark.parametrize(
    "loss",
    [
        {"objective": "ppo"},
        {"objective": "cispo"},
        {"objective": "gspo", "aggregate": "sequences"},
        {"objective": "gspo_token", "aggregate": "sequences"},
        {"aggregate": "constant", "aggregate_tokens": 4},
    ],
    ids=str,
)
def test_every_objective_learns_and_does_not_care_about_rows(learner: MakeLearner, loss: dict[str, Any]) -> None:
    """One batch, 20 updates on it with wide bounds: the lucky answers become likelier. Any split into rows is equal."""
    settings = {
        "credit": {"advantage": "grpo"},
        "loss": {**loss, "clip_low": 1.0, "clip_high": 9.0, "entropy_coef": 0.001},
    }
    norms = []
    for row_tokens in (512, 16):
        made = learner(
            algorithm=settings, batch={"row_tokens": row_tokens}, optimizer={"lr": 0.0, "max_grad_norm": 1e9}
        )
        norms.append(apply(made, *samples_of(made, groups=4)).metrics["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    made = learner(algorithm=settings, optimizer={"lr": 5e-3, "epochs": 20})
    plan, samples = samples_of(made, groups=4)
    lucky = [choice for choice in samples.choices if choice.token_ids[0] == recorded.LUCKY]
    before = made.ppo.evaluate(lucky).logprobs_N.mean()
    apply(made, plan, samples)
    assert made.ppo.evaluate(lucky).logprobs_N.mean() > before + 0.5


def test_when_the_engine_and_the_trainer_agree_three_policies_are_two(learner: MakeLearner) -> None:
    """Behaviour = proximal: the decoupled objective and plain PPO take the same steps, to 1e-6."""
    optimizer, finals = {"epochs": 2, "minibatches": 2, "lr": 1e-4}, []
    for correction in ({}, {"anchor": "behaviour", "weights": "off"}, {"weights": "sequence"}):
        made = learner(algorithm={"credit": {"advantage": "grpo"}, "correction": correction}, optimizer=optimizer)
        apply(made, *samples_of(made, groups=4))
        finals.append(weights(made))
    for final in finals[1:]:
        for name, tensor in final.items():
            torch.testing.assert_close(tensor, finals[0][name], rtol=0, atol=1e-6)
    unlike = learner(algorithm={"credit": {"advantage": "grpo"}}, optimizer=optimizer)
    plan, samples = samples_of(unlike, groups=4)
    halved = [tuple(value - 0.7 for value in choice.behaviour_logprobs) for choice in samples.choices]
    moved = [replace(c, behaviour_logprobs=low) for c, low in zip(samples.choices[::2], halved[::2], strict=True)]
    apply(
        unlike,
        plan,
        replace(samples, choices=tuple(x for p in zip(moved, samples.choices[1::2], strict=True) for x in p)),
    )
    assert any(float((t - finals[0][n]).abs().max()) > 1e-5 for n, t in weights(unlike).items())


def test_metrics_tell_the_policies_apart(learner: MakeLearner) -> None:
    made = learner(algorithm={"loss": {"kl_coef": 0.1}}, optimizer={"epochs": 3, "lr": 5e-3})
    plan, samples = samples_of(made)
    metrics = apply(made, plan, samples).metrics
    for of in (metrics, *metrics["roles"].values()):
        assert set(of["kl_to"]) == {"behaviour", "proximal", "reference"}
        assert all(value["k3"] >= 0.0 for value in of["kl_to"].values())
        assert of["kl_to"]["proximal"]["k3"] == pytest.approx(of["kl_to"]["behaviour"]["k3"], abs=1e-4)
        assert of["value_error"] > 0.0
        assert of["explained_variance"] is not None
    assert metrics["kl_to"]["reference"]["k3"] > 0.0, "the reference is the base: the third epoch has left it"
    group = learner(**GROUP)
    assert set(apply(group, *samples_of(group)).metrics["kl_to"]) == {"behaviour", "proximal"}


def test_an_account_that_disagrees_with_the_mask_is_refused(learner: MakeLearner) -> None:
    made = learner()
    plan, samples = samples_of(made)
    for choices in (samples.choices[:-1], (*samples.choices, samples.choices[0])):
        with pytest.raises(StepRefused, match=r"are not trained|trains token"):
            apply(made, plan, replace(samples, choices=choices))


def test_reference_kl_holds_the_policy_back(learner: MakeLearner) -> None:
    moved = []
    for kl_coef in (0.0, 10.0):
        made = learner(
            algorithm={"credit": {"advantage": "grpo"}, "loss": {"kl_coef": kl_coef}},
            optimizer={"epochs": 8, "lr": 5e-3},
        )
        plan, samples = samples_of(made)
        moved.append(apply(made, plan, samples).metrics["kl"])
    assert 0 < moved[1] < moved[0] / 2


@pytest.mark.parametrize("advantage", ["gae", "reinforce++"])
def test_a_kl_penalty_in_the_reward_is_credit_of_each_token(learner: MakeLearner, advantage: str) -> None:
    """Golden: with the reference 1 nat lower, k1 is 1 and k3 e^-1, taken from every token's reward."""
    for estimator, penalty in (("k1", 0.5), ("k3", 0.5 * np.exp(-1.0))):
        loss = {"kl_coef": 0.5, "kl_in": "reward", "kl_estimator": estimator}
        settings = {"credit": {"advantage": advantage, "normalise": "off", "gae_lambda": 1.0}, "loss": loss}
        made, without = learner(algorithm=settings), learner(algorithm={**settings, "loss": {}})
        _, samples = samples_of(made)
        proximal = made.ppo.evaluate(samples.choices, full=True)
        found = made.ppo.credit(samples, Before(proximal=proximal, reference_N=proximal.logprobs_N - 1.0))
        plain = without.ppo.credit(samples, Before(proximal=proximal))
        lengths = np.diff(token_starts(samples.choices))
        to_come = np.concatenate([np.arange(length, 0, -1) for length in lengths])
        if advantage == "reinforce++":
            to_come = np.repeat(lengths, lengths)
        np.testing.assert_allclose(found.advantages_N, plain.advantages_N - penalty * to_come, atol=1e-6)
        assert made.ppo.needs_proximal


def test_a_kl_penalty_in_the_reward_holds_the_policy_back(learner: MakeLearner) -> None:
    moved = []
    for kl_coef in (0.0, 20.0):
        loss = {"kl_coef": kl_coef, "kl_in": "reward", "kl_estimator": "k1"}
        settings = {"credit": {"advantage": "dr_grpo"}, "loss": loss}
        made = learner(algorithm=settings, optimizer={"lr": 5e-3})
        plan, samples = samples_of(made)
        for step in range(1, 13):
            metrics = apply(made, replace(plan, step=step), samples).metrics
        moved.append(metrics["kl"])
        assert metrics["reward"] == pytest.approx(apply(learner(**GROUP), plan, samples).metrics["reward"])
    assert 0 < moved[1] < moved[0] / 2


def test_warm_up_grows_with_the_step_alone(learner: MakeLearner) -> None:
    made = learner(optimizer={"lr": 1e-3, "warmup_steps": 4})
    plan, samples = samples_of(made)
    rates = [apply(made, replace(plan, step=step), samples).metrics["lr"] for step in (1, 2, 4, 9)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 1e-3, 1e-3])


def test_metrics_tell_stale_tokens_apart(learner: MakeLearner) -> None:
    made = learner(optimizer={"lr": 0.0})
    plan, samples = samples_of(made)
    metrics = apply(made, plan, samples, version_id=2).metrics
    assert metrics["logprob_abs_diff"] is None
    assert metrics["stale_tokens"] == metrics["tokens_trained"]


def test_metrics_tell_the_age_of_tokens_and_what_each_role_lost(learner: MakeLearner) -> None:
    made = learner(optimizer={"lr": 0.0}, **GROUP)
    traces = recorded.traces_of(recorded.recorded_groups(2, score=made.score))
    calls = [replace(call, status="aborted") if call.attribution.role == "writer" else call for call in traces[0].calls]
    samples = build_batch([replace(traces[0], calls=tuple(calls)), *traces[1:]], recorded.RULE)
    old = samples.choices[0]
    choices = (replace(old, version_spans=((0, 0), (1, 1))), *samples.choices[1:])
    plan = BatchPlan(step=3, epoch=0, seed=0, run_ids=("r",))
    metrics = apply(made, plan, replace(samples, choices=choices, version_ages={0: 2, 1: 1})).metrics
    assert (metrics["staleness_max"], metrics["roles"][str(old.role)]["staleness_max"]) == (2, 2)
    assert metrics["staleness_mean"] == pytest.approx(1 + 1 / metrics["tokens_trained"])
    assert metrics["tokens_excluded"] == metrics["roles"]["writer"]["tokens_excluded"]
    assert metrics["roles"]["writer"]["tokens_excluded"]["aborted"] > 0
    assert metrics["roles"]["planner"]["tokens_excluded"] == {}
    assert "staleness_max" not in apply(made, plan, samples).metrics, "where nobody asked for ages there are none"


def test_a_role_of_which_nothing_is_trained_says_why(learner: MakeLearner) -> None:
    """Every writer call was cut by top_p, and one run failed: its tokens are lost to both roles."""
    made = learner(optimizer={"lr": 0.0}, **GROUP)
    traces = []
    for trace in recorded.traces_of(recorded.recorded_groups(2, score=made.score)):
        planner, writer = trace.calls
        assert (planner.attribution.role, writer.attribution.role) == recorded.ROLES
        cut = replace(writer, effective={"temperature": 1.0, "top_p": 0.5})
        traces.append(replace(trace, calls=(planner, cut)))
    traces[0] = replace(traces[0], run=replace(traces[0].run, status="failed"), rewards=())
    plan = BatchPlan(step=3, epoch=0, seed=0, run_ids=("r",))
    metrics = apply(made, plan, build_batch(traces, recorded.RULE)).metrics
    sampled = [[len(call.choices[0].token_ids) for call in trace.calls] for trace in traces]
    failed, lost = sampled[0], sum(writer for _, writer in sampled[1:])
    excluded = {"run failed": failed[1], "truncated sampling": lost}
    assert metrics["roles"]["writer"] == {"choices": 0, "tokens_trained": 0, "tokens_excluded": excluded}
    assert metrics["roles"]["planner"]["tokens_excluded"] == {"run failed": failed[0]}
    assert metrics["roles"]["planner"]["tokens_trained"] == metrics["tokens_trained"]
    assert metrics["tokens_excluded"] == {"run failed": sum(failed), "truncated sampling": lost}


def test_shared_prompts_are_computed_once(learner: MakeLearner) -> None:
    made = learner(batch={"row_tokens": 4096})
    plan, samples = samples_of(made)
    metrics = apply(made, plan, samples).metrics
    assert metrics["tokens_unique"] <= metrics["tokens_computed"] <= metrics["tokens_unique"] + 3
    assert metrics["tokens_computed"] < metrics["tokens_naive"] / 3


def test_tokens_that_minibatches_compute_apart_are_counted_apart(
    learner: MakeLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups on one prompt of 3 in two minibatches: the prompt is computed twice, and the metrics say so."""
    made = learner(optimizer={"minibatches": 2, "epochs": 2}, batch={"row_tokens": 4096})
    plan, samples = samples_of(made, groups=2)
    samples = replace(samples, choices=tuple(replace(one, prompt_ids=(3, 4, 5)) for one in samples.choices))
    computed: list[int] = []
    outputs = made.policy.edge_outputs

    def counted(row: PackedRow, **asked: bool) -> EdgeOutputs:
        if torch.is_grad_enabled():
            computed.append(row.n_nodes)
        return outputs(row, **asked)

    monkeypatch.setattr(made.policy, "edge_outputs", counted)
    metrics = apply(made, plan, samples).metrics
    assert len(computed) == 4, "a row for each minibatch of two epochs"
    assert metrics["tokens_computed"] == sum(computed[2:]) == sum(computed[:2])
    assert metrics["tokens_computed"] >= metrics["tokens_unique"] + 3
    assert metrics["efficiency"] == metrics["tokens_unique"] / metrics["tokens_computed"] < 1.0
    whole = apply(learner(batch={"row_tokens": 4096}), plan, samples).metrics
    assert (whole["efficiency"], whole["tokens_computed"]) == (1.0, metrics["tokens_unique"])


def test_one_update_without_a_critic_computes_nothing_twice(learner: MakeLearner) -> None:
    """The update's own forward is the proximal pass: the same step as with a pass beforehand."""
    lean, full = learner(**GROUP), learner(**GROUP)
    plan, samples = samples_of(lean, temperature=0.7)
    assert not lean.ppo.needs_proximal
    ours = lean.ppo.run(plan, samples, Before(), version_id=1)
    evaluated = Before(proximal=full.ppo.evaluate(samples.choices, full=True))
    theirs = full.ppo.run(plan, samples, evaluated, version_id=1)
    for name in ("entropy", "kl", "logprob_abs_diff", "ratio_mean", "reward", "loss", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name
    for name, tensor in weights(lean).items():
        torch.testing.assert_close(tensor, weights(full)[name], rtol=0, atol=1e-6)
    assert learner().ppo.needs_proximal
    assert learner(optimizer={"epochs": 2}, **GROUP).ppo.needs_proximal
