"""Staleness at the step: what became too old between lease and step is left out, with a count (law 8).

Readiness refuses what is too stale when it leases; a lease can outlive that moment (a trainer that was away, a bound
that was lowered, steps that are queued). So the bound is asked once more of the samples themselves: a choice is as old
as its oldest token, a run as its oldest trainable choice. A run over the bound is dropped whole: its tokens are
accounted for as `too stale` and its rewards belong to no statistics. Refuses nothing; no I/O. Called by the controller.
"""

from collections.abc import Callable
from dataclasses import replace

from tracegrad.tracestore.reasons import TOO_STALE
from tracegrad.tracestore.records import Consumption
from tracegrad.trainer.samples import Samples


def without_stale_runs(
    samples: Samples, step_of: Callable[[int], int], *, step: int, max_staleness: int, live_step: int | None = None
) -> tuple[Samples, frozenset[str]]:
    """Return the samples without over-stale runs and with the age of each version, and the ids of those runs.

    `step_of`: policy version -> the step that made it (asked once for each). `step`: of the weights that are about to
    be trained: ages count from it. A run is too stale when ``live_step - oldest`` exceeds `max_staleness`, as readiness
    counts; where nothing is live, `step` stands for it.
    """
    versions = {version for choice in samples.choices for version in choice.token_versions}
    ages = {version: step - step_of(version) for version in sorted(versions)}
    ahead = 0 if live_step is None else step - live_step
    old = {version for version, age in ages.items() if age - ahead > max_staleness}
    stale = frozenset(choice.run_id for choice in samples.choices if not old.isdisjoint(choice.token_versions))
    if not stale:
        return replace(samples, version_ages=ages), stale
    return (
        replace(
            samples,
            version_ages=ages,
            choices=tuple(choice for choice in samples.choices if choice.run_id not in stale),
            consumption=tuple(_excluded(entry) if entry.run_id in stale else entry for entry in samples.consumption),
            rewards={run_id: given for run_id, given in samples.rewards.items() if run_id not in stale},
            run_groups={run_id: group for run_id, group in samples.run_groups.items() if run_id not in stale},
            graphs={run_id: graph for run_id, graph in samples.graphs.items() if run_id not in stale},
        ),
        stale,
    )


def _excluded(entry: Consumption) -> Consumption:
    """Take what would have been trained out; what was excluded before keeps its reason."""
    if entry.reason is not None:
        return entry
    return replace(entry, trained_tokens=0, excluded_tokens=entry.trained_tokens, reason=TOO_STALE)
