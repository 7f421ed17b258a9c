"""Policy versions for tests that publish without a trainer, and publishes that ask nobody."""

from pathlib import Path

from tracegrad.tracestore.records import PolicyVersion, VersionKind
from tracegrad.tracestore.store import Store


def add_version(
    store: Store,
    path: str | Path,
    step: int = 0,
    *,
    model: str = "tiny",
    kind: VersionKind | None = None,
    parent_id: int | None = None,
    job_id: str | None = None,
) -> PolicyVersion:
    """Add a version of the weights at `path`; without `kind`, step 0 is the initial one."""
    return store.add_version(
        model=model,
        kind=kind or ("step" if step else "initial"),
        parent_id=parent_id,
        checkpoint_path=str(path),
        checkpoint_hash=Path(path).name,
        step=step,
        job_id=job_id,
    )


def next_version(store: Store) -> int:
    """Add a version of `main` after the live one, of weights that are nowhere."""
    live = store.live_version("main")
    step, parent_id = (0, None) if live is None else (live.step + 1, live.version_id)
    return add_version(store, f"/checkpoints/{step}", step, model="main", parent_id=parent_id).version_id


def go_live(store: Store, version_id: int | None = None) -> int:
    """Publish a version, the next one unless told, without asking anybody; return it."""
    version_id = next_version(store) if version_id is None else version_id
    publish_id = store.request_publish(version_id).publish_id
    for state in ("draining", "swapping", "live"):
        store.advance_publish(publish_id, state)
    return version_id
