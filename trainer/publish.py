"""New weights into every engine of a model, as a state machine in the store, or not at all.

`requested -> draining -> swapping -> live | failed`. Draining: every proxy with a fresh heartbeat stops dispatching,
lets finish what is in flight, and acknowledges. Swapping: each engine loads the checkpoint, forgets its prefix cache,
is told the version, and is probed; only then is the publish `live` and the proxies go on. Anything else puts the
previous live weights back *before* it says `failed`, because proxies go on then as well. Where even that is impossible
the publish stays unfinished: proxies go on holding, and `recover` ends it once the engine can be reached.

Refuses (PublishFailed): proxies that do not drain in time, an engine that cannot load or says another version than it
was told, a probe that finds the engine stale or mismatched. Called by the trainer's controller and `tracegrad
rollback`; one publisher a model at a time (the store refuses a second unfinished publish). Torch-free.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

from tracegrad.tracestore.config import PublishConfig
from tracegrad.tracestore.publishes import UNFINISHED
from tracegrad.tracestore.records import PolicyVersion, Publish
from tracegrad.tracestore.store import Store
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import EngineUnreachable, PublishFailed
from tracegrad.trainer.errors import EngineError
from tracegrad.trainer.preflight import tied_head
from tracegrad.trainer.probe import ProbeResult, ProbeSet, judge
from tracegrad.trainer.publish_report import PublishReport, Stopwatch

UNVERIFIED = "unverified"
"""The version an engine is marked with when nobody knows its weights and there are none to put back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturbed:
    """A checkpoint of visibly other weights, and their logprobs (T = 1) on the sequences of the probe it goes with."""

    checkpoint_path: str
    checkpoint_hash: str
    logprobs: tuple[tuple[float, ...], ...]


