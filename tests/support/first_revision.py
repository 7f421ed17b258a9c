"""A store as the code of the first revision left it: the rows that it wrote, a table at a time, parents first.

Group g is trained in step 1; group h is held by a lease of step 2, which the call `late` missed. Call `long` has a
prompt of several blocks, two choices, a NaN and no logprobs; `roleless` has no role. Call `c` of run `r` was never
sampled. Numbers that the database gives are left to it.
"""

import math
import struct

from sqlalchemy import Connection, column, table


def _ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def _floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def fill(connection: Connection) -> None:
    """Insert them into an empty store of revision 0001."""
    for statement in _CALL:
        connection.exec_driver_sql(statement)
    for name, columns, rows in _WORLD:
        names = columns.split()
        into = table(name, *map(column, names)).insert()
        connection.execute(into, [dict(zip(names, row, strict=True)) for row in rows])


_CALL = (
    "INSERT INTO runs (run_id, project, purpose, status, opened_at, active_at) "
    "VALUES ('r', 'p', 'live', 'open', 1.0, 1.0)",
    "INSERT INTO spans (run_id, span_id, name, kind, triggers) VALUES ('r', 's', 'node', 'node', '[\"t\"]')",
    "INSERT INTO calls (call_id, run_id, run_source, role, role_source, span_id, model, requested_model,"
    " status, received_at, dispatched_at, completed_at, stream)"
    " VALUES ('c', 'r', 'hook', 'a', 'hook', 's', 'm', 'gpt', 'complete', 1.0, 2.0, 3.0, false)",
    "INSERT INTO call_payloads (call_id, request, requested, effective) VALUES ('c', '{}', '{}', '{}')",
    "INSERT INTO rewards (reward_id, run_id, call_id, name, value, source, created_at)"
    " VALUES ('w', 'r', 'c', 'f1', 0.5, 'test', 1.0)",
)
"""A call, and rows that name it by a foreign key."""

