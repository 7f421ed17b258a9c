"""Policy versions, of the tiny model unless told, for tests that publish without a trainer."""

from pathlib import Path

from tracegrad.tracestore.records import PolicyVersion, VersionKind
from tracegrad.tracestore.store import Store


def add_version(
    store: Store, path: Path, step: int = 0, *, model: str = "tiny", kind: VersionKind | None = None
) -> PolicyVersion:
    """Add a version of the weights at `path`; without `kind`, step 0 is the initial one."""
    return store.add_version(
        model=model,
        kind=kind or ("step" if step else "initial"),
        parent_id=None,
        checkpoint_path=str(path),
        checkpoint_hash=path.name,
        step=step,
        job_id=None,
    )
