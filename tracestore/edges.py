"""The graph of a run: which span's output fed which, derived from its spans. Pure; no I/O.

LangGraph runs a graph in supersteps: what the nodes of one step wrote is merged into the state at its end, and the
nodes that this triggers run in the next. So a span is fed by the spans of its own graph that ran in the step before it
and wrote a channel that triggers it; of the copies that `Send` makes each is fed by the execution that sent it. A
trigger that names its sources (`join:a+b:c`) is fed by exactly those. Steps, triggers and writes decide, never time: a
span without a superstep has no edges here. Where nobody told what a span wrote (a LangSmith tree does not), it is taken
to have fed all of the next step. A span of a subgraph's first step has no edge inside it; what fed its parent fed it
(`Span.parent_span_id`). Called by whoever shows a run, and by graph credit.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import groupby

from tracegrad.tracestore.records import Edge, Span

_JOIN = "join:"
_PUSH = "__pregel_push:"
_SENDS = ("__pregel_push", "__pregel_tasks")
_SEND = "send:"


def edges(spans: Iterable[Span]) -> tuple[Edge, ...]:
    """Return the edges between the node spans of one run, by target, then source, in the order of the supersteps.

    Where a span of the step before told nothing of its writes, it is taken to have fed the span. The time is that of
    sorting the spans, of their triggers and writes, and of the edges found.
    """
    graphs: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        if span.kind == "node" and span.superstep is not None and span.namespace:
            graphs[graph_of(span.namespace)].append(span)
    found: list[Edge] = []
    for name in sorted(graphs):
        past = _Past()
        for _, step in groupby(sorted(graphs[name], key=_place), key=lambda span: span.superstep):
            beside = _Step(list(step))
            senders = past.senders(beside)
            for target in beside.spans:
                found += [Edge(source=source.span_id, target=target.span_id) for source in _fed(target, past, senders)]
            past.add(beside)
    return tuple(found)


def graph_of(namespace: str) -> str:
    """Return which instance of a graph a node's namespace lies in: ``outer:1f|model:2e`` -> ``outer:1f``."""
    return namespace.rpartition("|")[0]


class _Step:
    """The spans of one superstep of a graph, in the order of their ids, and what they wrote and sent."""

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans
        self.silent = any(span.wrote is None for span in spans)
        """Whether nobody told what one of them wrote."""
        self.named: dict[str, list[Span]] = defaultdict(list)
        self.writers: dict[str, list[Span]] = defaultdict(list)
        for span in spans:
            self.named[span.name].append(span)
            for channel in dict.fromkeys(span.wrote or ()):
                self.writers[channel].append(span)
        self.arrived = {_number(span): span.name for span in spans}
        self.sent = [
            (span, write[len(_SEND) :])
            for span in sorted(spans, key=_path)
            for write in span.wrote or ()
            if write.startswith(_SEND)
        ]

    def wrote(self, channel: str) -> list[Span]:
        """Return the spans that wrote the channel, or may have."""
        if not self.silent:
            return self.writers.get(channel, [])
        return [span for span in self.spans if span.wrote is None or channel in span.wrote]


class _Past:
    """The steps of a graph before the one that is looked at: the last, and who ran and who wrote last."""

    def __init__(self) -> None:
        self.last: _Step | None = None
        self.named: dict[str, list[Span]] = {}
        """Node -> its spans of the last step in which it ran."""
        self.writers: dict[str, list[Span]] = {}
        """Channel -> those that said they wrote it, of the last step in which somebody did."""

    def senders(self, beside: _Step) -> list[Span]:
        """Return who sent the spans of this step, by LangGraph's count through the step before.

        Empty where not all that was sent is known, or did not arrive.
        """
        if self.last is None or self.last.silent:
            return []
        arrived = all(beside.arrived.get(number) == name for number, (_, name) in enumerate(self.last.sent))
        return [span for span, _ in self.last.sent] if arrived else []

    def add(self, step: _Step) -> None:
        """Go on to the next step."""
        self.last = step
        self.named |= step.named
        self.writers |= step.writers


def _fed(target: Span, past: _Past, senders: Sequence[Span]) -> list[Span]:
    """The spans of the same graph that fed `target`, in the order of their steps."""
    if past.last is None:
        return []
    fed = [span for trigger in target.triggers for span in _fed_through(trigger, target, past.last, past, senders)]
    sources = {span.span_id: span for span in fed or past.last.spans}
    return sorted(sources.values(), key=_place)


def _fed_through(trigger: str, target: Span, before: _Step, past: _Past, senders: Sequence[Span]) -> list[Span]:
    """The spans that one of the target's triggers says fed it; none where it was another that made it run."""
    if trigger.startswith(_JOIN):
        names = set(trigger[len(_JOIN) :].rsplit(":", 1)[0].split("+"))
        return [span for name in names for span in past.named[name]] if names <= past.named.keys() else []
    number = _number(target)
    if number is not None and number < len(senders):
        return [senders[number]]
    channel = _SEND + target.name if trigger.startswith(_SENDS) else trigger
    if wrote := before.wrote(channel):
        return wrote
    # Nobody of the step before: the node waited (`defer`), or the trigger is one of several and did not fire.
    return past.writers.get(channel, []) if len(target.triggers) == 1 else []


def _place(span: Span) -> tuple[int, str]:
    """The order of the supersteps, and within one of the ids."""
    return span.superstep or 0, span.span_id


def _path(span: Span) -> tuple[int, str]:
    """LangGraph's order within a step: nodes that a channel made run, by name; then those that were sent, by number."""
    number = _number(span)
    return -1 if number is None else number, span.name


def _number(span: Span) -> int | None:
    """The place of a span among all that was sent in the step before; None: it was not sent, or nobody said."""
    said = [trigger[len(_PUSH) :] for trigger in span.triggers if trigger.startswith(_PUSH)]
    return int(said[0]) if said and said[0].isdecimal() else None
