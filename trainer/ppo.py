"""One PPO step of one model: evaluate, credit, update. No folders, no store, no engine.

Order: proximal logprobs and values of every sampled token under the weights the step starts with (with one update and
no critic that pass is the update's own forward: nothing is computed twice); credit per choice; then `epochs` x
`minibatches` updates over packed rows, each loss divided by the count of trained tokens of its minibatch, whatever
rows it lies in. It refuses, leaving weights and optimizer as they were: a loss or gradient that is not finite, a
gradient that explodes, an update in which every token is rejected, nothing to train, and rows that do not select every
trained token exactly once per epoch (law 5). It refuses also what the updates leave where that is not finite, or
computes what is not; a single update cannot be taken back then: load before going on.
Everything random comes from the plan's seed. Of several ranks each computes some of an update's rows; all else they do
alike, on the whole batch. Called by the learner.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from msgspec.structs import replace

from tracegrad.tracestore.algorithm import CreditConfig
from tracegrad.tracestore.config import TrainerConfig
from tracegrad.tracestore.records import BatchPlan
from tracegrad.trainer.batches import PackedRow, packed_row, split_groups
from tracegrad.trainer.comparison import Statistics
from tracegrad.trainer.corrections import KEPT, rejection_reasons
from tracegrad.trainer.credit import Credit, assign, behaviour_logprobs, critic_values, token_starts
from tracegrad.trainer.errors import StepRefused
from tracegrad.trainer.evaluation import Before, Evaluation, Floats, evaluate
from tracegrad.trainer.exchange import CriticValues
from tracegrad.trainer.losses import kl_estimate, objective
from tracegrad.trainer.packing import Packing, pack
from tracegrad.trainer.policy import Policy
from tracegrad.trainer.ranks import slowest
from tracegrad.trainer.refusals import StepHistory
from tracegrad.trainer.samples import ChoiceSample, Samples
from tracegrad.trainer.sharding import whole
from tracegrad.trainer.step_metrics import StepArrays, step_metrics, token_counts
from tracegrad.trainer.step_tensors import Fixed, Minibatch, Seen, float32

EASY_TOKENS = 512
"""A longer row is cut where that computes no token again: the activations of a row are held at once, 0.5 MB a token of
SmolLM2-135M, and matrix products of so many tokens are nearly as fast as those of more."""


class PpoStep:
    """Applies steps to a policy through its optimizer. Holds no state between steps."""

    def __init__(
        self, policy: Policy, optimizer: torch.optim.Optimizer, config: TrainerConfig, reference: Policy | None = None
    ) -> None:
        self._policy, self._optimizer, self._reference = policy, optimizer, reference
        self._config = config
        self._critic = config.algorithm.credit.advantage == "gae"
        self._penalised = config.algorithm.loss.kl_coef > 0.0 and config.algorithm.loss.kl_in == "reward"

    def pack(self, choices: Sequence[ChoiceSample], select: Sequence[int] | None = None) -> Packing:
        """Lay choices into rows of the configured length; for several ranks into shorter ones where that is faster."""
        policy, ranks = self._policy, self._policy.ranks
        attention, each = policy.attention_cost, policy.row_cost

        def within(row_tokens: int) -> Packing:
            return pack(
                choices,
                row_tokens=row_tokens,
                attention_cost=attention,
                row_cost=each,
                easy_tokens=EASY_TOKENS,
                select=select,
            )

        packing = within(self._config.batch.row_tokens)
        if ranks.size == 1:
            return packing
        even = packing.stats.n_nodes / ranks.size
        limits = [math.ceil(even * slack / turns) for turns in (1, 2) for slack in (1.1, 1.4)]
        shorter = [within(limit) for limit in limits if 0 < limit < self._config.batch.row_tokens]
        return min(
            (packing, *shorter),
            key=lambda packing: slowest(
                [row.n_nodes for row in packing.rows], ranks.size, lambda tokens: tokens + attention * tokens**2 + each
            ),
        )

    def evaluate(self, choices: Sequence[ChoiceSample], *, full: bool = False) -> Evaluation:
        """Return logprobs of the current weights at the choices' temperatures; with `full` values and entropies."""
        return self._evaluate_with(self._policy, choices, full=full)

    @property
    def needs_proximal(self) -> bool:
        """Whether `run` needs an evaluation beforehand: a critic's values, a penalty in the reward, or logprobs that
        outlive an update.
        """
        updates = self._config.optimizer.epochs * self._config.optimizer.minibatches
        return self._critic or self._penalised or updates > 1

    def run(
        self,
        plan: BatchPlan,
        samples: Samples,
        before: Before,
        *,
        version_id: int | None,
        history: StepHistory | None = None,
        batch: Statistics | None = None,
        foreign: Sequence[CriticValues] = (),
    ) -> dict[str, Any]:
        """Update the weights once through the step; return its metrics.

        `before.proximal` is `evaluate(samples.choices, full=True)` under the present weights, or None if not
        `needs_proximal`; `before.reference_N` is `reference_logprobs`. `history`: of the steps before, to refuse a
        gradient that explodes. `batch`: see `spread`. `foreign`: of the other models, see `values`.

        Raises:
            StepRefused: see the module.
        """
        started = time.monotonic()
        choices, proximal = samples.choices, before.proximal
        credit = self.credit(samples, before, batch, foreign)
        packing = self.pack(choices)
        fixed = self._fixed(samples, before, credit)
        seen = Seen(len(fixed.behaviour))
        facts: dict[str, Any] = {}
        packings = [packing]
        parts = self._config.optimizer.minibatches
        updates = self._config.optimizer.epochs * parts
        with self._unchanged_on_failure(updates):
            for epoch in range(self._config.optimizer.epochs):
                seed = plan.seed + epoch
                selections = split_groups(choices, parts, seed=seed) if parts > 1 else [list(range(len(choices)))]
                packings = [self.pack(choices, part) if parts > 1 else packing for part in selections]
                rows = [[packed_row(row) for row in part.rows] for part in packings]
                _check_mask(plan.step, [row for part in rows for row in part], samples)
                for part in rows:
                    facts = self._update(plan.step, Minibatch.of(part), fixed, seen, history or StepHistory())
            self._check_weights(plan.step)
        arrays = StepArrays(
            starts=token_starts(choices),
            credit=credit,
            behaviour_N=behaviour_logprobs(choices),
            proximal_N=seen.policy_N if proximal is None else proximal.logprobs_N,
            policy_N=seen.policy_N,
            reference_N=before.reference_N,
            entropy_N=seen.entropy_N if proximal is None else _present(proximal.entropy_N),
            ratio_N=seen.ratio_N,
            clipped_N=seen.clipped_N,
            dual_clipped_N=seen.dual_clipped_N,
            weight_N=seen.weight_N,
            rejected_N=seen.rejected_N,
            reasons=rejection_reasons(self._config.algorithm.correction),
            version_ages=samples.version_ages,
            values_N=seen.values_N if self._critic else None,
            old_values_N=None if proximal is None else proximal.values_N,
        )
        return {
            **step_metrics(choices, arrays, version_id),
            **facts,
            "updates": updates,
            **token_counts(packing.stats, [part.stats for part in packings]),
            "seconds": {"update": time.monotonic() - started},
        }

    def reference_logprobs(self, choices: Sequence[ChoiceSample]) -> Floats | None:
        """Return those of the reference policy, None where there is none."""
        return None if self._reference is None else self._evaluate_with(self._reference, choices, full=False).logprobs_N

    def values(self, samples: Samples, before: Before) -> CriticValues:
        """Return what the critic says of the step's choices, for the credit of this model and of others."""
        values_N = _present(None if before.proximal is None else before.proximal.values_N)
        return critic_values(samples, values_N, self._penalties(before))

    def spread(self, samples: Samples, before: Before, foreign: Sequence[CriticValues] = ()) -> Statistics:
        """Return the statistics of the step's advantages as they are before anything is normalised.

        Those of several models together (`Statistics.joined`) are what `normalise: batch` takes in `run`.
        """
        plain = replace(self._config.algorithm.credit, normalise="off")
        return Statistics.of(self.credit(samples, before, foreign=foreign, rule=plain).advantages_N.tolist())

    def credit(
        self,
        samples: Samples,
        before: Before,
        batch: Statistics | None = None,
        foreign: Sequence[CriticValues] = (),
        *,
        rule: CreditConfig | None = None,
    ) -> Credit:
        """Turn rewards into advantages, with the critic's values where there is one; `rule`: not as configured.

        With `kl_in: reward` each token's reward is less by its KL penalty, of the weights that the step starts with.
        """
        rule = rule or self._config.algorithm.credit
        if self._critic:
            known = self.values(samples, before)
            return assign(samples, rule, known.values_N, known.token_rewards_N, batch, foreign=foreign)
        return assign(samples, rule, None, self._penalties(before), batch)

    # -- inside

    def _penalties(self, before: Before) -> Floats | None:
        """What each token's reward is less for leaving the reference policy, as a number below 0."""
        if not self._penalised:
            return None
        loss = self._config.algorithm.loss
        sampled_N = torch.from_numpy(_present(None if before.proximal is None else before.proximal.logprobs_N))
        other_N = torch.from_numpy(_present(before.reference_N))
        penalties_N: Floats = -loss.kl_coef * kl_estimate(loss.kl_estimator, sampled_N, other_N).numpy()
        return penalties_N

    def _evaluate_with(self, policy: Policy, choices: Sequence[ChoiceSample], *, full: bool) -> Evaluation:
        rows = [packed_row(row) for row in self.pack(choices).rows]
        n_tokens = int(token_starts(choices)[-1])
        return evaluate(policy, rows, n_tokens, with_values=full and self._critic, with_entropy=full)

    def _fixed(self, samples: Samples, before: Before, credit: Credit) -> Fixed:
        proximal = before.proximal
        return Fixed(
            lengths=torch.tensor([len(choice.token_ids) for choice in samples.choices]),
            behaviour=torch.from_numpy(behaviour_logprobs(samples.choices)).float(),
            proximal=None if proximal is None else float32(proximal.logprobs_N),
            advantages=torch.from_numpy(credit.advantages_N).float(),
            targets=float32(credit.targets_N),
            old_values=None if proximal is None else float32(proximal.values_N),
            reference=float32(before.reference_N),
        ).to(self._policy.device)

    def _update(self, step: int, batch: Minibatch, fixed: Fixed, seen: Seen, history: StepHistory) -> dict[str, Any]:
        """One optimizer step over a minibatch; the weights change only if everything is finite, something counts."""
        total, n_rejected = 0.0, 0.0
        ranks, algorithm = self._policy.ranks, self._config.algorithm
        with_entropy = fixed.proximal is None or algorithm.loss.entropy_coef > 0.0
        self._policy.zero_grads()
        for share in ranks.share(batch.rows, lambda row: row.n_nodes):
            if share is None:
                self._policy.idle(with_values=self._critic).backward()
                continue
            row = share.to(self._policy.device)
            outputs = self._policy.edge_outputs(row, with_values=self._critic, with_entropy=with_entropy)
            loss = objective(fixed.inputs(row, outputs, batch, algorithm.loss), algorithm)
            loss.total.backward()
            total += float(loss.total.detach())
            n_rejected += int((loss.correction.rejected_E != KEPT).sum())
            seen.note(row, outputs, loss)
        total, n_rejected = ranks.sums(total, n_rejected)
        seen.exchange(ranks)
        if n_rejected == batch.n_tokens:
            raise StepRefused(
                f"step {step}: all {batch.n_tokens} tokens of an update are rejected by trainer.algorithm.correction: "
                "the engine's logprobs and the trainer's are too far apart, or the bounds too narrow "
                "(`logprob_abs_diff` in metrics.jsonl tells); the weights are unchanged"
            )
        norm = self._grad_norm()
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise StepRefused(f"step {step}: loss {total}, gradient norm {norm}: not finite; the weights are unchanged")
        history.check_norm(step, norm, max_grad_norm=self._config.optimizer.max_grad_norm, config=algorithm.refuse)
        lr = self._set_learning_rates(step)
        self._step_clipped(norm)
        self._policy.zero_grads()
        self._policy.refresh()
        return {"loss": total, "grad_norm": norm, "lr": lr}

    def _check_weights(self, step: int) -> None:
        """Refuse weights that are not finite, and such as do not compute finite numbers. Ranks alike.

        Finite gradients do not rule them out: a learning rate, a rounding or a memory may be at fault. What a start
        would find wrong with a checkpoint must not be in one.
        """
        settings, said = self._config.optimizer, ""
        if wrong := self._policy.not_finite():
            said = f"not finite in {len(wrong)} of the parameters, first in {wrong[0]}"
        elif not self._policy.computes_numbers():
            said = "finite, but what they compute is not"
        if said:
            raise StepRefused(
                f"step {step}: after the update the weights are {said}; nothing of the step is kept. Lower "
                f"trainer.optimizer.lr ({settings.lr:g}) or critic_lr ({settings.critic_lr:g})"
            )

    @property
    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]

    def _grad_norm(self) -> float:
        return float(whole(torch.nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])))

    def _step_clipped(self, norm: float) -> None:
        """Step with the gradients scaled down to `max_grad_norm` where they are longer.

        The fused AdamW scales them as it reads them, if it is told as torch's `GradScaler` tells it: one pass over all
        gradients less. (It cannot where they are divided over ranks.) Source: `torch.nn.utils.clip_grads_with_norm_`.
        """
        limit = self._config.optimizer.max_grad_norm
        scale = (norm + 1e-6) / limit
        if scale > 1.0 and self._policy.ranks.size > 1:
            torch.nn.utils.clip_grads_with_norm_(self._trained, limit, torch.tensor(norm, device=self._policy.device))
        elif scale > 1.0:
            vars(self._optimizer)["grad_scale"] = torch.tensor(scale, device=self._policy.device)
        try:
            self._optimizer.step()
        finally:
            vars(self._optimizer).pop("grad_scale", None)

    def _set_learning_rates(self, step: int) -> float:
        """Linear warm-up over the first steps: a function of the step alone, so that nothing has to be resumed."""
        settings = self._config.optimizer
        factor = min(1.0, step / settings.warmup_steps) if settings.warmup_steps else 1.0
        for group, lr in zip(self._optimizer.param_groups, (settings.lr, settings.critic_lr), strict=True):
            group["lr"] = lr * factor
        return settings.lr * factor

    @contextmanager
    def _unchanged_on_failure(self, updates: int) -> Iterator[None]:
        """Put weights and optimizer back when the block raises.

        One update changes nothing before its gradient is checked, and a second copy of weights and moments is dear:
        where what it leaves is refused, whoever called loads the last checkpoint.
        """
        kept = _Snapshot(self._policy, self._optimizer) if updates > 1 else None
        done = False
        try:
            yield
            done = True
        finally:
            if not done:
                self._policy.zero_grads()
                if kept is not None:
                    kept.restore()


