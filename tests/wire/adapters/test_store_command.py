"""`tracegrad store`: what goes and what stays, what is said of it, and what is refused."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tracegrad.adapters.amounts import in_bytes, moment, size
from tracegrad.adapters.doctor import doctor
from tracegrad.adapters.parquet_command import export
from tracegrad.adapters.reward_command import reward
from tracegrad.adapters.store_command import store as command
from tracegrad.tracestore.errors import Conflict, NotFound, StoreUnavailable
from tracegrad.tracestore.records import Run
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import Clock, add_group, make_call, ready_group, sql, take, train


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def store(url: str, clock: Clock) -> Iterator[Store]:
    opened = open_store(url, clock=clock)
    yield opened
    opened.close()


def invoke(*arguments: str, **how: Any) -> Any:
    return CliRunner().invoke(command, list(arguments), catch_exceptions=False, **how)


def result(*arguments: str) -> Any:
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def closed(store: Store, clock: Clock, count: int, prefix: str = "r", **how: Any) -> list[str]:
    run_ids = [f"{prefix}{number:03}" for number in range(count)]
    for run_id in run_ids:
        store.append_calls([make_call(f"call-{run_id}", run_id, **how)])
        store.end_run(run_id, status="closed", ended_by="explicit")
        clock.advance(1)
    return run_ids


def test_named_runs_go(store: Store, clock: Clock, url: str) -> None:
    closed(store, clock, 3)
    counted = result("delete", "r000", "r001", "--dry-run", "--store", url)
    assert (counted["runs"], counted["calls"]) == (2, 2) and store.get_run("r000")
    done = invoke("delete", "r000", "r001", "--store", url)
    assert "2 runs and 2 calls are gone" in done.stdout and "nothing else of them is left" in done.stdout
    assert [run.run.run_id for run in store.list_runs()] == ["r002"]


def test_a_leased_run_is_refused_in_plain_words_unless_forced(store: Store, url: str) -> None:
    runs = ready_group(store)
    lease = take(store)
    with pytest.raises(Conflict, match=f"'g-0' is held by lease {lease.lease_id} of job 'job': wait"):
        invoke("delete", *runs, "--store", url)
    assert result("delete", *runs, "--force", "--store", url)["runs"] == 2
    with pytest.raises(NotFound):
        invoke("delete", *runs, "--store", url)


def test_of_trained_runs_it_says_that_a_stub_stays(store: Store, url: str) -> None:
    runs = ready_group(store)
    train(store)
    assert "of 2 of them a stub stays" in invoke("delete", *runs, "--store", url).stdout


def test_a_project_goes_after_a_question_and_others_stay(store: Store, clock: Clock, url: str) -> None:
    closed(store, clock, 120, project="a")
    closed(store, clock, 2, "keep", project="b")
    store.append_calls([make_call("alone", None, role=None, project="a"), make_call("open", "open", project="a")])
    for mistyped in (["delete"], ["prune", "--older-than", "1s"]):
        with pytest.raises(NotFound, match="no project 'aa' in this store; did you mean a\\?"):
            invoke(*mistyped, "--project", "aa", "--store", url)
    refused = invoke("delete", "--project", "a", "--store", url, input="n\n")
    assert refused.exit_code == 1 and store.get_run("r000")
    done = result("delete", "--project", "a", "--yes", "--store", url)
    assert (done["runs"], done["calls"]) == (120, 121)
    assert {run.run.run_id for run in store.list_runs()} == {"open", "keep000", "keep001"}
    assert result("delete", "--project", "a", "--yes", "--force", "--store", url)["runs"] == 1


@pytest.mark.parametrize("which", [["delete"], ["delete", "--before", "30d"], ["prune", "--older-than", "30d"]])
def test_a_dry_run_counts_what_goes(store: Store, clock: Clock, url: str, which: list[str]) -> None:
    """Calls without a run too, of this project and of this age."""
    closed(store, clock, 2)
    store.append_calls([make_call(f"alone{number}", None, role=None) for number in range(150)])
    store.append_calls([make_call("young", None, at=time.time()), make_call("foreign", None, project="b")])
    arguments = [*which, "--project", "default", "--store", url]
    yes = ["--yes"] if which[0] == "delete" else []
    would = result(*arguments, "--dry-run")
    assert (would["runs"], would["calls"]) == (2, 153 if which == ["delete"] else 152)
    did = result(*arguments, *yes)
    assert [did[name] for name in ("runs", "calls", "weight_bytes")] == [
        would[name] for name in ("runs", "calls", "weight_bytes")
    ]
    assert did["weight_bytes"] > 152 * 50


def test_a_whole_project_goes_with_what_never_began(store: Store, url: str) -> None:
    add_group(store, "planned")
    sql(store, "DELETE FROM runs")
    store.open_run(Run(run_id="open"))
    _, key = store.create_key(scopes=["call"], run_id="open")
    assert result("delete", "--project", "default", "--yes", "--store", url)["beside"] == {}
    done = invoke("delete", "--project", "default", "--yes", "--force", "--store", url)
    assert "beside them went 1 of groups, 1 of tasks" in done.stdout
    assert f"`tracegrad keys revoke {key.key_id}`" in done.stderr
    with pytest.raises(NotFound):
        store.get_task("task-planned")


def test_a_job_that_never_trained_goes(store: Store, url: str) -> None:
    store.register_job("tarin", ["main"], {})
    assert invoke("delete-job", "tarin", "--store", url).stdout == "job tarin is gone\n"
    ready_group(store)
    train(store)
    with pytest.raises(Conflict, match="job 'job' has trained 1 steps"):
        invoke("delete-job", "job", "--store", url)
    assert [job.job_id for job in store.list_jobs()] == ["job"]


def test_a_project_goes_up_to_a_date(store: Store, clock: Clock, url: str) -> None:
    closed(store, clock, 10)
    done = result("delete", "--project", "default", "--before", "1970-01-01T00:16:45+00:00", "--yes", "--store", url)
    assert done["runs"] == 5


def test_prune_by_age_and_by_size_oldest_first(store: Store, clock: Clock, url: str) -> None:
    closed(store, clock, 250)  # seconds 1,000 to 1,249, long ago
    (one,) = store.newest_runs("default", limit=1)
    everything = result("prune", "--project", "default", "--older-than", "30d", "--dry-run", "--store", url)
    assert everything["runs"] == 250 and everything["weight_bytes"] == 250 * one.weight_bytes
    fits = result("prune", "--project", "default", "--larger-than", "10GB", "--store", url)
    assert fits["runs"] == 0
    done = result("prune", "--project", "default", "--larger-than", f"{one.weight_bytes * 40}B", "--store", url)
    assert done["runs"] == 210 and "written anew" in done["space"]
    left = sorted(run.run.run_id for run in store.list_runs(limit=500))
    assert left == [f"r{number}" for number in range(210, 250)]
    assert result("prune", "--project", "default", "--older-than", "1w", "--store", url)["runs"] == 40
    assert result("check", "--store", url) == []


def test_prune_leaves_what_is_open_or_leased(store: Store, url: str) -> None:
    runs = ready_group(store)
    take(store)
    store.append_calls([make_call("c", "open")])
    done = result("prune", "--project", "default", "--older-than", "1s", "--larger-than", "1B", "--store", url)
    assert done["runs"] == 0 and store.traces([*runs, "open"])


def test_the_file_is_not_rewritten_beside_a_proxy(store: Store, clock: Clock, url: str) -> None:
    closed(store, clock, 50, tokens=[range(1_000)])
    with open_store(url)._db.write() as connection:
        connection.exec_driver_sql("INSERT INTO proxies VALUES ('p', 'u', 0, 9e12)")
    done = result("prune", "--project", "default", "--older-than", "1s", "--store", url)
    assert "1 proxies are at work, so the file keeps its size" in done["space"]
    said = result("vacuum", "--incremental", "--force", "--store", url)
    assert said["after_bytes"] < said["before_bytes"] and store.gives_back()
    closed(store, clock, 50, "again", tokens=[range(1_000)])
    again = result("prune", "--project", "default", "--older-than", "1s", "--store", url)
    assert "step by step" in again["space"] and store.space().free_bytes == 0
    assert store.check() == []  # `store` was open all the while


def test_check_says_what_is_wrong_and_exits_1(store: Store, clock: Clock, url: str) -> None:
    closed(store, clock, 1)
    assert "the store is whole" in invoke("check", "--store", url).stdout
    sql(store, "DELETE FROM call_payloads")
    done = invoke("check", "--store", url)
    assert done.exit_code == 1 and "calls without their payload: 1, such as call-r000" in done.stdout


def test_a_backup_is_a_store(store: Store, clock: Clock, url: str, tmp_path: Path) -> None:
    closed(store, clock, 2)
    done = result("backup", str(tmp_path / "copy.db"), "--store", url)
    assert done["bytes"] > 0
    copy = open_store(f"sqlite:///{tmp_path}/copy.db", create=False)
    assert copy.trace("r001") == store.trace("r001")
    copy.close()
    with pytest.raises(Conflict):
        invoke("backup", str(tmp_path / "copy.db"), "--store", url)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["delete"], "which runs?"),
        (["delete", "r", "--project", "p"], "which runs?"),
        (["delete", "r", "--before", "2026-01-01"], "which runs?"),
        (["prune", "--project", "p"], "how much may stay?"),
        (["prune", "--project", "p", "--older-than", "30"], "'30' is no age (30m, 2h, 7d) and no ISO"),
        (["prune", "--project", "p", "--larger-than", "10"], "write 500MB, 10GB or 10GiB"),
        (["delete", "--project", "p", "--before", "soon"], "'soon' is no age"),
    ],
)
def test_what_is_not_clear_is_asked_back(arguments: list[str], says: str, url: str) -> None:
    done = invoke(*arguments, "--store", url)
    assert done.exit_code == 2 and says in done.output


def test_a_store_that_is_not_there_is_not_made(url: str, tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        invoke("check", "--store", url)
    assert not (tmp_path / "store.db").exists()


def test_amounts() -> None:
    now = time.time()
    ages = {"90s": 90, " 1.5 h": 5_400, "30d": 2_592_000, "4w": 2_419_200}
    assert [moment(text) for text in ages] == pytest.approx([now - s for s in ages.values()], abs=9)
    assert [size(text) for text in ("5B", "1.5KB", "10GB", "1GiB")] == [5, 1_500, 10**10, 2**30]
    assert {moment(f"1970-01-02T00:00{zone}") for zone in ("Z", "+00:00")} == {86_400.0}
    assert [in_bytes(count) for count in (0, 999, 1_500, 2 * 10**12)] == ["0 B", "999 B", "1.5 KB", "2.0 TB"]


def test_every_command_reads_times_alike() -> None:
    """But for `train`, which may not import this and calls the same parser."""
    commands = [doctor, export, reward, *command.commands.values()]
    options = [one for each in commands for one in each.params if getattr(one.type, "func", None) is moment]
    assert {name for one in options for name in one.opts} == {"--since", "--before", "--older-than"}
    assert len(options) == 5 and {one.metavar for one in options} == {"AGE|TIME"}
