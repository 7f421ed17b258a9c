"""What a person sees while a rollout or an evaluation runs: a live line on a terminal, plain lines elsewhere.

Writes to standard error only, so that standard output stays the result's. Called by the drivers through `Watcher`.
"""

import sys
import time
from collections.abc import Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tracegrad.adapters.execution import RunOutcome
from tracegrad.adapters.rollout import GroupProgress, Rollout, Watcher, mean_scores

_RECENT_GROUPS = 8
_PLAIN_EVERY_S = 5.0


class Line(Protocol):
    """Shows `done` of `total` and a text beside it."""

    def update(self, done: int, text: str) -> None:
        """Show the new state."""

    def close(self) -> None:
        """Leave the last state standing."""


class LiveLine:
    """A bar on a terminal, redrawn in place."""

    def __init__(self, what: str, total: int) -> None:
        columns = (TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        self._task: TaskID = self._progress.add_task(what, total=total, text="")
        self._progress.start()

    def update(self, done: int, text: str) -> None:
        """Redraw."""
        self._progress.update(self._task, completed=done, text=text)

    def close(self) -> None:
        """Stop redrawing."""
        self._progress.stop()


class PlainLine:
    """A line of text now and then, where nothing can be redrawn (a log, a pipe)."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._said_at = 0.0
        self._unsaid: str | None = None

    def update(self, done: int, text: str) -> None:
        """Print, unless a line was printed moments ago."""
        self._unsaid = f"{self._what} {done}/{self._total}  {text}"
        if time.monotonic() - self._said_at >= _PLAIN_EVERY_S:
            self._said_at = time.monotonic()
            self.close()

    def close(self) -> None:
        """Print the last state, if it was not."""
        if self._unsaid is not None:
            print(self._unsaid, file=sys.stderr, flush=True)
            self._unsaid = None


def line_for(what: str, total: int) -> Line:
    """Return the line that standard error can show."""
    return LiveLine(what, total) if sys.stderr.isatty() else PlainLine(what, total)


class RolloutProgress(Watcher):
    """Groups done, mean scores of the newest groups, runs in flight, and whether the trainer is waited for."""

    def __init__(self) -> None:
        self._line: Line | None = None
        self._rollout: Rollout | None = None
        self._why: str | None = None

    def begin(self, rollout: Rollout) -> None:
        """Show the empty bar."""
        self._rollout = rollout
        self._line = line_for(f"rollout {rollout.plan.name}: groups", rollout.plan.groups)
        self._show()

    def group_done(self, rollout: Rollout, group: GroupProgress) -> None:
        """Show the new counts."""
        self._show()

    def waiting(self, why: str | None) -> None:
        """Show what is waited for."""
        self._why = why
        self._show()

    def close(self) -> None:
        """Leave the last state standing."""
        if self._line is not None:
            self._line.close()

    def _show(self) -> None:
        if self._line is None or self._rollout is None:
            return
        rollout = self._rollout
        recent = [outcome for group in rollout.done[-_RECENT_GROUPS:] for outcome in group.outcomes]
        parts = [*score_texts(recent), f"{rollout.runs_in_flight} in flight"]
        if self._why is not None:
            parts.append(f"waiting: {self._why}")
        self._line.update(len(rollout.done) + rollout.groups_before, "  ".join(parts))


def score_texts(outcomes: Sequence[RunOutcome]) -> list[str]:
    """Return `name mean` for each score of the closed runs, and how many failed where some did."""
    closed = [outcome for outcome in outcomes if outcome.status == "closed"]
    texts = [f"{name} {mean:.3f}" for name, mean in mean_scores(closed).items()]
    failed = len(outcomes) - len(closed)
    return texts + ([f"{failed} failed"] if failed else [])
