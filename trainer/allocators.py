"""Allocators: from what a run achieved to the rewards of its roles and turns. Plain functions over plain numbers.

The building blocks are those of published workflows; `iterative_search` and `reflective_code` put them together as
UnityMAS-O does (Chen et al. 2026, arXiv 2605.26646). A reward function calls them and returns what they say;
`role_turns` tells the calls that a turn's reward stands on. Where credit goes through the graph, a reward of a turn of
several calls is posted on one of them or shared out (`shared` with `split`): posted on each in full, it reaches what
came before once for each call, since rewards on different calls are different rewards. What cannot be judged has no
reward: None or absent, never 0 (law 6). They need neither torch nor numpy, do no I/O, and refuse what does not fit
together.
"""

from collections.abc import Mapping, Sequence

from tracegrad.tracestore.records import RunTrace
from tracegrad.trainer.errors import SampleError
from tracegrad.trainer.returns import Atom, ScopedGraph, call_returns
from tracegrad.trainer.run_graph import CallNode, linked, run_graph
from tracegrad.trainer.samples import Turn, turn_of

SEARCHERS = ("search", "summary", "update")
WRITERS = ("planner", "coder")


def shared(outcome: float, members: Sequence[str], *, split: bool = False) -> dict[str, float]:
    """Return the outcome for each member (a role, or a call), in full or divided among them.

    In full is what a reward on the run says already; split keeps the sum equal to the outcome.

    Raises:
        SampleError: no members, or one twice.
    """
    if not members or len(set(members)) < len(members):
        raise SampleError(f"an outcome is shared among members, each once, not {list(members)}")
    return dict.fromkeys(members, outcome / len(members) if split else outcome)


def deltas(scores: Sequence[float], before: float = 0.0) -> list[float]:
    """Return what each turn added: s_t - s_{t-1}. `before`: the score before the first turn.

    They sum up to the last score less `before`: the potential-based form of that outcome.
    """
    return [score - earlier for earlier, score in zip([before, *scores], scores, strict=False)]


def next_deltas(scores: Sequence[float]) -> list[float | None]:
    """Return what the turn after each one added: s_{t+1} - s_t; None for the last, which nothing followed."""
    return [*deltas(scores)[1:], None] if scores else []


def with_format(reward: float, keeps_format: bool, weight: float) -> float:
    """Return the reward less `weight` where the answer does not keep its format (a format term of -1, else 0)."""
    return reward if keeps_format else reward - weight


def group_relative(values: Mapping[str, float]) -> dict[str, float]:
    """Return each run's value less the mean of its group. A run without a value is left out before, not 0."""
    if not values:
        return {}
    mean = sum(values.values()) / len(values)
    return {run_id: value - mean for run_id, value in values.items()}


def discounted(
    steps: Mapping[str, float | None], parents: Mapping[str, Sequence[str]], gamma: float
) -> dict[str, float]:
    """Carry rewards back through a graph: each step gets its own and gamma^d of those of its descendants, each once.

    `steps`: step -> its reward or None; `parents`: step -> those that fed it; d: the steps on the longest way. Steps
    that nothing reaches are absent.

    Raises:
        SampleError: a parent that is no step, or a cycle.
    """
    links = [(parent, step) for step, fed_by in parents.items() for parent in fed_by]
    if strangers := {name for link in links for name in link} - steps.keys():
        raise SampleError(f"the graph names {', '.join(sorted(strangers))}, which `steps` does not have")
    graph = linked([CallNode(call_id=step, role=None, model="") for step in steps], links)
    if links and not any(graph.descendants):
        raise SampleError("a step feeds itself: a run graph has no cycles")
    values = [steps[node.call_id] for node in graph.nodes]
    atoms = [Atom(value, 1 << place) for place, value in enumerate(values) if value is not None]
    carried = call_returns(ScopedGraph(graph, "graph", atoms), atoms, turn_gamma=gamma)
    pairs = zip(graph.nodes, carried, strict=True)
    return {node.call_id: value for node, value in pairs if value is not None}


def iterative_search(answers: Sequence[float | None], plan: float | None = None) -> list[dict[str, float]]:
    """Return role -> reward for each turn of plan, then (search, summary, update, answer) again and again.

    `answers`: the F1 of each turn's answer; None where the search said that it was enough, and ended. The planner and
    every answer get their own F1; the searching roles get F1_t - F1_{t-1}; a search that ended gets 0, as published:
    it was asked, and changed nothing. Turn 0 answers from the plan, without a search.
    """
    turns: list[dict[str, float]] = []
    last: float | None = None
    for number, answer in enumerate(answers):
        rewards: dict[str, float] = {}
        if number == 0 and plan is not None:
            rewards["plan"] = plan
        if number and answer is None:
            rewards["search"] = 0.0
        elif answer is not None:
            if number:
                rewards |= dict.fromkeys(SEARCHERS, answer - (0.0 if last is None else last))
            rewards["answer"] = last = answer
        turns.append(rewards)
    return turns


def reflective_code(pass_rates: Sequence[float]) -> list[dict[str, float]]:
    """Return role -> reward for each turn of planner, coder, tests, reflector.

    Planner and coder get the pass rate's delta; the reflector, who speaks after the tests, gets that of the next turn.
    """
    turns: list[dict[str, float]] = []
    for own, following in zip(deltas(pass_rates), next_deltas(pass_rates), strict=True):
        turns.append(dict.fromkeys(WRITERS, own) | ({} if following is None else {"reflector": following}))
    return turns


def role_turns(trace: RunTrace) -> dict[str, list[tuple[str, ...]]]:
    """Return role -> the call ids of each of its turns, the turns in the order of the run graph.

    A turn's reward is a reward on these calls; of several see the module. Calls without a span are turns of their own,
    in order of dispatch.
    """
    graph = run_graph(trace)
    place = graph.index()
    turns: dict[tuple[str, Turn, str], list[str]] = {}
    ahead: dict[tuple[str, Turn, str], int] = {}
    for call in trace.calls:
        if (role := call.attribution.role) is None:
            continue
        span = call.attribution.span
        key = (role, turn_of(span), "" if span is not None else call.call_id)
        turns.setdefault(key, []).append(call.call_id)
        following = graph.descendants[place[call.call_id]].bit_count()
        ahead[key] = max(ahead.get(key, 0), following)
    found: dict[str, list[tuple[str, ...]]] = {}
    for key in sorted(turns, key=lambda key: (-ahead[key], key[1].superstep or 0)):
        found.setdefault(key[0], []).append(tuple(turns[key]))
    return found
