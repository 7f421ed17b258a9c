"""What stands where: store, engines, proxies, publish, runs, trainer, and in plain lines what is wrong with them.

Reads the store and asks engines and proxies for their health; changes nothing, needs no proxy. What cannot be learnt is
None, never a guess. Each problem says what to do. Made by `status`.
"""

import http.client
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.gating import evaluator_of, rejections_in_a_row
from tracegrad.tracestore.overview import DriftCount, OpenRuns, ProxyRow
from tracegrad.tracestore.publishes import SILENT_LIVES, UNFINISHED, UNSWAPPED, silence_s
from tracegrad.tracestore.records import Backlog, Publish
from tracegrad.tracestore.rules import lease_rule
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.time_shares import CYCLES, paused_share, wait_share
from tracegrad.tracestore.trainers import TrainerAtWork

LONGEST_REQUESTED_S = 30.0
"""A publish that was asked for begins to drain at once; one that waits longer has lost its publisher."""
IDLE_TRAINER_S = 60.0
_HOW_TO_START = "`tracegrad up` starts it again and says so; where it does not run, start it, or `tracegrad engine`"


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineState:
    """One engine. `version` is what it says it serves: a policy version's id, or vLLM's word "default".

    `adapters`: those of the configuration that it serves beside, name -> folder; None where there are none to ask for.
    """

    model: str
    url: str
    health: str
    version: str | None
    adapters: Mapping[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelState:
    """One model: what is live, and the publish that has not ended, with the seconds since it entered its state."""

    model: str
    live_version: int | None
    live_step: int | None
    live_folder: str | None
    pinned: int | None
    publish: Publish | None
    publish_age_s: float | None
    silent_s: float | None
    """For how long its publisher has said nothing, where that is long enough to take it for dead."""
    rejected_in_a_row: int
    paused_share: float | None
    """Share of time in which its engines were drained or paused for publishes; None before a second one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerState:
    """One training job: its last committed step and how long ago that was; what waits for it; what its trainer does.

    `now` is None where no trainer has a heartbeat.
    """

    job: str
    models: tuple[str, ...]
    step: int | None
    steps: int
    step_age_s: float | None
    wait_share: float | None
    """Share of time in which it waited for runs that it may lease; None before its second step."""
    backlog: Backlog
    now: TrainerAtWork | None


@dataclass(kw_only=True, slots=True)
class Report:
    """Everything, and the problems found on the way."""

    store: str
    revision: str | None = None
    engines: list[EngineState] = field(default_factory=list)
    proxies: list[ProxyRow] = field(default_factory=list)
    dead_proxies: int = 0
    models: list[ModelState] = field(default_factory=list)
    open_runs: OpenRuns | None = None
    drift: list[DriftCount] = field(default_factory=list)
    trainer: TrainerState | None = None
    proxy_health: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)


def examine(config: Config, *, timeout_s: float = 3.0) -> Report:
    """Look at everything that `config` names."""
    report = Report(store=_without_password(config.store))
    _ask_engines(report, config, timeout_s)
    try:
        store = open_store(config.store, create=False)
    except TraceStoreError as error:
        report.problems.append(f"store: {error}")
        return report
    try:
        _read_store(report, config, store)
    except TraceStoreError as error:
        report.problems.append(f"store: {error}")
    finally:
        store.close()
    _ask_proxy(report, config, timeout_s)
    _compare_versions(report)
    _compare_adapters(report, config)
    _look_at_trainer(report, config)
    return report


def _read_store(report: Report, config: Config, store: Store) -> None:
    report.revision = store.schema_revision()
    rows, expires_s = store.list_proxies(), config.proxy.heartbeat_expires_s
    report.proxies = [row for row in rows if row.age_s < expires_s]
    report.dead_proxies = len(rows) - len(report.proxies)
    report.open_runs = store.open_runs(config.project)
    report.drift = store.drift_counts(config.project)
    for model in [name for name, each in config.models.items() if each.api is None]:
        state = _model(store, model, expires_s)
        report.models.append(state)
        if (problem := _publish_problem(state, store, config)) is not None:
            report.problems.append(problem)
    if config.trained_models():
        report.trainer = _trainer(store, config)
    judges = evaluator_of(config.trained_models())
    if config.trainer.publish.gate is not None and not store.living_evaluators(judges, expires_s):
        report.problems.append(
            "no evaluator has a heartbeat: new versions are rejected unjudged; start `tracegrad gate`"
        )


def _model(store: Store, model: str, expires_s: float) -> ModelState:
    live, last = store.live_version(model), store.last_publish(model)
    silence = 0.0 if last is None or last.state not in UNFINISHED else silence_s(last.beat_at, time.time())
    return ModelState(
        model=model,
        live_version=None if live is None else live.version_id,
        live_step=None if live is None else live.step,
        live_folder=None if live is None else live.checkpoint_path,
        pinned=store.pinned(model),
        publish=last,
        publish_age_s=None if last is None else max(time.time() - last.entered[last.state], 0.0),
        silent_s=silence if silence > SILENT_LIVES * expires_s else None,
        rejected_in_a_row=rejections_in_a_row(store.list_publishes(model)),
        paused_share=paused_share(store.last_publishes(model, CYCLES)),
    )


def _trainer(store: Store, config: Config) -> TrainerState:
    trainer = config.trainer
    last = store.last_checkpoint(trainer.job)
    return TrainerState(
        job=trainer.job,
        models=config.trained_models(),
        step=None if last is None else last.step,
        steps=trainer.steps,
        step_age_s=None if last is None else max(time.time() - last.created_at, 0.0),
        wait_share=wait_share(store.last_steps(trainer.job, CYCLES)),
        backlog=store.backlog(trainer.job, lease_rule(config)),
        now=store.trainer_at_work(trainer.job, config.proxy.heartbeat_expires_s),
    )


def _publish_problem(state: ModelState, store: Store, config: Config) -> str | None:
    """Say what holds a publish longer than it may take, or that the last one failed."""
    publish, age_s = state.publish, state.publish_age_s
    if publish is None or age_s is None:
        return None
    what = f"publish {publish.publish_id} of {state.model} (version {publish.version_id})"
    if publish.state == "failed":
        kept = "nothing is live" if state.live_version is None else f"version {state.live_version} stays live"
        return f"{what} failed: {publish.error or 'it was given up'}; {kept}; start `tracegrad train` to publish again"
    if state.silent_s is not None:
        silent = f"{what} is {publish.state} and its publisher is silent since {state.silent_s:.0f} s"
        if publish.state in UNSWAPPED:
            return f"{silent}: nothing was swapped, so a proxy ends it and goes on; where none is up, start one"
        return f"{silent}: calls are held; start `tracegrad train` (it ends what was left unfinished)"
    limits = config.trainer.publish
    judged_s = LONGEST_REQUESTED_S + (publish.gate["timeout_s"] if publish.gate is not None else 0.0)
    longest = {
        "requested": judged_s,
        "draining": limits.drain_timeout_s,
        "swapping": limits.swap_timeout_s,
        "evaluating": judged_s,
        "settling": limits.drain_timeout_s + limits.swap_timeout_s,
    }.get(publish.state)
    if longest is None or age_s <= longest:
        return None
    waiting = store.waiting_proxies(publish.publish_id, config.proxy.heartbeat_expires_s)
    drains = publish.state in ("draining", "settling")
    blame = f"; not acknowledged by {', '.join(waiting)}" if drains and waiting else ""
    return (
        f"{what} is {publish.state} since {age_s:.0f} s{blame}: calls are held; "
        "start `tracegrad train` (it ends what was left unfinished)"
    )


def _ask_engines(report: Report, config: Config, timeout_s: float) -> None:
    """Ask every engine of ours. What an outside API does is not ours to watch, and asking may cost."""
    engines = [(name, each.engine) for name, model in config.models.items() for each in model.each_engine()]
    for name, engine in engines:
        health, version = engine_state(engine.url, timeout_s)
        beside = _adapters_of(engine.url, timeout_s) if health == "ok" and config.adapters_on(name) else None
        report.engines.append(EngineState(model=name, url=engine.url, health=health, version=version, adapters=beside))
        if health != "ok":
            whose = "start it (it is external)" if engine.external else _HOW_TO_START
            report.problems.append(f"engine of {name} at {engine.url}: {health}; {whose}")


def engine_state(url: str, timeout_s: float) -> tuple[str, str | None]:
    """Return ("ok" or what is wrong, the version the engine says it serves or None)."""
    try:
        status, _ = fetch(url, "/health", timeout_s)
    except (OSError, http.client.HTTPException) as error:
        return f"does not answer ({error or type(error).__name__})", None
    if status != 200:
        return f"answers HTTP {status}", None
    try:
        status, answer = fetch(url, "/weight_info", timeout_s)
    except (OSError, http.client.HTTPException):
        return "ok", None
    known = answer.get("weight_version") if status == 200 and isinstance(answer, dict) else None
    return "ok", None if known is None else str(known)


def _adapters_of(url: str, timeout_s: float) -> dict[str, str] | None:
    """What an engine lists beside its base; None where it does not tell."""
    try:
        status, answer = fetch(url, "/v1/models", timeout_s)
    except (OSError, http.client.HTTPException):
        return None
    cards = answer.get("data") or () if status == 200 and isinstance(answer, dict) else ()
    return {card["id"]: card.get("root") or "" for card in cards if card.get("parent")}


def _compare_adapters(report: Report, config: Config) -> None:
    """As `_compare_versions`: an adapter is its folder."""
    for state in report.models:
        publishing = state.publish is not None and state.publish.state in UNFINISHED
        if config.held_by(state.model) == state.model or state.live_folder is None or publishing:
            continue
        for engine in report.engines:
            served = engine.adapters
            if engine.model != config.held_by(state.model) or served is None:
                continue
            if served.get(state.model) != state.live_folder:
                report.problems.append(
                    f"engine of {engine.model} at {engine.url} serves the adapter {state.model} from "
                    f"{served.get(state.model, 'nowhere')}, live is version {state.live_version} "
                    f"({state.live_folder}); restart `tracegrad engine`, which loads the live one"
                )


def _compare_versions(report: Report) -> None:
    """An engine that says another version than the live one samples what nobody can train on."""
    live = {state.model: state for state in report.models}
    for engine in report.engines:
        state = live.get(engine.model)
        if state is None or state.live_version is None or engine.version is None:
            continue
        publishing = state.publish is not None and state.publish.state in UNFINISHED
        if engine.version != str(state.live_version) and not publishing:
            report.problems.append(
                f"engine of {engine.model} at {engine.url} serves version {engine.version}, live is "
                f"{state.live_version}; restart `tracegrad engine`, which loads the live one"
            )


def _ask_proxy(report: Report, config: Config, timeout_s: float) -> None:
    """Ask a living proxy for its own view; the configured address where none is registered."""
    if not report.proxies:
        report.problems.append("no proxy has a heartbeat; start `tracegrad proxy`, or `tracegrad up` for everything")
        return
    url = report.proxies[0].url or f"http://{config.proxy.host}:{config.proxy.port}"
    try:
        _, answer = fetch(url, "/health", timeout_s)
    except (OSError, http.client.HTTPException) as error:
        report.problems.append(
            f"proxy {report.proxies[0].proxy_id} at {url} has a heartbeat and does not answer "
            f"({error or type(error).__name__}); is it on another machine?"
        )
        return
    if not isinstance(answer, dict):
        return
    report.proxy_health = answer
    well = {engine.url.rstrip("/") for engine in report.engines if engine.health == "ok"}
    for name, model in (answer.get("models") or {}).items():
        for engine in model.get("engines") or ():
            if engine["url"].rstrip("/") in well and engine["state"] == "down":
                report.problems.append(
                    f"proxy {report.proxies[0].proxy_id} cannot use the engine of {name} at {engine['url']}, which "
                    f"answers from here: {engine['detail']}; check the network between them"
                )
        if (lacking := model.get("token_in")) is not None:
            report.problems.append(f"token-in is configured and off for {name}: {lacking}")


def _look_at_trainer(report: Report, config: Config) -> None:
    """A trainer at work takes what is ready, or says what else it does. One that never ran may be meant not to."""
    trainer = report.trainer
    if trainer is None or trainer.now is not None or trainer.step is None or trainer.step >= trainer.steps:
        return
    if (row := _rejected_in_a_row(report, config)) is not None:
        report.problems.append(
            f"trainer: the gate rejected {row} versions in a row, which ends training at step {trainer.step} "
            "(trainer.publish.gate.rejected.stop_after); `tracegrad versions` says why, `tracegrad train` tries again"
        )
        return
    waits = trainer.backlog.ready_groups >= config.trainer.batch.groups and not trainer.backlog.leased_groups
    if waits and not trainer.backlog.publishing and (trainer.step_age_s or 0.0) > IDLE_TRAINER_S:
        report.problems.append(
            f"trainer: {trainer.backlog.ready_groups} groups are ready for job {trainer.job!r}, and nobody has taken "
            f"them since step {trainer.step}; start `tracegrad train`, or read its log"
        )


def _rejected_in_a_row(report: Report, config: Config) -> int | None:
    """How many candidates of a model the gate has rejected since one went live, where so many end the training."""
    gate = config.trainer.publish.gate
    most = None if gate is None else gate.rejected.stop_after
    row = max((state.rejected_in_a_row for state in report.models), default=0)
    return row if most is not None and row >= most else None


def fetch(url: str, path: str, timeout_s: float) -> tuple[int, Any]:
    """GET and return (status, decoded JSON or None). Raises OSError or HTTPException where nobody answers."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", parts.path.rstrip("/") + path)
        response = connection.getresponse()
        raw = response.read()
    finally:
        connection.close()
    try:
        return response.status, json.loads(raw)
    except ValueError:
        return response.status, None


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return url if parts.password is None else url.replace(f":{parts.password}@", ":***@")


def as_json(report: Report) -> Mapping[str, Any]:
    """Return the report as JSON values; `ok` says whether there are no problems."""
    return {"ok": not report.problems, **asdict(report)}
