"""Export and import: HF datasets reads it, and every byte comes back, on both backends and from one to the other."""

import builtins
import gc
import math
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tracegrad.tracestore import interchange
from tracegrad.tracestore.errors import ConfigError, Conflict, InvalidRecord, NotFound
from tracegrad.tracestore.interchange import CARRIED, Chosen
from tracegrad.tracestore.parquet import export_to, import_from
from tracegrad.tracestore.records import Choice, Continues, LateAttribution, Run, Span, Task
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import (
    Clock,
    add_group,
    finish_run,
    live_version,
    make_call,
    make_choice,
    make_reward,
    ready_group,
    sql,
    train,
)

parquet = pytest.importorskip("pyarrow.parquet", reason="tracegrad[parquet] is not installed")
EXACT = (-0.1, math.nan, -math.inf, -1e-45, 0.0, -0.0)


def float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    opened = open_store(store_url, clock=Clock())
    yield opened
    opened.close()


@pytest.fixture(params=["sqlite", "postgres"])
def other(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """An empty store to import into."""
    url = f"sqlite:///{tmp_path}/other.db"
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
    opened = open_store(url)
    yield opened
    opened.close()


def world(store: Store) -> list[str]:
    """Groups, tasks, versions, NaN and None, no prompt, no choices, choices of no token, spans, calls of no run."""
    version = live_version(store).version_id
    runs = [*ready_group(store, "g", version=version), *add_group(store, "e", purpose="eval")]
    store.put_tasks([Task(task_id="t", input={"q": "ü\u2028"}, reference={"a": [1, None]}, project="p")])
    store.open_run(Run(run_id="solo", project="p", task_id="t"))
    odd = replace(
        make_choice(0, range(len(EXACT)), EXACT),
        version_spans=((0, version), (2, version + 1)),
        kept_ids=tuple((token, *range(100, 100 + token)) for token in range(len(EXACT))),
    )
    none = Choice(
        index=3, token_ids=(2**31 - 1, -(2**31)), logprobs=None, finish_reason=None, message={"content": None}
    )
    store.append_calls(
        [
            make_call("odd", "solo", choices=(odd, none), version=version, project="p", stream=True),
            make_call("empty", "solo", choices=(make_choice(0, ()),), project="p", request_hash="h", retry_of="odd",
                      continues=Continues(call_id="odd", choice=0, drift="template", token_in=True)),
            make_call("failed", "solo", choices=(), prompt_ids=None, status="failed", error="5xx", project="p"),
            make_call("alone", None, role=None, project="p"),
            make_call("no-tokens", "solo", prompt_ids=(), project="p"),
        ]
    )  # fmt: skip
    store.put_spans([Span(span_id="tool", run_id="solo", name="x", kind="tool", input={"n": 0.1}, wrote=("a",))])
    store.add_rewards(
        [make_reward("w1", "solo", 0.1), make_reward("w2", "solo", 0.25), make_reward("w3", "solo", call_id="odd")]
    )
    store.end_run("solo", status="failed", ended_by="hook", error="boom")
    return [*runs, "solo"]


def same(one: Any, two: Any) -> bool:
    return repr(one) == repr(two)  # nan is not equal to itself; its word is


def test_what_was_exported_comes_back_exactly(store: Store, other: Store, tmp_path: Path) -> None:
    runs = world(store)
    wrote = export_to(store, tmp_path / "out", Chosen())
    assert wrote == {"tasks": 3, "policy_versions": 1, "groups": 2, "runs": 5, "spans": 4, "calls": 7, "rewards": 5}
    assert import_from(other, tmp_path / "out") == wrote
    for run_id in runs:
        assert same(other.trace(run_id), store.trace(run_id)), run_id
    assert same(other.get_call("alone"), store.get_call("alone"))
    back = other.get_call("odd")
    assert same(back.choices[0].logprobs, tuple(map(float32, EXACT))) and back.choices[1].logprobs is None
    assert other.get_call("failed").prompt_ids is None and other.get_call("no-tokens").prompt_ids == ()
    assert other.get_task("t") == store.get_task("t") and other.get_group("e") == store.get_group("e")
    assert other.check() == []
    export_to(other, tmp_path / "again", Chosen())
    for name in CARRIED:  # row for row, value for value: also rewards that were overtaken
        tables = [parquet.read_table(tmp_path / folder / f"{name}.parquet").to_pylist() for folder in ("out", "again")]
        assert same(*tables), name


def test_it_may_be_imported_twice_and_the_store_goes_on(store: Store, other: Store, tmp_path: Path) -> None:
    world(store)
    export_to(store, tmp_path / "out", Chosen())
    import_from(other, tmp_path / "out")
    assert set(import_from(other, tmp_path / "out").values()) == {0}
    made = live_version(other, step=1)
    assert made.version_id == 2
    train(other)  # imported runs can be trained by a job of that store


def test_a_task_whose_content_was_deleted_is_no_other_task(store: Store, other: Store, tmp_path: Path) -> None:
    """Neither in the export nor in the store; content goes where there is none."""
    task = Task(task_id="task-g", input={"question": "g"})
    runs = ready_group(store)
    train(store)
    store.delete_runs(runs)
    export_to(store, tmp_path / "blank", Chosen())
    other.put_tasks([task])
    import_from(other, tmp_path / "blank")
    assert other.get_task("task-g") == task
    store.open_run(Run(run_id="r", task_id="task-g"))
    export_to(other, tmp_path / "whole", Chosen())
    import_from(store, tmp_path / "whole")
    assert store.get_task("task-g") == task
    other.put_tasks([Task(task_id="x", input={})])
    store.put_tasks([Task(task_id="x", input={"else": 1})])
    export_to(other, tmp_path / "other", Chosen())
    with pytest.raises(Conflict, match="tasks x is here already with another input"):
        import_from(store, tmp_path / "other")


def test_what_is_there_and_says_otherwise_is_refused(store: Store, tmp_path: Path) -> None:
    world(store)
    export_to(store, tmp_path / "out", Chosen())
    with open_store(f"sqlite:///{tmp_path}/third.db")._db.write() as connection:
        connection.exec_driver_sql(
            "INSERT INTO policy_versions (model, kind, checkpoint_path, checkpoint_hash, step, abandoned, created_at)"
            " VALUES ('main', 'initial', 'x', 'x', 0, 0, 0)"
        )
    third = open_store(f"sqlite:///{tmp_path}/third.db")
    with pytest.raises(Conflict, match="policy_versions 1 is here already with another checkpoint_hash"):
        import_from(third, tmp_path / "out")
    third.close()
    changed = open_store(f"sqlite:///{tmp_path}/fourth.db")
    import_from(changed, tmp_path / "out")
    with changed._db.write() as connection:
        connection.exec_driver_sql(
            "UPDATE choice_payloads SET logprobs = zeroblob(24) WHERE logprobs IS NOT NULL"
            " AND seq = (SELECT seq FROM calls WHERE call_id = 'odd')"
        )
    with pytest.raises(Conflict, match="call odd is here already with another logprobs"):
        import_from(changed, tmp_path / "out")
    changed.close()


LATE = LateAttribution(source="langsmith", call_id="c", run_id="r")


@pytest.mark.parametrize(
    ("learn", "refused"),
    [
        (lambda store: store.end_run("r", status="closed", ended_by="hook"), "runs r .* another status"),
        (lambda store: store.put_spans([Span(span_id="s", run_id="r", name="n", output=1)]), "spans r s .* output"),
        (lambda store: store.attribute_late([LATE]), "calls c .* another run_id"),
        (lambda store: store.attribute_late([replace(LATE, run_id=None, role="x")]), "calls c .* another role"),
    ],
)
def test_what_was_learnt_since_is_refused_and_not_left_out(
    store: Store, other: Store, tmp_path: Path, learn: Callable[[Store], None], refused: str
) -> None:
    """The other way round the export knows less, which is no difference."""
    for one in (store, other):
        live_version(one)
    store.open_run(Run(run_id="r"))
    store.put_spans([Span(span_id="s", run_id="r", name="n")])
    store.append_calls([make_call("c", None, role=None)])
    export_to(store, tmp_path / "before", Chosen())
    import_from(other, tmp_path / "before")
    learn(store)
    export_to(store, tmp_path / "after", Chosen())
    with pytest.raises(Conflict, match=refused):
        import_from(other, tmp_path / "after")
    assert not any(import_from(store, tmp_path / "before").values())


@pytest.mark.parametrize(
    ("read", "make", "lost"),
    [
        ("rewards", ready_group, "runs that rewards name .* such as g-0"),
        ("calls", lambda store: finish_run(store, "r", reward=None), "runs that calls name .* such as r"),
        ("spans", lambda store: store.put_spans([Span(span_id="s", run_id="r", name="n")]), "runs that spans name"),
        ("runs", add_group, "groups that runs name .* such as g"),
        ("groups", lambda store: add_group(store) and sql(store, "DELETE FROM runs"), "tasks that groups name"),
    ],
)
def test_an_export_that_a_deletion_broke_says_so(
    store: Store, tmp_path: Path, read: str, make: Callable[[Store], Any], lost: str
) -> None:
    """Each table was read, and then the others were gone; the folder is none that could be imported."""
    make(store)

    def delete(table: str, rows: int) -> None:
        if table == read:
            store.delete_runs([one.run.run_id for one in store.list_runs()], busy="force")
            store.delete_beside_runs("default")

    with pytest.raises(Conflict, match=f"{lost}.*: .*export again into a new folder"):
        export_to(store, tmp_path / "out", Chosen(), delete)
    with pytest.raises(NotFound, match="no whole export"):
        import_from(store, tmp_path / "out")


@pytest.mark.parametrize(
    ("read", "lost"),
    [("rewards", "calls that rewards name .* such as late of g-0"), ("calls", "spans that calls name")],
)
def test_an_export_says_so_where_a_stub_was_left(store: Store, tmp_path: Path, read: str, lost: str) -> None:
    """What a stub lacks it lacks in the store too, but for what was read before it was one."""
    runs = ready_group(store)
    train(store)
    store.append_calls([make_call("late", runs[0])])
    store.add_rewards([make_reward("late", runs[0], call_id="late")])

    def delete(table: str, rows: int) -> None:
        if table == read:
            store.delete_runs(runs)

    with pytest.raises(Conflict, match=lost):
        export_to(store, tmp_path / "out", Chosen(), delete)
    store.append_calls([make_call("again", runs[0])])
    export_to(store, tmp_path / "stubs", Chosen())


def test_a_part_of_a_store(store: Store, tmp_path: Path) -> None:
    world(store)
    one = export_to(store, tmp_path / "one", Chosen(run_ids=("solo",)))
    assert (one["runs"], one["calls"], one["tasks"], one["groups"]) == (1, 4, 1, 0)
    project = export_to(store, tmp_path / "project", Chosen(project="p"))
    assert (project["runs"], project["calls"]) == (1, 5)
    assert export_to(store, tmp_path / "since", Chosen(since=2_000.0))["calls"] == 0
    with pytest.raises(NotFound, match="nobody"):
        export_to(store, tmp_path / "nobody", Chosen(run_ids=("nobody",)))


def test_the_stub_of_a_deleted_run_travels_as_one(store: Store, tmp_path: Path) -> None:
    runs = ready_group(store, version=live_version(store).version_id)
    train(store)
    store.delete_runs(runs)
    export_to(store, tmp_path / "out", Chosen())
    other = open_store(f"sqlite:///{tmp_path}/other.db")
    import_from(other, tmp_path / "out")
    assert other.get_run(runs[0]).error == "content deleted" and other.trace(runs[0]).calls == ()
    other.close()


def test_a_stub_and_the_run_that_it_was_are_no_different_runs(store: Store, other: Store, tmp_path: Path) -> None:
    """What was exported before the deletion goes into the store again, and what was exported after it elsewhere."""
    runs = ready_group(store)
    train(store)
    export_to(store, tmp_path / "whole", Chosen())
    store.delete_runs(runs)
    export_to(store, tmp_path / "stubs", Chosen())
    import_from(other, tmp_path / "whole")
    assert not any(import_from(other, tmp_path / "stubs").values())
    assert other.trace(runs[0]).calls and other.get_run(runs[0]).status == "closed"
    assert import_from(store, tmp_path / "whole")["calls"] == 0
    assert store.get_run(runs[0]).error == "content deleted" and store.check() == []


def test_light_calls_are_a_thousand_a_page(store: Store) -> None:
    ids = random.Random(0).choices(range(50_000), k=50)
    store.append_calls([make_call(f"c{number}", f"r{number // 4}", tokens=[ids]) for number in range(2_500)])
    assert [len(page) for page in store.pages("calls", Chosen())] == [1_000, 1_000, 500]


def test_memory_is_bounded_by_what_a_page_weighs(
    store: Store, other: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls with kept sets, calls of which only text is known, spans: 10 MB, by pages of half a megabyte."""
    page = 500_000
    monkeypatch.setattr(interchange, "PAGE_BYTES", page)
    store.append_calls([make_call("warm", "warm")])
    export_to(store, tmp_path / "warm", Chosen())  # what is imported and compiled once is not measured
    import_from(other, tmp_path / "warm")
    kept = replace(make_choice(0, [7] * 250), kept_ids=(tuple(range(128)),) * 250)
    texts = {f"r{number}": random.Random(number).randbytes(20_000).hex() for number in range(50)}
    store.append_calls(
        [
            call
            for run_id, text in texts.items()
            for call in (
                make_call(f"kept-{run_id}", run_id, choices=(kept,)),
                make_call(f"text-{run_id}", run_id, prompt_ids=None, request={"messages": [{"content": text}]}),
            )
        ]
    )
    store.put_spans(
        [Span(span_id="tool", run_id=one, name="x", kind="tool", input=text) for one, text in texts.items()]
    )
    assert {name: len(list(store.pages(name, Chosen()))) for name in ("calls", "spans")} == {"calls": 17, "spans": 4}
    with peak() as exported:
        wrote = export_to(store, tmp_path / "out", Chosen())
    with peak() as imported:
        new = import_from(other, tmp_path / "out")
    assert new == wrote | {"runs": 50, "spans": 100, "calls": 100}
    assert exported[0] < 8 * page
    assert imported[0] < 10 * page
    assert same(other.trace("r39"), store.trace("r39"))


@contextmanager
def peak() -> Iterator[list[int]]:
    """The most bytes that Python and Arrow held at once, together at most, more than at the beginning."""
    import pyarrow

    known, found = pyarrow.default_memory_pool(), [0]
    watched = pyarrow.proxy_memory_pool(known)
    pyarrow.set_memory_pool(watched)
    gc.collect()
    tracemalloc.start()
    try:
        yield found
        found[0] = tracemalloc.get_traced_memory()[1] + watched.max_memory()
    finally:
        tracemalloc.stop()
        pyarrow.set_memory_pool(known)


def test_hf_datasets_loads_it_in_one_line(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="HF datasets is not installed")
    world(store)
    export_to(store, tmp_path / "out", Chosen())
    code = f"""
import os
os.environ.update(HF_HOME={str(tmp_path / "hf")!r}, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
from datasets import load_dataset
calls = load_dataset({str(tmp_path / "out")!r}, split="train")
odd = next(call for call in calls if call["call_id"] == "odd")
assert odd["prompt_ids"] == [1, 2, 3] and odd["role"] == "answerer", odd
assert odd["choices"][0]["token_ids"] == [0, 1, 2, 3, 4, 5] and odd["choices"][1]["logprobs"] is None, odd
assert calls.features["choices"].feature["logprobs"].feature.dtype == "float32"
assert calls.features["prompt_ids"].feature.dtype == "int32"
assert len(load_dataset({str(tmp_path / "out")!r}, "rewards", split="train")) == 5
print(len(calls))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "7"


def test_what_is_no_export_is_refused(store: Store, tmp_path: Path) -> None:
    finish_run(store, "r", version=live_version(store).version_id)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    with pytest.raises(Conflict, match="not empty"):
        export_to(store, tmp_path / "full", Chosen())
    with pytest.raises(NotFound, match="is no whole export"):
        import_from(store, tmp_path / "full")
    out = tmp_path / "out"
    export_to(store, out, Chosen())
    table = parquet.read_table(out / "runs.parquet")
    parquet.write_table(table.replace_schema_metadata({}), out / "runs.parquet")
    with pytest.raises(InvalidRecord, match="not made by `tracegrad export`"):
        import_from(store, out)
    parquet.write_table(table.drop_columns(["error"]), out / "runs.parquet")
    with pytest.raises(InvalidRecord, match="export again with this version"):
        import_from(store, out)
    (out / "tasks.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(InvalidRecord, match="cannot be read"):
        import_from(store, out)


def test_without_pyarrow_it_says_what_to_install(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return known(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        export_to(store, tmp_path / "out", Chosen())
