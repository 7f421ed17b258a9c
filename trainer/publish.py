"""New weights into every engine of a model, as a state machine in the store, or not at all.

`requested -> draining -> swapping -> live | failed`. Draining: every proxy with a fresh heartbeat stops dispatching,
lets finish what is in flight, and acknowledges. Swapping: each engine loads the checkpoint, forgets its prefix cache,
is told the version, and is probed; only then is the publish `live` and the proxies go on. Anything else puts the
previous live weights back *before* it says `failed`, because proxies go on then as well. Where even that is impossible
the publish stays unfinished: proxies go on holding, and `recover` ends it once the engine can be reached. Who is told
to leave meanwhile (Ctrl-C, SIGTERM) ends it in the same way first. Meanwhile a thread says that the publisher is alive.
What a killed one left before it swapped anything, proxies end by themselves; the rest `recover` ends. A publisher that
slept for so long finds its publish ended when it wants to enter `swapping`, and no engine has other weights by then.

With `mode: in_flight` proxies acknowledge with calls in flight. Each engine stands still for the swap (`/pause` keeps
what runs and throws its cache away), then goes on with the new weights and is probed; tokens are told apart by the
version that the engine is marked with. What it sampled until a probe refused it, the proxies quarantine. First versions
and canaries are published by drain.

With a gate (see `gated`) some engines, or the only one, get the candidate first: it is `evaluating`; then it is live,
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
from typing import Any, NoReturn

from tracegrad.tracestore.config import PublishConfig
from tracegrad.tracestore.errors import Conflict
from tracegrad.tracestore.gating import unjudged, was_rejected
from tracegrad.tracestore.publishes import BEATS_A_LIFE, UNFINISHED, UNSWAPPED
from tracegrad.tracestore.records import PolicyVersion, Publish, PublishState
from tracegrad.tracestore.store import Store
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import UNFINISHED_STAYS, PublishFailed
from tracegrad.trainer.errors import EngineError
from tracegrad.trainer.fleet import Fleet, Rehearsal, refuse_bad, told
from tracegrad.trainer.gate import STOPPED, Gatekeeper, needs_gate
from tracegrad.trainer.gated import Attempt, Candidate, Passage
from tracegrad.trainer.heartbeat import Pulse
from tracegrad.trainer.pauses import Pauses
from tracegrad.trainer.probe import ProbeResult, ProbeSet
from tracegrad.trainer.publish_report import PublishReport, Stopwatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturbed:
    """A checkpoint of visibly other weights, and their logprobs (T = 1) on the sequences of the probe it goes with."""

    checkpoint_path: str
    checkpoint_hash: str
    logprobs: tuple[tuple[float, ...], ...]


class Publisher:
    """Publishes versions of `model` to `engines` (its replicas).

    `on_state` is told each state as it is entered, `stopped` is asked while the gate is waited for; `judged` are the
    models whose versions it judges as one (default: this one). The noise of a verified engine is remembered from one
    publish to the next: it makes later probes sharper.
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
        judged: Sequence[str] = (),
    ) -> None:
        if not engines:
            raise PublishFailed(f"model {model!r} has no engine to publish to: name one in models.{model}.engine.url")
        self.store = store
        self.model = model
        self.fleet = Fleet(engines, settings)
        self.settings = settings
        self._expires_s = heartbeat_expires_s
        self._poll_s = poll_s
        self.on_state = on_state or (lambda _state: None)
        self.noise: float | None = None
        self._proof: tuple[int, ProbeSet] | None = None
        self.gate: Gatekeeper | None = None
        if settings.gate is not None:
            models = tuple(judged) or (model,)
            self.gate = Gatekeeper(store, settings.gate, models, expires_s=heartbeat_expires_s, stopped=stopped)

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
        if self.gate is not None and (candidate := self.candidate(version_id, probe, canary)) is not None:
            return Passage(self.gate, [candidate]).run()[self.model]
        version, previous = self._version(version_id, probe, canary), self.store.live_version(self.model)
        in_flight = self.settings.mode == "in_flight" and canary is None and previous is not None
        publish = self.store.request_publish(version_id, in_flight=in_flight)
        attempt = Attempt(publish, version, previous, self.fleet)
        clock, self.fleet.pauses = Stopwatch(), Pauses()
        with self.alive([publish]):
            try:
                rehearsal = None if probe is None or canary is not None else self._rehearse(attempt, probe, clock)
                self.drain(attempt, clock, staged=canary is None)
                canary_seen, seen = self.try_out(attempt, rehearsal.check if rehearsal else probe, canary, clock)
                seen = rehearsal.seen if rehearsal else seen
                report = PublishReport(
                    publish_id=attempt.publish.publish_id,
                    version_id=version_id,
                    model=self.model,
                    probe=seen,
                    canary=canary_seen,
                    decision=None,
                    paused_s=self.fleet.pauses.longest_s if in_flight else None,
                    total_s=clock.total_s(),
                    **clock.spent,
                )
                self.store.advance_publish(publish.publish_id, "live", probe=report.as_json(), goes_back=goes_back)
            except (KeyboardInterrupt, SystemExit):
                self._leave(attempt)
                raise
        self.on_state("live")
        self.remember(version, probe, seen)
        return report

    def candidate(
        self, version_id: int, probe: ProbeSet | None = None, canary: Perturbed | None = None
    ) -> Candidate | None:
        """Return what has to pass the gate; None where the version may serve without. Raises PublishFailed."""
        version, previous = self._version(version_id, probe, canary), self.store.live_version(self.model)
        if self.gate is None or previous is None or not needs_gate(self.store, version, previous):
            return None
        return Candidate(publisher=self, version=version, previous=previous, probe=probe, canary=canary)

    def alive(self, publishes: Sequence[Publish]) -> Pulse:
        """Return what says, while it is entered, that these have a publisher."""
        ids, every_s = [publish.publish_id for publish in publishes], self._expires_s / BEATS_A_LIFE
        return Pulse(lambda: self.store.beat_publishes(ids), name=f"publish-{ids[0]}", every_s=every_s)

    def remember(self, version: PolicyVersion, probe: ProbeSet | None, seen: ProbeResult | None) -> None:
        """Keep what proves that a version that went live is served, for the day on which it has to be put back."""
        if seen is not None and seen.verdict == "new":
            self.noise = seen.mean_abs_new
        self._proof = None if probe is None else (version.version_id, probe)

    def proof_of(self, version: PolicyVersion) -> ProbeSet | None:
        """Return the probe that proves that a version is served, where it is at hand."""
        return self._proof[1] if self._proof and self._proof[0] == version.version_id else None

    def recover(self) -> Publish | None:
        """End what a dead publisher left, and make the engines serve the live version. Call before the first publish.

        A version at which serving is pinned counts as the live one. Returns the unfinished publish it ended, or None.
        Gives engines no weights where nothing was ever live and nothing is unfinished.

        Raises:
            PublishFailed: an engine cannot be brought back; an unfinished publish stays unfinished.
            EngineUnreachable: nothing is unfinished, and an engine does not answer.
        """
        ended = self.end_unswapped()
        last, live = self.store.last_publish(self.model), self.store.live_version(self.model)
        if last is not None and last.state in UNFINISHED:
            try:
                return self._end(last, live)
            except (EngineError, PublishFailed) as reason:
                raise PublishFailed(f"publish {last.publish_id} stays {last.state}: {reason}") from reason
        self.fleet.clear_beside()
        wanted = self.store.pinned(self.model) or (None if live is None else live.version_id)
        if wanted is not None and not self.fleet.serves(self.store.get_version(wanted)):
            self.publish(wanted)
        return self._of(ended) if ended else None

    def end_unswapped(self) -> list[Publish]:
        """End what a dead publisher left before it swapped anything, here and of the models judged with this one.

        Needs no engine. Returns what it ended.
        """
        last = self.store.last_publish(self.model)
        return self.store.end_unswapped(last.publish_id) if last is not None and last.state in UNSWAPPED else []

    def _end(self, last: Publish, live: PolicyVersion | None) -> Publish:
        """Put the live weights back and end an unfinished publish; a judgement that was made is kept."""
        error = f"its publisher died while it was {last.state}; recovered at the next start"
        if last.state == "evaluating":  # proxies dispatch to the candidate
            decision = unjudged("its publisher died").as_json()
            last = self._of(self.store.advance_together(last.publish_id, "settling", decision=decision))
        if last.state == "settling":
            self._wait_for_proxies(last)
        self.fleet.put_back(live, in_flight=last.in_flight)
        end: PublishState = "rejected" if was_rejected(last.decision) else "failed"
        return self.store.advance_publish(last.publish_id, end, error=error)

    # -- the states

    def try_out(
        self, attempt: Attempt, probe: ProbeSet | None, canary: Perturbed | None, clock: Stopwatch
    ) -> tuple[ProbeResult | None, ProbeResult | None]:
        """Swap the first engines and return what canary and probe saw; else undo it and raise PublishFailed."""
        version, canary_seen, seen = attempt.version, None, None
        try:
            if canary is not None and probe is not None:
                with clock.timed("canary_s"):
                    canary_seen = self._try_canary(version, probe, canary, attempt.first)
            with clock.timed("swap_s"):
                attempt.first.serve(version, in_flight=attempt.publish.in_flight)
            with clock.timed("probe_s"):
                seen = None if probe is None else attempt.first.probe(probe, noise=self.noise)
            refuse_bad(seen, version)
        except (EngineError, PublishFailed) as error:
            self._undo(attempt.publish, attempt.previous, error)
        return canary_seen, seen

    def stand_still(self, publish: Publish) -> None:
        """Wait until no proxy dispatches and nothing runs in any engine, unless that may go on.

        Raises PublishFailed, EngineError, Conflict.
        """
        self._wait_for_proxies(publish)
        if not publish.in_flight:
            self.fleet.forget_prefixes()

    def _rehearse(self, attempt: Attempt, probe: ProbeSet, clock: Stopwatch) -> Rehearsal | None:
        """Probe the version beside the one that serves, where engines hold both; else fail, and nobody has waited."""
        try:
            with clock.timed("stage_s"):
                rehearsal = attempt.first.rehearse(attempt.version.checkpoint_path, probe, noise=self.noise)
            refuse_bad(None if rehearsal is None else rehearsal.seen, attempt.version)
        except (PublishFailed, EngineError) as error:
            self.fail(attempt.publish, error)
        return rehearsal

    def drain(self, attempt: Attempt, clock: Stopwatch, *, staged: bool) -> None:
        """Enter draining, wait until proxies and engines stand still, enter swapping; else fail, nothing swapped.

        With `staged`, what can be done before anybody waits is done first. It fails, too, where the publish was ended
        meanwhile because nobody had heard of us.
        """
        publish = attempt.publish
        try:
            if staged:
                with clock.timed("stage_s"):
                    attempt.first.stage(attempt.version.checkpoint_path)
            self.store.advance_publish(publish.publish_id, "draining")
            self.on_state("draining")
            with clock.timed("drain_s"):
                self.stand_still(publish)
            self.store.advance_publish(publish.publish_id, "swapping")
        except (PublishFailed, EngineError, Conflict) as error:
            attempt.first.unstage()
            self.fail(publish, error)
        self.on_state("swapping")

    def fail(self, publish: Publish, error: Exception) -> NoReturn:
        """Write `failed` and raise PublishFailed: engines serve what they served."""
        probe = getattr(error, "probe", None)
        stored = self._write_failed(publish, error, probe)
        what = f"publish {publish.publish_id} of version {publish.version_id} failed"
        if stored.error != str(error):  # somebody else ended it, for us
            raise PublishFailed(f"{what}: {stored.error}") from error
        raise PublishFailed(f"{what}, nothing was swapped: {error}", probe=probe) from error

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
        seen = engines.probe(inverse, bound=float("inf"), noise=self.noise)
        _refuse_invisible(seen, self.settings.probe_bound)
        return seen

    # -- the way back

    def _undo(self, publish: Publish, previous: PolicyVersion | None, error: Exception) -> None:
        """Put the previous weights back, write `failed`, raise PublishFailed; where that fails, leave it unfinished."""
        what = f"publish {publish.publish_id} of version {publish.version_id} failed: {error}"
        probe = getattr(error, "probe", None)
        try:
            self.fleet.put_back(previous, in_flight=publish.in_flight)
        except EngineError as second:
            raise PublishFailed(
                f"{what}. The previous weights could not be put back either ({second}). {UNFINISHED_STAYS}",
                probe=probe,
            ) from error
        self._write_failed(publish, error, probe)
        back = f"version {previous.version_id} is back" if previous else "there was no live version to put back"
        raise PublishFailed(f"{what}. {back}", probe=probe) from error

    def _leave(self, attempt: Attempt) -> None:
        """End what is unfinished before going: proxies would hold calls for a publisher that is gone.

        Raises:
            EngineError: the previous weights could not be put back; the publish stays unfinished.
        """
        publish = self.store.last_publish(self.model)
        if publish is None or publish.publish_id != attempt.publish.publish_id or publish.state not in UNFINISHED:
            return
        if publish.state == "swapping":
            self.fleet.put_back(attempt.previous, in_flight=publish.in_flight)
        else:
            attempt.first.unstage()
        self._write_failed(publish, PublishFailed(STOPPED), None)

    def _write_failed(self, publish: Publish, error: Exception, probe: ProbeResult | None) -> Publish:
        kept: dict[str, Any] = {} if probe is None else {"result": probe.as_json()}
        if publish.in_flight:
            kept["paused_s"] = self.fleet.pauses.longest_s
        stored = self.store.advance_publish(publish.publish_id, "failed", error=str(error), probe=kept or None)
        self.on_state("failed")
        return stored

    def _of(self, publishes: Sequence[Publish]) -> Publish:
        return next(publish for publish in publishes if publish.model == self.model)

    def _version(self, version_id: int, probe: ProbeSet | None, canary: Perturbed | None) -> PolicyVersion:
        """Return what is to be published. Raises PublishFailed where nobody could see whether it arrived."""
        if canary is not None and probe is None:
            raise PublishFailed("a canary needs a probe: the logprobs of the real weights on the same sequences")
        version = self.store.get_version(version_id)
        if version.model != self.model:
            raise PublishFailed(f"version {version_id} is of model {version.model!r}, not of {self.model!r}")
        if probe is None:
            self.fleet.refuse_blind(version)
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
            f"the canary's weights do not reach the engine whole: {told(seen)}. Start the engine with tracegrad's "
            "worker extension (`tracegrad engine --preflight` says how)",
            probe=seen,
        )
