"""A run as a tree for the terminal, and as a Mermaid graph: what ran inside what, and what fed what.

Pure: takes a `RunTrace`. Spans hang below their parents, calls below the span that made them; what belongs nowhere
hangs at the root. Edges are those of `tracestore.edges`. Refuses nothing. Called by `look`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from rich.markup import escape
from rich.tree import Tree

from tracegrad.tracestore.edges import edges
from tracegrad.tracestore.records import Call, RunTrace, Span

_SHAPES = {"node": ("[", "]"), "tool": ("([", "])"), "graph": ("[[", "]]")}
_COLOURS = {"node": "cyan", "tool": "magenta", "graph": "blue"}


def tree_of(trace: RunTrace, *, shorten: Callable[[str], str]) -> Tree:
    """Return the run's spans and calls as a Rich tree; `shorten` cuts texts."""
    numbers = {call.call_id: number for number, call in enumerate(trace.calls, start=1)}
    calls: dict[str | None, list[Call]] = defaultdict(list)
    for call in trace.calls:
        span = call.attribution.span
        calls[None if span is None else span.span_id].append(call)
    root = Tree(escape(f"run {trace.run.run_id}"))

    def grow(parent: Tree, span: Span, children: Mapping[str | None, list[Span]]) -> None:
        branch = parent.add(_span_label(span, shorten))
        for call in calls.pop(span.span_id, ()):
            branch.add(_call_label(numbers[call.call_id], call))
        for child in children.get(span.span_id, ()):
            grow(branch, child, children)

    children = children_of(trace.spans)
    for span in children.get(None, ()):
        grow(root, span, children)
    for left in calls.values():
        for call in left:
            root.add(_call_label(numbers[call.call_id], call))
    return root


def children_of(spans: Iterable[Span]) -> dict[str | None, list[Span]]:
    """Return span id -> its children, in the order given; what has no known parent is a child of None.

    A span whose ancestors form a ring (told by sources that disagree) is a child of None as well.
    """
    parents = {span.span_id: span.parent_span_id for span in spans}
    children: dict[str | None, list[Span]] = defaultdict(list)
    for span in spans:
        parent = span.parent_span_id if span.parent_span_id in parents else None
        children[None if _in_a_ring(span.span_id, parents) else parent].append(span)
    return children


def mermaid(trace: RunTrace) -> str:
    """Return the run as a Mermaid flowchart: solid arrows are edges, dotted ones lead to what ran inside a span."""
    names = {span.span_id: f"s{number}" for number, span in enumerate(trace.spans)}
    calls: dict[str, int] = defaultdict(int)
    for call in trace.calls:
        if call.attribution.span is not None:
            calls[call.attribution.span.span_id] += 1
    lines = ["flowchart TD"]
    for span in trace.spans:
        left, right = _SHAPES[span.kind]
        lines.append(f"    {names[span.span_id]}{left}{_quoted(_box(span, calls[span.span_id]))}{right}")
    lines += [f"    {names[edge.source]} --> {names[edge.target]}" for edge in edges(trace.spans)]
    for parent, inside in children_of(trace.spans).items():
        if parent is not None:
            lines += [f"    {names[parent]} -.-> {names[span.span_id]}" for span in inside]
    return "\n".join(lines) + "\n"


def _in_a_ring(span_id: str, parents: Mapping[str, str | None]) -> bool:
    seen: set[str] = set()
    at: str | None = span_id
    while at is not None and at in parents:
        if at in seen:
            return True
        seen.add(at)
        at = parents[at]
    return False


def _span_label(span: Span, shorten: Callable[[str], str]) -> str:
    place = "" if span.superstep is None else f" [dim]step {span.superstep}[/]"
    took = ""
    if span.started_at is not None and span.ended_at is not None:
        took = f" [dim]{span.ended_at - span.started_at:.2f} s[/]"
    label = f"[{_COLOURS[span.kind]}]{escape(span.name)}[/] [dim]{span.kind}[/]{place}{took}"
    if span.kind == "tool" and span.input is not None:
        label += f"\n  [dim]in[/]  {escape(shorten(_text(span.input)))}"
    if span.output is not None and span.kind != "graph":
        label += f"\n  [dim]out[/] {escape(shorten(_text(span.output)))}"
    if span.error is not None:
        label += f"\n  [red]{escape(shorten(span.error))}[/]"
    return label


def _call_label(number: int, call: Call) -> str:
    sampled = sum(len(choice.token_ids) for choice in call.choices)
    return f"[bold]call {number}[/] {escape(str(call.attribution.role or '(no role)'))} [dim]{sampled} tokens[/]"


def _box(span: Span, n_calls: int) -> str:
    parts = [span.name]
    if span.superstep is not None:
        parts.append(f"step {span.superstep}")
    if n_calls:
        parts.append(f"{n_calls} call{'s' if n_calls > 1 else ''}")
    if span.error is not None:
        parts.append("failed")
    return ", ".join(parts)


def _quoted(text: str) -> str:
    """Mermaid's quoted label: entities for what would end it."""
    return '"' + text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace("\n", " ") + '"'


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