class Publisher:
    """Publishes versions of `model` to `engines` (its replicas).

    `on_state` is told each state as it is entered. The noise of a verified engine is remembered from one publish to
    the next: it makes later probes sharper.
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
    ) -> None:
        if not engines:
            raise PublishFailed(f"model {model!r} has no engine to publish to: name one in models.{model}.engine.url")
        self.store = store
        self.model = model
        self.engines = tuple(engines)
        self.settings = settings
        self._expires_s = heartbeat_expires_s
        self._poll_s = poll_s
        self._on_state = on_state or (lambda _state: None)
        self._noise: float | None = None

    def publish(
        self, version_id: int, probe: ProbeSet | None = None, *, canary: Perturbed | None = None
    ) -> PublishReport:
        """Bring a version live in every engine and return how it went.

        With `canary`, the perturbed weights are loaded and probed first, inside the same hold: no call is ever sampled
        from them. Without `probe` nothing proves that the engine serves the version, and the store says so (null).

        Raises:
            PublishFailed: the version is not live; the previous weights are back, or the message says why not.
            Conflict, NotFound: another publish of the model is unfinished, the version is abandoned or unknown.
        """
        if canary is not None and probe is None:
            raise PublishFailed("a canary needs a probe: the logprobs of the real weights on the same sequences")
        version = self._version(version_id)
        if probe is None:
            self._refuse_blind(version)
        previous = self.store.live_version(self.model)
        publish = self.store.request_publish(version_id)
        clock = Stopwatch()
        self._drain(publish, clock)
        seen: ProbeResult | None = None
        canary_seen: ProbeResult | None = None
        try:
            if canary is not None and probe is not None:
                with clock.timed("canary_s"):
                    canary_seen = self._try_canary(version, probe, canary)
            with clock.timed("swap_s"):
                self._swap(version.checkpoint_path, str(version_id))
            with clock.timed("probe_s"):
                seen = None if probe is None else self._probe(probe)
            _refuse_bad(seen, version)
        except (EngineError, PublishFailed) as error:
            self._undo(publish, previous, error)
        report = PublishReport(
            publish_id=publish.publish_id,
            version_id=version_id,
            model=self.model,
            probe=seen,
            canary=canary_seen,
            total_s=clock.total_s(),
            **clock.spent,
        )
        self.store.advance_publish(publish.publish_id, "live", probe=report.as_json())
        self._on_state("live")
        if seen is not None and seen.verdict == "new":
            self._noise = seen.mean_abs_new
        return report

    def recover(self) -> Publish | None:
        """End what a dead publisher left, and make the engines serve the live version. Call before the first publish.

        Returns the unfinished publish it failed, or None. Does nothing to the engines where nothing was ever live and
        nothing is unfinished.

        Raises:
            PublishFailed: an engine cannot be brought back; an unfinished publish stays unfinished.
            EngineUnreachable: nothing is unfinished, and an engine does not answer.
        """
        last = self.store.last_publish(self.model)
        live = self.store.live_version(self.model)
        if last is not None and last.state in UNFINISHED:
            error = f"its publisher died while it was {last.state}; recovered at the next start"
            try:
                self._put_back(live)
            except EngineError as reason:
                raise PublishFailed(f"publish {last.publish_id} stays {last.state}: {reason}") from reason
            return self.store.advance_publish(last.publish_id, "failed", error=error)
        if live is not None and any(engine.version() != str(live.version_id) for engine in self.engines):
            self.publish(live.version_id)
        return None

    # -- the states

    def _drain(self, publish: Publish, clock: Stopwatch) -> None:
        """Enter draining, wait until proxies and engines stand still, enter swapping; else fail, nothing swapped."""
        self.store.advance_publish(publish.publish_id, "draining")
        self._on_state("draining")
        try:
            with clock.timed("drain_s"):
                self._wait_for_proxies(publish)
                for engine in self.engines:
                    engine.reset_prefix_cache()
        except (PublishFailed, EngineError) as error:
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

    def _swap(self, path: str, mark: str) -> None:
        """Load `path` into every engine (at once), reset its prefix cache, tell it the version, and read that back."""
        with ThreadPoolExecutor(len(self.engines)) as pool:
            list(pool.map(lambda engine: self._swap_one(engine, path, mark), self.engines))

    def _swap_one(self, engine: EngineClient, path: str, mark: str) -> None:
        engine.reload(path, timeout_s=self.settings.swap_timeout_s)
        engine.reset_prefix_cache()
        engine.set_version(mark)
        if (said := engine.version()) != mark:
            raise PublishFailed(f"{engine.url} was told version {mark} and says {said}: is somebody else publishing?")

    def _probe(self, probe: ProbeSet, *, bound: float | None = None) -> ProbeResult:
        """Score the probe on every engine and return the worst result."""
        results = [self._probe_one(engine, probe, bound) for engine in self.engines]
        order = ("new", "unresolved", "mismatch", "stale")
        return max(results, key=lambda result: order.index(result.verdict))

    def _probe_one(self, engine: EngineClient, probe: ProbeSet, bound: float | None) -> ProbeResult:
        limit = next((m.max_model_len for m in engine.models() if m.name == engine.name), None)
        probe = probe.fitting(limit)
        scores = engine.score_many([(s.ids, s.n_prompt) for s in probe.sequences])
        flat = chain.from_iterable
        return judge(
            list(flat(scores)),
            list(flat(probe.new_logprobs)),
            None if probe.previous_logprobs is None else list(flat(probe.previous_logprobs)),
            self.settings.probe_bound if bound is None else bound,
            noise=self._noise,
            min_tokens=self.settings.probe_tokens,
        )

    def _try_canary(self, version: PolicyVersion, probe: ProbeSet, canary: Perturbed) -> ProbeResult:
        """Load the perturbed weights and demand that the probe sees them: nearer by far than the real ones."""
        row = self.store.add_version(
            model=self.model,
            kind="canary",
            parent_id=version.version_id,
            checkpoint_path=canary.checkpoint_path,
            checkpoint_hash=canary.checkpoint_hash,
            step=version.step,
            job_id=version.job_id,
        )
        self.store.abandon_version(row.version_id)
        inverse = ProbeSet(
            sequences=probe.sequences, new_logprobs=canary.logprobs, previous_logprobs=probe.new_logprobs
        )
        self._swap(canary.checkpoint_path, str(row.version_id))
        seen = self._probe(inverse, bound=float("inf"))
        bound = self.settings.probe_bound
        if seen.gap is None or seen.gap < 2 * bound:
            raise PublishFailed(f"the canary's weights differ too little to be seen ({seen.gap}): perturb them more")
        if seen.verdict == "stale" or seen.mean_abs_new > max(bound, seen.gap / 4):
            raise PublishFailed(
                f"the canary's weights do not reach the engine whole: {_told(seen)}. Start the engine with tracegrad's "
                "worker extension (`tracegrad engine --preflight` says how)",
                probe=seen,
            )
        return seen

    # -- the way back

    def _undo(self, publish: Publish, previous: PolicyVersion | None, error: Exception) -> None:
        """Put the previous weights back, write `failed`, raise PublishFailed; where that fails, leave it unfinished."""
        what = f"publish {publish.publish_id} of version {publish.version_id} failed: {error}"
        probe = getattr(error, "probe", None)
        try:
            self._put_back(previous)
        except EngineError as second:
            raise PublishFailed(
                f"{what}. The previous weights could not be put back either ({second}): the publish stays unfinished "
                "and proxies hold their requests. Start the engine again; the next start of the trainer recovers",
                probe=probe,
            ) from error
        stored = None if probe is None else {"result": probe.as_json()}
        self.store.advance_publish(publish.publish_id, "failed", error=str(error), probe=stored)
        self._on_state("failed")
        back = f"version {previous.version_id} is back" if previous else "there was no live version to put back"
        raise PublishFailed(f"{what}. {back}", probe=probe) from error

    def _put_back(self, version: PolicyVersion | None) -> None:
        """Load `version` (or mark the weights unverified); waits up to `swap_timeout_s` for an engine that restarts.

        Raises:
            EngineError: it could not be done in that time.
        """
        deadline = time.monotonic() + self.settings.swap_timeout_s
        while True:
            try:
                if version is not None:
                    self._swap(version.checkpoint_path, str(version.version_id))
                else:
                    for engine in self.engines:
                        engine.set_version(UNVERIFIED)
            except EngineUnreachable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            except PublishFailed as error:
                raise EngineError(str(error)) from error
            else:
                return

    def _refuse_blind(self, version: PolicyVersion) -> None:
        """Without a probe nobody would see a stale head: then every engine must have the extension that mends it."""
        if tied_head(version.checkpoint_path):
            for engine in self.engines:
                if engine.extension_info() is None:
                    raise PublishFailed(
                        f"version {version.version_id} has a tied head, {engine.url} lacks our worker extension "
                        "and no probe was given: start the engine with `tracegrad engine`"
                    )

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


def _refuse_bad(seen: ProbeResult | None, version: PolicyVersion) -> None:
    if seen is not None and seen.verdict in ("stale", "mismatch"):
        # Rounding of bf16 alone comes near the default bound where few tokens were compared.
        hint = "; if that is rounding, raise trainer.publish.probe_bound" if seen.verdict == "mismatch" else ""
        raise PublishFailed(f"the engine does not serve version {version.version_id}: {_told(seen)}{hint}", probe=seen)


def _told(seen: ProbeResult) -> str:
    parts = [f"{seen.verdict} over {seen.n_tokens} tokens", f"mean |d| {seen.mean_abs_new:.4g} from the new weights"]
    if seen.mean_abs_previous is not None:
        parts.append(f"{seen.mean_abs_previous:.4g} from the previous")
    if seen.stale_share is not None:
        parts.append(f"{seen.stale_share:.0%} of the step missing")
    return ", ".join([*parts, f"bound {seen.bound:g}"])
