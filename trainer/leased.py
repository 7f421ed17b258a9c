"""Between a lease and its step, and between the step and its commit: what the controller asks of the store.

Refuses what the store refuses. Called by the controller, under the lease's keeper.
"""

import time
from collections.abc import Callable

from tracegrad.tracestore.errors import StoreUnavailable
from tracegrad.tracestore.records import Lease, LeaseRule, PolicyVersion, StepCommit
from tracegrad.tracestore.store import Store
from tracegrad.trainer.lease_keeper import LeaseKeeper
from tracegrad.trainer.returns import Scope
from tracegrad.trainer.samples import Samples, build_batch
from tracegrad.trainer.staleness import without_stale_runs

_COMMIT_TRIES = 5
_COMMIT_PAUSE_S = 1.0


def leased_samples(
    store: Store, lease: Lease, rule: LeaseRule, *, scope: Scope, current_step: int, say: Callable[[str], None]
) -> tuple[Samples, frozenset[str]]:
    """Return what the lease has to train, and the runs in it that have become too stale meanwhile, which `say` is told.

    Staleness counts from the live version, as readiness counts it: while a pin or a gate holds serving back, what the
    live version samples must not be leased and returned for ever. Ages count from `current_step`, the weights' own.
    """
    live = store.live_version(rule.model)
    samples, stale = without_stale_runs(
        build_batch(store.lease_traces(lease, rule), rule, scope=scope),
        lambda version_id: store.get_version(version_id).step,
        step=current_step,
        live_step=None if live is None else live.step,
        max_staleness=rule.max_staleness,
    )
    if stale:
        say(
            f"step {lease.plan.step}: {len(stale)} of {len(lease.plan.run_ids)} runs became too stale since they were "
            f"leased and are {'left out' if samples.choices else 'returned'}"
        )
    return samples, stale


def commit_patiently(store: Store, keeper: LeaseKeeper, commit: StepCommit) -> PolicyVersion:
    """Commit; a store that is away for a moment is asked again, which it knows how to answer.

    Raises:
        LeaseLost: another trainer has the lease.
        StoreUnavailable: after the last attempt.
    """
    for attempt in range(1, _COMMIT_TRIES + 1):
        try:
            return store.commit_step(keeper.current, commit)
        except StoreUnavailable:
            if attempt == _COMMIT_TRIES:
                raise
            time.sleep(_COMMIT_PAUSE_S)
    raise AssertionError("unreachable: the last attempt returns or raises")
