"""`tracegrad gate`: evaluate what is to be published, so that only what passes `trainer.publish.gate` serves.

A service beside proxy and trainer; `tracegrad up` starts it where a gate is configured. Refuses a configuration without
one. Exit code 0: told to stop; 1: it could not be done (the message says why).
"""

import hashlib
import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

import click

from tracegrad.adapters.app_session import leave, open_session, run_loop
from tracegrad.adapters.gate import GateEvaluator
from tracegrad.adapters.launch import proxy_root
from tracegrad.adapters.tasks import load_tasks
from tracegrad.tracestore.config import load_config
from tracegrad.tracestore.errors import ConfigError
from tracegrad.tracestore.evaluations import Evaluator
from tracegrad.tracestore.gating import StoredEvaluation, evaluator_of
from tracegrad.tracestore.ids import new_id
from tracegrad.tracestore.store import open_store


@click.command()
@click.option(
    "--config",
    "path",
    type=click.Path(dir_okay=False, path_type=Path),
    default="tracegrad.yaml",
    show_default=True,
    help="The YAML file with trainer.publish.gate.",
)
@click.option("--proxy", help="The proxy's URL. Default: TRACEGRAD_PROXY, else what --config says.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per evaluation on standard output.")
def gate(path: Path, proxy: str | None, as_json: bool) -> None:
    """Evaluate what is to be published, over held-out tasks, until Ctrl-C.

    \b
    trainer:
      publish:
        gate:
          app: app.py:graph
          tasks: heldout.jsonl
          reward: reward.py:score
          rule: {max_drop: 0.05}

    The trainer decides by what is found here; `tracegrad versions` shows both.
    """
    config = load_config(path)
    settings = config.trainer.publish.gate
    if settings is None:
        raise ConfigError(f"{path} has no trainer.publish.gate: there is nothing to evaluate (--help shows one)")
    tasks = load_tasks(settings.tasks, project=config.project)
    tasks_hash = hashlib.sha256(Path(settings.tasks).read_bytes()).hexdigest()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until the loop has its own
    store = open_store(config.store)
    models = config.trained_models()
    me = Evaluator(
        evaluator_id=new_id("evaluator"), model=evaluator_of(models), tasks_hash=tasks_hash, score=settings.score
    )
    try:
        root = proxy_root(proxy, str(path), os.environ)
        session = open_session(root, app=settings.app, reward=settings.reward, purpose="eval", source="gate")
        _say(f"evaluating versions of {', '.join(models)} over {len(tasks)} tasks of {settings.tasks}")
        evaluator = GateEvaluator(
            store,
            me,
            settings,
            tasks,
            session,
            models=models,
            expires_s=config.proxy.heartbeat_expires_s,
            tell=_print_json if as_json else _print_line,
            warn=_say,
        )
        run_loop(evaluator.run, concurrency=settings.concurrency)
    except KeyboardInterrupt:
        _say("stopping")
    finally:
        store.remove_evaluator(me.evaluator_id)
        store.close()
    leave(0)


def _print_json(found: StoredEvaluation) -> None:
    click.echo(json.dumps(asdict(found)))


def _print_line(found: StoredEvaluation) -> None:
    whose = "the live version" if found.publish_id is None else f"publish {found.publish_id}"
    seconds = found.created_at - found.started_at
    if found.error is not None:
        said = f"could not be evaluated: {found.error}"
    elif found.mean is None:
        said = f"none of its {found.n_runs} runs has the score {found.score!r}"
    else:
        said = f"mean {found.score} {found.mean:.4f} [{found.low:.4f}, {found.high:.4f}] over {len(found.values)} tasks"
        said += f", {found.n_failed} of {found.n_runs} runs failed"
    ids = ", ".join(str(version_id) for _, version_id in sorted(found.versions.items()))
    click.echo(f"version{'s' * (len(found.versions) > 1)} {ids} ({whose}): {said} ({seconds:.1f} s)")


def _say(text: str) -> None:
    click.echo(text, err=True)
