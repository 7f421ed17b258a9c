"""Returns: which rewards reach a call, through the run graph or without it. Pure; no I/O.

A reward stands on a run, on a role in it, or on a call; a reward on a turn is one on the turn's calls. How far it
reaches is the scope. `call`: a run's reward reaches all its calls, a role's those of the role, a call's that one.
`role`: also the earlier calls of the same role. `graph`: also every ancestor, of any role and model. Nothing ever
reaches a call that is not an ancestor of what was rewarded, and each reward counts once, over however many paths.

In scope `role` and `graph` a reward is paid where the last of its target ends: one on the run after its last calls, one
on a role after that role's last. Between a call and that place lies a discount for each call on the longest way (so an
edge that others imply changes nothing). A call that nothing reaches has no return: None, not 0 (law 6).

A mute call (failed, or sent again) is nothing that follows: a request that the network lost and the SDK repeated moves
nobody's credit. It stays only for a reward all of whose targets are mute, such as one on the failed call itself.
Called by `samples`, `gae` and `credit`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tracegrad.tracestore.records import Reward
from tracegrad.trainer.run_graph import CallNode, RunGraph, bits

Scope = Literal["call", "role", "graph"]


@dataclass(frozen=True, slots=True)
class Atom:
    """One weighted reward and the calls it stands on, as bits of the graph's nodes."""

    value: float
    targets: int


class ScopedGraph:
    """A run graph as a scope sees it: what follows each call, and what follows it directly. Bits as in `RunGraph`.

    `atoms`: the rewards that are going to be carried. A mute call that none of them needs follows nothing.
    """

    def __init__(self, graph: RunGraph, scope: Scope, atoms: Sequence[Atom] = ()) -> None:
        self.graph = graph
        unheard = _unheard(graph, atoms)
        descendants = tuple(mask & ~unheard for mask in graph.descendants)
        of_role: dict[str | None, int] = {}
        for number, node in enumerate(graph.nodes):
            of_role[node.role] = of_role.get(node.role, 0) | 1 << number
        self.following = descendants
        if scope == "role":
            pairs = zip(graph.nodes, descendants, strict=True)
            self.following = tuple(mask & of_role[node.role] for node, mask in pairs)
        elif scope == "call":
            self.following = (0,) * len(graph.nodes)
        self.latest_first = sorted(range(len(graph.nodes)), key=lambda number: self.following[number].bit_count())
        """A call after all that follow it: whatever follows has fewer that follow."""
        self.next = self._direct()

    def _direct(self) -> tuple[tuple[int, ...], ...]:
        """The earliest of what follows a call follows it directly; what follows that one does not; and so on."""
        earliest_first = self.latest_first[::-1]
        found: list[tuple[int, ...]] = [()] * len(self.following)
        for place, number in enumerate(earliest_first):
            left, direct = self.following[number], []
            for later in range(place + 1, len(earliest_first)):
                if not left:
                    break
                if left >> (candidate := earliest_first[later]) & 1:
                    direct.append(candidate)
                    left &= ~(self.following[candidate] | 1 << candidate)
            found[number] = tuple(sorted(direct))
        return tuple(found)

    def paid_at(self, number: int, atoms: Iterable[Atom]) -> float:
        """Return the sum of the rewards that end with this call: those on it, and on nothing that follows it."""
        here = 1 << number
        return sum(a.value for a in atoms if a.targets & here and not a.targets & self.following[number])

    def sum_over(self, atoms: Iterable[Atom], calls: int, weights: Mapping[int, float]) -> float:
        """Return the sum of the rewards that stand on one of `calls` (bits), each once, times its least weight.

        `weights`: call -> weight; those that are not named weigh 1.
        """
        touched = [(atom.value, atom.targets & calls) for atom in atoms if atom.targets & calls]
        return sum(value * min(weights.get(number, 1.0) for number in bits(mask)) for value, mask in touched)

    def weights(self, steps: Sequence[float]) -> list[dict[int, float]]:
        """Return, per call, the discount to the end of each call that follows it: the product of `steps` on the way.

        `steps`: per call, from the end of the one before to its own end, in [0, 1]. Of several ways the least. What is
        not named weighs 1.
        """
        found: list[dict[int, float]] = [{} for _ in self.next]
        if all(step == 1.0 for step in steps):
            return found
        for number in self.latest_first:
            for following in self.next[number]:
                ways = {following: 1.0, **found[following]}
                for end, weight in ways.items():
                    known = found[number].get(end, 1.0)
                    found[number][end] = min(known, steps[following] * weight)
        return found


def atoms_of(graph: RunGraph, rewards: Iterable[Reward], weights: Mapping[str, float] | None = None) -> list[Atom]:
    """Return the counted rewards of a run, weighted. `weights`: name -> weight; empty or None weighs every name 1."""
    found = []
    for reward in rewards:
        if weights and reward.name not in weights:
            continue
        targets = sum(1 << number for number, node in enumerate(graph.nodes) if stands_on(reward, node))
        found.append(Atom(reward.value * (weights[reward.name] if weights else 1.0), targets))
    return found


def call_returns(view: ScopedGraph, atoms: Sequence[Atom], *, turn_gamma: float = 1.0) -> list[float | None]:
    """Return, per call, the sum of the distinct rewards that reach it; None where nothing does.

    `turn_gamma`: the discount for each call between, on the longest way.
    """
    weights = view.weights([turn_gamma] * len(view.following))
    found: list[float | None] = []
    for number, following in enumerate(view.following):
        span = following | 1 << number
        reached = any(atom.targets & span for atom in atoms)
        found.append(view.sum_over(atoms, span, weights[number]) if reached else None)
    return found


def reached_calls(
    graph: RunGraph, rewards: Iterable[Reward], scope: Scope, weights: Mapping[str, float] | None = None
) -> frozenset[str]:
    """Return the ids of the calls that a counted reward reaches."""
    atoms = atoms_of(graph, rewards, weights)
    returns = call_returns(ScopedGraph(graph, scope, atoms), atoms)
    pairs = zip(graph.nodes, returns, strict=True)
    return frozenset(node.call_id for node, value in pairs if value is not None)


def stands_on(reward: Reward, node: CallNode) -> bool:
    """Say whether a reward of the run is one on this call: on the run, on its own role, or on itself."""
    if reward.call_id is not None:
        return reward.call_id == node.call_id
    return reward.role is None or reward.role == node.role


def _unheard(graph: RunGraph, atoms: Iterable[Atom]) -> int:
    """The mute calls, less the targets of rewards that stand on mute calls only."""
    mute = sum(1 << number for number, node in enumerate(graph.nodes) if node.mute)
    unheard = mute
    for atom in atoms:
        if not atom.targets & ~mute:
            unheard &= ~atom.targets
    return unheard
