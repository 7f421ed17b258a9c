"""What can go wrong between us and the engine. A message says what, which engine, and what to do.

EngineError (tracegrad.trainer.errors)
├── EngineUnreachable    no connection, or no answer in time
├── EngineRefused        it answered with an error; `status` is the HTTP status
├── EngineStartFailed    the process died or never became healthy; holds the last lines of its log
└── EngineNotReady       the preflight found something missing; `findings` says what to add
PublishError (tracegrad.trainer.errors)
└── PublishFailed        the version is not live; `report` (may be None) holds what the probe saw
"""

from collections.abc import Sequence
from typing import Any

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
