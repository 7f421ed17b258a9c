"""The tables, as SQLAlchemy Core metadata. What the laws say, constraints say again.

* token and logprob blobs are as long as their counts (law 4), and so are the parts of prompts;
* a run of a group has the group's purpose and task;
* an `eval` run cannot be held, nor entered in the ledger: `purpose` travels in the key and a CHECK refuses it;
* a ledger row names the hash of a checkpoint of its own job and step (law 7), which makes one version of a model;
* trained + excluded tokens of a consumption row equal the sampled tokens of its choice (law 5);
* at most one unfinished publish per model; ids of versions, publishes and leases are never reused.

Call metadata and payload (prompts, tokens, logprobs, messages) lie in tables apart, so that lists and counts do not
read payload pages: `payload_schema` has the latter. `migrations/` makes the same tables; a test compares the two.
Called by the modules of this package only.
"""

from typing import get_args

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Identity,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

from tracegrad.tracestore.codec import JsonText
from tracegrad.tracestore.records import PublishState

HEAD = "0020"
"""The migration that makes exactly these tables."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

CONTENT_DELETED = "content deleted"
"""The `error` of a run of which `removal` left a stub."""
SERIAL = BigInteger().with_variant(Integer, "sqlite")
_LARGEST = "1.7976931348623157e308"


def _key(name: str) -> Column[str]:
    return Column(name, String, primary_key=True)


def _word(name: str, *, null: bool = False) -> Column[str]:
    return Column(name, String, nullable=null)


def _number(name: str, *, null: bool = False) -> Column[int]:
    return Column(name, Integer, nullable=null)


def _time(name: str, *, null: bool = False) -> Column[float]:
    return Column(name, Double, nullable=null)


def _one_of(column: str, *words: str) -> CheckConstraint:
    return CheckConstraint(f"{column} IN ({', '.join(repr(word) for word in words)})", name=column)


def _never_eval() -> CheckConstraint:
    return CheckConstraint("purpose <> 'eval'", name="never_eval")


tasks = Table(
    "tasks",
    metadata,
    _key("task_id"),
    _word("project"),
    Column("input", JsonText, nullable=False),
    Column("reference", JsonText, nullable=False),
    _time("created_at"),
)

groups = Table(
    "groups",
    metadata,
    _key("group_id"),
    Column("task_id", String, ForeignKey("tasks.task_id"), nullable=False),
    _number("planned_size"),
    _word("purpose"),
    _time("created_at"),
    UniqueConstraint("group_id", "purpose"),
    UniqueConstraint("group_id", "task_id"),
    _one_of("purpose", "train", "eval", "live"),
    CheckConstraint("planned_size >= 1", name="planned_size"),
    Index(None, "task_id"),
)

runs = Table(
    "runs",
    metadata,
    _key("run_id"),
    _word("project"),
    _word("purpose"),
    Column("task_id", String, ForeignKey("tasks.task_id")),
    _word("group_id", null=True),
    _number("member", null=True),
    _word("status"),
    _word("ended_by", null=True),
    Column("error", Text),
    _time("opened_at"),
    _time("ended_at", null=True),
    _time("active_at"),
    UniqueConstraint("run_id", "purpose"),
    UniqueConstraint("group_id", "member"),
    ForeignKeyConstraint(["group_id", "purpose"], ["groups.group_id", "groups.purpose"]),
    ForeignKeyConstraint(["group_id", "task_id"], ["groups.group_id", "groups.task_id"]),
    _one_of("purpose", "train", "eval", "live"),
    _one_of("status", "open", "closed", "failed"),
    _one_of("ended_by", "hook", "explicit", "idle"),
    CheckConstraint("(group_id IS NULL) = (member IS NULL)", name="group_and_member"),
    CheckConstraint("group_id IS NULL OR task_id IS NOT NULL", name="group_has_task"),
    CheckConstraint("member >= 0", name="member"),
    CheckConstraint("(status = 'open') = (ended_at IS NULL)", name="ended_at"),
    Index(None, "project", "opened_at"),
    Index(None, "status", "active_at"),
    Index(None, "task_id"),
)

spans = Table(
    "spans",
    metadata,
    Column("run_id", String, ForeignKey("runs.run_id"), primary_key=True),
    _key("span_id"),
    _word("name"),
    _word("kind"),
    _word("parent_span_id", null=True),
    _word("namespace", null=True),
    _number("superstep", null=True),
    Column("triggers", JsonText, nullable=False),
    Column("wrote", JsonText),
    Column("input", JsonText),
    Column("output", JsonText),
    Column("error", Text),
    _time("started_at", null=True),
    _time("ended_at", null=True),
    _word("source", null=True),
    _one_of("kind", "node", "tool", "graph"),
    Index(None, "span_id"),
)

jobs = Table(
    "jobs",
    metadata,
    _key("job_id"),
    Column("config", JsonText, nullable=False),
    Column("rule", JsonText),
    _time("created_at"),
)

job_models = Table(
    "job_models",
    metadata,
    Column("job_id", String, ForeignKey("jobs.job_id"), primary_key=True),
    _key("model"),
)
"""The models that a job trains: always the same, for a checkpoint holds them all."""

policy_versions = Table(
    "policy_versions",
    metadata,
    Column("version_id", Integer, Identity(), primary_key=True),
    _word("model"),
    _word("kind"),
    _number("parent_id", null=True),
    _word("checkpoint_path"),
    _word("checkpoint_hash"),
    _number("step"),
    Column("updates", Integer, nullable=False, server_default="0"),
    _number("line", null=True),
    Column("job_id", String, ForeignKey("jobs.job_id")),
    Column("abandoned", Boolean(create_constraint=False), nullable=False),
    _time("created_at"),
    UniqueConstraint("version_id", "model"),
    ForeignKeyConstraint(["parent_id", "model"], ["policy_versions.version_id", "policy_versions.model"]),
    _one_of("kind", "initial", "step", "canary"),
    CheckConstraint("step >= 0", name="step"),
    sqlite_autoincrement=True,
)

calls = Table(
    "calls",
    metadata,
    Column("seq", SERIAL, Identity(), primary_key=True),
    Column("call_id", String, nullable=False, unique=True),
    _word("completion_id", null=True),
    Column("run_id", String, ForeignKey("runs.run_id")),
    _word("run_source", null=True),
    _word("role", null=True),
    _word("role_source", null=True),
    _word("span_id", null=True),
    _word("model"),
    _word("requested_model"),
    _number("version_dispatched", null=True),
    _number("version_completed", null=True),
    _word("status"),
    _time("received_at"),
    _time("dispatched_at"),
    _time("first_token_at", null=True),
    _time("completed_at"),
    Column("stream", Boolean(create_constraint=False), nullable=False),
    Column("quarantine", Text),
    Column("error", Text),
    Column("endpoint", String, nullable=False, server_default="chat"),
    Column("project", String, nullable=False, server_default="default"),
    _word("request_hash", null=True),
    _word("retry_of", null=True),
    Column("placed_by", BigInteger),
    Column("role_by", BigInteger),
    Column("span_by", BigInteger),
    _word("continues", null=True),
    _number("continues_choice", null=True),
    _word("drift", null=True),
    Column("token_in", Boolean(create_constraint=False)),
    ForeignKeyConstraint(["run_id", "span_id"], ["spans.run_id", "spans.span_id"]),
    ForeignKeyConstraint(["version_dispatched", "model"], ["policy_versions.version_id", "policy_versions.model"]),
    ForeignKeyConstraint(["version_completed", "model"], ["policy_versions.version_id", "policy_versions.model"]),
    _one_of("status", "complete", "aborted", "failed"),
    _one_of("run_source", "header", "path", "key", "hook", "langsmith", "inferred"),
    _one_of("role_source", "header", "path", "key", "hook", "langsmith", "rule", "inferred"),
    CheckConstraint("span_id IS NULL OR run_id IS NOT NULL", name="span_has_run"),
    Index(None, "run_id", "model"),
    Index(None, "version_dispatched", "run_id"),
    Index(None, "completion_id", postgresql_using="hash"),
    sqlite_autoincrement=True,
)
for _seldom in (calls.c.request_hash, calls.c.retry_of):
    Index(None, _seldom, sqlite_where=_seldom.is_not(None), postgresql_where=_seldom.is_not(None))
_goes_on = calls.c.continues.is_not(None)
Index(None, calls.c.project, calls.c.model, calls.c.drift, sqlite_where=_goes_on, postgresql_where=_goes_on)
"""Only of calls that go on from another: who does not count drift does not pay for it."""

attributions = Table(
    "attributions",
    metadata,
    Column("seq", SERIAL, Identity(), primary_key=True),
    _word("source"),
    _word("call_id", null=True),
    _word("completion_id", null=True),
    _word("run_id", null=True),
    _word("role", null=True),
    _word("span_id", null=True),
    _time("created_at"),
    Column("project", String, nullable=False, server_default="default"),
    UniqueConstraint("project", "source", "call_id"),
    UniqueConstraint("project", "source", "completion_id"),
    _one_of("source", "header", "path", "key", "hook", "langsmith", "rule", "inferred"),
    CheckConstraint("call_id IS NOT NULL OR completion_id IS NOT NULL", name="names_a_call"),
    Index(None, "run_id"),
    sqlite_autoincrement=True,
)
"""What was said of calls after they were stored. `calls` takes over what it does not know: `placed_by`, `role_by` and
`span_by` name the row that gave it its run, its role and its span (NULL: known when it was stored)."""

langsmith_runs = Table(
    "langsmith_runs",
    metadata,
    _key("project"),
    _key("langsmith_id"),
    _word("trace_id"),
    Column("run_id", String, ForeignKey("runs.run_id")),
    _word("span_id", null=True),
    Column("named", JsonText, nullable=False),
    Index(None, "project", "trace_id"),
)
_became_one = langsmith_runs.c.run_id.is_not(None)
Index(None, langsmith_runs.c.run_id, sqlite_where=_became_one, postgresql_where=_became_one)

choices = Table(
    "choices",
    metadata,
    Column("seq", SERIAL, ForeignKey("calls.seq"), primary_key=True, autoincrement=False),
    Column("choice_index", Integer, primary_key=True, autoincrement=False),
    Column("n_tokens", Integer, primary_key=True, autoincrement=False),
    _word("finish_reason", null=True),
    Column("flags", JsonText, nullable=False),
    Column("version_spans", JsonText),
    CheckConstraint("choice_index >= 0", name="choice_index"),
    CheckConstraint("n_tokens >= 0", name="n_tokens"),
    sqlite_with_rowid=False,
)
"""`n_tokens` is in the key so that rows elsewhere name it with the choice. That an index stands once in a call, the key
of `choice_payloads` says, which is written beside each. `version_spans` is NULL but where weights were exchanged while
the choice was sampled: [[first token, version], ...]."""

rewards = Table(
    "rewards",
    metadata,
    Column("seq", SERIAL, Identity(), primary_key=True),
    Column("reward_id", String, nullable=False, unique=True),
    Column("run_id", String, ForeignKey("runs.run_id"), nullable=False),
    _word("role", null=True),
    Column("call_id", String, ForeignKey("calls.call_id")),
    _word("name"),
    Column("value", Double, nullable=False),
    _word("source"),
    _time("created_at"),
    CheckConstraint("role IS NULL OR call_id IS NULL", name="one_target"),
    CheckConstraint(f"value BETWEEN -{_LARGEST} AND {_LARGEST}", name="finite"),
    Index(None, "run_id", "name"),
    sqlite_autoincrement=True,
)
_on_a_call = rewards.c.call_id.is_not(None)
Index(None, rewards.c.call_id, sqlite_where=_on_a_call, postgresql_where=_on_a_call)

leases = Table(
    "leases",
    metadata,
    Column("lease_id", Integer, Identity(), primary_key=True),
    Column("job_id", String, ForeignKey("jobs.job_id"), nullable=False),
    _number("token"),
    _word("state"),
    _number("step"),
    _number("epoch"),
    Column("seed", BigInteger, nullable=False),
    Column("run_ids", JsonText, nullable=False),
    Column("calls_through", BigInteger, nullable=False),
    Column("rewards_through", BigInteger, nullable=False),
    Column("attributions_through", BigInteger, nullable=False, server_default="0"),
    _time("created_at"),
    _time("expires_at"),
    UniqueConstraint("lease_id", "job_id"),
    _one_of("state", "held", "acknowledged", "released"),
    Index(None, "job_id", "state"),
    sqlite_autoincrement=True,
)

holds = Table(
    "holds",
    metadata,
    _key("job_id"),
    _key("run_id"),
    _number("lease_id"),
    _word("purpose"),
    Column("spans", JsonText),  # of the run when it was leased, by `outlines_of`; NULL: before revision 0020
    ForeignKeyConstraint(["lease_id", "job_id"], ["leases.lease_id", "leases.job_id"]),
    ForeignKeyConstraint(["run_id", "purpose"], ["runs.run_id", "runs.purpose"]),
    _never_eval(),
    Index(None, "lease_id"),
    Index(None, "run_id"),
)

checkpoints = Table(
    "checkpoints",
    metadata,
    Column("job_id", String, ForeignKey("jobs.job_id"), primary_key=True),
    Column("step", Integer, primary_key=True, autoincrement=False),
    _word("path"),
    _word("hash"),
    Column("lease_id", Integer, nullable=False, unique=True),
    Column("metrics", JsonText, nullable=False),
    _time("created_at"),
    UniqueConstraint("job_id", "step", "hash"),
    ForeignKeyConstraint(["lease_id", "job_id"], ["leases.lease_id", "leases.job_id"]),
)

step_versions = Table(
    "step_versions",
    metadata,
    _key("job_id"),
    Column("step", Integer, primary_key=True, autoincrement=False),
    _key("model"),
    Column("version_id", Integer, nullable=False, unique=True),
    ForeignKeyConstraint(["job_id", "step"], ["checkpoints.job_id", "checkpoints.step"]),
    ForeignKeyConstraint(["job_id", "model"], ["job_models.job_id", "job_models.model"]),
    ForeignKeyConstraint(["version_id", "model"], ["policy_versions.version_id", "policy_versions.model"]),
)
"""The version that a step made of each model that it trained."""

ledger = Table(
    "ledger",
    metadata,
    _word("job_id"),
    _word("run_id"),
    _number("epoch"),
    _word("purpose"),
    _number("step"),
    _word("checkpoint_hash"),
    Column("rewards_through", BigInteger, nullable=False),
    PrimaryKeyConstraint("job_id", "run_id", "epoch"),
    ForeignKeyConstraint(["run_id", "purpose"], ["runs.run_id", "runs.purpose"]),
    ForeignKeyConstraint(
        ["job_id", "step", "checkpoint_hash"], ["checkpoints.job_id", "checkpoints.step", "checkpoints.hash"]
    ),
    _never_eval(),
    Index(None, "run_id"),
    Index(None, "job_id", "step"),
)

refusals = Table(
    "refusals",
    metadata,
    Column("job_id", String, ForeignKey("jobs.job_id"), primary_key=True),
    Column("run_id", String, ForeignKey("runs.run_id"), primary_key=True),
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("reasons", JsonText, nullable=False),
    _time("created_at"),
    Index(None, "run_id"),
)
"""Runs in whose whole batch a job found nothing to train in an epoch: it does not lease them again there."""

consumption = Table(
    "consumption",
    metadata,
    _word("job_id"),
    _number("epoch"),
    Column("seq", BigInteger, nullable=False),
    _number("choice_index"),
    _word("run_id"),
    _number("trained_tokens"),
    _number("excluded_tokens"),
    _number("n_tokens"),
    Column("reason", Text),
    _word("model", null=True),
    PrimaryKeyConstraint("job_id", "epoch", "seq", "choice_index"),
    ForeignKeyConstraint(["job_id", "run_id", "epoch"], ["ledger.job_id", "ledger.run_id", "ledger.epoch"]),
    ForeignKeyConstraint(
        ["seq", "choice_index", "n_tokens"], ["choices.seq", "choices.choice_index", "choices.n_tokens"]
    ),
    CheckConstraint("trained_tokens >= 0 AND excluded_tokens >= 0", name="counts"),
    CheckConstraint("trained_tokens + excluded_tokens = n_tokens", name="conserved"),
    CheckConstraint("excluded_tokens = 0 OR reason IS NOT NULL", name="reason"),
    Index(None, "seq"),
)

PUBLISH_STATES: tuple[PublishState, ...] = get_args(PublishState)
UNFINISHED_STATES = PUBLISH_STATES[:5]
publishes = Table(
    "publishes",
    metadata,
    Column("publish_id", Integer, Identity(), primary_key=True),
    _number("version_id"),
    _word("model"),
    _word("state"),
    Column("error", Text),
    Column("probe", JsonText),
    Column("gate", JsonText),
    Column("decision", JsonText),
    Column("in_flight", Boolean(create_constraint=False), nullable=False, server_default=false()),
    _time("requested_at"),
    *(_time(f"{state}_at", null=True) for state in PUBLISH_STATES[1:]),
    _time("beat_at", null=True),
    ForeignKeyConstraint(["version_id", "model"], ["policy_versions.version_id", "policy_versions.model"]),
    _one_of("state", *PUBLISH_STATES),
    Index(None, "model", "state"),
    sqlite_autoincrement=True,
)
_UNFINISHED = publishes.c.state.in_(UNFINISHED_STATES)
Index("uq_publishes_unfinished", publishes.c.model, unique=True, sqlite_where=_UNFINISHED, postgresql_where=_UNFINISHED)

proxies = Table(
    "proxies",
    metadata,
    _key("proxy_id"),
    _word("url"),
    _time("registered_at"),
    _time("beat_at"),
)

publish_acks = Table(
    "publish_acks",
    metadata,
    Column("publish_id", Integer, ForeignKey("publishes.publish_id"), primary_key=True, autoincrement=False),
    Column("proxy_id", String, ForeignKey("proxies.proxy_id", ondelete="CASCADE"), primary_key=True),
    Column("phase", String, primary_key=True, server_default="draining"),
    _time("acked_at"),
)

api_keys = Table(
    "api_keys",
    metadata,
    _key("key_id"),
    Column("hash", String, nullable=False, unique=True),
    _word("name"),
    _word("project"),
    Column("scopes", JsonText, nullable=False),
    _word("run_id", null=True),
    _word("role", null=True),
    _time("created_at"),
    _time("revoked_at", null=True),
)
