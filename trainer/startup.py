"""What a trainer does before its first lease: find its weights, clear what a kill left, and prove the engine.

Order matters. The unfinished lease is reclaimed by the controller first (a former holder is fenced from then on);
only then folders without a row are removed, because no one else can commit them any more. An unfinished publish is
ended before anything is published. Refuses a job whose every version is abandoned. Called by the controller.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import PolicyVersion
from tracegrad.tracestore.store import Store
from tracegrad.trainer.checkpoints import remove_orphans
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import EngineUnreachable
from tracegrad.trainer.errors import TrainerError
from tracegrad.trainer.preflight import check
from tracegrad.trainer.probe import ProbeSequence, ProbeSet
from tracegrad.trainer.publish import Perturbed, Publisher, canary
from tracegrad.trainer.publish_report import PublishReport
from tracegrad.trainer.results import Scored
from tracegrad.trainer.workers import Trains

CANARY_BOUNDS = 8
"""The canary's logprobs differ from the real ones by at least so many times the probe's bound."""


def find_weights(store: Store, workers: Trains, config: Config, root: Path) -> PolicyVersion:
    """Load the job's newest version that is not abandoned; with none, make the initial one from the base model.

    Raises:
        TrainerError: the job has versions and all are abandoned.
        CheckpointError: the folder is damaged, missing, or not the one its row names.
    """
    trainer = config.trainer
    own = [v for v in store.list_versions(trainer.model) if v.job_id == trainer.job and v.kind != "canary"]
    usable = [v for v in own if not v.abandoned]
    if usable:
        newest = usable[-1]
        workers.load(newest.checkpoint_path, newest.checkpoint_hash)
        return newest
    if own:
        raise TrainerError(f"every version of job {trainer.job!r} is abandoned: give the new attempt another job name")
    made = workers.create(str(root))
    return store.add_version(
        model=trainer.model,
        kind="initial",
        parent_id=None,
        checkpoint_path=made.path,
        checkpoint_hash=made.hash,
        step=0,
        job_id=trainer.job,
    )


def clear_orphans(store: Store, config: Config, root: Path) -> list[str]:
    """Remove checkpoint folders that no version row of the job names: they never happened (law 7)."""
    trainer = config.trainer
    return remove_orphans(
        root, [v.checkpoint_path for v in store.list_versions(trainer.model) if v.job_id == trainer.job]
    )


def wait_for_engines(
    clients: Sequence[EngineClient], config: Config, say: Callable[[str], None], stopped: Callable[[], bool]
) -> None:
    """Wait until every engine is up, then refuse one that lacks what training needs.

    Raises:
        EngineUnreachable: one does not answer within its start time-out.
        EngineNotReady: the preflight found something; each line says what to add.
    """
    model = config.models[config.trainer.model]
    deadline = time.monotonic() + model.engine.start_timeout_s
    for client in clients:
        while not client.healthy():
            if stopped():
                return
            if time.monotonic() > deadline:
                raise EngineUnreachable(
                    f"the engine at {client.url} did not answer for {model.engine.start_timeout_s:g} s: start it with "
                    "`tracegrad engine`, or name another with models.<name>.engine.url"
                )
            say(f"waiting for the engine at {client.url}")
            time.sleep(1.0)
        check(client, model)


def first_publish(
    publisher: Publisher, workers: Trains, config: Config, version: PolicyVersion, folder: Path
) -> PublishReport | None:
    """Make `version` live and proven, if it is not; with `publish.canary`, prove the path once per trainer start.

    The workers hold its weights. Raises as `Publisher.publish`.
    """
    settings = config.trainer.publish
    live = publisher.store.live_version(config.trainer.model)
    if live is not None and live.version_id == version.version_id and not settings.canary:
        return None
    sequences = workers.probe_sequences(settings.probe_tokens, config.trainer.seed)
    if not settings.canary:
        return publisher.publish(version.version_id, probe_set(sequences))

    def perturb(_probe: ProbeSet) -> Perturbed:
        saved = workers.perturbed(str(folder), CANARY_BOUNDS * settings.probe_bound, sequences, config.trainer.seed)
        scores = tuple(sequence.logprobs for sequence in saved.new)
        return Perturbed(checkpoint_path=saved.checkpoint.path, checkpoint_hash=saved.checkpoint.hash, logprobs=scores)

    try:
        return canary(publisher, version.version_id, probe_set(sequences), perturb)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def probe_set(new: tuple[Scored, ...], previous: tuple[Scored, ...] | None = None) -> ProbeSet:
    """Turn the learner's scores into the publisher's probe."""
    return ProbeSet(
        sequences=tuple(ProbeSequence(ids=sequence.ids, n_prompt=sequence.n_prompt) for sequence in new),
        new_logprobs=tuple(sequence.logprobs for sequence in new),
        previous_logprobs=None if previous is None else tuple(sequence.logprobs for sequence in previous),
    )
