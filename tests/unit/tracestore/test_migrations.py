"""Opening: from nothing, by many at once, a newer schema, and the migration against the metadata."""

import math
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from old_stores import script, to_revision, url_of
from sqlalchemy import create_engine, inspect
from sqlalchemy.engine.default import DefaultDialect

from tracegrad.tracestore.errors import (
    ConfigError,
    InvalidRecord,
    LeaseLost,
    SchemaMismatch,
    StoreUnavailable,
)
from tracegrad.tracestore.records import Attribution, BatchPlan, LateAttribution, Lease, Run
from tracegrad.tracestore.schema import HEAD, metadata
from tracegrad.tracestore.store import open_store
from tracegrad.tracestore.testing.rows import (
    JOB,
    MODEL,
    Clock,
    account,
    make_call,
    make_choice,
    make_commit,
    make_reward,
    make_rule,
    sql,
)


@pytest.fixture
def migrated(tmp_path: Path) -> Path:
    path = tmp_path / "store.db"
    open_store(url_of(path)).close()
    return path


def test_head_is_the_last_revision() -> None:
    assert script().get_heads() == [HEAD]


def test_migrations_make_what_the_metadata_says(migrated: Path, tmp_path: Path) -> None:
    engine = create_engine(url_of(migrated))
    with engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection, opts={"compare_type": True}), metadata)
    engine.dispose()
    assert differences == []
    direct = tmp_path / "direct.db"
    other = create_engine(url_of(direct))
    metadata.create_all(other)
    other.dispose()
    assert ddl(migrated) == ddl(direct)


def ddl(path: Path) -> dict[str, list[str]]:
    """Each object's DDL as its comma-separated parts, sorted: CHECKs and defaults included, order left aside."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    parts = {name: sorted(part.strip() for part in _at_outer_commas(sql.replace('"', ""))) for name, sql in rows}
    return {name: found for name, found in parts.items() if name != "alembic_version"}


def _at_outer_commas(sql: str) -> Iterator[str]:
    """Cut the list of a CREATE TABLE at the commas outside inner parentheses: ADD COLUMN writes no line of its own."""
    before, _, rest = sql.partition("(")
    yield before
    depth, part = 0, ""
    for character in rest.rpartition(")")[0]:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            yield part
            part = ""
        else:
            part += character
    yield part


CATALOGUE = {
    "columns": "SELECT attrelid::regclass || '.' || attname, format_type(atttypid, atttypmod), attnotnull,"
    " pg_get_expr(adbin, adrelid), attidentity, attcollation::regcollation::text, attstorage, attcompression"
    " FROM pg_attribute JOIN pg_class c ON c.oid = attrelid"
    " LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum"
    " WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped",
    "constraints": "SELECT conrelid::regclass || '.' || conname, pg_get_constraintdef(oid), convalidated"
    " FROM pg_constraint WHERE connamespace = 'public'::regnamespace",
    "indexes": "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
    "relations": "SELECT relname, relkind, relpersistence FROM pg_class WHERE relnamespace = 'public'::regnamespace",
    "settings": "SELECT relname, array_to_string(reloptions, ' ')"
    " FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'",
    "sequences": "SELECT sequencename, data_type::text, start_value, min_value, max_value, increment_by, cycle,"
    " cache_size FROM pg_sequences WHERE schemaname = 'public'",
}
FULL = (
    *("pk_calls", "pk_choices", "pk_choice_payloads", "pk_call_payloads", "pk_blocks"),
    *("ix_call_payloads_ids_head", "ix_call_payloads_text_head", "ix_blocks_parent_id_first"),
)
"""Indexes whose pages revision 0014 fills whole; the metadata has no word for that of a primary key's."""


def catalogue(url: str) -> dict[str, dict[str, tuple[Any, ...]]]:
    """What PostgreSQL says of each object by kind and name, but for Alembic's own table."""
    engine = create_engine(url)
    with engine.connect() as connection:
        found = {kind: connection.exec_driver_sql(query).all() for kind, query in CATALOGUE.items()}
    engine.dispose()
    return {
        kind: {row[0]: tuple(row[1:]) for row in rows if not row[0].startswith("alembic_version")}
        for kind, rows in found.items()
    }


