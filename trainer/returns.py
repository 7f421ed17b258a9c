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

What follows a call, and which rewards stand on it, are bits (see `run_graph`). Besides operations on these, a few for
each call and for each pair that follow one another directly, time goes with the rewards that reach each call: with few
rewards it is near linear in the calls, with one on each of n calls in a chain n^2/2 numbers are added up.
Called by `samples`, `gae` and `credit`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import mul
from typing import Literal

from tracegrad.tracestore.records import Reward
from tracegrad.trainer.run_graph import RunGraph, bits

Scope = Literal["call", "role", "graph"]
_DIGITS = bytes.maketrans(b"01", b"\0\1")


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
        descendants = tuple(mask & ~unheard for mask in graph.descendants) if unheard else graph.descendants
        self.following = descendants
        if scope == "role":
            of_role = _of_role(graph)
            pairs = zip(graph.nodes, descendants, strict=True)
            self.following = tuple(mask & of_role[node.role] for node, mask in pairs)
        elif scope == "call":
            self.following = (0,) * len(graph.nodes)
        self.next = self._direct()
        """Per call those that follow it directly, ascending. Like the graph's nodes the last calls come first."""

    def _direct(self) -> tuple[tuple[int, ...], ...]:
        """The earliest of what follows a call follows it directly; what follows that one does not; and so on."""
        known: dict[int, tuple[int, ...]] = {}
        for following in self.following:
            if following not in known:
                left, direct = following, []
                while left:
                    direct.append(left.bit_length() - 1)
                    left &= ~(self.following[direct[-1]] | 1 << direct[-1])
                known[following] = tuple(reversed(direct))
        return tuple(known[following] for following in self.following)

    def paid(self, atoms: Iterable[Atom]) -> list[float]:
        """Return, per call, the sum of the rewards that end with it: those on it, and on nothing that follows it."""
        found: list[list[float]] = [[] for _ in self.following]
        for atom in atoms:
            for number in bits(atom.targets):
                if not atom.targets & self.following[number]:
                    found[number].append(atom.value)
        return [sum(values) for values in found]


class Reach:
    """Which rewards stand on each call, and which on what follows it in a scope: bits of their places in `atoms`."""

    def __init__(self, view: ScopedGraph, atoms: Sequence[Atom]) -> None:
        self.view = view
        self.on = [0] * len(view.next)
        for place, atom in enumerate(atoms):
            for number in bits(atom.targets):
                self.on[number] |= 1 << place
        self.behind = [0] * len(view.next)
        for number, direct in enumerate(view.next):
            for following in direct:
                self.behind[number] |= self.behind[following] | self.on[following]
        self._values = [float(atom.value) for atom in atoms]

    def total(self, chosen: int, weights: Sequence[float]) -> float:
        """Return the sum of the chosen rewards, in their order, each times its weight; without weights, as they are."""
        picked = format(chosen, "b")[::-1].encode().translate(_DIGITS)
        values = compress(self._values, picked)
        return sum(map(mul, values, compress(weights, picked)) if weights else values)

    def weights(self, steps: Sequence[float]) -> Iterator[Sequence[float]]:
        """Yield, per call, the weight of each reward on it (1) or on what follows: the product of `steps` on the way.

        `steps`: per call, from the end of the one before to its own end, in [0, 1]. Of several ways, and of several
        calls that a reward stands on, the least; infinite where none is reached. Where all steps are 1, empty. A call's
        weights are kept for as long as those before it ask for them.
        """
        if all(step == 1.0 for step in steps):
            yield from ((),) * len(steps)
            return
        readers = Counter(following for direct in self.view.next for following in direct)
        known: dict[int, list[float]] = {}
        behind: list[float] = []
        for number, direct in enumerate(self.view.next):
            if not number or direct != self.view.next[number - 1]:  # branches that meet in one call have it in common
                ways = [_stepped(known[one], steps[one]) for one in direct]
                ways = ways or [[math.inf] * len(self._values)]
                behind = ways[0] if len(ways) == 1 else list(map(min, *ways))
            for following in direct:
                readers[following] -= 1
                if not readers[following]:
                    del known[following]
            found = behind
            if new := self.on[number] & ~self.behind[number]:
                found = behind.copy()
                for place in bits(new):
                    found[place] = 1.0
            yield found
            if readers[number]:
                known[number] = found


def _stepped(weights: Sequence[float], step: float) -> list[float]:
    """One step further off. What is not reached stays so, also by a step of 0."""
    return [step * weight if weight < math.inf else weight for weight in weights]


def atoms_of(graph: RunGraph, rewards: Iterable[Reward], weights: Mapping[str, float] | None = None) -> list[Atom]:
    """Return the counted rewards of a run, weighted. `weights`: name -> weight; empty or None weighs every name 1."""
    place = graph.index()
    of_role = _of_role(graph)
    everywhere = (1 << len(graph.nodes)) - 1
    found = []
    for reward in rewards:
        if weights and reward.name not in weights:
            continue
        if reward.call_id is not None:
            targets = 1 << place[reward.call_id] if reward.call_id in place else 0
        else:
            targets = everywhere if reward.role is None else of_role.get(reward.role, 0)
        found.append(Atom(reward.value * (weights[reward.name] if weights else 1.0), targets))
    return found


def call_returns(view: ScopedGraph, atoms: Sequence[Atom], *, turn_gamma: float = 1.0) -> list[float | None]:
    """Return, per call, the sum of the distinct rewards that reach it; None where nothing does.

    `turn_gamma`: the discount for each call between, on the longest way.
    """
    reach = Reach(view, atoms)
    found: list[float | None] = []
    for on, behind, weights in zip(reach.on, reach.behind, reach.weights([turn_gamma] * len(view.next)), strict=True):
        found.append(reach.total(on | behind, weights) if on | behind else None)
    return found


def reached_calls(
    graph: RunGraph, rewards: Iterable[Reward], scope: Scope, weights: Mapping[str, float] | None = None
) -> frozenset[str]:
    """Return the ids of the calls that a counted reward reaches."""
    atoms = atoms_of(graph, rewards, weights)
    reach = Reach(ScopedGraph(graph, scope, atoms), atoms)
    pairs = zip(graph.nodes, reach.on, reach.behind, strict=True)
    return frozenset(node.call_id for node, on, behind in pairs if on or behind)


def _of_role(graph: RunGraph) -> dict[str | None, int]:
    """Role -> its calls, as bits."""
    found: dict[str | None, int] = {}
    for number, node in enumerate(graph.nodes):
        found[node.role] = found.get(node.role, 0) | 1 << number
    return found


def _unheard(graph: RunGraph, atoms: Iterable[Atom]) -> int:
    """The mute calls, less the targets of rewards that stand on mute calls only."""
    mute = sum(1 << number for number, node in enumerate(graph.nodes) if node.mute)
    unheard = mute
    for atom in atoms:
        if not atom.targets & ~mute:
            unheard &= ~atom.targets
    return unheard
