"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make every table."""
    op.create_table(
        "jobs",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("config", sa.Text(), nullable=False),
        sa.Column("rule", sa.Text(), nullable=True),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("job_id", name=op.f("pk_jobs")),
    )
    op.create_table(
        "proxies",
        sa.Column("proxy_id", sa.String(), nullable=False),
        sa.Column("url", sa.String(), nullable=False),
        sa.Column("registered_at", sa.Double(), nullable=False),
        sa.Column("beat_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("proxy_id", name=op.f("pk_proxies")),
    )
    op.create_table(
        "tasks",
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("input", sa.Text(), nullable=False),
        sa.Column("reference", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("task_id", name=op.f("pk_tasks")),
    )
    op.create_table(
        "groups",
        sa.Column("group_id", sa.String(), nullable=False),
        sa.Column("task_id", sa.String(), nullable=False),
        sa.Column("planned_size", sa.Integer(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint("purpose IN ('train', 'eval', 'live')", name=op.f("ck_groups_purpose")),
        sa.CheckConstraint("planned_size >= 1", name=op.f("ck_groups_planned_size")),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name=op.f("fk_groups_task_id_tasks")),
        sa.PrimaryKeyConstraint("group_id", name=op.f("pk_groups")),
        sa.UniqueConstraint("group_id", "purpose", name=op.f("uq_groups_group_id_purpose")),
        sa.UniqueConstraint("group_id", "task_id", name=op.f("uq_groups_group_id_task_id")),
    )
    op.create_table(
        "leases",
        sa.Column("lease_id", sa.Integer(), sa.Identity(always=False), nullable=False),
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("token", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("run_ids", sa.Text(), nullable=False),
        sa.Column("calls_through", sa.BigInteger(), nullable=False),
        sa.Column("rewards_through", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.CheckConstraint("state IN ('held', 'acknowledged', 'released')", name=op.f("ck_leases_state")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name=op.f("fk_leases_job_id_jobs")),
        sa.PrimaryKeyConstraint("lease_id", name=op.f("pk_leases")),
        sa.UniqueConstraint("lease_id", "job_id", name=op.f("uq_leases_lease_id_job_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_leases_job_id_state"), "leases", ["job_id", "state"], unique=False)
    op.create_table(
        "policy_versions",
        sa.Column("version_id", sa.Integer(), sa.Identity(always=False), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("parent_id", sa.Integer(), nullable=True),
        sa.Column("checkpoint_path", sa.String(), nullable=False),
        sa.Column("checkpoint_hash", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.String(), nullable=True),
        sa.Column("abandoned", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint("kind IN ('initial', 'step', 'canary')", name=op.f("ck_policy_versions_kind")),
        sa.CheckConstraint("step >= 0", name=op.f("ck_policy_versions_step")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name=op.f("fk_policy_versions_job_id_jobs")),
        sa.ForeignKeyConstraint(
            ["parent_id", "model"],
            ["policy_versions.version_id", "policy_versions.model"],
            name=op.f("fk_policy_versions_parent_id_model_policy_versions"),
        ),
        sa.PrimaryKeyConstraint("version_id", name=op.f("pk_policy_versions")),
        sa.UniqueConstraint("version_id", "model", name=op.f("uq_policy_versions_version_id_model")),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "checkpoints",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("hash", sa.String(), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("lease_id", sa.Integer(), nullable=False),
        sa.Column("metrics", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.job_id"], name=op.f("fk_checkpoints_job_id_jobs")),
        sa.ForeignKeyConstraint(
            ["lease_id", "job_id"],
            ["leases.lease_id", "leases.job_id"],
            name=op.f("fk_checkpoints_lease_id_job_id_leases"),
        ),
        sa.ForeignKeyConstraint(
            ["version_id"], ["policy_versions.version_id"], name=op.f("fk_checkpoints_version_id_policy_versions")
        ),
        sa.PrimaryKeyConstraint("job_id", "step", name=op.f("pk_checkpoints")),
        sa.UniqueConstraint("job_id", "step", "hash", name=op.f("uq_checkpoints_job_id_step_hash")),
        sa.UniqueConstraint("lease_id", name=op.f("uq_checkpoints_lease_id")),
        sa.UniqueConstraint("version_id", name=op.f("uq_checkpoints_version_id")),
    )
    op.create_table(
        "publishes",
        sa.Column("publish_id", sa.Integer(), sa.Identity(always=False), nullable=False),
        sa.Column("version_id", sa.Integer(), nullable=False),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("probe", sa.Text(), nullable=True),
        sa.Column("requested_at", sa.Double(), nullable=False),
        sa.Column("draining_at", sa.Double(), nullable=True),
        sa.Column("swapping_at", sa.Double(), nullable=True),
        sa.Column("live_at", sa.Double(), nullable=True),
        sa.Column("failed_at", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "state IN ('requested', 'draining', 'swapping', 'live', 'failed')", name=op.f("ck_publishes_state")
        ),
        sa.ForeignKeyConstraint(
            ["version_id", "model"],
            ["policy_versions.version_id", "policy_versions.model"],
            name=op.f("fk_publishes_version_id_model_policy_versions"),
        ),
        sa.PrimaryKeyConstraint("publish_id", name=op.f("pk_publishes")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_publishes_model_state"), "publishes", ["model", "state"], unique=False)
    op.create_index(
        "uq_publishes_unfinished",
        "publishes",
        ["model"],
        unique=True,
        sqlite_where=sa.text("state IN ('requested', 'draining', 'swapping')"),
        postgresql_where=sa.text("state IN ('requested', 'draining', 'swapping')"),
    )
    op.create_table(
        "runs",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("project", sa.String(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("task_id", sa.String(), nullable=True),
        sa.Column("group_id", sa.String(), nullable=True),
        sa.Column("member", sa.Integer(), nullable=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("ended_by", sa.String(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("opened_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("active_at", sa.Double(), nullable=False),
        sa.CheckConstraint("(status = 'open') = (ended_at IS NULL)", name=op.f("ck_runs_ended_at")),
        sa.CheckConstraint("ended_by IN ('hook', 'explicit', 'idle')", name=op.f("ck_runs_ended_by")),
        sa.CheckConstraint("purpose IN ('train', 'eval', 'live')", name=op.f("ck_runs_purpose")),
        sa.CheckConstraint("status IN ('open', 'closed', 'failed')", name=op.f("ck_runs_status")),
        sa.CheckConstraint("(group_id IS NULL) = (member IS NULL)", name=op.f("ck_runs_group_and_member")),
        sa.CheckConstraint("group_id IS NULL OR task_id IS NOT NULL", name=op.f("ck_runs_group_has_task")),
        sa.CheckConstraint("member >= 0", name=op.f("ck_runs_member")),
        sa.ForeignKeyConstraint(
            ["group_id", "purpose"], ["groups.group_id", "groups.purpose"], name=op.f("fk_runs_group_id_purpose_groups")
        ),
        sa.ForeignKeyConstraint(
            ["group_id", "task_id"], ["groups.group_id", "groups.task_id"], name=op.f("fk_runs_group_id_task_id_groups")
        ),
        sa.ForeignKeyConstraint(["task_id"], ["tasks.task_id"], name=op.f("fk_runs_task_id_tasks")),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_runs")),
        sa.UniqueConstraint("group_id", "member", name=op.f("uq_runs_group_id_member")),
        sa.UniqueConstraint("run_id", "purpose", name=op.f("uq_runs_run_id_purpose")),
    )
    op.create_index(op.f("ix_runs_project_opened_at"), "runs", ["project", "opened_at"], unique=False)
    op.create_index(op.f("ix_runs_status_active_at"), "runs", ["status", "active_at"], unique=False)
    op.create_index(op.f("ix_runs_task_id"), "runs", ["task_id"], unique=False)
    op.create_table(
        "holds",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("lease_id", sa.Integer(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.CheckConstraint("purpose <> 'eval'", name=op.f("ck_holds_never_eval")),
        sa.ForeignKeyConstraint(
            ["lease_id", "job_id"], ["leases.lease_id", "leases.job_id"], name=op.f("fk_holds_lease_id_job_id_leases")
        ),
        sa.ForeignKeyConstraint(
            ["run_id", "purpose"], ["runs.run_id", "runs.purpose"], name=op.f("fk_holds_run_id_purpose_runs")
        ),
        sa.PrimaryKeyConstraint("job_id", "run_id", name=op.f("pk_holds")),
    )
    op.create_index(op.f("ix_holds_lease_id"), "holds", ["lease_id"], unique=False)
    op.create_table(
        "ledger",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("purpose", sa.String(), nullable=False),
        sa.Column("step", sa.Integer(), nullable=False),
        sa.Column("checkpoint_hash", sa.String(), nullable=False),
        sa.Column("rewards_through", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("purpose <> 'eval'", name=op.f("ck_ledger_never_eval")),
        sa.ForeignKeyConstraint(
            ["job_id", "step", "checkpoint_hash"],
            ["checkpoints.job_id", "checkpoints.step", "checkpoints.hash"],
            name=op.f("fk_ledger_job_id_step_checkpoint_hash_checkpoints"),
        ),
        sa.ForeignKeyConstraint(
            ["run_id", "purpose"], ["runs.run_id", "runs.purpose"], name=op.f("fk_ledger_run_id_purpose_runs")
        ),
        sa.PrimaryKeyConstraint("job_id", "run_id", "epoch", name=op.f("pk_ledger")),
    )
    op.create_table(
        "publish_acks",
        sa.Column("publish_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("proxy_id", sa.String(), nullable=False),
        sa.Column("acked_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["proxy_id"], ["proxies.proxy_id"], name=op.f("fk_publish_acks_proxy_id_proxies"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["publish_id"], ["publishes.publish_id"], name=op.f("fk_publish_acks_publish_id_publishes")
        ),
        sa.PrimaryKeyConstraint("publish_id", "proxy_id", name=op.f("pk_publish_acks")),
    )
    op.create_table(
        "spans",
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("span_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("parent_span_id", sa.String(), nullable=True),
        sa.Column("namespace", sa.String(), nullable=True),
        sa.Column("superstep", sa.Integer(), nullable=True),
        sa.Column("triggers", sa.Text(), nullable=False),
        sa.CheckConstraint("kind IN ('node', 'tool', 'graph')", name=op.f("ck_spans_kind")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_spans_run_id_runs")),
        sa.PrimaryKeyConstraint("run_id", "span_id", name=op.f("pk_spans")),
    )
    op.create_table(
        "calls",
        sa.Column(
            "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Identity(always=False), nullable=False
        ),
        sa.Column("call_id", sa.String(), nullable=False),
        sa.Column("completion_id", sa.String(), nullable=True),
        sa.Column("run_id", sa.String(), nullable=True),
        sa.Column("run_source", sa.String(), nullable=True),
        sa.Column("role", sa.String(), nullable=True),
        sa.Column("role_source", sa.String(), nullable=True),
        sa.Column("span_id", sa.String(), nullable=True),
        sa.Column("model", sa.String(), nullable=False),
        sa.Column("requested_model", sa.String(), nullable=False),
        sa.Column("version_dispatched", sa.Integer(), nullable=True),
        sa.Column("version_completed", sa.Integer(), nullable=True),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("received_at", sa.Double(), nullable=False),
        sa.Column("dispatched_at", sa.Double(), nullable=False),
        sa.Column("first_token_at", sa.Double(), nullable=True),
        sa.Column("completed_at", sa.Double(), nullable=False),
        sa.Column("stream", sa.Boolean(), nullable=False),
        sa.Column("quarantine", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "role_source IN ('header', 'path', 'key', 'hook', 'langsmith', 'inferred')",
            name=op.f("ck_calls_role_source"),
        ),
        sa.CheckConstraint(
            "run_source IN ('header', 'path', 'key', 'hook', 'langsmith', 'inferred')", name=op.f("ck_calls_run_source")
        ),
        sa.CheckConstraint("status IN ('complete', 'aborted', 'failed')", name=op.f("ck_calls_status")),
        sa.CheckConstraint("span_id IS NULL OR run_id IS NOT NULL", name=op.f("ck_calls_span_has_run")),
        sa.ForeignKeyConstraint(
            ["run_id", "span_id"], ["spans.run_id", "spans.span_id"], name=op.f("fk_calls_run_id_span_id_spans")
        ),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_calls_run_id_runs")),
        sa.ForeignKeyConstraint(
            ["version_completed", "model"],
            ["policy_versions.version_id", "policy_versions.model"],
            name=op.f("fk_calls_version_completed_model_policy_versions"),
        ),
        sa.ForeignKeyConstraint(
            ["version_dispatched", "model"],
            ["policy_versions.version_id", "policy_versions.model"],
            name=op.f("fk_calls_version_dispatched_model_policy_versions"),
        ),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_calls")),
        sa.UniqueConstraint("call_id", name=op.f("uq_calls_call_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_calls_completion_id"), "calls", ["completion_id"], unique=False)
    op.create_index(op.f("ix_calls_run_id_model"), "calls", ["run_id", "model"], unique=False)
    op.create_table(
        "call_payloads",
        sa.Column("call_id", sa.String(), nullable=False),
        sa.Column("n_prompt", sa.Integer(), nullable=True),
        sa.Column("prompt_ids", sa.LargeBinary(), nullable=True),
        sa.Column("request", sa.Text(), nullable=False),
        sa.Column("requested", sa.Text(), nullable=False),
        sa.Column("effective", sa.Text(), nullable=False),
        sa.CheckConstraint("(prompt_ids IS NULL) = (n_prompt IS NULL)", name=op.f("ck_call_payloads_prompt_counted")),
        sa.CheckConstraint("length(prompt_ids) = 4 * n_prompt", name=op.f("ck_call_payloads_prompt_length")),
        sa.ForeignKeyConstraint(["call_id"], ["calls.call_id"], name=op.f("fk_call_payloads_call_id_calls")),
        sa.PrimaryKeyConstraint("call_id", name=op.f("pk_call_payloads")),
    )
    op.create_table(
        "choices",
        sa.Column("call_id", sa.String(), nullable=False),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("finish_reason", sa.String(), nullable=True),
        sa.Column("flags", sa.Text(), nullable=False),
        sa.CheckConstraint("choice_index >= 0", name=op.f("ck_choices_choice_index")),
        sa.CheckConstraint("n_tokens >= 0", name=op.f("ck_choices_n_tokens")),
        sa.ForeignKeyConstraint(["call_id"], ["calls.call_id"], name=op.f("fk_choices_call_id_calls")),
        sa.PrimaryKeyConstraint("call_id", "choice_index", name=op.f("pk_choices")),
        sa.UniqueConstraint(
            "call_id", "choice_index", "n_tokens", name=op.f("uq_choices_call_id_choice_index_n_tokens")
        ),
    )
    op.create_table(
        "rewards",
        sa.Column(
            "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), sa.Identity(always=False), nullable=False
        ),
        sa.Column("reward_id", sa.String(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=True),
        sa.Column("call_id", sa.String(), nullable=True),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.CheckConstraint("role IS NULL OR call_id IS NULL", name=op.f("ck_rewards_one_target")),
        sa.CheckConstraint(
            "value BETWEEN -1.7976931348623157e308 AND 1.7976931348623157e308", name=op.f("ck_rewards_finite")
        ),
        sa.ForeignKeyConstraint(["call_id"], ["calls.call_id"], name=op.f("fk_rewards_call_id_calls")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.run_id"], name=op.f("fk_rewards_run_id_runs")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_rewards")),
        sa.UniqueConstraint("reward_id", name=op.f("uq_rewards_reward_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_rewards_run_id_name"), "rewards", ["run_id", "name"], unique=False)
    op.create_table(
        "choice_payloads",
        sa.Column("call_id", sa.String(), nullable=False),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("token_ids", sa.LargeBinary(), nullable=False),
        sa.Column("logprobs", sa.LargeBinary(), nullable=True),
        sa.Column("message", sa.Text(), nullable=False),
        sa.CheckConstraint("length(logprobs) = 4 * n_tokens", name=op.f("ck_choice_payloads_logprob_length")),
        sa.CheckConstraint("length(token_ids) = 4 * n_tokens", name=op.f("ck_choice_payloads_token_length")),
        sa.ForeignKeyConstraint(
            ["call_id", "choice_index", "n_tokens"],
            ["choices.call_id", "choices.choice_index", "choices.n_tokens"],
            name=op.f("fk_choice_payloads_call_id_choice_index_n_tokens_choices"),
        ),
        sa.PrimaryKeyConstraint("call_id", "choice_index", name=op.f("pk_choice_payloads")),
    )
    op.create_table(
        "consumption",
        sa.Column("job_id", sa.String(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("call_id", sa.String(), nullable=False),
        sa.Column("choice_index", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(), nullable=False),
        sa.Column("trained_tokens", sa.Integer(), nullable=False),
        sa.Column("excluded_tokens", sa.Integer(), nullable=False),
        sa.Column("n_tokens", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.CheckConstraint("excluded_tokens = 0 OR reason IS NOT NULL", name=op.f("ck_consumption_reason")),
        sa.CheckConstraint("trained_tokens + excluded_tokens = n_tokens", name=op.f("ck_consumption_conserved")),
        sa.CheckConstraint("trained_tokens >= 0 AND excluded_tokens >= 0", name=op.f("ck_consumption_counts")),
        sa.ForeignKeyConstraint(
            ["call_id", "choice_index", "n_tokens"],
            ["choices.call_id", "choices.choice_index", "choices.n_tokens"],
            name=op.f("fk_consumption_call_id_choice_index_n_tokens_choices"),
        ),
        sa.ForeignKeyConstraint(
            ["job_id", "run_id", "epoch"],
            ["ledger.job_id", "ledger.run_id", "ledger.epoch"],
            name=op.f("fk_consumption_job_id_run_id_epoch_ledger"),
        ),
        sa.PrimaryKeyConstraint("job_id", "epoch", "call_id", "choice_index", name=op.f("pk_consumption")),
    )


def downgrade() -> None:
    """Drop every table."""
    op.drop_table("consumption")
    op.drop_table("choice_payloads")
    op.drop_index(op.f("ix_rewards_run_id_name"), table_name="rewards")
    op.drop_table("rewards")
    op.drop_table("choices")
    op.drop_table("call_payloads")
    op.drop_index(op.f("ix_calls_run_id_model"), table_name="calls")
    op.drop_index(op.f("ix_calls_completion_id"), table_name="calls")
    op.drop_table("calls")
    op.drop_table("spans")
    op.drop_table("publish_acks")
    op.drop_table("ledger")
    op.drop_index(op.f("ix_holds_lease_id"), table_name="holds")
    op.drop_table("holds")
    op.drop_index(op.f("ix_runs_task_id"), table_name="runs")
    op.drop_index(op.f("ix_runs_status_active_at"), table_name="runs")
    op.drop_index(op.f("ix_runs_project_opened_at"), table_name="runs")
    op.drop_table("runs")
    op.drop_index(
        "uq_publishes_unfinished",
        table_name="publishes",
        sqlite_where=sa.text("state IN ('requested', 'draining', 'swapping')"),
        postgresql_where=sa.text("state IN ('requested', 'draining', 'swapping')"),
    )
    op.drop_index(op.f("ix_publishes_model_state"), table_name="publishes")
    op.drop_table("publishes")
    op.drop_table("checkpoints")
    op.drop_table("policy_versions")
    op.drop_index(op.f("ix_leases_job_id_state"), table_name="leases")
    op.drop_table("leases")
    op.drop_table("groups")
    op.drop_table("tasks")
    op.drop_table("proxies")
    op.drop_table("jobs")
