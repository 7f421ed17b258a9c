"""`tracegrad status`: what it sees, and that each thing that is wrong is a line that says what to do."""

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_engine
import pytest
from click.testing import CliRunner

from tracegrad.adapters import status_report
from tracegrad.adapters.serving import free_port
from tracegrad.adapters.status import status
from tracegrad.tracestore.evaluations import Evaluator
from tracegrad.tracestore.records import Continues, Run
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import JOB, Clock, live_version, make_call, ready_group, sql, train
from tracegrad.tracestore.trainers import TrainerPhase


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[fake_engine.FakeEngine]:
    with fake_engine.FakeEngine(fake_engine.save_weight(tmp_path / "weights", 1.0)) as served:
        yield served


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path}/trace.db")
    yield opened
    opened.close()


@pytest.fixture
def ask(tmp_path: Path, engine: fake_engine.FakeEngine) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run the command; returns (exit status, the JSON, the text for people)."""

    def run(**changed: Any) -> tuple[int, dict[str, Any], str]:
        config = {
            "store": f"sqlite:///{tmp_path}/trace.db",
            "models": {"main": {"checkpoint": "none", "engine": {"url": engine.url}}},
            "roles": {"*": "main"},
            **changed,
        }
        path = tmp_path / "tracegrad.yaml"
        path.write_text(json.dumps(config))
        arguments = ["--config", str(path), "--timeout", "1"]
        text = CliRunner().invoke(status, arguments)
        answer = CliRunner().invoke(status, [*arguments, "--json"])
        assert text.exit_code == answer.exit_code, text.output
        return answer.exit_code, json.loads(answer.output), " ".join(text.output.split())

    return run


def test_all_is_well(store: Store, engine: fake_engine.FakeEngine, ask: Any) -> None:
    version = live_version(store, 3)
    engine.version = str(version.version_id)
    store.register_proxy("proxy_1", engine.url)
    store.open_run(Run(run_id="r"))
    code, found, text = ask()
    assert (code, found["ok"], found["problems"]) == (0, True, [])
    assert found["engines"] == [
        {"model": "main", "url": engine.url, "health": "ok", "version": str(version.version_id), "adapters": None}
    ]
    assert (found["models"][0]["live_version"], found["models"][0]["live_step"]) == (version.version_id, 3)
    assert found["open_runs"]["count"] == 1
    assert [row["proxy_id"] for row in found["proxies"]] == ["proxy_1"]
    assert found["trainer"]["step"] is None
    assert "everything is up" in text and "version 1 is live (step 3)" in text and "1 open" in text
    assert "job main: no trainer is at work; no step yet; 0 groups ready" in text
    assert found["drift"] == [] and "go on from" not in text
    assert found["models"][0]["pinned"] is None and "pinned" not in text
    assert found["models"][0]["paused_share"] is None and "held for publishes" not in text
    live_version(store, 4)
    sql(store, "update publishes set draining_at = 100, live_at = 101 where publish_id = 1")
    sql(store, "update publishes set draining_at = 120 where publish_id = 2")
    _, found, text = ask()
    assert found["models"][0]["paused_share"] == 1 / 20 and "held for publishes 5.0% of the time" in text
    sql(store, "update publishes set in_flight = true, probe = '{\"paused_s\": 0.5}'")
    assert "version 2 is live (step 4), paused for publishes 2.5% of the time" in ask()[2]
    sql(store, "delete from publishes where publish_id = 2")
    store.pin_version(version.version_id, "by hand")
    _, found, text = ask()
    assert found["models"][0]["pinned"] == version.version_id
    assert "version 1 is live (step 3), pinned at version 1" in text


@pytest.mark.parametrize(
    ("phase", "row"), [("loading", "loading weights and proving its engines"), ("training", "training step 2")]
)
def test_a_trainer_is_told_by_what_it_does(
    store: Store, engine: fake_engine.FakeEngine, ask: Any, phase: TrainerPhase, row: str
) -> None:
    """One that loads is not up yet; one that trains or loads has good reason to leave ready groups alone."""
    ready_group(store)
    train(store)
    sql(store, "UPDATE checkpoints SET created_at = 0")
    ready_group(store, "next")
    store.register_proxy("proxy_1", engine.url)
    changed = {"trainer": {"job": JOB, "batch": {"groups": 1}}}
    (problem,) = ask(**changed)[1]["problems"]
    assert "nobody has taken them since step 1" in problem
    now = time.time()
    store.beat_trainer(JOB, phase, 2, since=now - 7, started=now - 60)
    code, found, text = ask(**changed)
    assert (code, found["problems"], found["trainer"]["now"]["phase"]) == (0, [], phase)
    assert f"job {JOB}: {row} since 7 s; step 1 of" in text
    assert (f"the trainer is {row}; everything else is up" if phase == "loading" else "everything is up") in text


def test_a_training_that_the_gate_ended_is_told_as_that(store: Store, engine: fake_engine.FakeEngine, ask: Any) -> None:
    live = live_version(store)
    engine.version = str(live.version_id)
    store.register_proxy("proxy_1", engine.url)
    ready_group(store)
    candidate = train(store)
    publish = store.request_publish(candidate.version_id, gate={"share": 0.0, "engines": [], "timeout_s": 9.0})
    why = {"passed": False, "judged": True, "why": "too bad"}
    store.advance_publish(publish.publish_id, "rejected", decision=why)
    gate = {"app": "a:g", "tasks": "t", "reward": "r:f", "rule": {"minimum": 1}, "rejected": {"stop_after": 1}}
    store.beat_evaluator(Evaluator(evaluator_id="e", model="main", tasks_hash="t", score="reward"))
    _, found, text = ask(trainer={"job": JOB, "publish": {"gate": gate}})
    (problem,) = found["problems"]
    assert problem.startswith("trainer: the gate rejected 1 versions in a row, which ends training at step 1 ")
    assert f"version {candidate.version_id} was rejected: too bad" in text


def test_each_trained_model_is_shown_and_an_adapter_that_is_not_served_is_a_problem(
    store: Store, engine: fake_engine.FakeEngine, ask: Any
) -> None:
    store.register_proxy("proxy_1", engine.url)
    versions = {name: live_version(store, 2, name) for name in ("p", "w")}
    engine.name = "base"
    engine.adapters = {name: version.checkpoint_path for name, version in versions.items()}
    models = {
        "base": {"checkpoint": "none", "trained": False, "engine": {"url": engine.url}},
        **{name: {"adapter": {"of": "base"}} for name in versions},
    }
    mapped = {"models": models, "roles": {"planner": "p", "writer": "w"}}
    code, found, text = ask(**mapped)
    assert (code, found["problems"]) == (0, [])
    assert [(one["model"], one["live_step"]) for one in found["models"]] == [("base", None), ("p", 2), ("w", 2)]
    assert found["trainer"]["models"] == ["p", "w"] and "job main of p, w: no trainer is at work; no step yet" in text
    engine.adapters["p"] = "/checkpoints/old"
    (problem,) = ask(**mapped)[1]["problems"]
    assert "serves the adapter p from /checkpoints/old, live is version 1 (/checkpoints/2)" in problem


def test_drift_is_told_by_its_cause(store: Store, engine: fake_engine.FakeEngine, ask: Any) -> None:
    store.register_proxy("proxy_1", engine.url)
    rewritten = Continues(call_id="c", choice=0, drift="template")
    for number, origin in enumerate((None, rewritten, rewritten, replace(rewritten, token_in=True))):
        store.append_calls([make_call(f"c{number}", "r", continues=origin)])
    store.append_calls([make_call("exact", "r", continues=replace(rewritten, drift=None))])
    _, found, text = ask()
    assert sum(one["calls"] for one in found["drift"]) == 4
    assert "4 calls go on from an earlier one: 3 template, 1 as sampled; 1 built from sampled ids (token-in)" in text


def test_nothing_is_there(tmp_path: Path, ask: Any) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    code, found, text = ask(models={"main": {"checkpoint": "none", "engine": {"url": url}}})
    assert code == 1
    assert not (tmp_path / "trace.db").exists(), "looking must not make a store"
    engine, there = found["problems"]
    assert engine.startswith(f"engine of main at {url}: does not answer") and "`tracegrad engine`" in engine
    assert there.startswith("store: there is no store at") and "`tracegrad proxy`" in there
    assert "problem: engine of main" in text and "not readable" in text


def test_each_replica_is_asked_and_an_outside_api_is_not(
    store: Store, engine: fake_engine.FakeEngine, ask: Any
) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    store.register_proxy("proxy_1", engine.url)
    api = {"api": {"url": "https://api.invalid/v1", "key_env": "KEY", "model": "m"}, "trained": False}
    main = {"checkpoint": "none", "engine": {"url": engine.url}, "replicas": [away]}
    _, found, _ = ask(models={"main": main, "judge": api}, roles={"judge": "judge", "*": "main"})
    assert [(one["url"], one["health"] == "ok") for one in found["engines"]] == [(engine.url, True), (away, False)]
    assert [one["model"] for one in found["models"]] == ["main"]
    (problem,) = found["problems"]
    assert problem.startswith(f"engine of main at {away}: does not answer")


@pytest.mark.parametrize("seen", ["down", "up"])
def test_a_proxy_that_cannot_use_one_replica_is_a_problem_only_where_that_one_answers_us(
    store: Store, engine: fake_engine.FakeEngine, ask: Any, monkeypatch: pytest.MonkeyPatch, seen: str
) -> None:
    """A replica that is down for everybody is one problem, not also one of the network between proxy and engine."""
    away, proxy = f"http://127.0.0.1:{free_port()}", "http://proxy.invalid"
    store.register_proxy("proxy_1", proxy)
    engines = [
        {"url": engine.url, "state": seen, "detail": "cannot be reached"},
        {"url": away, "state": "down", "detail": "cannot be reached"},
    ]
    health = {"models": {"main": {"engine": "main: cannot be reached", "engines": engines}}}
    fetch = status_report.fetch
    monkeypatch.setattr(status_report, "fetch", lambda url, *more: (503, health) if url == proxy else fetch(url, *more))
    _, found, _ = ask(models={"main": {"checkpoint": "none", "engine": {"url": engine.url}, "replicas": [away]}})
    gone, *network = found["problems"]
    assert gone.startswith(f"engine of main at {away}: does not answer")
    assert network == [
        f"proxy proxy_1 cannot use the engine of main at {engine.url}, which answers from here: cannot be reached; "
        "check the network between them"
    ] * (seen == "down")


def test_a_store_of_another_schema(store: Store, ask: Any) -> None:
    sql(store, "UPDATE alembic_version SET version_num = '0000'")
    (problem,) = ask()[1]["problems"]
    assert problem.startswith("store: the store is at revision 0000, this code needs")
    assert "`tracegrad up`" in problem


def test_no_proxy_a_dead_one_and_an_engine_that_is_unwell(
    store: Store, tmp_path: Path, engine: fake_engine.FakeEngine, ask: Any
) -> None:
    old = open_store(store.url, clock=Clock())
    old.register_proxy("dead", "http://127.0.0.1:9")
    old.close()
    _, found, text = ask(
        models={"main": {"checkpoint": "none", "engine": {"url": engine.url + "/no", "external": True}}}
    )
    assert (found["proxies"], found["dead_proxies"]) == ([], 1)
    assert found["problems"] == [
        f"engine of main at {engine.url}/no: answers HTTP 404; start it (it is external)",
        "no proxy has a heartbeat; start `tracegrad proxy`, or `tracegrad up` for everything",
    ]
    assert "1 more are registered and have no heartbeat" in text


def test_an_engine_on_another_version_and_a_proxy_that_does_not_answer(
    store: Store, engine: fake_engine.FakeEngine, ask: Any
) -> None:
    live_version(store, 0)
    store.register_proxy("proxy_1", f"http://127.0.0.1:{free_port()}")
    code, found, _ = ask()
    proxy, version = found["problems"]
    assert code == 1
    assert "has a heartbeat and does not answer" in proxy
    assert version == (
        f"engine of main at {engine.url} serves version default, live is 1; "
        "restart `tracegrad engine`, which loads the live one"
    )


def test_a_publish_that_hangs_names_who_holds_it_and_one_that_failed_says_why(
    store: Store, engine: fake_engine.FakeEngine, ask: Any
) -> None:
    engine.version = str(live_version(store, 0).version_id)
    store.register_proxy("slow", engine.url)
    long_ago = open_store(store.url, clock=Clock())
    publish_id = long_ago.request_publish(1).publish_id
    long_ago.advance_publish(publish_id, "draining")
    long_ago.close()
    store.beat_publishes([publish_id])
    _, found, text = ask()
    (problem,) = found["problems"]
    assert problem.startswith(f"publish {publish_id} of main (version 1) is draining since ")
    assert "not acknowledged by slow" in problem and "start `tracegrad train`" in problem
    assert f"publish {publish_id} of version 1 is draining since" in text
    store.advance_publish(publish_id, "failed", error="the probe saw stale weights")
    (problem,) = ask()[1]["problems"]
    assert "failed: the probe saw stale weights; version 1 stays live" in problem
    rejected = store.request_publish(1, gate={"timeout_s": 60.0, "share": 0.0, "engines": []}).publish_id
    store.advance_publish(rejected, "rejected", decision={"passed": False, "judged": True, "why": "it lost 0.2"})
    _, found, text = ask()
    assert found["problems"] == [], "the gate does what it is for"
    gate = {"app": "a:g", "tasks": "t", "reward": "r:f", "rule": {"minimum": 0.5}}
    (lonely,) = ask(trainer={"publish": {"gate": gate}})[1]["problems"]
    assert "no evaluator has a heartbeat" in lonely and "start `tracegrad gate`" in lonely
    assert "version 1 was rejected: it lost 0.2" in " ".join(text.split())
    store.skip_publish(1, "the model is pinned")
    assert "version 1 was skipped: the model is pinned" in " ".join(ask()[2].split())


@pytest.mark.parametrize(
    ("state", "advice"), [("draining", "so a proxy ends it and goes on"), ("swapping", "start `tracegrad train`")]
)
def test_a_publisher_that_is_silent_is_said_at_once(
    store: Store, engine: fake_engine.FakeEngine, ask: Any, state: str, advice: str
) -> None:
    """Not only when a drain or a swap takes longer than it may."""
    engine.version = str(live_version(store, 0).version_id)
    store.register_proxy("p", engine.url)
    publish_id = store.request_publish(1).publish_id
    for step in ("draining", "swapping")[: 1 + (state == "swapping")]:
        store.advance_publish(publish_id, step)  # type: ignore[arg-type]
    assert ask()[1]["problems"] == []
    sql(store, "update publishes set beat_at = :at", at=time.time() - 31)
    _, found, text = ask()
    (problem,) = found["problems"]
    assert problem.startswith(
        f"publish {publish_id} of main (version 1) is {state} and its publisher is silent since 3"
    )
    assert advice in problem and "its publisher silent since 3" in " ".join(text.split())
    sql(store, "update publishes set beat_at = null")
    assert ask()[1]["problems"] == [], "an older trainer's says nothing"


def test_a_trainer_that_is_gone_while_runs_wait(store: Store, engine: fake_engine.FakeEngine, ask: Any) -> None:
    live = live_version(store, 0)
    engine.version = str(live.version_id)
    store.register_proxy("proxy_1", engine.url)
    trainer = {"job": JOB, "batch": {"groups": 1}, "algorithm": {"credit": {"advantage": "grpo"}}}
    ready_group(store, "g1")
    train(store)
    ready_group(store, "g2")
    _, found, text = ask(trainer=trainer)
    assert found["problems"] == [], "it has just made a step"
    assert re.search(r"step 1 of 100, \d+ s ago; 1 groups ready", text)
    sql(store, "UPDATE checkpoints SET created_at = created_at - 600")
    (problem,) = ask(trainer=trainer)[1]["problems"]
    assert problem.startswith(
        "trainer: 1 groups are ready for job 'job', and nobody has taken them since step 1; start"
    )
    assert ask(trainer={**trainer, "steps": 1})[1]["problems"] == [], "it has done its steps"
