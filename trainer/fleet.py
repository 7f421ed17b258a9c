"""Several engines of one model as one: they are swapped, probed and put back together, and the worst of them counts.

Refuses (PublishFailed) an engine that says another version than it was told, and a tied head where nothing would see it
go stale; what an engine itself refuses passes through (EngineError). Knows no store and no states. Called by `publish`.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain

from tracegrad.tracestore.config import PublishConfig
from tracegrad.tracestore.records import PolicyVersion
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import EngineUnreachable, PublishFailed
from tracegrad.trainer.errors import EngineError
from tracegrad.trainer.pauses import Pauses
from tracegrad.trainer.preflight import tied_head
from tracegrad.trainer.probe import ProbeResult, ProbeSequence, ProbeSet, judge

UNVERIFIED = "unverified"
"""The version an engine is marked with when nobody knows its weights and there are none to put back."""


_CHECKED_TOKENS = 64
"""Tokens that are scored again after a switch to weights that were rehearsed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rehearsal:
    """What the probe saw of weights that do not serve yet. `check`: few of its tokens, and what engines said of them.

    Whoever serves these weights afterwards says the same: of that, and of the folder, a switch is known to be made.
    """

    seen: ProbeResult
    check: ProbeSet


class Fleet:
    """Engines that serve the same weights."""

    def __init__(self, engines: Sequence[EngineClient], settings: PublishConfig) -> None:
        self.engines = tuple(engines)
        self.settings = settings
        self.pauses = Pauses()

    def __len__(self) -> int:
        return len(self.engines)

    def __iter__(self) -> Iterator[EngineClient]:
        return iter(self.engines)

    def of(self, engines: Sequence[EngineClient]) -> "Fleet":
        """Return a fleet of some of them."""
        return Fleet(engines, self.settings)

    def without(self, other: "Fleet") -> "Fleet":
        """Return those that `other` does not have."""
        return self.of([engine for engine in self if engine not in other.engines])

    def forget_prefixes(self) -> None:
        """Reset every prefix cache: it is refused where anything still runs, so this proves that nothing does."""
        for engine in self:
            engine.prove_idle()

    def stage(self, path: str) -> None:
        """Prepare `path` for `swap` where that is of use, while engines serve."""
        self.engines[0].stage(path)  # replicas share what prepares it

    def unstage(self) -> None:
        """Forget what was prepared."""
        self.engines[0].unstage()

    def swap(self, path: str, mark: str, *, in_flight: bool = False) -> None:
        """Load `path` into every engine (at once), tell it the version, and read that back.

        With `in_flight` each stands still for it with what runs on it, and goes on where it succeeded, there alone.
        """
        try:
            with ThreadPoolExecutor(len(self)) as pool:
                list(pool.map(lambda engine: self._swap_one(engine, path, mark, in_flight), self))
        finally:
            self.unstage()

    def serve(self, version: PolicyVersion, *, in_flight: bool = False) -> None:
        """Swap to a version."""
        self.swap(version.checkpoint_path, str(version.version_id), in_flight=in_flight)

    def serves(self, version: PolicyVersion) -> bool:
        """Return whether every engine says that it serves the version."""
        return all(engine.serves(version.checkpoint_path, str(version.version_id)) for engine in self)

    @property
    def is_beside(self) -> bool:
        """Whether these are weights beside those that serve."""
        return any(engine.is_beside for engine in self)

    def clear_beside(self) -> None:
        """Take away what is loaded beside what serves."""
        for engine in self:
            engine.clear_beside()

    def put_back(self, version: PolicyVersion | None, *, in_flight: bool = False) -> None:
        """Load `version` (or mark the weights unverified), nothing loaded beside it; of what is beside, nothing at all.

        Waits up to `swap_timeout_s` for an engine that restarts.

        Raises:
            EngineError: it could not be done in that time.
        """
        deadline = time.monotonic() + self.settings.swap_timeout_s
        while True:
            try:
                self.clear_beside()
                if self.is_beside:
                    return
                if version is not None:
                    self.serve(version, in_flight=in_flight)
                else:
                    for engine in self:
                        engine.disown(UNVERIFIED)
            except EngineUnreachable:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            except PublishFailed as error:
                raise EngineError(str(error)) from error
            else:
                return

    def probe(self, probe: ProbeSet, *, bound: float | None = None, noise: float | None = None) -> ProbeResult:
        """Score the probe on every engine and return the worst result."""
        results = [self._probe_one(engine, probe, bound, noise) for engine in self]
        order = ("new", "unresolved", "mismatch", "stale")
        return max(results, key=lambda result: order.index(result.verdict))

    def rehearse(self, path: str, probe: ProbeSet, *, noise: float | None = None) -> Rehearsal | None:
        """Score the probe on weights loaded beside those that serve, while these do; None where engines cannot."""
        beside = [engine.beside() for engine in self]
        loaded = self.of([engine for engine in beside if engine is not None])
        if len(loaded) < len(self):
            return None
        try:
            loaded.swap(path, path)
            probe = probe.fitting(loaded.engines[0].max_model_len())
            short = _shortened(probe)
            said = loaded.engines[0].score_many([(s.ids, s.n_prompt) for s in short.sequences])
            seen = loaded.probe(probe, noise=noise)
        finally:
            for engine in loaded:
                engine.disown(path)
        return Rehearsal(seen=seen, check=replace(short, new_logprobs=tuple(said)))

    def refuse_blind(self, version: PolicyVersion) -> None:
        """Without a probe nobody would see a stale head: then every engine must have the extension that mends it."""
        if tied_head(version.checkpoint_path):
            for engine in self:
                if engine.has_head and engine.extension_info() is None:
                    raise PublishFailed(
                        f"version {version.version_id} has a tied head, {engine.url} lacks our worker extension "
                        "and no probe was given: start the engine with `tracegrad engine`"
                    )

    def _swap_one(self, engine: EngineClient, path: str, mark: str, in_flight: bool) -> None:
        if in_flight:
            self.pauses.pause(engine)
        if (said := engine.swap(path, mark, timeout_s=self.settings.swap_timeout_s)) != mark:
            raise PublishFailed(f"{engine.url} was told version {mark} and says {said}: is somebody else publishing?")
        if in_flight:
            self.pauses.resume(engine)

    def _probe_one(
        self, engine: EngineClient, probe: ProbeSet, bound: float | None, noise: float | None
    ) -> ProbeResult:
        probe = probe.fitting(engine.max_model_len())
        scores = engine.score_many([(s.ids, s.n_prompt) for s in probe.sequences])
        flat = chain.from_iterable
        return judge(
            list(flat(scores)),
            list(flat(probe.new_logprobs)),
            None if probe.previous_logprobs is None else list(flat(probe.previous_logprobs)),
            self.settings.probe_bound if bound is None else bound,
            noise=noise,
            min_tokens=self.settings.probe_tokens,
        )


