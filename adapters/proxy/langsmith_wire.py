"""What a LangSmith client posts, from bytes to run parts: multipart forms and JSON batches.

Clients tell of a run in parts (its start, its end), each with an id, its trace and its place in it (`dotted_order`).
Feedback comes as parts of a form too, or by itself. Refuses what is not the form it says it is; a single part that
cannot be read is left out and counted. Attachments are skipped. Bodies come unpacked (see `limits`). Pure. Source:
langsmith-sdk `_internal/_operations.py` (part names). Called by `langsmith`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec

from tracegrad.adapters.proxy.errors import InvalidRequest

_UNREADABLE = (msgspec.MsgspecError, KeyError, TypeError, ValueError, AttributeError, OverflowError)
_FIELDS = ("inputs", "outputs", "extra", "error")
_NAME = re.compile(rb'content-disposition:[^\r\n]*\bname="([^"]*)"', re.IGNORECASE)
_BOUNDARY = re.compile(rb'boundary="?([^";,]+)"?', re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPart:
    """A part of a LangSmith run. Ids are UUIDs in hex; `ancestors` are the runs it lies in, outermost first."""

    run_id: str
    trace_id: str
    parent_id: str | None
    ancestors: tuple[str, ...]
    name: str | None
    run_type: str | None
    tags: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    inputs: Any = None
    outputs: Any = None
    error: str | None = None
    started_at: float | None = None
    ended_at: float | None = None

    @property
    def is_root(self) -> bool:
        """Whether this is the trace's outermost run."""
        return self.run_id == self.trace_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """What somebody thinks of a run. `score` None: nothing that could be a reward, say a comment (law 6)."""

    feedback_id: str
    about: str | None
    """The run of LangSmith, in hex; None: a whole project."""
    key: str
    score: float | None


@dataclass(frozen=True, slots=True)
class Posted:
    """What one request told: the parts in its order, the feedback, and how many parts could not be read."""

    parts: tuple[RunPart, ...]
    unread: int = 0
    feedback: tuple[Feedback, ...] = ()


def zstd_available() -> bool:
    """Whether bodies compressed with zstd can be read here: `zstandard` is no dependency of ours."""
    try:
        import zstandard  # noqa: F401
    except ImportError:
        return False
    return True


def read_multipart(body: bytes, content_type: bytes) -> Posted:
    """Read `/runs/multipart`: parts named `post.ID` or `patch.ID`, and `….inputs`, `.outputs`, `.extra`, `.error`;
    `feedback.ID`.

    Raises:
        InvalidRequest: no multipart form.
    """
    boundary = _BOUNDARY.search(content_type)
    if boundary is None or b"multipart/form-data" not in content_type.lower():
        raise InvalidRequest("send multipart/form-data with a boundary")
    runs: dict[tuple[str, str], dict[str, Any]] = {}
    feedback: list[Feedback] = []
    unread = 0
    for name, raw in _form_parts(body, boundary.group(1)):
        operation, _, rest = name.partition(".")
        run_id, _, key = rest.partition(".")
        if operation == "feedback":
            try:
                feedback.append(_feedback(msgspec.json.decode(raw)))
            except _UNREADABLE:
                unread += 1
        if operation not in ("post", "patch") or key not in ("", *_FIELDS):
            continue
        fields = runs.setdefault((operation, run_id), {"id": run_id})
        try:
            value = msgspec.json.decode(raw)
            fields.update({key: value} if key else value)
        except _UNREADABLE:
            unread += 1
    return replace(_posted(runs.values(), unread), feedback=tuple(feedback))


def _form_parts(body: bytes, boundary: bytes) -> Iterator[tuple[str, bytes]]:
    mark = b"--" + boundary
    for piece in body.split(mark)[1:]:
        if piece.startswith(b"--"):
            return
        head, found, content = piece.partition(b"\r\n\r\n")
        name = _NAME.search(head)
        if found and name is not None:
            yield name.group(1).decode(errors="replace"), content.removesuffix(b"\r\n")


