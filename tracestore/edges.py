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

from tracegrad.tracestore.records import Edge, Span

_JOIN = "join:"
_PUSH = "__pregel_push:"
_SENDS = ("__pregel_push", "__pregel_tasks")
_SEND = "send:"


def edges(spans: Iterable[Span]) -> tuple[Edge, ...]:
    """Return the edges between the node spans of one run, by target, then source, in the order of the supersteps.

    Where a span of the step before told nothing of its writes, it is taken to have fed the span.
    """
    graphs: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        if span.kind == "node" and span.superstep is not None and span.namespace:
            graphs[graph_of(span.namespace)].append(span)
    found = []
    for name in sorted(graphs):
        nodes = sorted(graphs[name], key=lambda span: (span.superstep or 0, span.span_id))
        found += [
            Edge(source=source.span_id, target=target.span_id) for target in nodes for source in _fed(target, nodes)
        ]
    return tuple(found)


def graph_of(namespace: str) -> str:
    """Return which instance of a graph a node's namespace lies in: ``outer:1f|model:2e`` -> ``outer:1f``."""
    return namespace.rpartition("|")[0]


def _fed(target: Span, nodes: Sequence[Span]) -> list[Span]:
    """The spans of the same graph that fed `target`; `nodes` are in the order of their steps."""
    assert target.superstep is not None
    earlier = [span for span in nodes if span.superstep is not None and span.superstep < target.superstep]
    if not earlier:
        return []
    before = [span for span in earlier if span.superstep == earlier[-1].superstep]
    beside = [span for span in nodes if span.superstep == target.superstep]
    fed = [span for trigger in target.triggers for span in _fed_through(trigger, target, earlier, before, beside)]
    sources = {span.span_id for span in fed or before}
    return [span for span in earlier if span.span_id in sources]


def _fed_through(
    trigger: str, target: Span, earlier: Sequence[Span], before: Sequence[Span], beside: Sequence[Span]
) -> list[Span]:
    """The spans that one of the target's triggers says fed it; none where it was another that made it run.

    `before` are those of the step before, `beside` those of the target's own.
    """
    if trigger.startswith(_JOIN):
        return _last_of(set(trigger[len(_JOIN) :].rsplit(":", 1)[0].split("+")), earlier)
    sender = _sender(target, before, beside)
    if sender is not None:
        return [sender]
    channel = _SEND + target.name if trigger.startswith(_SENDS) else trigger
    wrote = [span for span in before if span.wrote is None or channel in span.wrote]
    if wrote:
        return wrote
    # Nobody of the step before: the node waited (`defer`), or the trigger is one of several and did not fire.
    writers = [span for span in earlier if span.wrote is not None and channel in span.wrote]
    waited = bool(writers) and len(target.triggers) == 1
    return [span for span in writers if span.superstep == writers[-1].superstep] if waited else []


def _sender(target: Span, before: Sequence[Span], beside: Sequence[Span]) -> Span | None:
    """The span that sent `target`, where all that was sent is known and arrived: LangGraph counts through a step."""
    number = _number(target)
    if number is None or any(span.wrote is None for span in before):
        return None
    sent = [
        (span, write) for span in sorted(before, key=_path) for write in span.wrote or () if write.startswith(_SEND)
    ]
    arrived = {_number(span): span.name for span in beside}
    if any(arrived.get(at) != write[len(_SEND) :] for at, (_, write) in enumerate(sent)) or number >= len(sent):
        return None
    return sent[number][0]


def _path(span: Span) -> tuple[int, str]:
    """LangGraph's order within a step: nodes that a channel made run, by name; then those that were sent, by number."""
    number = _number(span)
    return -1 if number is None else number, span.name


def _number(span: Span) -> int | None:
    """The place of a span among all that was sent in the step before; None: it was not sent, or nobody said."""
    said = [trigger[len(_PUSH) :] for trigger in span.triggers if trigger.startswith(_PUSH)]
    return int(said[0]) if said and said[0].isdecimal() else None


def _last_of(names: set[str], earlier: Sequence[Span]) -> list[Span]:
    """The spans of the last step in which each of the named nodes ran; none while one of them has not run."""
    last_step = {span.name: span.superstep for span in earlier if span.name in names}
    if set(last_step) != names:
        return []
    return [span for span in earlier if last_step.get(span.name) == span.superstep]
