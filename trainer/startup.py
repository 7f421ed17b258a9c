"""What a trainer does before its first lease: find its weights, clear what a kill left, and prove the engines.

Order matters. An unfinished publish is ended before anything else: calls are held for it. The unfinished lease is
reclaimed by the controller before weights are looked for (a former holder is fenced from then on); only then folders
without a row are removed, because no one else can commit them any more. Refuses a job whose every version is abandoned.
Called by the controller and by `publishing`.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
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
from tracegrad.trainer.worker_groups import WorkerGroups

CANARY_BOUNDS = 8
"""The canary's logprobs differ from the real ones by at least so many times the probe's bound."""


def find_weights(store: Store, workers: WorkerGroups, config: Config, root: Path) -> dict[str, PolicyVersion]:
    """Load the job's newest step, all models of it; return the version that each model stands at.

    With no step yet, make the initial versions from the base models. A checkpoint holds all models, so they go back
    together: a step of which one version is abandoned is not built on, and its other versions are abandoned now.

    Raises:
        TrainerError: the job has versions, and no step is left.
        CheckpointError: the folder is damaged, missing, or not the one its rows name.
    """
    own = {model: _own_versions(store, config, model) for model in config.trained_models()}
    everything = [version for versions in own.values() for version in versions]
    for step in sorted({version.step for version in everything}, reverse=True):
        made = [version for version in everything if version.step == step]
        if all(versions for versions in own.values()) and not any(version.abandoned for version in made):
            workers.load(made[-1].checkpoint_path, made[-1].checkpoint_hash)
            for version in everything:
                if version.step > step and not version.abandoned:
                    store.abandon_version(version.version_id)
            return {model: _newest(versions, step) for model, versions in own.items()}
    if any(version.abandoned or version.step for version in everything):
        job = config.trainer.job
        raise TrainerError(f"every step of job {job!r} has an abandoned version: give the new attempt another job name")
    return _begin(store, workers, config, own, root)


def _own_versions(store: Store, config: Config, model: str) -> list[PolicyVersion]:
    return [v for v in store.list_versions(model) if v.job_id == config.trainer.job and v.kind != "canary"]


def _newest(versions: Sequence[PolicyVersion], step: int) -> PolicyVersion:
    """The version at a step: a model that a step did not train stays at the one it had."""
    return [version for version in versions if version.step <= step and not version.abandoned][-1]


def _begin(
    store: Store, workers: WorkerGroups, config: Config, own: Mapping[str, Sequence[PolicyVersion]], root: Path
) -> dict[str, PolicyVersion]:
    """Make the initial versions; those that a killed trainer had written already name the same checkpoint."""
    made = workers.create(str(root))
    return {
        model: known[-1]
        if known
        else store.add_version(
            model=model,
            kind="initial",
            parent_id=None,
            checkpoint_path=made.by_model[model].path,
            checkpoint_hash=made.checkpoint.hash,
            step=0,
            job_id=config.trainer.job,
        )
        for model, known in own.items()
    }


def clear_orphans(store: Store, config: Config, root: Path) -> list[str]:
    """Remove checkpoint folders that no version row of the job names: they never happened (law 7)."""
    versions = [version for model in config.trained_models() for version in store.list_versions(model)]
    return remove_orphans(root, [v.checkpoint_path for v in versions if v.job_id == config.trainer.job])


def wait_for_engines(
    engines: Mapping[str, Sequence[EngineClient]],
    config: Config,
    say: Callable[[str], None],
    stopped: Callable[[], bool],
) -> None:
    """Wait until every engine of every model is up, then refuse one that lacks what training needs.

    Raises:
        EngineUnreachable: one does not answer within its start time-out.
        EngineNotReady: the preflight found something; each line says what to add.
    """
    started = time.monotonic()
    for name, clients in engines.items():
        model = config.models[config.held_by(name)]
        for client in clients:
            while not client.healthy():
                if stopped():
                    return
                if time.monotonic() > started + model.engine.start_timeout_s:
                    raise EngineUnreachable(
                        f"the engine at {client.url} did not answer for {model.engine.start_timeout_s:g} s: start it "
                        "with `tracegrad engine`, or name another with models.<name>.engine.url"
                    )
                say(f"waiting for the engine at {client.url}")
                time.sleep(1.0)
            slots = config.adapter_slots(config.held_by(name))
            check(client, model, in_flight=config.publishes_in_flight, slots=slots)


def first_publish(
    publisher: Publisher, workers: WorkerGroups, config: Config, version: PolicyVersion, folder: Path
) -> PublishReport | None:
    """Make `version` live and proven, if it is not; with `publish.canary`, prove the path once per trainer start.

    The workers hold its weights. Raises as `Publisher.publish`.
    """
    settings, model, seed = config.trainer.publish, version.model, config.trainer.seed
    live = publisher.store.live_version(model)
    if live is not None and live.version_id == version.version_id and not settings.canary:
        return None
    sequences = workers.probe_sequences(model, settings.probe_tokens, seed)
    if not settings.canary:
        return publisher.publish(version.version_id, probe_set(sequences))

    def perturb(_probe: ProbeSet) -> Perturbed:
        saved = workers.perturbed(model, str(folder), CANARY_BOUNDS * settings.probe_bound, sequences, seed)
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
