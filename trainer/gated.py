"""Candidates of one model or of several through the gate as one: all live, or the previous versions of all.

One evaluation of the whole workflow judges them, so no call may reach one of them before all can be reached, and none
stays where one has to go: they are drained and swapped model by model, and from `evaluating` on they move in one
transaction of the store. Where one cannot be swapped or is not what was trained, none is judged. A candidate beside
what is live (an adapter, see `gate`) is loaded and probed before anybody waits; it takes the live one's place when it
passed, and is unloaded however else it ends. What a publisher that dies leaves behind is ended model by model by
`Publisher.recover`: nothing was live before all were.

Refuses (PublishRejected) what the gate does not let pass, and (PublishFailed) what `publish` refuses. Called by
`publish` and `publishing`.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tracegrad.tracestore.errors import Conflict
from tracegrad.tracestore.gating import Decision, unjudged
from tracegrad.tracestore.publishes import UNFINISHED
from tracegrad.tracestore.records import PolicyVersion, Publish, PublishState
from tracegrad.trainer.engine_errors import UNFINISHED_STAYS, PublishFailed, PublishRejected
from tracegrad.trainer.errors import EngineError
from tracegrad.trainer.fleet import Fleet, refuse_bad
from tracegrad.trainer.gate import STOPPED, Gatekeeper
from tracegrad.trainer.probe import ProbeResult, ProbeSet
from tracegrad.trainer.publish_report import PublishReport, Stopwatch

if TYPE_CHECKING:
    from tracegrad.trainer.publish import Perturbed, Publisher


@dataclass(frozen=True, slots=True)
class Attempt:
    """A publish under way: of which version, over which live one, and the engines that get it first."""

    publish: Publish
    version: PolicyVersion
    previous: PolicyVersion | None
    first: Fleet


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """What is to be published by whom; `previous` is what it takes the place of."""

    publisher: "Publisher"
    version: PolicyVersion
    previous: PolicyVersion
    probe: ProbeSet | None = None
    canary: "Perturbed | None" = None


@dataclass(slots=True)
class _Way:
    """One candidate on its way."""

    candidate: Candidate
    attempt: Attempt
    clock: Stopwatch = field(default_factory=Stopwatch)
    canary_seen: ProbeResult | None = None
    seen: ProbeResult | None = None

    @property
    def publisher(self) -> "Publisher":
        return self.candidate.publisher

    @property
    def publish_id(self) -> int:
        return self.attempt.publish.publish_id

    @property
    def is_tried(self) -> bool:
        """Whether it is loaded and probed before anybody waits: beside what serves nobody meets it yet."""
        return self.attempt.first.is_beside and self.candidate.canary is None

    @property
    def model(self) -> str:
        return self.attempt.version.model

    @property
    def rest(self) -> Fleet:
        """The engines that have not got it yet."""
        return self.publisher.fleet.without(self.attempt.first)

    def report(self, decision: Decision | None) -> PublishReport:
        """Return how it went until now."""
        return PublishReport(
            publish_id=self.publish_id,
            version_id=self.attempt.version.version_id,
            model=self.model,
            probe=self.seen,
            canary=self.canary_seen,
            decision=decision,
            total_s=self.clock.total_s(),
            **self.clock.spent,
        )


class Passage:
    """One passage of `candidates`, each of another model, through the gate. `run` is called once."""

    def __init__(self, gate: Gatekeeper, candidates: Sequence[Candidate]) -> None:
        self._gate = gate
        self._candidates = {each.version.version_id: each for each in candidates}
        self._store = candidates[0].publisher.store
        self._ways: list[_Way] = []
        self._live: dict[str, int] = {}

    def run(self) -> dict[str, PublishReport]:
        """Bring all candidates live in all their engines; return model -> how it went.

        Raises:
            PublishFailed: none is live; the previous weights are back, or the message says why not.
            PublishRejected: they did not pass; the previous weights are back.
            Conflict, NotFound: another publish of one of the models is unfinished, a version is abandoned or unknown.
            Pinned: serving of one of the models is held at another version.
        """
        self._open()
        with self._ways[0].publisher.alive([way.attempt.publish for way in self._ways]):
            return self._pass()

    def _pass(self) -> dict[str, PublishReport]:
        with _timed(self._ways, "judge_s"):
            self._wait_for_judges()
        with self._all_or_none():
            for way in (way for way in self._ways if way.candidate.canary is None):
                self._stage(way)
            for way in self._ways:
                way.publisher.drain(way.attempt, way.clock, staged=False)
            for way in (way for way in self._ways if not way.is_tried):
                probe, canary = way.candidate.probe, way.candidate.canary
                way.canary_seen, way.seen = way.publisher.try_out(way.attempt, probe, canary, way.clock)
        try:
            with _timed(self._ways, "judge_s"):
                decision = self._judge()
            self._follow(decision)
            return self._go_live(decision)
        except (KeyboardInterrupt, SystemExit):
            self._leave()
            raise

    def _leave(self) -> None:
        """End what is judged or settles before going: what was swapped is put back.

        Raises:
            PublishFailed, EngineError: that is impossible; they stay unfinished.
        """
        now = self._store.last_publish(self._ways[0].model)
        if now is None or now.publish_id != self._ways[0].publish_id or now.state not in UNFINISHED:
            return
        if now.state == "evaluating":
            self._reject(unjudged(STOPPED))
        elif now.state != "settling":
            self._fail_rest(STOPPED, PublishFailed(STOPPED))
        else:
            for way in self._ways:
                way.publisher.stand_still(way.attempt.publish)
            if now.decision is not None and now.decision["passed"]:
                self._undo(PublishFailed(STOPPED))
            else:
                self._put_back()
                self._advance("rejected")
                self._tell("rejected")

    # -- the way there

    def _open(self) -> None:
        """Open the publishes. What is judged are the candidates with what is live of the other models."""
        firsts, terms = {}, {}
        for version_id, each in self._candidates.items():
            firsts[version_id] = each.publisher.fleet.of(self._gate.triers(each.publisher.fleet.engines))
            terms[version_id] = self._gate.terms(firsts[version_id].engines).as_json()
        self._live = self._gate.live()
        for publish in self._store.request_together(terms):
            each = self._candidates[publish.version_id]
            self._ways.append(_Way(each, Attempt(publish, each.version, each.previous, firsts[publish.version_id])))

    @property
    def _versions(self) -> dict[str, int]:
        return {**self._live, **{each.version.model: each.version.version_id for each in self._candidates.values()}}

    def _wait_for_judges(self) -> None:
        """Reject the candidates before anybody had to wait, where nobody will judge them."""
        try:
            decision = self._gate.refuses(self._live)
        except (KeyboardInterrupt, SystemExit):
            with suppress(Conflict):  # it was ended, because nobody had heard of us
                self._advance("rejected", unjudged(STOPPED))
            raise
        if decision is not None:
            try:
                self._advance("rejected", decision)
            except Conflict as over:
                raise PublishFailed(str(over)) from over
            self._tell("rejected")
            raise self._rejected(decision, {})

    def _stage(self, way: _Way) -> None:
        """Do what can be done before anybody waits for any of them."""
        try:
            with way.clock.timed("stage_s"):
                way.attempt.first.stage(way.attempt.version.checkpoint_path)
            if way.is_tried:
                way.seen = self._load(way, way.attempt.first)
        except (EngineError, PublishFailed) as error:
            way.publisher.fail(way.attempt.publish, error)

    def _load(self, way: _Way, engines: Fleet) -> ProbeResult | None:
        """Load the candidate into these engines and return what the probe saw. Raises PublishFailed, EngineError."""
        probe = way.candidate.probe
        with way.clock.timed("swap_s"):
            engines.serve(way.attempt.version)
        with way.clock.timed("probe_s"):
            seen = None if probe is None else engines.probe(probe, noise=way.publisher.noise)
        refuse_bad(seen, way.attempt.version)
        return seen

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """Where one fails by itself, the others are put back and fail with it; where who publishes leaves, all."""
        try:
            yield
        except PublishFailed as error:
            self._fail_rest(f"it is published together with others: {error}", error)
            raise
        except (KeyboardInterrupt, SystemExit):
            self._fail_rest(STOPPED, PublishFailed(STOPPED))
            raise

    def _fail_rest(self, why: str, error: PublishFailed) -> None:
        """Put back and fail what is still under way. Raises PublishFailed where that is impossible."""
        stuck = [str(second) for way in self._ways if (second := self._fail_with(way, why)) is not None]
        if stuck:
            said = f"{error}. {'; '.join(stuck)}. {UNFINISHED_STAYS}"
            raise PublishFailed(said, probe=error.probe) from error

    def _fail_with(self, way: _Way, why: str) -> EngineError | None:
        """Put back and fail one that is still under way; return what made that impossible."""
        now = self._store.last_publish(way.attempt.version.model)
        over = now is None or now.publish_id != way.publish_id or now.state not in UNFINISHED
        beside = way.attempt.first.is_beside  # loaded before anybody waited: to be taken away whoever failed it
        try:
            if not over:
                way.attempt.first.unstage()
            if beside or (not over and now is not None and now.state == "swapping"):
                way.attempt.first.put_back(way.attempt.previous)
        except EngineError as second:
            return second
        if over:
            return None
        self._store.advance_publish(way.publish_id, "failed", error=why)
        return None

    # -- the judgement

    def _judge(self) -> Decision:
        """Let the candidates be evaluated; return the decision for them. Raises PublishRejected: they are gone."""
        self._advance("evaluating", probes=self._reports(None))
        self._tell("evaluating")
        decision = self._gate.decide(self._ways[0].publish_id, self._versions, self._live)
        if decision.passed:
            decision = self._still_there() or decision
        if len(self._versions) > 1:
            together = ", ".join(f"{model} {version}" for model, version in sorted(self._versions.items()))
            decision = replace(decision, why=f"{decision.why} (judged together: {together})")
        if not decision.passed:
            raise self._rejected(decision, self._reject(decision))
        return decision

    def _still_there(self) -> Decision | None:
        """An engine that restarted meanwhile serves the live version: then it was not the candidate that was judged."""
        for way in self._ways:
            try:
                if not way.attempt.first.serves(way.attempt.version):
                    version = way.attempt.version.version_id
                    return unjudged(
                        f"an engine came to serve something else than version {version} while it was judged"
                    )
            except EngineError as error:
                return unjudged(str(error))
        if self._gate.live() != self._live:
            return unjudged("another version of one of the other models went live while they were judged")
        return None

    def _reject(self, decision: Decision) -> dict[str, ProbeResult | None]:
        """Put the previous weights back, prove it where that can be done, and write `rejected`; model -> the proof."""
        self._settle(decision)
        seen: dict[str, ProbeResult | None] = {}
        for way in self._ways:
            previous = way.candidate.previous
            try:
                way.attempt.first.put_back(previous)
                proof = way.publisher.proof_of(previous)
                serving = way.publisher.fleet if way.attempt.first.is_beside else way.attempt.first
                found = None if proof is None else serving.probe(proof, noise=way.publisher.noise)
                refuse_bad(found, previous)
            except (EngineError, PublishFailed) as error:
                raise PublishFailed(
                    f"version {way.attempt.version.version_id} was rejected ({decision.why}), and version "
                    f"{previous.version_id} could not be put back: {error}. {UNFINISHED_STAYS}"
                ) from error
            seen[previous.model] = found
        told = {model: None if found is None else found.as_json() for model, found in seen.items()}
        kept = self._reports(decision)
        for way in self._ways:
            kept[way.publish_id]["put_back"] = told[way.attempt.version.model]
        self._advance("rejected", probes=kept)
        self._tell("rejected")
        return seen

    def _rejected(self, decision: Decision, seen: dict[str, ProbeResult | None]) -> PublishRejected:
        versions = [f"{way.attempt.version.version_id} (step {way.attempt.version.step})" for way in self._ways]
        live = [str(way.candidate.previous.version_id) for way in self._ways]
        if len(self._ways) == 1:
            text = f"version {versions[0]} was rejected by the gate: {decision.why}; version {live[0]} serves on"
        else:
            text = (
                f"versions {', '.join(versions)} were rejected by the gate: {decision.why}; {', '.join(live)} serve on"
            )
        return PublishRejected(text, decision=decision, probes=seen, candidates={w.model: w.seen for w in self._ways})

    # -- what passed

    def _follow(self, decision: Decision) -> None:
        """Bring what passed to the engines that do not have it yet."""
        if not any(way.rest for way in self._ways):
            return
        self._settle(decision)
        try:
            for way in (way for way in self._ways if way.rest):
                way.seen = self._load(way, way.rest) or way.seen
                way.publisher.fleet.clear_beside()
        except (EngineError, PublishFailed) as error:
            what, back = self._undo(error)
            raise PublishFailed(f"{what}. Version {back} is back", probe=getattr(error, "probe", None)) from error

    def _undo(self, error: EngineError | PublishFailed) -> tuple[str, str]:
        """Put the previous weights of all back and write `failed`; return what failed, and what is back.

        Raises PublishFailed where that is impossible: they stay unfinished.
        """
        ids = ", ".join(str(way.attempt.version.version_id) for way in self._ways)
        what = f"the publish of version {ids} failed: {error}"
        try:
            self._put_back()
        except EngineError as second:
            raise PublishFailed(
                f"{what}. The previous weights could not be put back either ({second}). {UNFINISHED_STAYS}",
                probe=getattr(error, "probe", None),
            ) from error
        for way in self._ways:
            self._store.advance_publish(way.publish_id, "failed", error=str(error))
        self._tell("failed")
        return what, ", ".join(str(way.candidate.previous.version_id) for way in self._ways)

    def _put_back(self) -> None:
        for way in self._ways:
            way.publisher.fleet.put_back(way.candidate.previous)

    def _go_live(self, decision: Decision) -> dict[str, PublishReport]:
        reports = {way.publish_id: way.report(decision) for way in self._ways}
        self._advance("live", decision, {publish_id: report.as_json() for publish_id, report in reports.items()})
        self._tell("live")
        for way in self._ways:
            way.publisher.remember(way.attempt.version, way.candidate.probe, way.seen)
        return {report.model: report for report in reports.values()}

    # -- in step

    def _reports(self, decision: Decision | None) -> dict[int, dict[str, Any]]:
        """Publish -> what the store keeps of it, so that the probe of what was rejected stands, too."""
        return {way.publish_id: way.report(decision).as_json() for way in self._ways}

    def _advance(
        self, state: PublishState, decision: Decision | None = None, probes: dict[int, dict[str, Any]] | None = None
    ) -> None:
        decided = None if decision is None else decision.as_json()
        self._store.advance_together(self._ways[0].publish_id, state, decision=decided, probes=probes)

    def _settle(self, decision: Decision) -> None:
        """Make proxies stand still once more, so that engines can change weights."""
        self._advance("settling", decision)
        self._tell("settling")
        for way in self._ways:
            try:
                way.publisher.stand_still(way.attempt.publish)
            except (PublishFailed, EngineError) as error:
                raise PublishFailed(
                    f"publish {way.publish_id} of version {way.attempt.version.version_id} could not settle: {error}. "
                    f"{UNFINISHED_STAYS}"
                ) from error

    def _tell(self, state: str) -> None:
        """All of them enter it at once, so it is told once."""
        self._ways[0].publisher.on_state(state)


@contextmanager
def _timed(ways: Sequence[_Way], part: str) -> Iterator[None]:
    with ExitStack() as clocks:
        for way in ways:
            clocks.enter_context(way.clock.timed(part))
        yield
