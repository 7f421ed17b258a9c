"""The nouns of the store as frozen values. No I/O, no database types.

Proxy, hooks, rollout driver and trainer exchange these with `tracegrad.tracestore.store.Store`. Times are Unix
seconds. Token ids and logprobs are tuples; logprobs are float32 values held as Python floats.
A missing thing is `None`: never 0, never an empty stand-in (law 6).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Json = Mapping[str, Any]
Purpose = Literal["train", "eval", "live"]
RunStatus = Literal["open", "closed", "failed"]
EndedBy = Literal["hook", "explicit", "idle"]
CallStatus = Literal["complete", "aborted", "failed"]
RoleSource = Literal["header", "path", "key", "hook", "langsmith", "rule", "inferred"]
PublishState = Literal[
    "requested", "draining", "swapping", "evaluating", "settling", "live", "failed", "rejected", "skipped"
]
VersionKind = Literal["initial", "step", "canary"]
LeaseState = Literal["held", "acknowledged", "released", "expired"]
Endpoint = Literal["chat", "completions", "embeddings"]
SpanKind = Literal["node", "tool", "graph"]
Drift = Literal["template", "retokenised", "edited", "unexplained"]
KeyScope = Literal["call", "reward", "read", "train", "admin"]
KEY_SCOPES: tuple[KeyScope, ...] = ("call", "reward", "read", "train", "admin")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One input of the workflow with whatever its reward needs; the id is stable across rollouts."""

    task_id: str
    input: Json
    reference: Json = field(default_factory=dict)
    project: str = "default"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The runs of one task that were sampled to be compared. Leased whole; failed members are absent."""

    group_id: str
    task_id: str
    planned_size: int
    purpose: Purpose


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One execution of the workflow. `member` is its index in the group; both or neither are set."""

    run_id: str
    project: str = "default"
    purpose: Purpose = "live"
    task_id: str | None = None
    group_id: str | None = None
    member: int | None = None
    status: RunStatus = "open"
    ended_by: EndedBy | None = None
    error: str | None = None
    opened_at: float = 0.0
    ended_at: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One execution inside a run: of a node, a tool or a (sub)graph. `namespace` is LangGraph's checkpoint namespace.

    It is told in parts (by a call, at its start, at its end): what one part leaves None, another may say. `input` and
    `output` are any JSON; a tool's `output` is what it returned. `source` is who told of it first. `triggers` are the
    channels that make the node run (of a `Send`: `__pregel_push:` and its number in the step); `wrote` are the channels
    that it wrote, so that others ran, and `send:NODE` for each `Send`, in their order; None: nobody told.
    """

    span_id: str
    run_id: str
    name: str
    kind: SpanKind = "node"
    parent_span_id: str | None = None
    namespace: str | None = None
    superstep: int | None = None
    triggers: tuple[str, ...] = ()
    wrote: tuple[str, ...] | None = None
    input: Any = None
    output: Any = None
    error: str | None = None
    started_at: float | None = None
    ended_at: float | None = None
    source: RoleSource | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Edge:
    """The output of span `source` fed span `target`. See `edges`."""

    source: str
    target: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One sampled completion.

    Invariant: where `logprobs` is not None, ``len(logprobs) == len(token_ids)``. `message` is the assistant message as
    the client got it. `flags` names what the trainer must know: "greedy", "constrained", "penalised",
    "truncated_sampling" (what was left is unknown), "stop_string", "reasoning", "hidden_tool_calls" (the model wrote
    more than the client got), "external" (sampled by somebody else's engine). `kept_ids`: for each sampled token the
    ids that top-p, top-k or min-p left, itself among them, over which its logprob is normalised; None: the whole
    vocabulary, or unknown. `version_spans`: (first token, policy version), from token 0 on, ascending, where weights
    were exchanged while the call was in flight; empty: the version at dispatch sampled all of it.
    """

    index: int
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: str | None
    message: Json = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    kept_ids: tuple[tuple[int, ...], ...] | None = None
    version_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class CallTiming:
    """When the call arrived, was dispatched to the engine, gave its first token, and completed."""

    received_at: float
    dispatched_at: float
    first_token_at: float | None
    completed_at: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Attribution:
    """Who called. Every field may be unknown; what says so is in the `source` fields."""

    run_id: str | None = None
    run_source: RoleSource | None = None
    role: str | None = None
    role_source: RoleSource | None = None
    span: Span | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LateAttribution:
    """What a source said of a call after it was stored. The call is named by our id or by its completion id.

    Append-only: one row per (named call, source). What the call does not know yet, it takes from here; where it knows
    something else, that is a conflict, and the call keeps what it has.
    """

    source: RoleSource
    call_id: str | None = None
    completion_id: str | None = None
    run_id: str | None = None
    role: str | None = None
    span_id: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LangSmithRun:
    """What a run of a LangSmith tree became: part of `run_id` (None: of no run), there the span `span_id` if it is one.

    Ids of LangSmith are UUIDs in hex. `named` are the calls that a model run made, by completion id or ours.
    """

    langsmith_id: str
    trace_id: str
    run_id: str | None = None
    span_id: str | None = None
    named: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class AttributionConflict:
    """A call that one source placed in one run or role, and a later source in another."""

    call_id: str
    field: Literal["run", "role"]
    kept: str
    kept_source: RoleSource | None
    said: str
    said_source: RoleSource


