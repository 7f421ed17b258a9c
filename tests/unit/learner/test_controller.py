"""The loop on a real store, in one process: what commits, what is thrown away, and what the next start does."""

import hashlib
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import recorded_runs as recorded
from in_process import InProcess
from offline_training import train

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.errors import LeaseLost, StoreUnavailable
from tracegrad.tracestore.records import Lease
from tracegrad.tracestore.rules import ANY_STALENESS, lease_rule
from tracegrad.tracestore.step_records import StepCommit
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import sql
from tracegrad.trainer.checkpoints import list_checkpoints
from tracegrad.trainer.controller import step_seed
from tracegrad.trainer.errors import CheckpointError, JobBusy, NothingToTrain, StepRefused, TrainerError
from tracegrad.trainer.job_folder import JobFolder
from tracegrad.trainer.lease_keeper import LeaseKeeper

Configure = Callable[..., Config]


@pytest.fixture(scope="session")
def undisturbed(llama: Path, recorded_store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Checkpoint hashes of four steps that nothing interrupted, by a job of another name in a store of its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    shutil.copyfile(recorded_store, folder / "store.db")
    config = recorded.configuration(llama, folder / "out", store=f"sqlite:///{folder}/store.db", job="undisturbed")
    with closing(open_store(config.store, create=False)) as opened:
        train(config, opened)
        return hashes(opened, "undisturbed")


class Dies(Exception):
    """Stands for the death of the process."""


class Mortal(InProcess):
    """Dies at a named point of a step."""

    def __init__(self, config: Config, point: str, step: int) -> None:
        super().__init__(config)
        self.at = (point, step)

    def step(self, plan: Any, samples: Any, **kwargs: Any) -> Any:
        if self.at == ("before-step", plan.step):
            raise Dies
        return super().step(plan, samples, **kwargs)

    def save(self, root: str, step: int) -> Any:
        if self.at == ("before-save", step):
            raise Dies
        saved = super().save(root, step)
        if self.at == ("after-save", step):
            raise Dies
        return saved


def hashes(store: Store, job: str = "test") -> list[str]:
    return [v.checkpoint_hash for v in store.list_versions(recorded.MODEL) if v.job_id == job]


def test_offline_trains_all_ready_groups_and_conserves_every_token(
    configure: Configure, store: Store, undisturbed: list[str]
) -> None:
    config = configure(steps=10)
    said = train(config, store)
    assert said[-1] == "stopped after step 4: 0 ready groups are left, a step takes 2"
    report = store.consumption("test")
    assert report.conserved
    assert report.trained == report.stored > 0
    assert hashes(store) == undisturbed
    last = store.last_checkpoint("test")
    assert last is not None
    assert last.step == 4
    assert last.metrics["step"] == 4
    versions = [v for v in store.list_versions(recorded.MODEL) if v.job_id == "test"]
    assert [(v.kind, v.step) for v in versions] == [("initial", 0), *(("step", step) for step in (1, 2, 3, 4))]
    assert [v.parent_id for v in versions[1:]] == [v.version_id for v in versions[:-1]]
    kept = list_checkpoints(Path(config.trainer.output) / "test" / "checkpoints")
    assert [p.name[:11] for p in kept] == ["step-000000", "step-000003", "step-000004"]


def test_other_settings_train_other_weights(configure: Configure, store: Store, undisturbed: list[str]) -> None:
    """What makes the equalities of this file mean something."""
    train(configure(steps=1, optimizer={"minibatches": 2}), store)
    assert hashes(store)[0] == undisturbed[0]
    assert hashes(store)[1] != undisturbed[1]


@pytest.mark.parametrize("point", ["before-step", "before-save", "after-save"])
def test_a_death_in_a_step_is_continued_to_the_same_bits(
    configure: Configure, store: Store, undisturbed: list[str], point: str
) -> None:
    config = configure()
    with pytest.raises(Dies):
        train(config, store, Mortal(config, point, 3))
    assert len(hashes(store)) == 3
    said = train(config, store)
    assert any("never committed" in line for line in said) is (point == "after-save")
    assert hashes(store) == undisturbed
    metrics = (Path(config.trainer.output) / "test" / "metrics.jsonl").read_text().splitlines()
    assert [line.split('"step": ')[1][0] for line in metrics] == ["1", "2", "3", "4"]


def test_a_lost_lease_throws_the_step_away(configure: Configure, store: Store, undisturbed: list[str]) -> None:
    """The lease is reclaimed behind the trainer's back once; it restores, and its next lease trains."""
    config = configure(steps=2)

    class Robbed(InProcess):
        robbed: Lease | None = None

        def step(self, plan: Any, samples: Any, **kwargs: Any) -> Any:
            result = super().step(plan, samples, **kwargs)
            if plan.step == 2 and self.robbed is None:
                self.robbed = store.reclaim("test", 60.0)
            return result

    workers = Robbed(config)
    said = train(config, store, workers)
    assert any(line.startswith("step 2 is thrown away") for line in said)
    assert hashes(store)[:2] == undisturbed[:2]
    assert store.last_checkpoint("test").step == 2  # type: ignore[union-attr]
    assert len(list_checkpoints(Path(config.trainer.output) / "test" / "checkpoints")) == 3


def test_a_refused_step_stops_training_and_commits_nothing(configure: Configure, store: Store) -> None:
    class Refuses(InProcess):
        def step(self, plan: Any, samples: Any, **kwargs: Any) -> Any:
            raise StepRefused(f"step {plan.step}: loss nan")

    config = configure()
    with pytest.raises(StepRefused):
        train(config, store, Refuses(config))
    assert store.last_checkpoint("test") is None
    assert store.reclaim("test", 60.0) is None, "the lease is returned, so that mended rewards are seen"


def test_a_step_that_ruins_the_weights_is_not_committed_and_the_job_goes_on(configure: Configure, store: Store) -> None:
    ruinous = configure(optimizer={"lr": 1e39})
    with pytest.raises(StepRefused, match="step 1: after the update"):
        train(ruinous, store)
    assert store.last_checkpoint("test") is None
    train(configure(), store)
    assert store.last_checkpoint("test").step == 4  # type: ignore[union-attr]


def test_a_stop_ends_after_the_step_at_hand(configure: Configure, store: Store) -> None:
    config, stop = configure(), Event()

    class Interrupted(InProcess):
        def step(self, plan: Any, samples: Any, **kwargs: Any) -> Any:
            stop.set()
            return super().step(plan, samples, **kwargs)

    train(config, store, Interrupted(config), stop)
    assert store.last_checkpoint("test").step == 1  # type: ignore[union-attr]


def test_an_abandoned_version_is_not_built_on(configure: Configure, store: Store) -> None:
    config = configure(steps=2)
    train(config, store)
    versions = [v for v in store.list_versions(recorded.MODEL) if v.job_id == "test"]
    store.abandon_version(versions[-1].version_id)
    train(configure(steps=3), store)
    newest = store.list_versions(recorded.MODEL)[-1]
    assert (newest.step, newest.parent_id) == (3, versions[1].version_id)
    for version in store.list_versions(recorded.MODEL):
        store.abandon_version(version.version_id)
    with pytest.raises(TrainerError, match="abandoned version"):
        train(config, store)


@pytest.mark.parametrize("when", ["while it waits", "in the step", "at the commit"])
def test_a_rollback_under_a_trainer_at_work_is_kept(configure: Configure, store: Store, when: str) -> None:
    """It must not go on from the weights it still holds: the next step is built on what was left."""
    config = configure(steps=3)
    rolled_back: list[int] = []

    def roll_back() -> None:
        if not rolled_back:
            rolled_back.append(store.list_versions(recorded.MODEL)[-1].version_id)
            store.abandon_version(rolled_back[0])

    class Watched(InProcess):
        computed: tuple[int, ...] = ()

        def step(self, plan: Any, samples: Any, **kwargs: Any) -> Any:
            result = super().step(plan, samples, **kwargs)
            self.computed += (plan.step,)
            if plan.step == 2 and when == "in the step":
                roll_back()
            return result

    workers = Watched(config)
    lease, commit_step = Store.lease, Store.commit_step

    def leased(self: Store, *args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == 2 and when == "while it waits":
            roll_back()
        return lease(self, *args, **kwargs)

    def committed(self: Store, lease: Lease, commit: StepCommit) -> Any:
        if lease.plan.step == 2 and when == "at the commit":
            roll_back()
        return commit_step(self, lease, commit)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Store, "lease", leased)
        patched.setattr(Store, "commit_step", committed)
        said = train(config, store, workers)
    assert f"step 2 is thrown away: version {rolled_back[0]}, which it builds on, was abandoned" in "\n".join(said)
    assert workers.computed == ((1, 2, 3) if when == "while it waits" else (1, 2, 2, 3))
    made = {v.step: v for v in store.list_versions(recorded.MODEL) if v.job_id == "test"}
    assert made[2].parent_id == made[0].version_id
    assert made[1].abandoned and not made[2].abandoned


def test_a_damaged_last_checkpoint_stops_the_start(configure: Configure, store: Store) -> None:
    config = configure(steps=1)
    train(config, store)
    newest = store.list_versions(recorded.MODEL)[-1]
    (Path(newest.checkpoint_path) / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        train(config, store)


def test_one_trainer_a_job(configure: Configure, store: Store) -> None:
    config = configure()
    with JobFolder(config.trainer).held(), pytest.raises(JobBusy, match="another trainer"):
        train(config, store)


def test_step_seeds_are_the_first_32_bits_of_a_hash() -> None:
    """Resume depends on this rule staying what it is."""
    assert step_seed(0, 1) == int(hashlib.sha256(b"0:1").hexdigest()[:8], 16)
    assert len({step_seed(seed, step) for seed in range(3) for step in range(3)}) == 9


def test_the_lease_rule_follows_the_configuration(configure: Configure) -> None:
    rule = lease_rule(configure(batch={"max_staleness": 3, "min_group": 4}))
    assert (rule.trained[0].roles, rule.max_staleness, rule.min_group, rule.reward_names) == (recorded.ROLES, 3, 1, ())
    grouped = configure(
        algorithm={"credit": {"advantage": "grpo", "reward_weights": {"style": 0.5, "score": 1.0}}},
        batch={"min_group": 4},
    )
    assert (lease_rule(grouped).min_group, lease_rule(grouped).reward_names) == (4, ("score", "style"))
    assert lease_rule(grouped, offline=True).max_staleness == ANY_STALENESS


def test_the_keeper_renews_and_reports_a_loss(configure: Configure, store: Store) -> None:
    class Away:
        def __init__(self) -> None:
            self.calls = 0
            self.renewed = Event()

        def renew(self, lease: Lease, lease_s: float) -> Lease:
            self.calls += 1
            if self.calls == 1:
                raise StoreUnavailable("down")
            if self.calls == 3:
                self.renewed.set()
                raise LeaseLost("gone")
            return lease

    lease = Lease(lease_id=1, token=1, job_id="j", plan=None, expires_at=4e9)  # type: ignore[arg-type]
    away = Away()
    with LeaseKeeper(away, lease, 0.03) as keeper:
        assert keeper.current == lease
        assert away.renewed.wait(10)
    with pytest.raises(LeaseLost):
        _ = keeper.current


def only_context(store: Store, *groups: int) -> None:
    """Flag every answer of these groups, so that nothing in them may train."""
    flag = "UPDATE choices SET flags = '[\"greedy\"]' WHERE seq IN (SELECT seq FROM calls WHERE call_id LIKE :call)"
    for group in groups:
        sql(store, flag, call=f"call-s0-g{group:03d}-%")


def test_a_batch_with_nothing_to_train_is_put_aside_once(configure: Configure, store: Store) -> None:
    """It is not leased again, not by the next start either; the other groups are trained."""
    only_context(store, 0, 1)
    said = train(configure(steps=9), store)
    aside = [line for line in said if "nothing to train" in line]
    assert len(aside) == 1 and aside[0].startswith("step 1: nothing to train in 8 runs. greedy: ")
    assert said[-1] == "stopped after step 3: 0 ready groups are left, a step takes 2"
    assert store.consumption("test").excluded.keys() == {"refused"}
    assert [one.refused.keys() for one in store.dead_runs("test")] == [{"greedy"}] * 8
    assert "nothing to train" not in "".join(train(configure(steps=9), store))


def test_batch_after_batch_with_nothing_to_train_stops(configure: Configure, store: Store) -> None:
    """That is no chance: the rest of the queue stays as it is."""
    only_context(store, *range(8))
    with pytest.raises(NothingToTrain, match="3 batches in a row: stopped"):
        train(configure(), store)
    assert store.queue("test").groups == {"not leased": 2, "refused": 6}
    assert store.last_checkpoint("test") is None
