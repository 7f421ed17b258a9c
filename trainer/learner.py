"""The learner: one model's policy, its AdamW and its folders, in one process. No store, no engine, no Ray.

The model is a full one, or an adapter on a trunk that several learners of the process may share. Of a group of several
workers each has a learner; all are asked the same, and the first writes the files. It loads and writes
checkpoints, applies PPO steps (`tracegrad.trainer.ppo`), and scores sequences for the publish probe and the canary.
Deterministic: fixed thread count, deterministic kernels, and everything random drawn from the plan's seed, so that
equal traces give bitwise equal weights. It refuses steps as `ppo` does, and folders that are not what their manifest
says. Called by `model_group`, or directly by tests and benchmarks.
"""

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import BatchPlan
from tracegrad.trainer.checkpoints import Checkpoint, verify_checkpoint, write_checkpoint
from tracegrad.trainer.comparison import Statistics
from tracegrad.trainer.credit import token_starts
from tracegrad.trainer.errors import TrainerError
from tracegrad.trainer.evaluation import Before, Evaluation, choose_probe, scored
from tracegrad.trainer.exchange import CriticValues, Told
from tracegrad.trainer.memory import return_freed_memory
from tracegrad.trainer.policy import Policy
from tracegrad.trainer.ppo import PpoStep
from tracegrad.trainer.ranks import ALONE, Ranks
from tracegrad.trainer.refusals import StepHistory, is_silent, nothing_to_train
from tracegrad.trainer.results import Saved, Scored, StepResult
from tracegrad.trainer.samples import ChoiceSample, Samples, Turn
from tracegrad.trainer.self_sampling import PROMPT_TOKENS, self_sample
from tracegrad.trainer.sharding import like, whole
from tracegrad.trainer.step_metrics import with_account
from tracegrad.trainer.weights import DTYPES, check_names, load_state, save_serving, save_state

if TYPE_CHECKING:
    from tracegrad.trainer.lora import Trunk

