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

from collections.abc import Sequence
from typing import Any

from tracegrad.tracestore.gating import Decision
from tracegrad.trainer.errors import EngineError, PublishError


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
    """A version did not pass the gate. `probe` is what the probe saw of the weights that were put back, or None."""

    def __init__(self, message: str, *, publish_id: int, decision: Decision, probe: Any = None) -> None:
        super().__init__(message)
        self.publish_id = publish_id
        self.decision = decision
        self.probe = probe

    def as_json(self) -> dict[str, Any]:
        """Return what metrics say of it."""
        put_back = None if self.probe is None else self.probe.as_json()
        return {"rejected": str(self), "decision": self.decision.as_json(), "put_back": put_back}