def _shortened(probe: ProbeSet) -> ProbeSet:
    """Return the first tokens of the sequence with the shortest prompt."""
    place = min(range(len(probe.sequences)), key=lambda i: probe.sequences[i].n_prompt)
    whole, previous = probe.sequences[place], probe.previous_logprobs
    return ProbeSet(
        sequences=(ProbeSequence(ids=whole.ids[: whole.n_prompt + _CHECKED_TOKENS], n_prompt=whole.n_prompt),),
        new_logprobs=(probe.new_logprobs[place][:_CHECKED_TOKENS],),
        previous_logprobs=None if previous is None else (previous[place][:_CHECKED_TOKENS],),
    )


def refuse_bad(seen: ProbeResult | None, version: PolicyVersion) -> None:
    """Raise PublishFailed where a probe saw other weights than the version's."""
    if seen is not None and seen.verdict in ("stale", "mismatch"):
        # Rounding of bf16 alone comes near the default bound where few tokens were compared.
        hint = "; if that is rounding, raise trainer.publish.probe_bound" if seen.verdict == "mismatch" else ""
        raise PublishFailed(f"the engine does not serve version {version.version_id}: {told(seen)}{hint}", probe=seen)


def told(seen: ProbeResult) -> str:
    """Return the figures of a probe in words."""
    parts = [f"{seen.verdict} over {seen.n_tokens} tokens", f"mean |d| {seen.mean_abs_new:.4g} from the new weights"]
    if seen.mean_abs_previous is not None:
        parts.append(f"{seen.mean_abs_previous:.4g} from the previous")
    if seen.stale_share is not None:
        parts.append(f"{seen.stale_share:.0%} of the step missing")
    return ", ".join([*parts, f"bound {seen.bound:g}"])
