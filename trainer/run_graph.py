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

Of n calls in as many spans there are some 10 n links: what had completed at a moment is a place of its own between
those that completed and those that heard it, so that no pair is looked at. Who comes after whom is kept as bits: n^2/16
bytes for n calls one after another (4 MB for 8,000), and operations on whole words of them, a few for each link.
Called by `samples`, for credit.
"""

import heapq
import math
from bisect import bisect_right
from collections import Counter, defaultdict
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
    """The calls of a run, and for each the set of all that come after it, as bits: bit i stands for `nodes[i]`.

    The last come first: what comes after a call stands before it, calls with equally many one after another behind
    them by id. Ancestry is all there is: an edge that says what others imply changes nothing.
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
    by_id = {node.call_id: node for node in nodes}
    after: dict[Hashable, set[Hashable]] = defaultdict(set)
    for source, target in links:
        after[source].add(target)
    try:
        backwards = tuple(TopologicalSorter(after).static_order())  # what comes after a vertex is before it here
    except CycleError:
        backwards = ()
    behind: dict[Hashable, int] = {}
    """Vertex -> the calls after it on the longest way."""
    for vertex in backwards:
        behind[vertex] = max((behind[one] + (one in by_id) for one in after.get(vertex, ())), default=0)
    ordered = tuple(sorted(by_id.values(), key=lambda node: (behind.get(node.call_id, 0), node.call_id)))
    place: dict[Hashable, int] = {node.call_id: number for number, node in enumerate(ordered)}
    readers = Counter(target for vertex in backwards for target in after.get(vertex, ()))
    descendants = [0] * len(ordered)
    reached: dict[Hashable, int] = {}
    for vertex in backwards:
        mask = 0
        for following in after.get(vertex, ()):
            mask |= reached[following] | (1 << place[following] if following in place else 0)
            readers[following] -= 1
            if not readers[following]:
                del reached[following]  # or the sets of what is no call would outnumber those of the calls
        if vertex in place:
            descendants[place[vertex]] = mask
        if readers[vertex]:
            reached[vertex] = mask
    return RunGraph(nodes=ordered, descendants=tuple(descendants))


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
    below: dict[str, tuple[float, float]] = {}
    """Span -> when the first call in it or below it was dispatched, and when the last had completed."""
    for call in calls:
        if call.attribution.span is None:
            continue
        own[call.attribution.span.span_id].append(call)
        for span_id in _upwards(call.attribution.span.span_id, spans):
            started, ended = below.get(span_id, (math.inf, -math.inf))
            below[span_id] = min(started, call.timing.dispatched_at), max(ended, _ended(call))
    within: dict[str, list[str]] = defaultdict(list)
    for span_id in below:
        if (parent := spans[span_id].parent_span_id) in own:
            within[parent].append(span_id)
    for span_id, made in own.items():
        for call in made:
            yield _enter(span_id), call.call_id
            yield call.call_id, _leave(span_id)
        yield from _chain(span_id, made, mute)
        if span_id in within:
            yield from _around(span_id, made, {child: below[child] for child in within[span_id]})


def _upwards(span_id: str, spans: dict[str, Span]) -> Iterator[str]:
    """The span and those it lies in, each once."""
    seen: set[str] = set()
    at: str | None = span_id
    while at in spans and at not in seen:
        seen.add(at)
        yield at
        at = spans[at].parent_span_id


def _chain(span_id: str, made: Sequence[Call], mute: set[str]) -> Iterator[Link]:
    """Each call after those of the span that had completed when it was dispatched.

    What had completed at a dispatch is a place that the later ones are reached from: each call is linked with two.
    """
    ordered = sorted(made, key=lambda call: (call.timing.dispatched_at, call.timing.completed_at, call.call_id))
    running: list[tuple[float, str]] = []
    heard = 0
    for call in ordered:
        while running and running[0][0] <= call.timing.dispatched_at:
            yield _heard(span_id, heard), _heard(span_id, heard + 1)
            heard += 1
            yield heapq.heappop(running)[1], _heard(span_id, heard)
        if heard:
            yield _heard(span_id, heard), call.call_id
        if call.call_id not in mute:
            heapq.heappush(running, (call.timing.completed_at, call.call_id))


def _heard(span_id: str, count: int) -> Hashable:
    return "heard", span_id, count


def _around(span_id: str, made: Sequence[Call], inside: dict[str, tuple[float, float]]) -> Iterator[Link]:
    """The span's own calls before and after its child spans. `inside`: child -> when its calls started and ended."""
    begun = sorted((call.timing.dispatched_at, _ended(call), call.call_id) for call in made)
    finished = sorted((ended, call_id) for _, ended, call_id in begun)
    for number, (_, call_id) in enumerate(finished):  # place n: after the first n to complete
        yield ("finished", span_id, number), ("finished", span_id, number + 1)
        yield call_id, ("finished", span_id, number + 1)
    for number, (*_, call_id) in enumerate(begun):  # place n: before all but the first n to be dispatched
        yield ("begun", span_id, number), ("begun", span_id, number + 1)
        yield ("begun", span_id, number), call_id
    for child_id, (started, ended) in inside.items():
        before = bisect_right(finished, started, key=lambda one: one[0])
        # What took no time, in the very moment in which the child did, came before it, and not after it as well.
        after = bisect_right(begun, (ended, started), key=lambda one: one[:2])
        yield ("finished", span_id, before), _enter(child_id)
        yield _leave(child_id), ("begun", span_id, after)


def _ended(call: Call) -> float:
    """When it had completed; where a clock was set back meanwhile, not before it was dispatched."""
    return max(call.timing.dispatched_at, call.timing.completed_at)


def _continued(calls: Sequence[Call]) -> Iterator[Link]:
    """Where spans say nothing of one of the two; between spans, equal answers of two branches would mislead."""
    known = {call.call_id: call for call in calls}
    for call in calls:
        earlier = known.get(call.continues.call_id) if call.continues is not None else None
        if earlier is not None and None in (earlier.attribution.span, call.attribution.span):
            yield earlier.call_id, call.call_id
