"""New weights into every engine of a model, as a state machine in the store, or not at all.

`requested -> draining -> swapping -> live | failed`. Draining: every proxy with a fresh heartbeat stops dispatching,
lets finish what is in flight, and acknowledges. Swapping: each engine loads the checkpoint, forgets its prefix cache,
is told the version, and is probed; only then is the publish `live` and the proxies go on. Anything else puts the
previous live weights back *before* it says `failed`, because proxies go on then as well. Where even that is impossible
the publish stays unfinished: proxies go on holding, and `recover` ends it once the engine can be reached.

With a gate (see `gate`) some engines, or the only one, get the candidate first and it is `evaluating`; then it is live,
or proxies stand still once more (`settling`) while the other engines follow, or the previous weights are put back and
probed: `rejected`.

Refuses (PublishFailed): proxies that do not drain in time, an engine that cannot load or says another version than it
was told, a probe that finds the engine stale or mismatched; (PublishRejected): what the gate does not let pass. Called
by the trainer's controller, `tracegrad rollback` and `tracegrad pin`; one publisher a model at a time (the store
refuses a second unfinished publish). Torch-free.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tracegrad.tracestore.config import PublishConfig
from tracegrad.tracestore.gating import Decision, unjudged, was_rejected
from tracegrad.tracestore.publishes import UNFINISHED
from tracegrad.tracestore.records import PolicyVersion, Publish, PublishState
from tracegrad.tracestore.store import Store
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import PublishFailed, PublishRejected
from tracegrad.trainer.errors import EngineError
from tracegrad.trainer.fleet import Fleet
from tracegrad.trainer.gate import STOPPED, Gatekeeper, needs_gate
from tracegrad.trainer.probe import ProbeResult, ProbeSet
from tracegrad.trainer.publish_report import PublishReport, Stopwatch

_UNFINISHED_STAYS = (
    "The publish stays unfinished and proxies hold their requests. Start the engine again; the next start of the "
    "trainer recovers"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturbed:
    """A checkpoint of visibly other weights, and their logprobs (T = 1) on the sequences of the probe it goes with."""

    checkpoint_path: str
    checkpoint_hash: str
    logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Attempt:
    """A publish under way: of which version, over which live one, and the engines that get it first."""

    publish: Publish
    version: PolicyVersion
    previous: PolicyVersion | None
    first: Fleet


class Publisher:
    """Publishes versions of `model` to `engines` (its replicas).

    `on_state` is told each state as it is entered, `stopped` is asked while the gate is waited for. The noise of a
    verified engine is remembered from one publish to the next: it makes later probes sharper.
    """

    def __init__(
        self,
        store: Store,
        model: str,
        engines: Sequence[EngineClient],
        settings: PublishConfig,
        *,
        heartbeat_expires_s: float = 10.0,
        poll_s: float = 0.02,
        on_state: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        if not engines:
            raise PublishFailed(f"model {model!r} has no engine to publish to: name one in models.{model}.engine.url")
        self.store = store
        self.model = model
        self.fleet = Fleet(engines, settings)
        self.settings = settings
        self._expires_s = heartbeat_expires_s
        self._poll_s = poll_s
        self._on_state = on_state or (lambda _state: None)
        self._noise: float | None = None
        self._proof: tuple[int, ProbeSet] | None = None
        self._gate: Gatekeeper | None = None
        if settings.gate is not None:
            self._gate = Gatekeeper(store, settings.gate, expires_s=heartbeat_expires_s, stopped=stopped)

    def publish(
        self,
        version_id: int,
        probe: ProbeSet | None = None,
        *,
        canary: Perturbed | None = None,
        goes_back: bool = False,
    ) -> PublishReport:
        """Bring a version live in every engine and return how it went.

        With `canary`, the perturbed weights are loaded and probed first, inside the same hold: no call is ever sampled
        from them. Without `probe` nothing proves that the engine serves the version, and the store says so (null). With
        `goes_back` newer versions are abandoned as this one goes live.

        Raises:
            PublishFailed: the version is not live; the previous weights are back, or the message says why not.
            PublishRejected: it did not pass the gate; the previous weights are back.
            Conflict, NotFound: another publish of the model is unfinished, the version is abandoned or unknown.
            Pinned: serving is held at another version.
        """
        if canary is not None and probe is None:
            raise PublishFailed("a canary needs a probe: the logprobs of the real weights on the same sequences")
        version = self._version(version_id)
        if probe is None:
            self.fleet.refuse_blind(version)
        previous = self.store.live_version(self.model)
        gate = self._gate if needs_gate(self.store, version, previous) else None
        first = self.fleet if gate is None else self.fleet.of(gate.triers(self.fleet.engines))
        terms = None if gate is None else gate.terms(first.engines).as_json()
        attempt = Attempt(self.store.request_publish(version_id, gate=terms), version, previous, first)
        clock, decision = Stopwatch(), None
        if gate is not None:
            with clock.timed("judge_s"):
                self._wait_for_judges(attempt, gate)
        self._drain(attempt, clock, staged=canary is None)
        canary_seen, seen = self._try(attempt, probe, canary, clock)
        if gate is not None:
            with clock.timed("judge_s"):
                decision = self._judge(attempt, gate)
            seen = self._follow(attempt, decision, probe, clock) or seen
        report = PublishReport(
            publish_id=attempt.publish.publish_id,
            version_id=version_id,
            model=self.model,
            probe=seen,
            canary=canary_seen,
            decision=decision,
            total_s=clock.total_s(),
            **clock.spent,
        )
        decided = None if decision is None else decision.as_json()
        self.store.advance_publish(
            attempt.publish.publish_id, "live", probe=report.as_json(), decision=decided, goes_back=goes_back
        )
        self._on_state("live")
        if seen is not None and seen.verdict == "new":
            self._noise = seen.mean_abs_new
        self._proof = None if probe is None else (version_id, probe)
        return report

    def recover(self) -> Publish | None:
        """End what a dead publisher left, and make the engines serve the live version. Call before the first publish.

        A version at which serving is pinned counts as the live one. Returns the unfinished publish it ended, or None.
        Does nothing to the engines where nothing was ever live and nothing is unfinished.

        Raises:
            PublishFailed: an engine cannot be brought back; an unfinished publish stays unfinished.
            EngineUnreachable: nothing is unfinished, and an engine does not answer.
        """
        last, live = self.store.last_publish(self.model), self.store.live_version(self.model)
        if last is not None and last.state in UNFINISHED:
            try:
                return self._end(last, live)
            except (EngineError, PublishFailed) as reason:
                raise PublishFailed(f"publish {last.publish_id} stays {last.state}: {reason}") from reason
        wanted = self.store.pinned(self.model) or (None if live is None else live.version_id)
        if wanted is not None and not self.fleet.serves(self.store.get_version(wanted)):
            self.publish(wanted)
        return None

    def _end(self, last: Publish, live: PolicyVersion | None) -> Publish:
        """Put the live weights back and end an unfinished publish; a judgement that was made is kept."""
        error = f"its publisher died while it was {last.state}; recovered at the next start"
        if last.state == "evaluating":  # proxies dispatch to the candidate
            decision = unjudged("its publisher died").as_json()
            last = self.store.advance_publish(last.publish_id, "settling", decision=decision)
        if last.state == "settling":
            self._wait_for_proxies(last)
        self.fleet.put_back(live)
        end: PublishState = "rejected" if was_rejected(last.decision) else "failed"
        return self.store.advance_publish(last.publish_id, end, error=error)

    # -- the states

    def _try(
        self, attempt: Attempt, probe: ProbeSet | None, canary: Perturbed | None, clock: Stopwatch
    ) -> tuple[ProbeResult | None, ProbeResult | None]:
        """Swap the first engines and return what canary and probe saw; else undo it and raise PublishFailed."""
        version, canary_seen, seen = attempt.version, None, None
        try:
            if canary is not None and probe is not None:
                with clock.timed("canary_s"):
                    canary_seen = self._try_canary(version, probe, canary, attempt.first)
            with clock.timed("swap_s"):
                attempt.first.serve(version)
            with clock.timed("probe_s"):
                seen = None if probe is None else attempt.first.probe(probe, noise=self._noise)
            _refuse_bad(seen, version)
        except (EngineError, PublishFailed) as error:
            self._undo(attempt.publish, attempt.previous, error)
        return canary_seen, seen

    def _wait_for_judges(self, attempt: Attempt, gate: Gatekeeper) -> None:
        """Reject the candidate before anybody had to wait, where nobody will judge it."""
        assert attempt.previous is not None, "the first version of a model is not gated"
        publish_id = attempt.publish.publish_id
        try:
            decision = gate.refuses(attempt.previous)
        except (KeyboardInterrupt, SystemExit):
            self.store.advance_publish(publish_id, "rejected", decision=unjudged(STOPPED).as_json())
            raise
        if decision is not None:
            self.store.advance_publish(publish_id, "rejected", decision=decision.as_json())
            self._on_state("rejected")
            raise _rejected(attempt, decision, None)

    def _judge(self, attempt: Attempt, gate: Gatekeeper) -> Decision:
        """Let the candidate be evaluated; return the decision for it. Raises PublishRejected: its weights are gone."""
        assert attempt.previous is not None, "the first version of a model is not gated"
        publish = self.store.advance_publish(attempt.publish.publish_id, "evaluating")
        try:
            self._on_state("evaluating")
            decision = gate.decide(publish, attempt.previous)
            if decision.passed:
                decision = _still_there(attempt) or decision
        except (KeyboardInterrupt, SystemExit):
            self._reject(attempt, unjudged(STOPPED))
            raise
        if not decision.passed:
            raise _rejected(attempt, decision, self._reject(attempt, decision))
        return decision

    def _reject(self, attempt: Attempt, decision: Decision) -> ProbeResult | None:
        """Put the previous weights back, prove it where that can be done, and write `rejected`."""
        previous = attempt.previous
        assert previous is not None, "the first version of a model is not gated"
        publish = self._settle(attempt.publish, decision)
        try:
            attempt.first.put_back(previous)
            proof = self._proof[1] if self._proof and self._proof[0] == previous.version_id else None
            seen = None if proof is None else attempt.first.probe(proof, noise=self._noise)
            _refuse_bad(seen, previous)
        except (EngineError, PublishFailed) as error:
            raise PublishFailed(
                f"version {attempt.version.version_id} was rejected ({decision.why}), and version "
                f"{previous.version_id} could not be put back: {error}. {_UNFINISHED_STAYS}"
            ) from error
        put_back = {"result": None, "put_back": None if seen is None else seen.as_json()}
        self.store.advance_publish(publish.publish_id, "rejected", probe=put_back)
        self._on_state("rejected")
        return seen

    def _follow(
        self, attempt: Attempt, decision: Decision, probe: ProbeSet | None, clock: Stopwatch
    ) -> ProbeResult | None:
        """Bring what passed to the engines that do not have it yet; return what the probe saw of them."""
        rest = self.fleet.without(attempt.first)
        if not rest:
            return None
        publish, version = self._settle(attempt.publish, decision), attempt.version
        seen: ProbeResult | None = None
        try:
            with clock.timed("swap_s"):
                rest.serve(version)
            with clock.timed("probe_s"):
                seen = None if probe is None else rest.probe(probe, noise=self._noise)
            _refuse_bad(seen, version)
        except (EngineError, PublishFailed) as error:
            self._undo(publish, attempt.previous, error)
        return seen

    def _settle(self, publish: Publish, decision: Decision) -> Publish:
        """Make proxies stand still once more, so that engines can change weights."""
        publish = self.store.advance_publish(publish.publish_id, "settling", decision=decision.as_json())
        self._on_state("settling")
        try:
            self._wait_for_proxies(publish)
            self.fleet.forget_prefixes()
        except (PublishFailed, EngineError) as error:
            raise PublishFailed(
                f"publish {publish.publish_id} of version {publish.version_id} could not settle: {error}. "
                f"{_UNFINISHED_STAYS}"
            ) from error
        return publish

    def _drain(self, attempt: Attempt, clock: Stopwatch, *, staged: bool) -> None:
        """Enter draining, wait until proxies and engines stand still, enter swapping; else fail, nothing swapped.

        With `staged`, what can be done before anybody waits is done first.
        """
        publish = attempt.publish
        try:
            if staged:
                with clock.timed("stage_s"):
                    attempt.first.stage(attempt.version.checkpoint_path)
            self.store.advance_publish(publish.publish_id, "draining")
            self._on_state("draining")
            with clock.timed("drain_s"):
                self._wait_for_proxies(publish)
                self.fleet.forget_prefixes()
        except (PublishFailed, EngineError) as error:
            attempt.first.unstage()
            self.store.advance_publish(publish.publish_id, "failed", error=str(error))
            self._on_state("failed")
            what = f"publish {publish.publish_id} of version {publish.version_id} failed, nothing was swapped"
            raise PublishFailed(f"{what}: {error}") from error
        self.store.advance_publish(publish.publish_id, "swapping")
        self._on_state("swapping")

    def _wait_for_proxies(self, publish: Publish) -> None:
        deadline = time.monotonic() + self.settings.drain_timeout_s
        while waiting := self.store.waiting_proxies(publish.publish_id, self._expires_s):
            if time.monotonic() > deadline:
                raise PublishFailed(
                    f"{', '.join(waiting)} did not drain in {self.settings.drain_timeout_s:g} s; raise "
                    "trainer.publish.drain_timeout_s, or shorten the calls"
                )
            time.sleep(self._poll_s)

    def _try_canary(self, version: PolicyVersion, probe: ProbeSet, canary: Perturbed, engines: Fleet) -> ProbeResult:
        """Load the perturbed weights and demand that the probe sees them: nearer by far than the real ones."""
        mark = _canary_version(self.store, version, canary)
        inverse = ProbeSet(
            sequences=probe.sequences, new_logprobs=canary.logprobs, previous_logprobs=probe.new_logprobs
        )
        engines.swap(canary.checkpoint_path, mark)
        seen = engines.probe(inverse, bound=float("inf"), noise=self._noise)
        _refuse_invisible(seen, self.settings.probe_bound)
        return seen

    # -- the way back

    def _undo(self, publish: Publish, previous: PolicyVersion | None, error: Exception) -> None:
        """Put the previous weights back, write `failed`, raise PublishFailed; where that fails, leave it unfinished."""
        what = f"publish {publish.publish_id} of version {publish.version_id} failed: {error}"
        probe = getattr(error, "probe", None)
        try:
            self.fleet.put_back(previous)
        except EngineError as second:
            raise PublishFailed(
                f"{what}. The previous weights could not be put back either ({second}). {_UNFINISHED_STAYS}",
                probe=probe,
            ) from error
        stored = None if probe is None else {"result": probe.as_json()}
        self.store.advance_publish(publish.publish_id, "failed", error=str(error), probe=stored)
        self._on_state("failed")
        back = f"version {previous.version_id} is back" if previous else "there was no live version to put back"
        raise PublishFailed(f"{what}. {back}", probe=probe) from error

    def _version(self, version_id: int) -> PolicyVersion:
        version = self.store.get_version(version_id)
        if version.model != self.model:
            raise PublishFailed(f"version {version_id} is of model {version.model!r}, not of {self.model!r}")
        return version


def canary(
    publisher: Publisher, version_id: int, probe: ProbeSet, make_perturbed: Callable[[ProbeSet], Perturbed]
) -> PublishReport:
    """Publish a version and prove on the way that the path from trainer to engine can be trusted.

    `make_perturbed` saves visibly perturbed weights and returns them with their logprobs on the probe's sequences. Call
    at each engine start, with the version that is (or shall be) live.

    Raises:
        PublishFailed: as `Publisher.publish`; in particular where the perturbed weights do not arrive whole.
    """
    return publisher.publish(version_id, probe, canary=make_perturbed(probe))


def _canary_version(store: Store, version: PolicyVersion, canary: Perturbed) -> str:
    """Give the perturbed weights a version, which is abandoned from the start; return what engines are marked with."""
    row = store.add_version(
        model=version.model,
        kind="canary",
        parent_id=version.version_id,
        checkpoint_path=canary.checkpoint_path,
        checkpoint_hash=canary.checkpoint_hash,
        step=version.step,
        job_id=version.job_id,
    )
    store.abandon_version(row.version_id)
    return str(row.version_id)


def _refuse_invisible(seen: ProbeResult, bound: float) -> None:
    if seen.gap is None or seen.gap < 2 * bound:
        raise PublishFailed(f"the canary's weights differ too little to be seen ({seen.gap}): perturb them more")
    if seen.verdict == "stale" or seen.mean_abs_new > max(bound, seen.gap / 4):
        raise PublishFailed(
            f"the canary's weights do not reach the engine whole: {_told(seen)}. Start the engine with tracegrad's "
            "worker extension (`tracegrad engine --preflight` says how)",
            probe=seen,
        )


def _refuse_bad(seen: ProbeResult | None, version: PolicyVersion) -> None:
    if seen is not None and seen.verdict in ("stale", "mismatch"):
        # Rounding of bf16 alone comes near the default bound where few tokens were compared.
        hint = "; if that is rounding, raise trainer.publish.probe_bound" if seen.verdict == "mismatch" else ""
        raise PublishFailed(f"the engine does not serve version {version.version_id}: {_told(seen)}{hint}", probe=seen)


def _still_there(attempt: Attempt) -> Decision | None:
    """An engine that restarted meanwhile serves the live version: then it was not the candidate that was judged."""
    version = attempt.version
    try:
        if attempt.first.serves(version):
            return None
    except EngineError as error:
        return unjudged(str(error))
    return unjudged(f"an engine came to serve something else than version {version.version_id} while it was judged")


def _rejected(attempt: Attempt, decision: Decision, seen: ProbeResult | None) -> PublishRejected:
    version, previous = attempt.version, attempt.previous
    serves = "" if previous is None else f"; version {previous.version_id} serves on"
    text = f"version {version.version_id} (step {version.step}) was rejected by the gate: {decision.why}{serves}"
    return PublishRejected(text, publish_id=attempt.publish.publish_id, decision=decision, probe=seen)


def _told(seen: ProbeResult) -> str:
    parts = [f"{seen.verdict} over {seen.n_tokens} tokens", f"mean |d| {seen.mean_abs_new:.4g} from the new weights"]
    if seen.mean_abs_previous is not None:
        parts.append(f"{seen.mean_abs_previous:.4g} from the previous")
    if seen.stale_share is not None:
        parts.append(f"{seen.stale_share:.0%} of the step missing")
    return ", ".join([*parts, f"bound {seen.bound:g}"])