@dataclass(frozen=True, kw_only=True, slots=True)
class Continues:
    """The earlier call of its run that a call goes on from: its messages are that call's, its answer, and more.

    `drift` says why the prompt as the engine renders it does not begin with the ids of that call's prompt and answer
    (None: it does): "retokenised" (the same text, other ids), "template" (the chat template, or the wire before it,
    left out or rewrote what was sampled: thoughts, white space, the form of a tool call), "edited" (the app changed
    what it sent or was sent; `choice` is None where no answer is left), "unexplained" (the engine could not say).
    `token_in`: the prompt was built from those ids nevertheless.
    """

    call_id: str
    choice: int | None
    drift: Drift | None = None
    token_in: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One request to a model with its choices: the unit that is committed before the reply ends (law 3).

    `model` is the physical model of the role map; `requested_model` is the name in the request.
    `version_dispatched`/`version_completed` are policy version ids of `model`; unequal ones quarantine, but where the
    engine told which sampled which token (`Choice.version_spans`).
    `requested`/`effective` hold the sampling parameters as sent by the client and as sent to the engine.
    `request` is the client's body without them (messages, tools, ...). `quarantine` is a reason or None.
    `request_hash` is a digest of the body as sent; `retry_of` names the call that this one was sent again for, because
    its answer did not arrive. `project` is the project that a run opened for this call belongs to.
    """

    call_id: str
    completion_id: str | None
    attribution: Attribution
    model: str
    requested_model: str
    version_dispatched: int | None
    version_completed: int | None
    prompt_ids: tuple[int, ...] | None
    choices: tuple[Choice, ...]
    status: CallStatus
    timing: CallTiming
    request: Json
    requested: Json
    effective: Json
    stream: bool = False
    quarantine: str | None = None
    error: str | None = None
    endpoint: Endpoint = "chat"
    request_hash: str | None = None
    retry_of: str | None = None
    project: str = "default"
    continues: Continues | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlierCall:
    """A complete chat call, as much of it as the next call of its run may go on from. `choices` have no logprobs."""

    call_id: str
    role: str | None
    request: Json
    prompt_ids: tuple[int, ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Reward:
    """A named value on a run, or inside it on a role or a call. Append-only; the newest of a name counts.

    Exactly one target: `call_id` set -> that call; else `role` set -> that role in the run; else the run.
    """

    reward_id: str
    run_id: str
    name: str
    value: float
    source: str
    role: str | None = None
    call_id: str | None = None
    created_at: float = 0.0
    late_for: tuple[str, ...] = ()
    """Training jobs that had already trained the run when this arrived: kept, counted, used by the next job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTrace:
    """A run with everything training needs: its calls (by dispatch time), the current view of its rewards, its spans.

    `spans` are in order of their start, those without one last; every span that a call names is among them.
    """

    run: Run
    calls: tuple[Call, ...]
    rewards: tuple[Reward, ...]
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyVersion:
    """One published (or to be published) set of weights of one model. The id is given by the store, never reused."""

    version_id: int
    model: str
    kind: VersionKind
    parent_id: int | None
    checkpoint_path: str
    checkpoint_hash: str
    step: int
    updates: int
    """How many times its model was trained; `step` is its job's."""
    line: int
    """The first version that it descends from, or itself."""
    job_id: str | None
    abandoned: bool = False
    created_at: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Publish:
    """One passage of a version through the states of `publishes`. `gate`, `decision`: None without a publish gate."""

    publish_id: int
    version_id: int
    model: str
    state: PublishState
    error: str | None
    probe: Json | None
    entered: Mapping[str, float]
    """State -> Unix time it was entered."""
    gate: Json | None = None
    decision: Json | None = None
    in_flight: bool = False
    """Calls go on through it: engines are paused for the exchange, and tell which version sampled which token."""
    beat_at: float | None = None
    """When its publisher was last heard of, Unix time; None: by an older trainer, which says nothing."""

    @property
    def together(self) -> tuple[int, ...]:
        """The publishes that one evaluation decides on, this one among them; they are judged and go live as one."""
        return _together(self.publish_id, self.gate)

    @property
    def paused_s(self) -> float:
        """Seconds in which engines had no calls, to change weights, as far as it has come to an end.

        By drain: those in which calls were held. In flight: those in which the engine stood still, by its publisher's
        clock (where that died in the middle, as by drain).
        """
        if self.probe is not None and "paused_s" in self.probe:
            return float(self.probe["paused_s"])
        ends = ("live", "rejected", "failed")
        return self._between("draining", ("evaluating", *ends)) + self._between("settling", ends)

    def _between(self, begin: str, ends: Sequence[str]) -> float:
        reached = [self.entered[state] for state in ends if state in self.entered]
        return max(min(reached) - self.entered[begin], 0.0) if begin in self.entered and reached else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """What a lease will train: the order of the runs and the seed of everything random in the step."""

    step: int
    epoch: int
    seed: int
    run_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """A fenced, time-limited hold. `token` grows with every (re)claim; only the newest may commit."""

    lease_id: int
    token: int
    job_id: str
    plan: BatchPlan
    expires_at: float
    state: LeaseState = "held"