def test_migrations_make_what_the_metadata_says_on_postgresql(postgres_url: str) -> None:
    """Every column, constraint, index and sequence, up, and once down to the first revision and up again."""
    open_store(postgres_url).close()
    migrated = catalogue(postgres_url)
    to_revision(postgres_url, "0001")
    open_store(postgres_url).close()
    again = catalogue(postgres_url)
    engine = create_engine(postgres_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
        metadata.create_all(connection)
    engine.dispose()
    direct = catalogue(postgres_url)
    full = {name: said for name, (said,) in migrated["indexes"].items() if "fillfactor" in said}
    assert full.keys() == set(FULL)
    for made in (migrated, again):
        made["indexes"] |= {name: (said.replace(" WITH (fillfactor='100')", ""),) for name, said in full.items()}
        for kind, objects in direct.items():
            assert objects and made[kind] == objects, kind


def test_a_store_of_the_first_revision_is_migrated_with_its_data(
    first_store: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its calls are in the project of their run, and it is written to again."""
    store = open_store(first_store)
    assert caplog.messages[0].startswith(f"bringing the store from revision 0001 to {HEAD}: a large one takes minutes")
    steps = [said.split(" is done")[0] for said in caplog.messages[1:]]
    assert steps == [f"revision {number:04}" for number in range(2, int(HEAD) + 1)]
    trace = store.trace("r")
    assert (trace.calls[0].project, trace.calls[0].endpoint, trace.calls[0].prompt_ids) == ("p", "chat", None)
    assert trace.calls[0].attribution.span is trace.spans[0]
    assert trace.spans[0].triggers == ("t",)
    assert [reward.call_id for reward in trace.rewards] == ["c"]
    ruled = Attribution(run_id="r", run_source="hook", role="b", role_source="rule")
    store.append_calls([make_call("new", "r", attribution=ruled)])
    assert [call.call_id for call in store.trace("r").calls] == ["c", "new"]
    with pytest.raises(InvalidRecord):  # the constraints of a table that was rebuilt are in force
        sql(store, "DELETE FROM calls WHERE call_id = 'c'")
    with pytest.raises(InvalidRecord):
        sql(store, "UPDATE calls SET role_source = 'nobody'")
    store.close()


def test_what_the_first_revision_sampled_and_trained_is_read_back_exactly(first_store: str) -> None:
    """Also once it was taken back and brought here again."""
    long = (
        make_choice(0, (7, 70_000), (struct.unpack("<f", struct.pack("<f", -0.1))[0], math.nan)),
        replace(make_choice(1, (2**31 - 1,)), logprobs=None, flags=()),
    )
    asked = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hé"}], "n": 2}
    calls = (
        make_call("long", "h-0", version=1, prompt_ids=tuple(range(300)), choices=long, request=asked),
        make_call("late", "h-0", version=1),
        make_call("roleless", "h-0", version=1, role=None, at=1_001.0),
    )
    rewards = (
        make_reward("whole", "h-0", 0.1, created_at=1_000.0),
        make_reward("one", "h-0", 0.25, "turn", call_id="long", created_at=1_000.0),
    )
    for _ in range(2):
        store = open_store(first_store)
        trace = store.trace("h-0")
        assert repr(trace.calls) == repr(calls)  # nan is not equal to itself; its word is
        assert trace.rewards == rewards
        run = Run(run_id="h-0", purpose="train", task_id="task-h", group_id="h", member=0, status="closed")
        assert trace.run == replace(run, ended_by="explicit", opened_at=1_000.0, ended_at=1_000.0)
        assert [store.trace(one).calls for one in ("g-0", "g-1", "h-1")] == [
            (make_call(f"call-{one}", one, version=version),) for one, version in (("g-0", 1), ("g-1", 1), ("h-1", 2))
        ]
        report = store.consumption(JOB)
        assert (report.stored, report.trained, dict(report.excluded)) == (18, 6, {"leased": 12})
        assert report.conserved
        step = store.last_checkpoint(JOB)
        assert step is not None and (step.step, step.hash, step.versions) == (1, "sha-1", {MODEL: 2})
        assert store.check() == []
        store.close()
        to_revision(first_store, "0001")


def test_a_lease_of_the_first_revision_is_reclaimed_and_trained(first_store: str) -> None:
    """It knows no late attribution: what is said of its calls from now on is not in its batch. Its old token is fenced
    off, its step is committed, and every token is accounted for."""
    clock = Clock(2_000.0)  # its time was up at 1,060
    store = open_store(first_store, clock=clock)
    plan = BatchPlan(step=2, epoch=0, seed=7, run_ids=("h-0", "h-1"))
    held = Lease(lease_id=2, token=1, job_id=JOB, plan=plan, expires_at=1_060.0)
    assert sql(store, "UPDATE leases SET token = token WHERE attributions_through = 0") == 2
    assert store.lease(JOB, make_rule(), groups=1, lease_s=60, step=2, epoch=0, seed=7) is None
    lease = store.reclaim(JOB, 60.0)
    assert lease == replace(held, token=2, expires_at=2_060.0)
    with pytest.raises(LeaseLost, match="reclaimed"):
        store.renew(held, 60.0)
    batch = repr(store.lease_traces(lease))
    assert "'roleless'" in batch and "'late'" not in batch
    store.attribute_late([LateAttribution(source="rule", call_id="roleless", role="answerer")])
    assert repr(store.lease_traces(lease)) == batch
    assert store.get_call("roleless").attribution.role == "answerer"
    assert store.commit_step(lease, make_commit(account(store, lease), hash_="sha-2"))[MODEL].version_id == 3
    report = store.consumption(JOB)
    assert (report.stored, report.trained, dict(report.excluded)) == (18, 15, {"arrived after the lease": 3})
    assert report.conserved
    store.close()


def test_a_migration_that_is_stopped_leaves_the_store_as_it_was(
    first_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C inside a statement is told as Ctrl-C, and the next start does all of it."""
    execute = DefaultDialect.do_execute

    def interrupted(self: DefaultDialect, cursor: Any, statement: str, *more: Any) -> None:
        if "INSERT INTO choices" in statement:
            raise KeyboardInterrupt
        execute(self, cursor, statement, *more)

    if not first_store.startswith("sqlite"):
        pytest.skip("psycopg runs its statements elsewhere")
    monkeypatch.setattr(DefaultDialect, "do_execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_store(first_store)
    monkeypatch.undo()
    with pytest.raises(SchemaMismatch, match="the store is at revision 0001"):
        open_store(first_store, create=False)
    store = open_store(first_store)
    assert store.trace("r").calls and store.check() == []
    store.close()


def test_every_revision_can_be_taken_back(first_store: str) -> None:
    open_store(first_store).close()
    to_revision(first_store, "base")
    engine = create_engine(first_store)
    assert inspect(engine).get_table_names() == ["alembic_version"]
    engine.dispose()


def test_opening_again_changes_nothing(migrated: Path) -> None:
    before = ddl(migrated)
    open_store(url_of(migrated)).close()
    open_store(url_of(migrated), create=False).close()
    assert ddl(migrated) == before


def test_a_newer_schema_is_refused(migrated: Path) -> None:
    with sqlite3.connect(migrated) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    for create in (True, False):
        with pytest.raises(SchemaMismatch, match=r"9999.*made by a newer version; install that one"):
            open_store(url_of(migrated), create=create)


def test_without_create_nothing_is_made(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with pytest.raises(StoreUnavailable, match="no store at"):
        open_store(url_of(path), create=False)
    assert not path.exists()
    path.touch()
    with pytest.raises(StoreUnavailable, match=r"store\.db holds no store yet: start"):
        open_store(url_of(path), create=False)


def test_places_that_cannot_hold_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="does not exist"):
        open_store(url_of(tmp_path / "none" / "store.db"))
    (tmp_path / "text.db").write_text("not a database, but long enough to be read as one" * 100)
    with pytest.raises(StoreUnavailable, match=r"text\.db"):
        open_store(url_of(tmp_path / "text.db"))
    for url in ("sqlite://", "sqlite:///:memory:", "mysql://localhost/x", "nonsense"):
        with pytest.raises(ConfigError):
            open_store(url)


def test_processes_that_open_an_empty_file_at_once_all_succeed(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    program = (
        "import sys, pathlib, time\n"
        "from tracegrad.tracestore.store import open_store\n"
        "go = pathlib.Path(sys.argv[2])\n"
        "print('ready', flush=True)\n"
        "while not go.exists(): time.sleep(0.001)\n"
        "store = open_store(sys.argv[1])\n"
        "store.ensure_runs([sys.argv[3]], 'p')\n"
    )
    go = tmp_path / "go"
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", program, url_of(path), str(go), f"r{index}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
    go.touch()
    for opener in openers:
        _, errors = opener.communicate(timeout=60)
        assert opener.returncode == 0, errors
    store = open_store(url_of(path), create=False)
    assert {summary.run.run_id for summary in store.list_runs()} == {"r0", "r1"}
    store.close()


def test_the_copies_of_a_migration_leave_no_dangling_row(tmp_path: Path) -> None:
    """A row that names no call, as a program without foreign keys can write it, stops the migration whole."""
    path = tmp_path / "store.db"
    to_revision(url_of(path), "0002")
    with sqlite3.connect(path) as connection:
        connection.execute(
            "INSERT INTO call_payloads (call_id, request, requested, effective) VALUES ('x', '{}', '{}', '{}')"
        )
    before = ddl(path)
    with pytest.raises(SchemaMismatch, match="call_payloads without their calls"):
        open_store(url_of(path))
    assert ddl(path) == before
