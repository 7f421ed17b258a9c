"""What the proxy counts, for Prometheus: one registry per proxy, nothing global.

Labels are bounded: models and roles of the configuration (others are `other`, no role is `none`), the endpoints, the
statuses, the reasons of a quarantine up to `MOST_REASONS`; never the id of a run or a call. Gauges are read when they
are asked for, from the gates and the committer. A value that is not known is absent, not 0. Called by `watch` for each
call, by `app` for each answer, and by `metrics_page`, which renders.
"""

import os
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from tracegrad.adapters.proxy.engines import Pool
from tracegrad.adapters.proxy.hold import Gate
from tracegrad.tracestore.config import Config
from tracegrad.tracestore.group_commit import GroupCommitter
from tracegrad.tracestore.records import Call

MOST_REASONS = 40
_CALL_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_HOLD_S = (0.001, 0.005, 0.025, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 120.0, 300.0)
_COMMIT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)


class ProxyMetrics:
    """The counters of one proxy. `worker` tells the processes of one `tracegrad proxy` apart."""

    def __init__(self, config: Config, *, proxy_id: str, worker: str = "0") -> None:
        self.worker = worker
        self.proxy_id = proxy_id
        self._models = frozenset(config.models)
        self._roles = frozenset(config.roles).union(rule.role for rule in config.role_rules)
        self._reasons: set[str] = set()
        self._registry = registry = CollectorRegistry()
        self._calls = Counter(
            "tracegrad_calls",
            "Calls that were dispatched and recorded, by how they ended; quarantine is empty for an exact one.",
            ("worker", "model", "role", "endpoint", "status", "quarantine"),
            registry=registry,
        )
        self._continued = Counter(
            "tracegrad_calls_continued",
            "Calls that go on from an earlier one of their run, by why their prompt, as the engine renders it, is not "
            "what was sampled (drift; empty: it is), and whether it was built from those ids (token_in).",
            ("worker", "model", "drift", "token_in"),
            registry=registry,
        )
        self._unrecorded = Counter(
            "tracegrad_calls_not_recorded",
            "Calls that could not be committed: their answers were withheld.",
            ("worker", "model"),
            registry=registry,
        )
        self._answers = Counter(
            "tracegrad_http_answers",
            "Answers of the proxy by path and HTTP status; 0 where the client left before one began.",
            ("worker", "path", "code"),
            registry=registry,
        )

        def times(name: str, says: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name, says, ("worker", *labels), buckets=buckets, registry=registry)

        self._first = times(
            "tracegrad_first_token_seconds",
            "From a streamed call's arrival to the engine's first bytes.",
            _CALL_S,
            "model",
            "role",
        )
        self._whole = times(
            "tracegrad_call_seconds", "From a call's arrival to the engine's last byte.", _CALL_S, "model", "role"
        )
        self._held = times(
            "tracegrad_hold_seconds",
            "From a call's arrival to its dispatch: what a publish, or a queue, held it.",
            _HOLD_S,
            "model",
        )
        self._commit = times(
            "tracegrad_commit_seconds", "From the end of a call to its durable record.", _COMMIT_S
        ).labels(worker)

    def watch(self, gates: Mapping[str, Gate], pools: Mapping[str, Pool], committer: GroupCommitter) -> None:
        """Read these from now on, whenever the numbers are asked for."""
        self._registry.register(_Gauges(self, gates, pools, committer))

    def recorded(self, call: Call, commit_s: float) -> None:
        """Count a call that is durable. From any thread."""
        worker, model, role = self.worker, self._model(call.model), self._role(call.attribution.role)
        reason = self._reason(call.quarantine)
        self._calls.labels(worker, model, role, call.endpoint, call.status, reason).inc()
        if call.continues is not None:
            used = str(call.continues.token_in).lower()
            self._continued.labels(worker, model, call.continues.drift or "", used).inc()
        timing = call.timing
        if timing.first_token_at is not None:
            self._first.labels(worker, model, role).observe(timing.first_token_at - timing.received_at)
        self._whole.labels(worker, model, role).observe(timing.completed_at - timing.received_at)
        self._held.labels(worker, model).observe(timing.dispatched_at - timing.received_at)
        self._commit.observe(commit_s)

    def not_recorded(self, model: str) -> None:
        """Count a call whose answer is withheld."""
        self._unrecorded.labels(self.worker, self._model(model)).inc()

    def answered(self, path: str, status: int) -> None:
        """Count an answer. `path` is one of a fixed list."""
        self._answers.labels(self.worker, path, str(status)).inc()

    def render(self) -> str:
        """Return the numbers in Prometheus's text format."""
        return generate_latest(self._registry).decode()

    def _model(self, model: str) -> str:
        return model if model in self._models else "other"

    def _role(self, role: str | None) -> str:
        if role is None:
            return "none"
        return role if role in self._roles else "other"

    def _reason(self, reason: str | None) -> str:
        if reason is None or reason in self._reasons:
            return reason or ""
        if len(self._reasons) >= MOST_REASONS:
            return "other"
        self._reasons.add(reason)
        return reason


class _Gauges(Collector):
    """What is read at the moment of asking."""

    def __init__(
        self,
        metrics: ProxyMetrics,
        gates: Mapping[str, Gate],
        pools: Mapping[str, Pool],
        committer: GroupCommitter,
    ) -> None:
        self._metrics = metrics
        self._gates = gates
        self._pools = pools
        self._committer = committer

    def describe(self) -> Iterable[Metric]:
        """Nothing: the names are known when they are collected."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Yield one family after the other."""
        worker = self._metrics.worker
        info = GaugeMetricFamily("tracegrad_proxy_info", "1 for each process.", labels=("worker", "proxy_id", "pid"))
        info.add_metric((worker, self._metrics.proxy_id, str(os.getpid())), 1)
        per_model = ("worker", "model")
        flying = GaugeMetricFamily("tracegrad_calls_in_flight", "Calls with the engine.", labels=per_model)
        holding = GaugeMetricFamily("tracegrad_model_holding", "1 while a publish holds new calls.", labels=per_model)
        live = GaugeMetricFamily("tracegrad_live_version", "The policy version that is live.", labels=per_model)
        waiting = GaugeMetricFamily("tracegrad_calls_waiting", "Calls that wait to be dispatched.", labels=per_model)
        for model, gate in self._gates.items():
            waiting.add_metric((worker, model), len(gate.line))
            flying.add_metric((worker, model), gate.in_flight)
            holding.add_metric((worker, model), float(gate.holding))
            if gate.live_version is not None:
                live.add_metric((worker, model), gate.live_version)
        up = GaugeMetricFamily("tracegrad_engine_up", "1 where calls go to it.", labels=(*per_model, "engine"))
        for model, pool in self._pools.items():
            for engine in pool.engines:
                up.add_metric((worker, model, str(engine.url)), float(engine.state == "up"))
        backlog = GaugeMetricFamily(
            "tracegrad_commit_backlog", "Calls that were submitted and are not durable yet.", labels=("worker",)
        )
        backlog.add_metric((worker,), self._committer.backlog)
        commits = CounterMetricFamily("tracegrad_store_commits", "Transactions of recorded calls.", labels=("worker",))
        commits.add_metric((worker,), self._committer.commits)
        return (info, flying, holding, waiting, live, up, backlog, commits)
