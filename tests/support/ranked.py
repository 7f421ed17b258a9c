"""Ranks of one worker group in processes of their own, without Ray: forks of a warm one, so that each costs a second.

As a program it imports the trainer, then for each line `FOLDER SIZE RANK AFTER_S` on its standard input forks SIZE
processes that meet in a file. Each runs the task that `FOLDER/task` holds and leaves its answer there; RANK (-1: none)
is killed after so many seconds, and whoever then hangs a little later. It prints the exit statuses. `Crew` is the other
end.
Used by tests/wire/learner/test_ranks.py and tests/wire/learner/test_ranks_killed.py.
"""

import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warm import Warm

if TYPE_CHECKING:
    from tracegrad.trainer.ranks import Ranks

_LOOK_S = 0.002
_END_S = 240.0
_GRACE_S = 3.0
"""So long the others of a killed rank may take to notice, as those in a collective do: then all are ended."""


class Crew(Warm):
    """Owns the warm process. A context manager. `folder`: for what the ranks are told and say."""

    def __init__(self, folder: Path) -> None:
        super().__init__(__file__)
        self._folder, self._runs = folder, 0

    def run(self, size: int, task: Any) -> list[Any]:
        """Have `size` ranks do the task; return what each answered."""
        statuses, answers = self.try_to(size, task)
        assert statuses == [0] * size, answers
        return answers

    def try_to(self, size: int, task: Any, *, kill: int = -1, after_s: float = 0.0) -> tuple[list[int], list[Any]]:
        """Return the exit statuses of the ranks, and the answers; of a rank that raised, the traceback."""
        self._runs += 1
        folder = self._folder / f"run-{self._runs}"
        folder.mkdir()
        (folder / "task").write_bytes(pickle.dumps(task))
        self.tell(f"{folder} {size} {kill} {after_s}")
        statuses = [int(status) for status in self.hear().split()]
        files = [folder / f"answer-{rank}" for rank in range(size)]
        return statuses, [pickle.loads(f.read_bytes()) if f.exists() else None for f in files]


@dataclass(frozen=True, kw_only=True)
class Train:
    """Start (or restore from `begin`) a group, train one step for each of `plans`, and write what is left into `end`.

    The answer: of each model the metrics of its steps, the gradients of its first update, the share of its masters and
    moments that the rank holds, and what was written.
    """

    config: Any
    group: str
    samples: Mapping[str, Any]
    plans: tuple[Any, ...]
    begin: str | None = None
    facts: Mapping[str, Any] | None = None
    end: str | None = None

    def __call__(self, ranks: "Ranks") -> dict[str, Any]:
        from tracegrad.trainer.exchange import Told
        from tracegrad.trainer.model_group import ModelGroup

        group = ModelGroup(self.config, self.group, ranks)
        if self.begin is None:
            group.start()
        else:
            assert self.facts is not None
            group.restore(self.begin, self.facts)
        gradients = {model: _gradients(learner) for model, learner in group.learners.items()}
        metrics: dict[str, list[Any]] = {model: [] for model in group.learners}
        for plan in self.plans:
            told = None
            if self.config.trainer.algorithm.credit.bootstrap == "all":
                told = Told(values=group.values(plan, self.samples, probe_tokens=8))
            versions = dict.fromkeys(group.learners, 1)
            done = group.step(plan, self.samples, version_ids=versions, probe_tokens=8, told=told)
            for model, result in done.items():
                metrics[model].append(result.metrics)
        written = group.write(self.end) if self.end is not None else {}
        shares = {model: _share(learner) for model, learner in group.learners.items()}
        return {"metrics": metrics, "gradients": gradients, "written": written, "shares": shares}


@dataclass(frozen=True, kw_only=True)
class Canary:
    """Sample a probe, write visibly changed weights, and be refused a step; the answer holds what was said of each."""

    config: Any
    group: str
    model: str
    folder: str
    poisoned: Any
    plan: Any

    def __call__(self, ranks: "Ranks") -> dict[str, Any]:
        from tracegrad.trainer.errors import StepRefused
        from tracegrad.trainer.model_group import ModelGroup

        group = ModelGroup(self.config, self.group, ranks)
        group.start()
        probe = group.probe_sequences(self.model, 32, seed=3)
        saved = group.perturbed(self.model, self.folder, 0.05, probe, seed=4)
        after = group.score(self.model, probe)
        refused = ""
        try:
            samples = dict.fromkeys(group.learners, self.poisoned)
            group.step(self.plan, samples, version_ids=dict.fromkeys(group.learners, 1))
        except StepRefused as error:
            refused = str(error)
        again = group.score(self.model, probe)
        return {"probe": probe, "changed": saved.new, "after": after, "refused": refused, "again": again}