_SCALES = tuple(0.05 * 2**doubling for doubling in range(8))
_SPREAD_OF_ZEROS = 0.02
_Probe = tuple[list[ChoiceSample], tuple[Scored, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Begun:
    """A step whose choices are evaluated, and how long that took."""

    plan: BatchPlan
    before: Before
    probe: _Probe | None
    seconds: float


class Learner:
    """Owns the weights of one model, default `config.trainer.model`, while a job trains them.

    `trunk` gives the base that an adapter lies on; without it the learner holds one of its own.
    """

    def __init__(
        self,
        config: Config,
        model_name: str | None = None,
        trunk: Callable[[], "Trunk"] | None = None,
        *,
        ranks: Ranks = ALONE,
    ) -> None:
        self._ranks = ranks
        self.config = config.trainer
        self.model_name = model_name or config.trainer.model
        self._adapter = config.models[self.model_name].adapter
        model = config.models[config.held_by(self.model_name)]
        self._base = Path(model.checkpoint)
        self._trunk = trunk or cache(lambda: load_trunk(config, (self.model_name,), ranks))
        self._dtype = DTYPES[model.engine.dtype]
        self._max_model_len = model.engine.max_model_len
        self._policy: Policy | None = None
        self._optimizer: torch.optim.AdamW | None = None
        self._ppo: PpoStep | None = None
        self._probe: _Probe | None = None
        self._begun: _Begun | None = None
        self._history = StepHistory()
        torch.set_num_threads(self.config.workers.threads)
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    # -- weights and folders

    def create(self, root: str) -> Checkpoint:
        """Take the base model as it is and write the checkpoint of step 0 under `root`."""
        self.start()
        return self._write(Path(root), 0)

    def start(self) -> None:
        """Take the base model as it is; an adapter starts as its seed says and computes what its base does."""
        self._adopt(self._policy_from(self._base))
        if self._adapter is None:
            check_names(self._base, self.policy)
        self._history = StepHistory()

    def load(self, path: str, expected_hash: str | None = None) -> int:
        """Verify the folder, take its weights and optimizer state, bitwise; return its step.

        Raises:
            CheckpointError: it is damaged, or is not the one the row names.
        """
        manifest = verify_checkpoint(path, expected_hash)
        self.restore(Path(path), manifest["facts"])
        return int(manifest["step"])

    def restore(self, folder: Path, facts: Mapping[str, Any]) -> None:
        """Take weights, critic, optimizer state and history out of a folder that is known to be whole, bitwise."""
        if self._policy is None:
            self._adopt(self._policy_from(folder))
        load_state(folder, self.policy, self._optimizer_or_raise())
        self._probe, self._begun = None, None
        self._history = StepHistory.from_json(facts.get("history"))

    def save(self, root: str, step: int) -> Saved:
        """Write the folder of `step`; meanwhile score the step's probe again, now under the new weights."""
        if self._ranks.size > 1:  # one thing after another: ranks must gather in one order
            made = self._write(Path(root), step)
            previous, new = self.probed()
            return Saved(checkpoint=made, previous=previous, new=new)
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(self._write, Path(root), step)
            previous, new = self.probed()
            return Saved(checkpoint=writing.result(), previous=previous, new=new)

    def write(self, folder: Path) -> dict[str, str]:
        """Fill a folder with what the engine loads and what training needs; return the sha256 of the large files."""
        optimizer = self._optimizer_or_raise()
        if self._ranks.size > 1:
            serving = save_serving(folder, self.policy, self._dtype, self._base)
            return {**serving, **save_state(folder, self.policy, optimizer, self._dtype)}
        with ThreadPoolExecutor(1) as pool:
            meanwhile = pool.submit(save_serving, folder, self.policy, self._dtype, self._base)
            return {**save_state(folder, self.policy, optimizer, self._dtype), **meanwhile.result()}

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest keeps of this model beside its files."""
        return {"model": self.model_name, "history": self._history.as_json()}

    @property
    def policy(self) -> Policy:
        """The weights. `create` or `load` comes first."""
        if self._policy is None:
            raise TrainerError("the learner has no weights yet: call create or load first")
        return self._policy

    @property
    def ppo(self) -> PpoStep:
        """The step over these weights."""
        if self._ppo is None:
            raise TrainerError("the learner has no weights yet: call create or load first")
        return self._ppo

    # -- probes

    def probed(self) -> tuple[tuple[Scored, ...], tuple[Scored, ...]]:
        """Return the last step's probe as scored before it, and scored now; both empty where there is none."""
        if self._probe is None:
            return (), ()
        choices, previous = self._probe
        return previous, scored(choices, self.ppo.evaluate(choices).logprobs_N)

    def probe_sequences(self, n_tokens: int, seed: int) -> tuple[Scored, ...]:
        """Sample sequences from the current weights and score them: a probe where no traces are at hand."""
        ids = self_sample(self.policy, n_tokens, seed=seed)
        return self.score([Scored(ids=row, n_prompt=PROMPT_TOKENS, logprobs=()) for row in ids])

    def score(self, sequences: Sequence[Scored], temperature: float = 1.0) -> tuple[Scored, ...]:
        """Return the same sequences with the logprobs of the current weights."""
        choices = [_as_choice(sequence, index, temperature) for index, sequence in enumerate(sequences)]
        return scored(choices, self.ppo.evaluate(choices).logprobs_N)

    def perturbed(self, root: str, gap: float, sequences: Sequence[Scored], seed: int) -> Saved:
        """Write a serving folder of visibly changed weights (head included), with the scores before and after.

        Every tensor gets Gaussian noise of the same share of its standard deviation, doubled until the scores differ
        by `gap` nats in the mean. The learner's weights are the same afterwards, bitwise. The folder holds no trainer
        state: it can be served, not trained.

        Raises:
            TrainerError: no noise up to eight standard deviations is seen in the scores.
        """
        previous = self.score(sequences)
        kept = {name: tensor.clone() for name, tensor in self.policy.lm_state().items()}
        try:
            for scale in _SCALES:
                generator = torch.Generator().manual_seed(seed)
                noisy = {name: like(tensor, _noisy(whole(tensor), scale, generator)) for name, tensor in kept.items()}
                self.policy.load_lm_state(noisy)
                new = self.score(sequences)
                if _mean_abs(new, previous) >= gap:
                    made = self._write_checkpoint(
                        Path(root), 0, lambda folder: save_serving(folder, self.policy, self._dtype, self._base), {}
                    )
                    return Saved(checkpoint=made, previous=previous, new=new)
        finally:
            self.policy.load_lm_state(kept)
        raise TrainerError(f"no perturbation changes the model's logprobs by {gap} nats: are its weights all zero?")

    # -- the step

    def values(self, plan: BatchPlan, samples: Samples, *, probe_tokens: int = 0) -> CriticValues:
        """Begin a step: evaluate its choices, and return what the critic says of them.

        `appraise` and `step` go on from there, told what all critics say. Raises as `step`.
        """
        self._begun = begun = self._begin(plan, samples, probe_tokens)
        return self.ppo.values(samples, begun.before)

    def appraise(
        self, plan: BatchPlan, samples: Samples, *, probe_tokens: int = 0, told: Told | None = None
    ) -> Statistics:
        """Begin a step, or go on where something is told; return its advantages before they are normalised.

        `step` goes on from there, told what those of all models are. Raises as `step`.
        """
        self._begun = begun = self._begin(plan, samples, probe_tokens) if told is None else self._going_on(plan)
        return self.ppo.spread(samples, begun.before, self._foreign(told))

    def step(
        self,
        plan: BatchPlan,
        samples: Samples,
        *,
        version_id: int | None,
        probe_tokens: int = 0,
        told: Told | None = None,
    ) -> StepResult:
        """Train one step. `version_id`: the policy version of the weights it starts with.

        `probe_tokens` > 0 keeps a publish probe of at least so many sampled tokens (or all) for `save`. `told`: what
        all models said, where each was asked for `values` or to `appraise` this step before.

        Raises:
            NothingToTrain: no choice may be trained; the message says why, and of how many tokens.
            StepRefused: see `tracegrad.trainer.ppo`; weights and optimizer are as before, but for one update that
                left what is not finite: load before going on.
        """
        begun = self._begin(plan, samples, probe_tokens) if told is None else self._going_on(plan)
        self._begun = None
        history, refuse = self._history, self.config.algorithm.refuse
        metrics = self.ppo.run(
            plan,
            samples,
            begun.before,
            version_id=version_id,
            history=history,
            batch=None if told is None else told.batch,
            foreign=self._foreign(told),
        )
        silent = is_silent(samples.rewards.values())
        self._history = history.after(metrics["grad_norm"], silent, refuse)
        self._probe = begun.probe
        return_freed_memory()
        return StepResult(
            consumption=samples.consumption,
            metrics={
                **with_account(metrics, samples),
                "runs": len(plan.run_ids),
                "silent_steps": self._history.silent_steps,
                "memory_bytes": int(self._ranks.largest(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)),
                "seconds": {**metrics["seconds"], "evaluate": begun.seconds},
            },
        )

    # -- inside

    def _begin(self, plan: BatchPlan, samples: Samples, probe_tokens: int) -> _Begun:
        started = time.monotonic()
        if not samples.choices:
            raise nothing_to_train(plan, samples.excluded_tokens)
        self._history.check_reward(plan.step, is_silent(samples.rewards.values()), self.config.algorithm.refuse)
        self._probe = None
        proximal, probe = self._proximal(samples.choices, probe_tokens)
        before = Before(proximal=proximal, reference_N=self.ppo.reference_logprobs(samples.choices))
        return _Begun(plan=plan, before=before, probe=probe, seconds=time.monotonic() - started)

    def _going_on(self, plan: BatchPlan) -> _Begun:
        if self._begun is None or self._begun.plan != plan:
            raise TrainerError(f"step {plan.step} was not begun with values or appraise: nothing to go on from")
        return self._begun

    def _foreign(self, told: Told | None) -> tuple[CriticValues, ...]:
        return () if told is None else told.foreign(self.model_name)

    def _proximal(self, choices: Sequence[ChoiceSample], probe_tokens: int) -> tuple[Evaluation | None, _Probe | None]:
        """Evaluate the step's choices where the step needs it, and the probe, in one pass: they share contexts."""
        probe = choose_probe(choices, probe_tokens, self._max_model_len - 1) if probe_tokens else []
        needed = list(choices) if self.ppo.needs_proximal else []
        if not needed and not probe:
            return None, None
        both = self.ppo.evaluate([*needed, *probe], full=bool(needed))
        n_tokens = int(token_starts(needed)[-1])
        known = (probe, scored(probe, both.logprobs_N[n_tokens:])) if probe else None
        if not needed:
            return None, known
        return both.first(n_tokens), known

    def _optimizer_or_raise(self) -> torch.optim.AdamW:
        if self._optimizer is None:
            raise TrainerError("the learner has no optimizer yet: call create or load first")
        return self._optimizer

    def _adopt(self, policy: Policy) -> None:
        settings = self.config.optimizer
        self._optimizer = torch.optim.AdamW(
            [
                {"params": list(policy.lm_masters().values()), "lr": settings.lr},
                {"params": list(policy.value_masters().values()), "lr": settings.critic_lr},
            ],
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._policy = policy
        self._ppo = PpoStep(policy, self._optimizer, self.config, self._reference())

    def _policy_from(self, folder: Path) -> Policy:
        if self._adapter is not None:
            return self._trunk().adapter(self.model_name, self._adapter, seed=self.config.seed)
        recompute = self.config.batch.gradient_checkpointing
        return Policy.from_checkpoint(
            folder, self.config.precision, gradient_checkpointing=recompute, ranks=self._ranks
        )

    def _reference(self) -> Policy | None:
        """The frozen policy that the KL term compares with. An adapter's is its base, which is there already."""
        if not self.config.algorithm.loss.kl_coef:
            return None
        if self._adapter is not None:
            return self._trunk().bare()
        reference = Policy.from_checkpoint(self._base, self.config.precision, verify=False, ranks=self._ranks)
        reference.requires_grad_(False)
        return reference

    def _write(self, root: Path, step: int) -> Checkpoint:
        return self._write_checkpoint(root, step, self.write, self.facts)

    def _write_checkpoint(
        self, root: Path, step: int, fill: Callable[[Path], Mapping[str, str]], facts: Mapping[str, Any]
    ) -> Checkpoint:
        if self._ranks.leads:
            return write_checkpoint(root, step, fill, facts)
        fill(root)
        return Checkpoint(path="", hash="", step=step, size_bytes=0, write_s=0.0)


def load_trunk(config: Config, models: Sequence[str], ranks: Ranks = ALONE) -> "Trunk":
    """Load the base of these adapters, which all lie on one, as the trainer is configured, and put them on it."""
    from tracegrad.trainer.lora import Trunk  # with peft, seconds: only where there are adapters

    trainer, base = config.trainer, config.models[config.held_by(models[0])].checkpoint
    recompute = trainer.batch.gradient_checkpointing
    trunk = Trunk.from_checkpoint(base, trainer.precision, gradient_checkpointing=recompute, verify=False, ranks=ranks)
    for model in models:
        if (adapter := config.models[model].adapter) is not None:
            trunk.adapter(model, adapter, seed=trainer.seed)
    trunk.divide()
    trunk.bare().verify()
    return trunk


def _as_choice(sequence: Scored, index: int, temperature: float) -> ChoiceSample:
    """Dress a sequence as a choice, which is what packing and evaluation take."""
    sampled = sequence.ids[sequence.n_prompt :]
    return ChoiceSample(
        run_id=f"probe-{index}",
        group_id=None,
        task_id=None,
        call_id=f"probe-{index}",
        choice_index=0,
        role=None,
        turn=Turn(),
        prompt_ids=sequence.ids[: sequence.n_prompt],
        token_ids=sampled,
        behaviour_logprobs=(0.0,) * len(sampled),
        temperature=temperature,
        finish_reason="stop",
        version_id=0,
    )


def _noisy(tensor: Tensor, scale: float, generator: torch.Generator) -> Tensor:
    """Noise relative to the tensor's own spread; absolute where it is all zeros, as B of a new adapter is."""
    spread = tensor.std(correction=0) if tensor.any() else _SPREAD_OF_ZEROS
    noise = torch.randn(tensor.shape, generator=generator, device=generator.device)
    return tensor + scale * spread * noise.to(tensor.device)  # the generator is the CPU's: the same noise everywhere


def _mean_abs(new: Sequence[Scored], previous: Sequence[Scored]) -> float:
    pairs = [pair for n, p in zip(new, previous, strict=True) for pair in zip(n.logprobs, p.logprobs, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)
