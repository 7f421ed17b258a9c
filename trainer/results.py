"""What a worker hands back: frozen values without torch, so that the controller's process never imports it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tracegrad.tracestore.records import Consumption
from tracegrad.trainer.checkpoints import Checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """One applied step: what became of every choice, and its metrics (JSON values only)."""

    consumption: tuple[Consumption, ...]
    metrics: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Token ids with the trainer's logprobs at temperature 1 of ``ids[n_prompt:]``, nats, under some weights."""

    ids: tuple[int, ...]
    n_prompt: int
    logprobs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A written checkpoint, and the same sequences scored under the weights before the step and under these."""

    checkpoint: Checkpoint
    previous: tuple[Scored, ...] = ()
    new: tuple[Scored, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a group wrote of one model into a folder that is not a checkpoint yet.

    `digests`: sha256 by file name in the model's folder, of the files that were hashed on the way; `facts`: for the
    manifest; the scores as in `Saved`.
    """

    digests: Mapping[str, str]
    facts: Mapping[str, Any]
    previous: tuple[Scored, ...] = ()
    new: tuple[Scored, ...] = ()