# fmt: off
_WORLD: tuple[tuple[str, str, tuple[tuple[object, ...], ...]], ...] = (
    ("jobs",
     "job_id model config rule created_at", (
        ("job", "main", "{}",
         '{"model":"main","roles":null,"purposes":["train","live"]'
         ',"max_staleness":1,"min_group":2,"reward_names":[],"epoch":0,"project":null}',
         1000.0),
    )),
    ("tasks",
     "task_id project input reference created_at", (
        ("task-g", "default", '{"question":"g"}', "{}", 1000.0),
        ("task-h", "default", '{"question":"h"}', "{}", 1000.0),
    )),
    ("groups",
     "group_id task_id planned_size purpose created_at", (
        ("g", "task-g", 2, "train", 1000.0),
        ("h", "task-h", 2, "train", 1000.0),
    )),
    ("policy_versions",
     "model kind checkpoint_path checkpoint_hash step job_id abandoned created_at", (
        ("main", "initial", "/w", "w", 0, None, False, 1000.0),
        ("main", "step", "/checkpoints/sha-1", "sha-1", 1, "job", False, 1000.0),
    )),
    ("leases",
     "job_id token state step epoch seed run_ids calls_through rewards_through created_at expires_at", (
        ("job", 1, "acknowledged", 1, 0, 7, '["g-0","g-1"]', 3, 3, 1000.0, 1060.0),
        ("job", 1, "held", 2, 0, 7, '["h-0","h-1"]', 6, 6, 1000.0, 1060.0),
    )),
    ("checkpoints",
     "job_id step path hash version_id lease_id metrics created_at", (
        ("job", 1, "/checkpoints/sha-1", "sha-1", 2, 1, '{"loss":0.25}', 1000.0),
    )),
    ("runs",
     "run_id project purpose task_id group_id member status ended_by opened_at ended_at active_at", (
        ("g-0", "default", "train", "task-g", "g", 0, "closed", "explicit", 1000.0, 1000.0, 1000.0),
        ("g-1", "default", "train", "task-g", "g", 1, "closed", "explicit", 1000.0, 1000.0, 1000.0),
        ("h-0", "default", "train", "task-h", "h", 0, "closed", "explicit", 1000.0, 1000.0, 1000.0),
        ("h-1", "default", "train", "task-h", "h", 1, "closed", "explicit", 1000.0, 1000.0, 1000.0),
    )),
    ("holds",
     "job_id run_id lease_id purpose", (
        ("job", "h-0", 2, "train"),
        ("job", "h-1", 2, "train"),
    )),
    ("ledger",
     "job_id run_id epoch purpose step checkpoint_hash rewards_through", (
        ("job", "g-0", 0, "train", 1, "sha-1", 3),
        ("job", "g-1", 0, "train", 1, "sha-1", 3),
    )),
    ("spans",
     "run_id span_id name kind superstep triggers", (
        ("g-0", "span-answerer", "answerer", "node", 1, "[]"),
        ("g-1", "span-answerer", "answerer", "node", 1, "[]"),
        ("h-1", "span-answerer", "answerer", "node", 1, "[]"),
        ("h-0", "span-answerer", "answerer", "node", 1, "[]"),
        ("h-0", "span-None", "None", "node", 1, "[]"),
    )),
    ("calls",
     "call_id completion_id run_id run_source role role_source span_id model requested_model "
     "version_dispatched version_completed status received_at dispatched_at completed_at stream", (
        ("call-g-0", "chatcmpl-call-g-0", "g-0", "header", "answerer", "header", "span-answerer", "main", "gpt-4o", 1,
         1, "complete", 1000.0, 1000.0, 1001.0, False),
        ("call-g-1", "chatcmpl-call-g-1", "g-1", "header", "answerer", "header", "span-answerer", "main", "gpt-4o", 1,
         1, "complete", 1000.0, 1000.0, 1001.0, False),
        ("call-h-1", "chatcmpl-call-h-1", "h-1", "header", "answerer", "header", "span-answerer", "main", "gpt-4o", 2,
         2, "complete", 1000.0, 1000.0, 1001.0, False),
        ("long", "chatcmpl-long", "h-0", "header", "answerer", "header", "span-answerer", "main", "gpt-4o", 1, 1,
         "complete", 1000.0, 1000.0, 1001.0, False),
        ("roleless", "chatcmpl-roleless", "h-0", "header", None, None, "span-None", "main", "gpt-4o", 1, 1,
         "complete", 1001.0, 1001.0, 1002.0, False),
        ("late", "chatcmpl-late", "h-0", "header", "answerer", "header", "span-answerer", "main", "gpt-4o", 1, 1,
         "complete", 1000.0, 1000.0, 1001.0, False),
    )),
    ("call_payloads",
     "call_id n_prompt prompt_ids request requested effective", (
        ("call-g-0", 3, _ints(1, 2, 3), '{"messages":[{"role":"user","content":"hé"}]}', '{"temperature":0.0}',
         '{"temperature":1.0}'),
        ("call-g-1", 3, _ints(1, 2, 3), '{"messages":[{"role":"user","content":"hé"}]}', '{"temperature":0.0}',
         '{"temperature":1.0}'),
        ("call-h-1", 3, _ints(1, 2, 3), '{"messages":[{"role":"user","content":"hé"}]}', '{"temperature":0.0}',
         '{"temperature":1.0}'),
        ("long", 300, _ints(*range(300)),
         '{"messages":[{"role":"system","content":"s"},{"role":"user","content":"hé"}],"n":2}', '{"temperature":0.0}',
         '{"temperature":1.0}'),
        ("roleless", 3, _ints(1, 2, 3), '{"messages":[{"role":"user","content":"hé"}]}', '{"temperature":0.0}',
         '{"temperature":1.0}'),
        ("late", 3, _ints(1, 2, 3), '{"messages":[{"role":"user","content":"hé"}]}', '{"temperature":0.0}',
         '{"temperature":1.0}'),
    )),
    ("choices",
     "call_id choice_index n_tokens finish_reason flags", (
        ("call-g-0", 0, 3, "stop", '["stop_string"]'),
        ("call-g-1", 0, 3, "stop", '["stop_string"]'),
        ("call-h-1", 0, 3, "stop", '["stop_string"]'),
        ("long", 0, 2, "stop", '["stop_string"]'),
        ("long", 1, 1, "stop", "[]"),
        ("roleless", 0, 3, "stop", '["stop_string"]'),
        ("late", 0, 3, "stop", '["stop_string"]'),
    )),
    ("rewards",
     "reward_id run_id call_id name value source created_at", (
        ("reward-g-0", "g-0", None, "f1", 1.0, "t", 1000.0),
        ("reward-g-1", "g-1", None, "f1", 1.0, "t", 1000.0),
        ("reward-h-1", "h-1", None, "f1", 1.0, "t", 1000.0),
        ("whole", "h-0", None, "f1", 0.1, "t", 1000.0),
        ("one", "h-0", "long", "turn", 0.25, "t", 1000.0),
    )),
    ("choice_payloads",
     "call_id choice_index n_tokens token_ids logprobs message", (
        ("call-g-0", 0, 3, _ints(4, 5, 6), _floats(-0.5, -0.5, -0.5), '{"role":"assistant","content":"x"}'),
        ("call-g-1", 0, 3, _ints(4, 5, 6), _floats(-0.5, -0.5, -0.5), '{"role":"assistant","content":"x"}'),
        ("call-h-1", 0, 3, _ints(4, 5, 6), _floats(-0.5, -0.5, -0.5), '{"role":"assistant","content":"x"}'),
        ("long", 0, 2, _ints(7, 70000), _floats(-0.1, math.nan), '{"role":"assistant","content":"x"}'),
        ("long", 1, 1, _ints(2147483647), None, '{"role":"assistant","content":"x"}'),
        ("roleless", 0, 3, _ints(4, 5, 6), _floats(-0.5, -0.5, -0.5), '{"role":"assistant","content":"x"}'),
        ("late", 0, 3, _ints(4, 5, 6), _floats(-0.5, -0.5, -0.5), '{"role":"assistant","content":"x"}'),
    )),
    ("consumption",
     "job_id epoch call_id choice_index run_id trained_tokens excluded_tokens n_tokens", (
        ("job", 0, "call-g-0", 0, "g-0", 3, 0, 3),
        ("job", 0, "call-g-1", 0, "g-1", 3, 0, 3),
    )),
)
# fmt: on
