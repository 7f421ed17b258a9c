"""Staleness at the step: what became too old between lease and step is left out, with a count (law 8).

Readiness refuses what is too stale when it leases; a lease can outlive that moment (a trainer that was away, a bound
that was lowered, steps that are queued). So the bound is asked once more of the samples themselves: a choice is as old
as its oldest token, a run as its oldest trainable choice, whichever model that trains. A run over the bound is dropped
whole, for all models: its tokens are accounted for as `too stale` and its rewards belong to no statistics. Refuses
nothing; no I/O. Called by the controller.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from tracegrad.tracestore.reasons import TOO_STALE
from tracegrad.tracestore.records import Consumption
from tracegrad.trainer.samples import Samples
from tracegrad.trainer.shares import Shares


def without_stale_runs(
    shares: Shares,
    updates_of: Callable[[int], int],
    *,
    updates: Mapping[str, int],
    live: Mapping[str, int],
    max_staleness: int,
) -> tuple[Shares, frozenset[str]]:
    """Return the shares without over-stale runs and with the age of each version, and the ids of those runs.

    `updates_of`: policy version -> the updates it counts as (asked once for each; see `tracestore.branches`).
    `updates`: model -> those of its weights that are about to be trained: ages count from them. A run is too stale for
    a model when ``live - oldest`` exceeds `max_staleness`, as readiness counts; where nothing of the model is live,
    `updates` stands for it.
    """
    aged: dict[str, Samples] = {}
    stale: set[str] = set()
    for model, samples in shares.by_model.items():
        own = updates[model]
        versions = {version for choice in samples.choices for version in choice.token_versions}
        ages = {version: own - updates_of(version) for version in sorted(versions)}
        ahead = own - live.get(model, own)
        old = {version for version, age in ages.items() if age - ahead > max_staleness}
        stale |= {choice.run_id for choice in samples.choices if not old.isdisjoint(choice.token_versions)}
        aged[model] = replace(samples, version_ages=ages)
    if not stale:
        return replace(shares, by_model=aged), frozenset()
    return (
        Shares(
            by_model={model: _without(samples, stale) for model, samples in aged.items()},
            consumption=tuple(_excluded(entry) if entry.run_id in stale else entry for entry in shares.consumption),
        ),
        frozenset(stale),
    )


def _without(samples: Samples, stale: set[str]) -> Samples:
    return replace(
        samples,
        choices=tuple(choice for choice in samples.choices if choice.run_id not in stale),
        consumption=tuple(_excluded(entry) if entry.run_id in stale else entry for entry in samples.consumption),
        rewards={run_id: given for run_id, given in samples.rewards.items() if run_id not in stale},
        run_groups={run_id: group for run_id, group in samples.run_groups.items() if run_id not in stale},
        graphs={run_id: graph for run_id, graph in samples.graphs.items() if run_id not in stale},
    )


def _excluded(entry: Consumption) -> Consumption:
    """Take what would have been trained out; what was excluded before keeps its reason."""
    if entry.reason is not None:
        return entry
    return replace(entry, trained_tokens=0, excluded_tokens=entry.trained_tokens, reason=TOO_STALE)
