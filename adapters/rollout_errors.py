"""What the rollout and evaluation drivers raise. A message says what, which id or line, and what to do.

RolloutError (an AdapterError)
├── TaskFileError          the task file cannot be read or has bad lines
├── EntryPointError        module:attribute cannot be imported, or is not what it must be
├── RewardShapeError       a reward function returned something that is not a reward
├── RolloutStopped         the driver gave up: too many failures in a row, or the proxy stayed away
├── EvalFileError          an evaluation's file cannot be read or is something else
└── ServingError           the engine or proxy started for an evaluation did not come up
"""

from tracegrad.adapters.errors import AdapterError


class RolloutError(AdapterError):
    """Root of what the rollout and evaluation drivers raise."""


class TaskFileError(RolloutError):
    """The task file cannot be used as written."""


class EntryPointError(RolloutError):
    """`module:attribute` names nothing that can be used."""


class RewardShapeError(RolloutError):
    """A reward function returned something that is not a reward."""


class RolloutStopped(RolloutError):
    """The driver gave up; what was done is in the store, and the same --name goes on from there."""


class ServingError(RolloutError):
    """The engine or the proxy started for an evaluation did not come up."""


class EvalFileError(RolloutError):
    """The file is not one that an evaluation wrote."""
