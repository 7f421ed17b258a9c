"""The publisher's side of the gate: which engines try a candidate, waiting for its judges, and the rule's answer.

Nobody is made to wait for a judge that is not there: before anything is drained an evaluator has to have a heartbeat
and, where the two are to be compared, the live version its evaluation on the same tasks. Every wait ends at the gate's
time-out, and what was not judged by then is rejected (law 9). Not gated: the first version of a model (there is nothing
to go back to) and one that was live before. Refuses nothing itself. Called by `publish`, the controller and start-up.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence

from tracegrad.tracestore.config import Config, GateConfig
from tracegrad.tracestore.gating import (
    Decision,
    GateTerms,
    StoredEvaluation,
    evaluator_of,
    judge,
    unjudged,
    was_rejected,
)
from tracegrad.tracestore.records import PolicyVersion
from tracegrad.tracestore.store import Store
from tracegrad.trainer.engine_client import EngineClient

STOPPED = "its publisher was told to stop"
POLL_S = 0.1


class Gatekeeper:
    """Judges candidates of `models`, as one where there are several. `stopped` is asked while it waits."""

    def __init__(
        self,
        store: Store,
        settings: GateConfig,
        models: Sequence[str],
        *,
        expires_s: float,
        stopped: Callable[[], bool],
    ) -> None:
        self.settings = settings
        self._store = store
        self._models = tuple(models)
        self._expires_s = expires_s
        self._stopped = stopped

    def triers(self, engines: Sequence[EngineClient]) -> tuple[EngineClient, ...]:
        """Return the engines that get a candidate first: as many as its share needs.

        All of them where there is only one, or where the candidate is to serve everybody; else one at least is left. An
        only one that can serve it beside what is live does so where the gate divides runs between them.
        """
        if len(engines) == 1 and 0 < self.settings.share < 1 and (beside := engines[0].beside()) is not None:
            return (beside,)
        if len(engines) == 1 or self.settings.share == 1:
            return tuple(engines)
        count = min(max(math.ceil(self.settings.share * len(engines)), 1), len(engines) - 1)
        return tuple(engines[-count:])

    def terms(self, engines: Sequence[EngineClient]) -> GateTerms:
        """Return what proxies have to know; `engines` get the candidate first."""
        urls = tuple(engine.url for engine in engines)
        beside, settings = any(engine.is_beside for engine in engines), self.settings
        return GateTerms(share=settings.share, engines=urls, timeout_s=settings.timeout_s, beside=beside)

    def live(self) -> dict[str, int]:
        """Return model -> the version that is live of it."""
        found = {model: self._store.live_version(model) for model in self._models}
        return {model: version.version_id for model, version in found.items() if version is not None}

    def refuses(self, live: Mapping[str, int]) -> Decision | None:
        """Wait for an evaluator and, to compare with, the evaluation of what is live; None: candidates can be judged.

        Otherwise the decision says why not.
        """
        needs_baseline = self.settings.rule.max_drop is not None
        known = {each.evaluation_id for each in self._store.evaluations_of(live)}
        deadline = time.monotonic() + self.settings.timeout_s
        while True:
            evaluators = self._store.living_evaluators(evaluator_of(self._models), self._expires_s)
            for each in evaluators:
                baseline = self._store.find_baseline(live, each.tasks_hash, each.score)
                if baseline is not None or not needs_baseline:
                    return None
            for made in self._store.evaluations_of(live):
                if made.evaluation_id not in known and made.mean is None and made.publish_id is None:
                    return unjudged(f"the live version {_ids(live)} could not be evaluated: {_nothing(made)}")
            if self._stopped():
                return unjudged(STOPPED)
            if time.monotonic() > deadline:
                lacks = (
                    "the live version was not evaluated" if evaluators else "no evaluator came: run `tracegrad gate`"
                )
                return unjudged(f"{lacks} (waited {self.settings.timeout_s:g} s)")
            time.sleep(POLL_S)

    def decide(self, publish_id: int, versions: Mapping[str, int], live: Mapping[str, int]) -> Decision:
        """Wait for the evaluation of the candidates and apply the rule; what is not there in time is not judged.

        `publish_id` is the first of theirs, `versions` (model -> version) what is judged, `live` what it replaces.
        """
        deadline = time.monotonic() + self.settings.timeout_s
        while not (made := self._store.list_evaluations(publish_id=publish_id)):
            if self._stopped():
                return unjudged(STOPPED)
            if time.monotonic() > deadline:
                return unjudged(f"it was not evaluated within {self.settings.timeout_s:g} s")
            time.sleep(POLL_S)
        candidate = made[-1]
        if candidate.versions != versions:
            return unjudged(
                f"evaluation {candidate.evaluation_id} is of version {_ids(candidate.versions)}, not of "
                f"{_ids(versions)}: `tracegrad gate` needs the trainer's configuration"
            )
        baseline = self._store.find_baseline(live, candidate.tasks_hash, candidate.score)
        if baseline is None and self.settings.rule.max_drop is not None:
            return unjudged(f"the live version has no evaluation on the tasks of evaluation {candidate.evaluation_id}")
        return judge(self.settings.rule, candidate, baseline)


def needs_gate(store: Store, version: PolicyVersion, live: PolicyVersion | None) -> bool:
    """Return whether a version has to pass the gate: something else is live, and this one never was."""
    if live is None:
        return False
    return all(p.state != "live" for p in store.list_publishes(version.model) if p.version_id == version.version_id)


def version_to_serve(store: Store, newest: PolicyVersion) -> PolicyVersion:
    """Return what a trainer serves when it starts: its newest version, unless that is held back.

    That is the pinned version where there is a pin, and the live one where the gate judged against the newest.
    """
    pin, live = store.pinned(newest.model), store.live_version(newest.model)
    if pin is not None:
        return store.get_version(pin)
    return live if live is not None and _is_rejected(store, newest) else newest


def abandon_rejected(store: Store, config: Config) -> list[PolicyVersion]:
    """With `rejected.then: return`: abandon the job's newest versions that were judged against; return them."""
    gate, trainer = config.trainer.publish.gate, config.trainer
    found: list[PolicyVersion] = []
    if gate is None or gate.rejected.then != "return":
        return found
    for model in config.trained_models():
        own = [v for v in store.list_versions(model) if v.job_id == trainer.job and v.kind == "step"]
        for version in reversed([v for v in own if not v.abandoned]):
            if not _is_rejected(store, version):
                break
            store.abandon_version(version.version_id)
            found.append(version)
    return found


def _is_rejected(store: Store, version: PolicyVersion) -> bool:
    mine = [p for p in store.list_publishes(version.model) if p.version_id == version.version_id]
    return any(was_rejected(p.decision) for p in mine) and all(p.state != "live" for p in mine)


def _ids(versions: Mapping[str, int]) -> str:
    return ", ".join(str(version_id) for _, version_id in sorted(versions.items()))


def _nothing(evaluation: StoredEvaluation) -> str:
    return evaluation.error or f"none of its {evaluation.n_runs} runs has the score {evaluation.score!r}"
