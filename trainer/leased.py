"""Between a lease and its step, and between the step and its commit: what the controller asks of the store.

Refuses what the store refuses. Called by the controller, under the lease's keeper.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from tracegrad.tracestore.errors import Abandoned, StoreUnavailable
from tracegrad.tracestore.records import Lease, LeaseRule, PolicyVersion
from tracegrad.tracestore.step_records import StepCommit
from tracegrad.tracestore.store import Store
from tracegrad.trainer.lease_keeper import LeaseKeeper
from tracegrad.trainer.returns import Scope
from tracegrad.trainer.samples import build_batch, spanned_versions
from tracegrad.trainer.shares import Shares, share
from tracegrad.trainer.staleness import without_stale_runs

_COMMIT_TRIES = 5
_COMMIT_PAUSE_S = 1.0


def leased_shares(
    store: Store, lease: Lease, rule: LeaseRule, *, scope: Scope, updates: Mapping[str, int], say: Callable[[str], None]
) -> tuple[Shares, frozenset[str]]:
    """Return what the lease has to train for each model, and the runs that have become too stale meanwhile.

    Staleness counts from the live versions, as readiness counts it: while a pin or a gate holds serving back, what the
    live version samples must not be leased and returned for ever. Ages count from `updates`, the weights' own by model.
    """
    live = store.live(rule.models)
    leased = store.lease_traces(lease, rule)
    models = store.models_of(spanned_versions(leased))
    shares, stale = without_stale_runs(
        share(
            leased,
            rule.models,
            lambda traces, model: build_batch(traces, rule.of(model), scope=scope, models=models),
        ),
        lambda version: live.counted(store.get_version(version)),
        updates=updates,
        live=live.updates,
        max_staleness=rule.max_staleness,
    )
    if stale:
        say(
            f"step {lease.plan.step}: {len(stale)} of {len(lease.plan.run_ids)} runs became too stale since they were "
            f"leased and are {'left out' if shares.n_trained_tokens else 'returned'}"
        )
    return shares, stale


def require_kept(store: Store, lease: Lease, version_ids: Iterable[int]) -> None:
    """Return the lease and refuse to build on what `tracegrad rollback` abandoned while this trainer was at work.

    Raises:
        Abandoned: one of the versions is.
    """
    with _returned_if_abandoned(store, lease):
        store.require_kept(list(version_ids))


def commit_patiently(store: Store, keeper: LeaseKeeper, commit: StepCommit) -> dict[str, PolicyVersion]:
    """Commit; a store that is away for a moment is asked again, which it knows how to answer.

    Raises:
        LeaseLost: another trainer has the lease.
        Abandoned: what the step builds on was rolled back while it was computed. The lease is returned.
        StoreUnavailable: after the last attempt.
    """
    for attempt in range(1, _COMMIT_TRIES + 1):
        try:
            with _returned_if_abandoned(store, keeper.current):
                return store.commit_step(keeper.current, commit)
        except StoreUnavailable:
            if attempt == _COMMIT_TRIES:
                raise
            time.sleep(_COMMIT_PAUSE_S)
    raise AssertionError("unreachable: the last attempt returns or raises")


@contextmanager
def _returned_if_abandoned(store: Store, lease: Lease) -> Iterator[None]:
    """What was to be trained on weights that are no more is leased anew."""
    try:
        yield
    except Abandoned:
        store.release(lease)
        raise
