"""What can go wrong between us and the engine. A message says what, which engine, and what to do.

EngineError (tracegrad.trainer.errors)
├── EngineUnreachable    no connection, or no answer in time
├── EngineRefused        it answered with an error; `status` is the HTTP status
├── EngineStartFailed    the process died or never became healthy; holds the last lines of its log
└── EngineNotReady       the preflight found something missing; `findings` says what to add
PublishError (tracegrad.trainer.errors)
├── PublishFailed        the version is not live; `probe` (may be None) holds what the probe saw
└── PublishRejected      the gate did not let it pass; the previous version serves on, and `decision` says why
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tracegrad.tracestore.gating import Decision
from tracegrad.trainer.errors import EngineError, PublishError

UNFINISHED_STAYS = (
    "The publish stays unfinished and proxies hold their requests. Start the engine again; the next start of the "
    "trainer recovers"
)


class EngineUnreachable(EngineError):
    """The engine does not answer."""


class EngineRefused(EngineError):
    """The engine answered with an error, or with something that is not what was asked for."""

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class EngineStartFailed(EngineError):
    """The engine's process died, or did not become healthy in time."""


class EngineNotReady(EngineError):
    """The engine runs, but training on it would be wrong."""

    def __init__(self, message: str, findings: Sequence[Any]) -> None:
        super().__init__(message)
        self.findings = tuple(findings)


class PublishFailed(PublishError):
    """A version did not become live. `probe` is what the probe saw, or None."""

    def __init__(self, message: str, *, probe: Any = None) -> None:
        super().__init__(message)
        self.probe = probe


class PublishRejected(PublishError):
    """What was judged did not pass the gate. Model -> what a probe saw: `candidates` of what did not pass, `probes` of
    what was put back.
    """

    def __init__(
        self,
        message: str,
        *,
        decision: Decision,
        probes: Mapping[str, Any],
        candidates: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.decision = decision
        self.probes = probes
        self.candidates = candidates

    def as_json(self, model: str) -> dict[str, Any]:
        """Return what metrics say of it for one of the models."""
        seen = {"result": self.candidates.get(model), "put_back": self.probes.get(model)}
        told = {name: None if each is None else each.as_json() for name, each in seen.items()}
        return {"rejected": str(self), "decision": self.decision.as_json(), **told}
