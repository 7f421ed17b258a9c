"""Policy versions of the tiny model, for tests that publish without a trainer."""

from pathlib import Path

from tracegrad.tracestore.records import PolicyVersion
from tracegrad.tracestore.store import Store


def add_version(store: Store, path: Path, step: int = 0) -> PolicyVersion:
    return store.add_version(
        model="tiny",
        kind="step" if step else "initial",
        parent_id=None,
        checkpoint_path=str(path),
        checkpoint_hash=path.name,
        step=step,
        job_id=None,
    )
