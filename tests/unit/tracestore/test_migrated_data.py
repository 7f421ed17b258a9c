"""What single migrations make of the data that was there, and what going back makes of what came since."""

import json
from dataclasses import replace

import pytest
from old_stores import to_revision
from sqlalchemy import create_engine, inspect

from tracegrad.tracestore.errors import Conflict
from tracegrad.tracestore.gating import GateTerms, unjudged
from tracegrad.tracestore.records import Attribution, LateAttribution, PolicyVersion, Span, VersionKind
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.chains import asked, stored_units, twice
from tracegrad.tracestore.testing.rows import JOB, make_call, make_choice, ready_group, sql, take, train


def test_what_a_rule_decided_is_called_inferred_by_the_revision_before(first_store: str) -> None:
    store = open_store(first_store)
    store.append_calls([make_call("ruled", None, attribution=Attribution(role="b", role_source="rule"))])
    store.attribute_late([LateAttribution(source="rule", call_id="c", role="b")], "p")
    store.attribute_late([LateAttribution(source="langsmith", call_id="c", run_id="other")], "p")
    store.close()
    to_revision(first_store, "0002")
    store = open_store(first_store)  # and up again
    (conflict,) = store.attribution_conflicts()  # the fact is of project p again
    assert (conflict.said, conflict.said_source) == ("other", "langsmith")
    engine = create_engine(first_store)
    with engine.connect() as connection:
        said = connection.exec_driver_sql("SELECT role_source FROM calls WHERE call_id = 'ruled'").scalar()
    engine.dispose()
    assert said == "inferred"
    store.close()


def test_prompts_become_chains_and_back_without_a_change(either_url: str) -> None:
    """Conversations, groups, several pages of calls, two projects, a stub; read before, between and after."""
    store = open_store(either_url)
    runs = ready_group(store)
    train(store)
    store.delete_runs(runs)
    talk = [f"turn{number}" for number in range(8)]
    store.append_calls(
        [
            asked(f"c{number}-{n}", f"r{number}", [*talk[:n], f"mine{number}"], project="pq"[number % 2])
            for number in range(30)
            for n in range(8)
        ]
    )
    store.append_calls([make_call("none", None, role=None, prompt_ids=None), make_call("empty", "e", prompt_ids=())])
    before = [store.trace(f"r{number}") for number in range(30)], store.get_call("none"), store.get_call("empty")
    weight = chained(store)
    store.close()
    to_revision(either_url, "0009")
    engine = create_engine(either_url)
    with engine.connect() as connection:
        assert "blocks" not in inspect(connection).get_table_names()
        row = connection.exec_driver_sql(
            "SELECT length(prompt_ids), n_prompt, request FROM call_payloads WHERE call_id = 'c7-3'"
        ).one()
        assert row[0] == 4 * row[1] and row[2].startswith('{"messages":[{"role":"user","content":"turn0 turn0')
    engine.dispose()
    store = open_store(either_url)
    assert (
        [store.trace(f"r{number}") for number in range(30)],
        store.get_call("none"),
        store.get_call("empty"),
    ) == before
    assert chained(store) <= weight, "they share what they shared"
    assert store.check() == []
    assert store.get_run(runs[0]).error == "content deleted"
    store.append_calls([asked("new", "r1", [*talk, "more"], project="q")])
    store.delete_runs([f"r{number}" for number in range(30)], busy="force")
    assert chained(store) == 0
    store.close()


def test_blocks_that_lie_twice_become_one_on_the_way_back(either_url: str) -> None:
    """Two writers of PostgreSQL may store one block at the same moment; the revision before had no room for that."""
    store = open_store(either_url)
    store.append_calls([asked("a", "r", ["x", "y"]), asked("b", "r", ["x", "y", "z"])])
    before = store.trace("r")
    twice(store)
    store.append_calls([asked("c", "r", ["x", "y", "z", "w"])])
    kept = store.get_call("c")
    assert store.check() == []
    store.close()
    to_revision(either_url, "0011")
    engine = create_engine(either_url)
    with engine.connect() as connection:
        counted = "SELECT count(*), count(DISTINCT hash) FROM blocks"
        assert len(set(connection.exec_driver_sql(counted).one())) == 1
    engine.dispose()
    store = open_store(either_url)
    assert store.check() == []
    assert [*store.trace("r").calls[:2]] == [*before.calls] and store.get_call("c") == kept
    store.delete_runs(["r"], busy="force")
    assert chained(store) == 0
    store.close()


def chained(store: Store) -> int:
    return sum(stored_units(store))


def test_a_call_of_two_versions_is_quarantined_by_the_revision_before(first_store: str) -> None:
    store = open_store(first_store)
    two = replace(make_choice(0, (4, 5)), version_spans=((0, 1), (1, 2)))
    store.append_calls([make_call("two", "r", choices=(two,)), make_call("one", "r")])
    store.close()
    to_revision(first_store, "0014")
    store = open_store(first_store)
    assert [(c.call_id, c.quarantine) for c in store.trace("r").calls] == [
        ("c", None),
        ("two", "version changed"),
        ("one", None),
    ]
    store.close()


