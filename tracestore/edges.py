"""The graph of a run: which span's output fed which, derived from its spans. Pure; no I/O.

LangGraph runs a graph in supersteps: what the nodes of one step wrote is merged into the state at its end, and the
nodes that this triggers run in the next. So a span is fed by the spans of its own graph that ran in the step before
it; a trigger that names its sources (`join:a+b:c`) is fed by exactly those. Steps and triggers decide, never time: a
span without a superstep has no edges here. A span of a subgraph's first step has no edge inside it; what fed its
parent fed it (`Span.parent_span_id`). Called by whoever shows a run, and by graph credit.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from tracegrad.tracestore.records import Edge, Span

_JOIN = "join:"


def edges(spans: Iterable[Span]) -> tuple[Edge, ...]:
    """Return the edges between the node spans of one run, by target, then source, in the order of the supersteps.

    Where several nodes ran in the step before, each is taken to have fed the span: it read the state they all wrote.
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
    joins = [trigger for trigger in target.triggers if trigger.startswith(_JOIN)]
    named = {name for trigger in joins for name in trigger[len(_JOIN) :].rsplit(":", 1)[0].split("+")}
    sources = {span.span_id for span in _last_of(named, earlier)}
    if len(joins) < max(len(target.triggers), 1):  # some trigger does not name who wrote: all of the step before did
        last_step = earlier[-1].superstep
        sources |= {span.span_id for span in earlier if span.superstep == last_step}
    return [span for span in earlier if span.span_id in sources]


def _last_of(names: set[str], earlier: Sequence[Span]) -> list[Span]:
    """The spans of the last step in which each of the named nodes ran."""
    last_step = {span.name: span.superstep for span in earlier if span.name in names}
    return [span for span in earlier if last_step.get(span.name) == span.superstep]
