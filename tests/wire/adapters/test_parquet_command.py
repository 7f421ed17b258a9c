"""`tracegrad export` and `tracegrad import`."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tracegrad.adapters.parquet_command import export, import_
from tracegrad.tracestore.errors import NotFound, StoreUnavailable
from tracegrad.tracestore.store import open_store
from tracegrad.tracestore.testing.rows import make_call, make_reward

pytest.importorskip("pyarrow", reason="tracegrad[parquet] is not installed")


def test_a_folder_goes_from_store_to_store(tmp_path: Path) -> None:
    url, out = f"sqlite:///{tmp_path}/store.db", str(tmp_path / "out")
    store = open_store(url)
    store.append_calls([make_call("c", "r", project="p"), make_call("other", "q")])
    store.add_rewards([make_reward("w", "r")])
    done = CliRunner().invoke(export, [out, "--store", url, "--project", "p", "--json"], catch_exceptions=False)
    assert json.loads(done.stdout) == {
        "tasks": 0, "policy_versions": 0, "groups": 0, "runs": 1, "spans": 1, "calls": 1, "rewards": 1,
    }  # fmt: skip
    with pytest.raises(NotFound, match=r"no project 'q' in this store \(known: default, p\)"):
        CliRunner().invoke(export, [str(tmp_path / "q"), "--store", url, "--project", "q"], catch_exceptions=False)
    assert not (tmp_path / "q").exists()
    other = f"sqlite:///{tmp_path}/other.db"
    done = CliRunner().invoke(import_, [out, "--store", other], catch_exceptions=False)
    assert "1 runs" in done.stdout and "new" in done.stdout
    copied = open_store(other, create=False)
    assert copied.trace("r") == store.trace("r")
    copied.close()
    store.close()


def test_an_export_makes_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        CliRunner().invoke(
            export, [str(tmp_path / "out"), "--store", f"sqlite:///{tmp_path}/no.db"], catch_exceptions=False
        )
    assert list(tmp_path.iterdir()) == []