@dataclass(frozen=True, kw_only=True)
class Ruined:
    """Train a step whose update leaves an infinity in what the last rank alone holds; the answer is the refusal."""

    config: Any
    samples: Any
    plan: Any

    def __call__(self, ranks: "Ranks") -> str:
        from tracegrad.trainer.errors import StepRefused
        from tracegrad.trainer.learner import Learner
        from tracegrad.trainer.sharding import own_part

        learner = Learner(self.config, ranks=ranks)
        learner.start()

        def ruin(*_: Any) -> None:
            if ranks.rank == ranks.size - 1:
                own_part(learner.policy.lm_state()["model.norm.weight"])[-1] = float("inf")

        learner._optimizer_or_raise().register_step_post_hook(ruin)
        try:
            learner.step(self.plan, self.samples, version_id=1)
        except StepRefused as error:
            return str(error)
        return ""


@dataclass(frozen=True, kw_only=True)
class Live:
    """Train until a step from the last checkpoint under `root`, or from the base, with a checkpoint after each step."""

    config: Any
    samples: Any
    plans: tuple[Any, ...]
    root: str

    def __call__(self, ranks: "Ranks") -> None:
        from tracegrad.trainer.checkpoints import list_checkpoints
        from tracegrad.trainer.learner import Learner

        learner = Learner(self.config, ranks=ranks)
        written = list_checkpoints(Path(self.root))
        if written:
            learner.load(str(written[-1]))
        else:
            learner.create(self.root)
        for plan in self.plans[max(0, len(written) - 1) :]:
            learner.step(plan, self.samples, version_id=1, probe_tokens=8)
            learner.save(self.root, plan.step)


def _share(learner: Any) -> float:
    from torch.distributed.tensor import DTensor

    from tracegrad.trainer.weights import named_masters

    masters = list(named_masters(learner.policy).values())
    held = [
        *masters,
        *(state[name] for state in learner._optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")),
    ]
    local = sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel() for tensor in held)
    return float(local / sum(tensor.numel() for tensor in held))


def _gradients(learner: Any) -> dict[str, Any]:
    """Return a mapping that fills with the whole gradients of the learner's first update."""
    from tracegrad.trainer.sharding import whole
    from tracegrad.trainer.weights import named_masters

    found: dict[str, Any] = {}

    def keep(*_: Any) -> None:
        if not found:
            masters = named_masters(learner.policy).items()
            found.update({name: whole(p.grad).numpy().copy() for name, p in masters if p.grad is not None})

    learner._optimizer.register_step_pre_hook(keep)
    return found


def _be(rank: int, size: int, folder: Path) -> int:
    import torch

    from tracegrad.trainer.ranks import join

    task = pickle.loads((folder / "task").read_bytes())
    store = torch.distributed.FileStore(str(folder / "meeting"), size)
    try:
        answer, status = task(join(rank, size, "cpu", store)), 0
    except BaseException:  # noqa: BLE001 - the test wants to know what it was
        answer, status = traceback.format_exc(), 1
    (folder / f"answer-{rank}").write_bytes(pickle.dumps(answer))
    return status


def _serve() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401 - imported lazily: now, and not in each child

    import tracegrad.trainer.lora
    import tracegrad.trainer.model_group  # noqa: F401

    for line in sys.stdin:
        folder, size, kill, after_s = line.split()
        pids = []
        for rank in range(int(size)):
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    status = _be(rank, int(size), Path(folder))
                finally:
                    os._exit(status)
            pids.append(pid)
        print(*_ends(pids, int(kill), float(after_s)), flush=True)


def _ends(pids: list[int], kill: int, after_s: float) -> list[int]:
    """Wait for the children. One is killed when its time has come; all, when they take too long for any test."""
    began, statuses = time.monotonic(), dict.fromkeys(pids, -signal.SIGALRM)
    alive, end_s = list(pids), _END_S
    while alive:
        for pid in list(alive):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                alive.remove(pid)
                statuses[pid] = os.waitstatus_to_exitcode(status)
        lived = time.monotonic() - began
        if kill >= 0 and lived >= after_s and pids[kill] in alive:
            os.kill(pids[kill], signal.SIGKILL)
            end_s = min(end_s, lived + _GRACE_S)
        if lived > end_s:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK_S)
    return list(statuses.values())


if __name__ == "__main__":
    sys.modules["ranked"] = sys.modules["__main__"]  # tasks are pickled by the name that tests import them by
    _serve()