def read_batch(body: bytes) -> Posted:
    """Read `/runs/batch`: `{"post": [run, …], "patch": [run, …]}`. Raises InvalidRequest."""
    batch = _json_object(body)
    runs = [run for key in ("post", "patch") for run in batch.get(key) or ()]
    return _posted([run for run in runs if isinstance(run, dict)], sum(not isinstance(run, dict) for run in runs))


def read_run(body: bytes, run_id: str | None = None) -> Posted:
    """Read the body of `POST /runs`, or of `PATCH /runs/{run_id}`. Raises InvalidRequest."""
    run = _json_object(body)
    return _posted([run if run_id is None else {**run, "id": run_id}], 0)


def read_feedback(body: bytes) -> Feedback:
    """Read the body of `POST /feedback`. Raises InvalidRequest."""
    try:
        return _feedback(_json_object(body))
    except _UNREADABLE as error:
        raise InvalidRequest(f"the feedback cannot be read: {error}") from error


def read_new_score(body: bytes) -> float | None:
    """Read the body of `PATCH /feedback/{id}`; None where it changes no score. Raises InvalidRequest."""
    try:
        return _score(_json_object(body).get("score"))
    except _UNREADABLE as error:
        raise InvalidRequest(f"the feedback cannot be read: {error}") from error


def _feedback(said: Mapping[str, Any]) -> Feedback:
    about = said.get("run_id") or said.get("trace_id")
    key = said["key"]
    if not isinstance(key, str) or not key:
        raise ValueError(f"its key must be a word, not {key!r}")
    return Feedback(
        feedback_id=UUID(said["id"]).hex,
        about=UUID(about).hex if about else None,
        key=key,
        score=_score(said.get("score")),
    )


def _score(score: Any) -> float | None:
    """A number, or true and false as LangSmith counts them: 1 and 0."""
    if score is None:
        return None
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f"its score must be a number, true, false or null, not {score!r}")
    return float(score)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body must be a JSON object: {error}") from error


def _posted(runs: Any, unread: int) -> Posted:
    parts = []
    for run in runs:
        try:
            parts.append(_part(run))
        except _UNREADABLE:
            unread += 1
    return Posted(tuple(parts), unread)


def _part(run: Mapping[str, Any]) -> RunPart:
    run_id = UUID(run["id"]).hex
    dotted = run.get("dotted_order")
    # 20261122T182117036547Z01a2047d-b56b-….20261122T…: a time and an id for each run from the outermost to this one
    path = tuple(UUID(step.rpartition("Z")[2]).hex for step in dotted.split(".")) if dotted else ()
    parent = UUID(run["parent_run_id"]).hex if run.get("parent_run_id") else path[-2] if len(path) > 1 else None
    trace_id = UUID(run["trace_id"]).hex if run.get("trace_id") else path[0] if path else parent or run_id
    extra = run.get("extra") or {}
    return RunPart(
        run_id=run_id,
        trace_id=trace_id,
        parent_id=parent,
        ancestors=path[:-1],
        name=run.get("name"),
        run_type=run.get("run_type"),
        tags=tuple(run.get("tags") or ()),
        metadata=extra.get("metadata") or {},
        inputs=run.get("inputs") or None,
        outputs=run.get("outputs") or None,
        error=run.get("error"),
        started_at=_seconds(run.get("start_time")),
        ended_at=_seconds(run.get("end_time")),
    )


def _seconds(time: Any) -> float | None:
    """Unix seconds from an ISO time (UTC where it does not say) or from milliseconds, as JS clients write them."""
    if time is None:
        return None
    if isinstance(time, int | float):
        return float(time) / 1000
    read = datetime.fromisoformat(time)
    return (read if read.tzinfo is not None else read.replace(tzinfo=UTC)).timestamp()
