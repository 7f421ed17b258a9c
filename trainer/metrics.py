"""What a training job says of itself: `metrics.jsonl`, TensorBoard, trackers, one line a step on the console.

The ledger is the truth and this is its shadow: a line is written after its step is committed, so a kill between the
two leaves one line missing, and `reconcile` puts it back from the ledger row. Refuses nothing but an unwritable disk:
what an experiment tracker refuses is said once, and its numbers stand in `metrics.jsonl`.
Called by the controller. TensorBoard's own writer is used, so this imports no torch.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from tracegrad.trainer.errors import TrackingError
from tracegrad.trainer.trackers import Tracker

Echo = Callable[[str], None]


class MetricsLog:
    """Appends to `<folder>/metrics.jsonl` (flushed to the operating system), `<folder>/tensorboard/`, and trackers."""

    def __init__(self, folder: Path, trackers: Sequence[Tracker] = (), say: Echo = lambda _text: None) -> None:
        self._trackers, self._say = trackers, say
        self._silent: set[Tracker] = set()
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        self._board = EventFileWriter(str(folder / "tensorboard"))

    def reconcile(self, last_step: int, metrics: Mapping[str, Any] | None) -> None:
        """Make the file end with the ledger's last step: drop a torn line and lines after it, add a missing last."""
        lines = [line for line in self._stored() if line["step"] <= last_step]
        if metrics is not None and all(line["step"] != last_step for line in lines):
            lines.append({**metrics, "step": last_step})
        temporary = self.path.with_suffix(".writing")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(self.path)

    def record(self, line: Mapping[str, Any]) -> None:
        """Append one step. `line` has "step"; nested mappings become `a/b` in TensorBoard."""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
        step, values = int(line["step"]), dict(scalars(line))
        self._board.add_event(_event(step, values))
        self._board.flush()
        self._tell(lambda tracker: tracker.log(step, values))

    def close(self) -> None:
        """Flush and close the TensorBoard file and the trackers."""
        self._board.close()
        self._tell(lambda tracker: tracker.close())

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            try:
                what(tracker)
                self._silent.discard(tracker)
            except TrackingError as error:
                if tracker not in self._silent:
                    self._say(f"{error}; training goes on, metrics.jsonl has the numbers")
                self._silent.add(tracker)

    def _stored(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for raw in self.path.read_bytes().split(b"\n"):
            try:
                line = json.loads(raw)
            except ValueError:
                continue  # the empty end, or the line that a kill tore
            if isinstance(line, dict) and "step" in line:
                yield line


class Console:
    """One line a step for people, or the JSON line with `as_json`; between steps, what it waits for (said once)."""

    def __init__(self, echo: Echo, *, steps: int, as_json: bool) -> None:
        self._echo, self._steps, self._json = echo, steps, as_json
        self._recent: deque[float] = deque(maxlen=8)
        self._last = time.monotonic()
        self._said = ""

    def say(self, text: str) -> None:
        """Print `text` unless it is what was said last."""
        if text == self._said:
            return
        self._said = text
        self._echo(json.dumps({"event": "status", "text": text}) if self._json else text)

    def step(self, line: Mapping[str, Any]) -> None:
        """Print the step's line with the time left at the pace of the last eight steps (waiting included)."""
        now = time.monotonic()
        self._recent.append(now - self._last)
        self._last, self._said = now, ""
        if self._json:
            self._echo(json.dumps({"event": "step", **line}))
            return
        left = (self._steps - int(line["step"])) * sum(self._recent) / len(self._recent)
        seconds = line.get("seconds", {})
        parts = [
            f"step {line['step']}/{self._steps}",
            f"reward {_number(line.get('reward'))}",
            *(f"{role} {_number(values.get('reward'))}" for role, values in line.get("roles", {}).items()),
            f"tokens {line.get('tokens_trained', 0)} trained, {line.get('tokens_computed', 0)} computed",
            f"kl {_number(line.get('kl'))}",
            f"|d| {_number(line.get('logprob_abs_diff'))}",
            f"{seconds.get('total', 0.0):.1f} s",
            f"left {duration(left)}",
        ]
        self._echo("  ".join(parts))


def scalars(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Flatten nested mappings to ("a/b", number); what is not a number (text, lists, missing) is left out."""
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", float(value)


def duration(seconds: float) -> str:
    """Return "1h02m", "3m20s" or "45s"."""
    whole = max(0, round(seconds))
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"


def _event(step: int, values: Mapping[str, float]) -> Event:
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    return Event(step=step, wall_time=time.time(), summary=summary)
