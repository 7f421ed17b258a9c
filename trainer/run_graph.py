"""The run graph over calls: which call's answer was there when another call was made. Pure; no I/O.

Spans come from the trace, the edges between them from `tracestore.edges` (supersteps, triggers, writes), and nesting
from their parents: what fed a span fed every call in it and below it, and every call in it and below it fed what the
span fed. Calls that one span made itself are one line of code: they form a chain by dispatch order; those that overlap
in time, and so cannot have read one another's answers, stand side by side. Its child spans are branches: only edges
link them with one another, never time.

A call without a span is linked by `Call.continues` alone (an earlier call's messages and answer stand in its prompt).
A run of which nothing else is known has no edges: graph credit is call-local there, and such calls are counted. A call
that failed, or whose answer the client never got, is mute: it fed nothing. What contradicts itself (a cycle) links
nothing.
Called by `samples`, for credit.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter

from tracegrad.tracestore.edges import edges
from tracegrad.tracestore.records import Call, RunTrace, Span

Link = tuple[Hashable, Hashable]


@dataclass(frozen=True, kw_only=True, slots=True)
class CallNode:
    """A call as credit sees it. `mute`: it failed, or was sent again; nothing follows it, and it is never trained."""

    call_id: str
    role: str | None
    model: str
    mute: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class RunGraph:
    """The calls of a run by id, and for each the set of all that come after it, as bits: bit i stands for `nodes[i]`.

    Ancestry is all there is: an edge that says what others imply changes nothing.
    """

    nodes: tuple[CallNode, ...]
    descendants: tuple[int, ...]

    def index(self) -> dict[str, int]:
        """Return call id -> its place in `nodes`."""
        return {node.call_id: number for number, node in enumerate(self.nodes)}

    def unlinked(self) -> frozenset[str]:
        """Return the calls that neither follow nor are followed by another, in a run of several calls."""
        touched = 0
        for number, mask in enumerate(self.descendants):
            touched |= mask | (1 << number if mask else 0)
        alone = {node.call_id for number, node in enumerate(self.nodes) if not touched >> number & 1}
        return frozenset(alone if len(self.nodes) > 1 else ())


def bits(mask: int) -> Iterator[int]:
    """Yield the places of the set bits, ascending."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def linked(nodes: Iterable[CallNode], links: Iterable[Link]) -> RunGraph:
    """Return the graph of `nodes` under `links`, which name call ids and whatever else lies between them.

    Any order of nodes and links gives the same graph. A cycle gives a graph without edges.
    """
    ordered = tuple(sorted(nodes, key=lambda node: node.call_id))
    place: dict[Hashable, int] = {node.call_id: number for number, node in enumerate(ordered)}
    after: dict[Hashable, set[Hashable]] = defaultdict(set)
    for source, target in links:
        after[source].add(target)
    reached: dict[Hashable, int] = {}
    try:
        for vertex in TopologicalSorter(after).static_order():  # whatever comes after a vertex is before it here
            mask = 0
            for following in after.get(vertex, ()):
                mask |= reached[following] | (1 << place[following] if following in place else 0)
            reached[vertex] = mask
    except CycleError:
        reached = {}
    return RunGraph(nodes=ordered, descendants=tuple(reached.get(node.call_id, 0) for node in ordered))


def run_graph(trace: RunTrace) -> RunGraph:
    """Return the graph of a run."""
    spans = {span.span_id: span for span in trace.spans}
    for call in trace.calls:
        if (own := call.attribution.span) is not None:
            spans.setdefault(own.span_id, own)
    retried = {call.retry_of for call in trace.calls}
    mute = {call.call_id for call in trace.calls if call.status == "failed" or call.call_id in retried}
    nodes = [
        CallNode(call_id=c.call_id, role=c.attribution.role, model=c.model, mute=c.call_id in mute) for c in trace.calls
    ]
    links = [*_between_spans(spans), *_inside_spans(spans, trace.calls, mute), *_continued(trace.calls)]
    return linked(nodes, [link for link in links if link[0] not in mute])


def _enter(span_id: str) -> Hashable:
    return "enter", span_id


def _leave(span_id: str) -> Hashable:
    return "leave", span_id


def _between_spans(spans: dict[str, Span]) -> Iterator[Link]:
    for edge in edges(spans.values()):
        yield _leave(edge.source), _enter(edge.target)
    for span in spans.values():
        yield _enter(span.span_id), _leave(span.span_id)
        if span.parent_span_id in spans:
            yield _enter(span.parent_span_id), _enter(span.span_id)
            yield _leave(span.span_id), _leave(span.parent_span_id)


def _inside_spans(spans: dict[str, Span], calls: Sequence[Call], mute: set[str]) -> Iterator[Link]:
    """A span's own calls, in their order, and before or after its child spans as their calls lie in time."""
    own: dict[str, list[Call]] = defaultdict(list)
    below: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        if call.attribution.span is None:
            continue
        own[call.attribution.span.span_id].append(call)
        for span_id in _upwards(call.attribution.span.span_id, spans):
            below[span_id].append(call)
    for span_id, made in own.items():
        for call in made:
            yield _enter(span_id), call.call_id
            yield call.call_id, _leave(span_id)
        yield from _chain(made, mute)
        for child in spans.values():
            if child.parent_span_id == span_id and below[child.span_id]:
                yield from _around(child.span_id, below[child.span_id], made)


def _upwards(span_id: str, spans: dict[str, Span]) -> Iterator[str]:
    """The span and those it lies in, each once."""
    seen: set[str] = set()
    at: str | None = span_id
    while at in spans and at not in seen:
        seen.add(at)
        yield at
        at = spans[at].parent_span_id


def _chain(made: Sequence[Call], mute: set[str]) -> Iterator[Link]:
    """Each call after those that had completed when it was dispatched, less what others between them imply."""
    ordered = sorted(made, key=lambda call: (call.timing.dispatched_at, call.timing.completed_at, call.call_id))
    for number, call in enumerate(ordered):
        heard = [one for one in ordered[:number] if one.call_id not in mute]
        before = [one for one in heard if one.timing.completed_at <= call.timing.dispatched_at]
        latest = max((one.timing.dispatched_at for one in before), default=0.0)
        for one in before:
            if one.timing.completed_at > latest or one.timing.dispatched_at == latest:
                yield one.call_id, call.call_id


def _around(child_id: str, inside: Sequence[Call], made: Sequence[Call]) -> Iterator[Link]:
    started = min(call.timing.dispatched_at for call in inside)
    ended = max(call.timing.completed_at for call in inside)
    for call in made:
        if call.timing.completed_at <= started:
            yield call.call_id, _enter(child_id)
        elif ended <= call.timing.dispatched_at:
            yield _leave(child_id), call.call_id


def _continued(calls: Sequence[Call]) -> Iterator[Link]:
    """Where spans say nothing of one of the two; between spans, equal answers of two branches would mislead."""
    known = {call.call_id: call for call in calls}
    for call in calls:
        earlier = known.get(call.continues.call_id) if call.continues is not None else None
        if earlier is not None and None in (earlier.attribution.span, call.attribution.span):
            yield earlier.call_id, call.call_id