def test_a_job_of_one_model_goes_on_as_one_of_several(either_url: str) -> None:
    """Its model, its rule, its steps and their versions; going back keeps the first model of each."""
    store = open_store(either_url)
    ready_group(store)
    ready_group(store, "next")
    version = train(store, roles=("answerer",))
    before = [store.list_jobs(), store.last_checkpoint(JOB), store.version_origin(version.version_id), store.queue(JOB)]
    store.close()
    to_revision(either_url, "0010")
    engine = create_engine(either_url)
    with engine.connect() as connection:
        model, rule = connection.exec_driver_sql("SELECT model, rule FROM jobs").one()
        made = connection.exec_driver_sql("SELECT version_id FROM checkpoints").scalar()
    engine.dispose()
    assert (model, made) == ("main", version.version_id)
    assert {"model": "main", "roles": ["answerer"]}.items() <= json.loads(rule).items()
    store = open_store(either_url)
    origin = store.version_origin(version.version_id)
    assert [store.list_jobs(), store.last_checkpoint(JOB), origin, store.queue(JOB)] == before
    assert train(store, step=2).step == 2
    with pytest.raises(Conflict):  # a version is made by one step
        sql(store, "UPDATE step_versions SET version_id = :one", one=version.version_id)
    store.close()


def test_publishes_come_through_with_their_acknowledgements_and_go_back(first_store: str) -> None:
    """A drain that is waited for stays so, ids are not used again, and the gate's states have names that were known."""
    rows = (
        "INSERT INTO policy_versions (model, kind, checkpoint_path, checkpoint_hash, step, abandoned, created_at)"
        " VALUES ('m', 'initial', '/w', 'w', 0, false, 1.0)",
        *(
            f"INSERT INTO publishes (version_id, model, state, requested_at) VALUES (3, 'm', '{state}', 1.0)"
            for state in ("live", "draining", "failed")
        ),
        *(f"INSERT INTO proxies VALUES ('{name}', 'http://p', 1.0, 1e12)" for name in ("acked", "waits")),
        "INSERT INTO publish_acks (publish_id, proxy_id, acked_at) VALUES (2, 'acked', 1.0)",
        "DELETE FROM publishes WHERE publish_id = 3",
    )
    engine = create_engine(first_store)
    with engine.begin() as connection:
        for statement in rows:
            connection.exec_driver_sql(statement)
    store = open_store(first_store)
    assert [(p.publish_id, p.state, p.gate) for p in store.list_publishes("m")] == [
        (1, "live", None),
        (2, "draining", None),
    ]
    assert store.waiting_proxies(2, 1.0) == ["waits"]
    assert store.end_unswapped(2, silent_s=1.0) == [], "an older trainer's has no heartbeat: it is not silent"
    store.advance_publish(2, "failed")
    terms = GateTerms(share=0.0, engines=("http://e",), timeout_s=1.0).as_json()
    rejected = store.request_publish(3, gate=terms)
    assert rejected.publish_id == 4
    store.advance_publish(rejected.publish_id, "rejected", decision=unjudged("nobody came").as_json())
    store.skip_publish(3, "pinned")
    store.pin_version(3, "by hand")
    store.close()
    to_revision(first_store, "0007")
    with engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT publish_id, state FROM publishes ORDER BY publish_id").all()
        acked = connection.exec_driver_sql("SELECT proxy_id FROM publish_acks").scalars().all()
    engine.dispose()
    assert [tuple(row) for row in found] == [(1, "live"), (2, "failed"), (4, "failed")]
    assert acked == ["acked"]


def test_staleness_is_counted_in_updates_of_a_model_that_some_steps_left_out(either_url: str) -> None:
    """Along the descent, canaries aside, each model by itself; without a parent the step is all that is known."""
    store = open_store(either_url)
    made: list[PolicyVersion] = []
    versions: tuple[tuple[str, VersionKind, int, int | None], ...] = (
        *(("p", "initial", 0, None), ("w", "initial", 0, None), ("p", "canary", 0, 0)),
        *(("p", "step", 1, 0), ("p", "step", 2, 3), ("w", "step", 2, 1), ("p", "step", 7, 4)),
        *(("w", "step", 9, 5), ("p", "step", 3, 3), ("other", "step", 4, None)),
    )
    for model, kind, step, parent in versions:
        parent_id = None if parent is None else made[parent].version_id
        version = store.add_version(
            model=model,
            kind=kind,
            parent_id=parent_id,
            checkpoint_path="",
            checkpoint_hash="",
            step=step,
            job_id=None,
        )
        made.append(version)
    assert [version.updates for version in made] == [0, 0, 0, 1, 2, 1, 3, 2, 2, 4]
    assert [version.line - made[0].version_id for version in made] == [0, 1, 0, 0, 0, 1, 0, 1, 0, 9]
    store.close()
    to_revision(either_url, "0018")
    store = open_store(either_url)
    assert store.list_versions() == made
    store.close()


def test_a_lease_of_the_revision_before_reads_its_spans_as_they_are(either_url: str) -> None:
    """It kept none. What came late stays, and a call that took its span late is the one it was appended as."""
    store = open_store(either_url)
    ready_group(store)
    first = take(store)
    spanless = make_call("spanless", None, role=None, version=1)
    store.append_calls([spanless])
    fact = LateAttribution(source="langsmith", call_id="spanless", run_id="g-0", span_id="span-answerer")
    store.attribute_late([fact])
    store.close()
    to_revision(either_url, "0019")
    store = open_store(either_url)
    store.put_spans([Span(span_id="tool", run_id="g-0", name="search", kind="tool", output="found")])
    lease = store.reclaim(JOB, 60)
    assert lease is not None
    newest = store.trace("g-0")
    assert store.lease_traces(lease)[0].spans == newest.spans
    assert {call.call_id: call.attribution.span for call in newest.calls}["spanless"] in newest.spans
    store.append_calls([spanless])
    assert lease.plan == first.plan
    store.release(lease)
    assert [span.output for span in store.lease_traces(take(store))[0].spans] == [None, None]
    store.close()