class _Snapshot:
    """Copies of masters and optimizer state."""

    def __init__(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        self._policy, self._optimizer = policy, optimizer
        self._parameters = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
        self._state = {
            p: {name: value.clone() for name, value in state.items()} for p, state in optimizer.state.items()
        }

    @torch.no_grad()
    def restore(self) -> None:
        for parameter, value in self._parameters.items():
            parameter.copy_(value)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        self._policy.refresh()


def _check_mask(step: int, rows: Sequence[PackedRow], samples: Samples) -> None:
    """Law 5, every epoch: the loss mask selects each trained token of the account exactly once."""
    trained = samples.n_trained_tokens
    counts = np.zeros(trained, dtype=np.int64)
    for row in rows:
        index_E = row.edge_index_E.numpy()
        if len(index_E) and int(index_E.max()) >= trained:
            raise StepRefused(f"step {step}: a row trains token {int(index_E.max())} of {trained}")
        np.add.at(counts, index_E, 1)
    if not (counts == 1).all():
        missed, double = int((counts == 0).sum()), int((counts > 1).sum())
        raise StepRefused(f"step {step}: of {trained} tokens {missed} are not trained and {double} more than once")


def _present(values: Floats | None) -> Floats:
    if values is None:
        raise StepRefused("the step lacks values, entropies or reference logprobs: call evaluate(..., full=True)")
    return values
