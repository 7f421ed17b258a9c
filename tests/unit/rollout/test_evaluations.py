"""`tracegrad eval`: purpose, means, failures apart, paired comparison; an engine of its own for a checkpoint."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from tracegrad.adapters.cli import main
from tracegrad.adapters.eval_files import excerpt, read_rows, write
from tracegrad.adapters.evaluation import EvalRow, report, task_scores
from tracegrad.adapters.rollout_errors import EvalFileError, ServingError
from tracegrad.adapters.serving import serving, serving_config
from tracegrad.adapters.supervisor import ChildSpec
from tracegrad.tracestore.config import Config, dump_config, parse_config
from tracegrad.tracestore.store import open_store

CHILD = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def row(task: str, scores: dict[str, float], *, repeat: int = 0, status: Any = "closed", **more: Any) -> EvalRow:
    return EvalRow(task_id=task, repeat=repeat, run_id=f"{task}.{repeat}", status=status, scores=scores, **more)


def test_an_app_is_scored_as_its_users_get_it(stack: Any, graph_app: str, tasks_file: Path, tmp_path: Path) -> None:
    with tasks_file.open("a") as file:
        file.write('{"id": "bad", "input": {"question": "explode"}}\n')
    app = ["--app", f"{graph_app}:graph", "--reward", f"{graph_app}:reward", "--tasks", str(tasks_file)]
    out = tmp_path / "out" / "eval.json"
    common = ["eval", *app, "--proxy", stack.root, "--json", "--repeat", "2", "--out", str(out)]
    done = CliRunner().invoke(main, [*common, "--name", "base"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["n_tasks"], found["n_runs"], found["n_failed"], found["n_unscored"]) == (7, 14, 2, 0)
    assert found["scores"]["right"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 6}
    assert found["errors"] == {"ValueError: the oven is too hot": 2}
    assert "eval: runs 14/14" in done.stderr
    rows = read_rows(out)
    assert [(r.task_id, r.repeat) for r in rows[:3]] == [("q0", 0), ("q0", 1), ("q1", 0)]
    assert json.loads(rows[0].output)["answer"] == "0: answer what is 0"
    trace = stack.store.trace(rows[0].run_id)
    assert (trace.run.purpose, trace.run.task_id, trace.run.group_id) == ("eval", "q0", None)
    assert all(call.effective == call.requested for call in trace.calls)
    assert {body["temperature"] for body in stack.engine.requests} == {0}


def test_an_evaluation_is_compared_with_an_earlier_one(
    stack: Any, light_app: str, tasks_file: Path, tmp_path: Path
) -> None:
    earlier = tmp_path / "earlier.json"
    rows = [row(f"q{number}", {"reward": 0.75}) for number in range(5)]
    write(earlier, report("earlier", rows), rows)
    app = ["--app", f"{light_app}:graph", "--reward", f"{light_app}:reward", "--tasks", str(tasks_file)]
    arguments = ["eval", *app, "--config", str(stack.config_path), "--compare", str(earlier), "--quiet"]
    compared = json.loads(CliRunner().invoke(main, [*arguments, "--json"], catch_exceptions=False).stdout)["comparison"]
    interval = {"mean": 0.25, "low": 0.25, "high": 0.25, "n": 5}
    assert compared == {"reward": {"difference": interval, "unpaired": 1}}
    table = CliRunner(env={"COLUMNS": "100"}).invoke(main, arguments, catch_exceptions=False)
    assert "+0.2500" in table.stdout
    assert "5 (1 unpaired)" in table.stdout
    assert "6 runs, 0 failed" in table.stdout


def test_failed_runs_are_in_no_mean_and_repeats_are_averaged_first() -> None:
    rows = [
        row("a", {"f1": 1.0}),
        row("a", {"f1": 0.0}, repeat=1),
        row("b", {"f1": 1.0}),
        row("b", {}, repeat=1, status="failed", error="boom"),
        row("c", {}, status="failed", error="boom"),
        row("d", {}),
    ]
    assert task_scores(rows) == {"f1": {"a": 0.5, "b": 1.0}}
    found = report("x", rows)
    assert (found.scores["f1"].mean, found.scores["f1"].n) == (0.75, 2)
    assert (found.n_tasks, found.n_runs, found.n_failed, found.n_unscored) == (4, 6, 2, 1)
    assert found.errors == {"boom": 2}


def test_only_tasks_that_both_sides_scored_are_compared() -> None:
    # a: 1 - 0.5, b: 0 - 0.25; c is on one side only. Mean of (0.5, -0.25) = 0.125.
    ours = [row("a", {"f1": 1.0}), row("b", {"f1": 0.0}), row("c", {"f1": 1.0})]
    theirs = [row("a", {"f1": 0.5}), row("b", {"f1": 0.25}), row("c", {}, status="failed")]
    comparison = (report("x", ours, other=theirs).comparison or {})["f1"]
    assert (comparison.difference.mean, comparison.difference.n, comparison.unpaired) == (0.125, 2, 1)
    assert (comparison.difference.low, comparison.difference.high) == (-0.25, 0.5)


def test_outputs_are_shortened_and_other_files_refused(tmp_path: Path) -> None:
    text = excerpt({"x": "y" * 9000})
    assert text is not None
    assert len(text) == 4000
    assert "object object" in (excerpt({"x": object()}) or "")
    (tmp_path / "other.json").write_text('{"rows": [{"a": 1}]}')
    with pytest.raises(EvalFileError, match="eval --out"):
        read_rows(tmp_path / "other.json")


def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_checkpoint_is_served_in_place_of_the_trained_model(tmp_path: Path) -> None:
    raw = {
        "store": "sqlite:////data/real.db",
        "models": {
            "a": {"checkpoint": "/a", "engine": {"dtype": "float32"}},
            "b": {"checkpoint": "/b", "engine": {"url": "http://127.0.0.1:9", "external": True}},
        },
        "roles": {"x": "a", "y": "b"},
        "trainer": {"model": "a"},
    }
    folder = checkpoint(tmp_path)
    own = serving_config(folder, parse_config(raw), tmp_path)
    assert (own.models["a"].checkpoint, own.models["b"].checkpoint) == (str(folder), "/b")
    assert own.models["a"].engine.dtype == "float32"
    assert own.store == f"sqlite:///{tmp_path}/eval.db", "an evaluation must not write into the real store"
    urls = {model.engine.url for model in own.models.values()} | {f"http://127.0.0.1:{own.proxy.port}"}
    assert len(urls) == 3
    assert not any(model.engine.external for model in own.models.values())
    with pytest.raises(ServingError, match=r"no config\.json"):
        serving_config(tmp_path, None, tmp_path)


def test_the_folder_of_a_step_serves_all_its_models(tmp_path: Path) -> None:
    """Each full model from its subfolder; adapters are live in the store that the engine reads when it starts."""
    step = tmp_path / "step-000003-abcdef01"
    for model, file in (("a", "config.json"), ("p", "adapter_config.json")):
        (step / model).mkdir(parents=True)
        (step / model / file).write_text("{}")
    models = {
        "a": {"checkpoint": "/a"},
        "base": {"checkpoint": "/b", "trained": False, "engine": {"url": "http://127.0.0.1:9"}},
        "p": {"adapter": {"of": "base"}},
    }
    config = parse_config({"models": models, "roles": {"x": "a", "y": "p"}})
    own = serving_config(step, config, tmp_path)
    assert {name: model.checkpoint for name, model in own.models.items()} == {
        "a": str(step / "a"),
        "base": "/b",
        "p": "",
    }
    live: list[str] = []

    def specs(config: Config, path: Path, *, train: bool) -> tuple[ChildSpec, ...]:
        with contextlib.closing(open_store(config.store)) as store:
            live.extend(version.checkpoint_path for name in ("a", "p") if (version := store.live_version(name)))
        script = "exit 1"
        return (ChildSpec(name="engine", command=("/bin/sh", "-c", script), ready_urls=("http://127.0.0.1:9/",)),)

    with pytest.raises(ServingError), serving(step, config, specs=specs):
        pytest.fail("it was never ready")
    assert live == [str(step / "p")]
    with pytest.raises(ServingError, match="holds one model, and the configuration trains a, p"):
        serving_config(step / "a", config, tmp_path)


def test_a_gate_is_no_business_of_an_evaluation_of_its_own(tmp_path: Path) -> None:
    """Its share may need replicas, of which there are none here."""
    gate = {"app": "a:g", "tasks": "t", "reward": "r:f", "rule": {"minimum": 0.5}, "share": 0.5}
    models = {"main": {"checkpoint": "/a", "replicas": ["http://127.0.0.1:9"]}}
    config = parse_config({"models": models, "trainer": {"publish": {"gate": gate}}})
    own = serving_config(checkpoint(tmp_path), config, tmp_path)
    assert parse_config(yaml.safe_load(dump_config(own))) == own


def test_what_was_started_for_an_evaluation_is_gone_afterwards(tmp_path: Path) -> None:
    made: list[Path] = []

    def specs(config: Config, path: Path, *, train: bool) -> tuple[ChildSpec, ...]:
        made.append(path)
        port = str(config.proxy.port)
        health = f"http://127.0.0.1:{port}/health"
        return (ChildSpec(name="proxy", command=(sys.executable, "-c", CHILD, port), ready_urls=(health,)),)

    said: list[str] = []
    with serving(checkpoint(tmp_path), None, say=said.append, specs=specs) as root:
        assert root.startswith("http://127.0.0.1:")
        assert made[0].exists()
    assert said == ["proxy: started", "proxy: ready", "proxy: stopped"]
    assert not made[0].parent.exists()


def test_an_engine_that_does_not_come_up_says_why(tmp_path: Path) -> None:
    def specs(config: Config, path: Path, *, train: bool) -> tuple[ChildSpec, ...]:
        script = "echo no such weights; exit 1"
        return (ChildSpec(name="engine", command=("/bin/sh", "-c", script), ready_urls=("http://127.0.0.1:9/",)),)

    says = r"(?s)engine exited with code 1.*no such weights"
    with pytest.raises(ServingError, match=says), serving(checkpoint(tmp_path), None, specs=specs):
        pytest.fail("it was never ready")