@dataclass(frozen=True, kw_only=True, slots=True)
class Consumption:
    """What became of one choice in one training pass: trained + excluded tokens = its sampled tokens (law 5).

    `model`: the model that it trained, where that is not the one that sampled it.
    """

    run_id: str
    call_id: str
    choice_index: int
    trained_tokens: int
    excluded_tokens: int
    reason: str | None
    model: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCalls:
    """Whose calls count for one model: those of `roles` (None: all but `other_roles`, which are other models')."""

    model: str
    roles: tuple[str, ...] | None = None
    other_roles: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRule:
    """Which groups a job takes, and what of them counts; `rules` and `readiness` read it, in Python and in SQL.

    `trained`: the models of the job, at least one, each with its roles; a run is taken for all of them at once, as soon
    as a call of it counts for one. `recorded_models` are further models whose calls count, for whom their role is:
    their tokenizer must be that model's. `max_staleness` is in updates of the model that sampled (see `branches`);
    `min_group` is the fewest closed, rewarded members;
    with `reward_names` a member needs every one of them, else any reward; with `reward_sources` only rewards that come
    from one of these count, for readiness and for credit. A run is taken `grace_s` after it ended at the earliest, and
    only if it was opened from `since` on and before `until` (Unix seconds). `project` None means every project.
    """

    trained: tuple[ModelCalls, ...]
    recorded_models: tuple[str, ...] = ()
    purposes: tuple[Purpose, ...] = ("train", "live")
    max_staleness: int
    min_group: int
    reward_names: tuple[str, ...] = ()
    reward_sources: tuple[str, ...] = ()
    grace_s: float = 0.0
    since: float | None = None
    until: float | None = None
    epoch: int = 0
    project: str | None = None

    @property
    def models(self) -> tuple[str, ...]:
        """The models that the job trains."""
        return tuple(each.model for each in self.trained)

    def of(self, model: str) -> "LeaseRule":
        """Return the rule for one of the models alone."""
        return replace(self, trained=tuple(each for each in self.trained if each.model == model))


@dataclass(frozen=True, kw_only=True, slots=True)
class Backlog:
    """What waits for a job: groups it could lease now, groups it holds, and whether a model of it is published now."""

    ready_groups: int
    leased_groups: int
    publishing: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """A run in a list. `rewards` is the current view: `name` for the run's own, `role:name` for a role's."""

    run: Run
    n_calls: int
    n_sampled_tokens: int
    rewards: Mapping[str, float]
    roles: tuple[str, ...]
    versions: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelState:
    """What a proxy polls: the live version of a model, and the newest publish with its state."""

    model: str
    live_version: int | None
    publish_id: int | None
    state: PublishState | None
    candidate: int | None = None
    """The version of the newest publish."""
    gate: Json | None = None
    overdue: bool = False
    """Whether the candidate is being evaluated for longer than its gate allows."""
    swaps: int = 0
    """How often engines were (perhaps) given other weights by the newest publish: 0, 1, or 2 where it settled."""
    in_flight: bool = False
    """Whether calls go on through the newest publish."""
    silent_s: float = 0.0
    """For how long its publisher has said nothing; 0 where it never did."""

    @property
    def together(self) -> tuple[int, ...]:
        """The publishes that are judged with the newest one, itself among them: the first one names the evaluation."""
        return () if self.publish_id is None else _together(self.publish_id, self.gate)


def _together(publish_id: int, gate: Json | None) -> tuple[int, ...]:
    return tuple((gate or {}).get("together") or (publish_id,))


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """What a key may do and where its calls belong; never its text, and not its hash either.

    `admin` includes every other scope. `run_id` and `role` attribute calls that say nothing themselves.
    """

    key_id: str
    name: str
    project: str
    scopes: tuple[KeyScope, ...]
    run_id: str | None = None
    role: str | None = None
    created_at: float = 0.0
    revoked_at: float | None = None

    def may(self, scope: KeyScope) -> bool:
        """Whether the key has `scope`."""
        return scope in self.scopes or "admin" in self.scopes
