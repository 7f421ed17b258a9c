"""Samples: what a model may be trained on, out of recorded runs, and why the rest may not (laws 4, 5, 6).

`build_batch` reads traces (no I/O) and gives one `ChoiceSample` per trainable choice of one model, and one
`Consumption` per choice of any kind: trained tokens + excluded tokens = the sampled tokens of these runs. It
refuses runs that can never be leased (open, eval) and rewards given twice. It invents nothing: a choice that no
counted reward reaches is excluded, not rewarded with 0. The words of its reasons are `tracestore.reasons`'s. Called by
the learner with the runs of one lease.
"""

import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tracegrad.tracestore.reasons import (
    ABORTED,
    BAD_SPANS,
    CONSTRAINED,
    EMPTY,
    FAILED_CALL,
    GREEDY,
    LENGTH_MISMATCH,
    NAN_LOGPROB,
    NO_LOGPROBS,
    NO_PROMPT,
    NO_REWARD,
    NO_VERSION,
    PENALISED,
    QUARANTINED,
    RUN_FAILED,
    SUPERSEDED,
    TRUNCATED,
    VERSION_CHANGED,
)
from tracegrad.tracestore.records import Call, Choice, Consumption, LeaseRule, Reward, RunTrace, Span
from tracegrad.tracestore.rules import reward_counts, wrong_owner
from tracegrad.tracestore.version_spans import are_of, cover
from tracegrad.trainer.errors import SampleError
from tracegrad.trainer.returns import Scope, reached_calls
from tracegrad.trainer.run_graph import RunGraph, run_graph

MIN_TEMPERATURE = 0.01
"""Below this a call counts as greedy: vLLM clamps smaller temperatures, so the recorded one was not used."""

_GRAMMARS = ("structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar")
_NAMESPACE_ID = re.compile(r":[^|:]*(?=\||$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """A call's place in its run: superstep and branch path. `None` parts are unknown; arrival order decides nothing.

    `path` holds LangGraph's checkpoint namespace with the execution ids taken out, so that the same place in two
    runs of a group is equal: ``"plan:1f0a|model:77"`` -> ``"plan|model"``.
    """

    superstep: int | None = None
    path: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceSample:
    """One trainable sampled completion of one model.

    Invariants: ``len(prompt_ids) >= 1``, ``len(token_ids) == len(behaviour_logprobs) >= 1``, every logprob finite,
    `temperature` >= MIN_TEMPERATURE. `behaviour_logprobs` are at `temperature`, as recorded when sampled (nats).
    `kept_ids`: for each sampled token the ids that top-p and top-k left, over which its logprob is normalised, the
    token among them; None: the whole vocabulary. `version_spans`: (first token, policy version) in ascending order
    where the weights were exchanged while the choice was sampled; empty: all tokens are `version_id`'s.
    """

    run_id: str
    group_id: str | None
    task_id: str | None
    call_id: str
    choice_index: int
    role: str | None
    turn: Turn
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    behaviour_logprobs: tuple[float, ...]
    temperature: float
    finish_reason: str
    version_id: int
    kept_ids: tuple[tuple[int, ...], ...] | None = None
    version_spans: tuple[tuple[int, int], ...] = ()

    @property
    def token_versions(self) -> tuple[int, ...]:
        """The policy version of each sampled token."""
        versions = [self.version_id] * len(self.token_ids)
        for first, version_id in self.version_spans:
            versions[first:] = [version_id] * (len(versions) - first)
        return tuple(versions)

    @property
    def group_key(self) -> str:
        """The group the run is compared in; a run without one is a group of its own."""
        return self.group_id if self.group_id is not None else self.run_id


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """The trainable choices of one model in some runs, and an account of every sampled token of these runs.

    `choices` follow the order of the traces, then of the calls in them, then the choice index. `consumption` has
    one entry per recorded choice, in the same order. `rewards` holds the counted rewards of every run that did not
    fail (also of those without a trainable choice: they belong to the statistics of their group), `graphs` the run
    graph over all calls of such a run, whatever their model. `version_ages`: policy version -> how many steps before
    the weights that are about to be trained it was made; empty where nobody asked (see `staleness`). `roles`: (run,
    call) -> its role, of every call that has one, also of failed runs.
    """

    choices: tuple[ChoiceSample, ...]
    consumption: tuple[Consumption, ...]
    rewards: Mapping[str, tuple[Reward, ...]]
    run_groups: Mapping[str, str]
    graphs: Mapping[str, RunGraph]
    version_ages: Mapping[int, int] = field(default_factory=dict)
    roles: Mapping[tuple[str, str], str] = field(default_factory=dict)

    @property
    def n_trained_tokens(self) -> int:
        """Sampled tokens that train."""
        return sum(entry.trained_tokens for entry in self.consumption)

    @property
    def excluded_tokens(self) -> dict[str, int]:
        """Exclusion reason -> sampled tokens (reasons of empty choices show with 0)."""
        return excluded_by_reason(self.consumption)

    @property
    def excluded_by_role(self) -> dict[str, dict[str, int]]:
        """Role -> as `excluded_tokens`, for every role in the account; of all its tokens trained, nothing."""
        entries: dict[str, list[Consumption]] = {}
        for entry in self.consumption:
            if (role := self.roles.get((entry.run_id, entry.call_id))) is not None:
                entries.setdefault(role, []).append(entry)
        return {role: excluded_by_reason(entries[role]) for role in sorted(entries)}


def excluded_by_reason(consumption: Iterable[Consumption]) -> dict[str, int]:
    """Return exclusion reason -> sampled tokens (reasons of empty choices show with 0)."""
    totals: dict[str, int] = {}
    for entry in consumption:
        if entry.reason is not None:
            totals[entry.reason] = totals.get(entry.reason, 0) + entry.excluded_tokens
    return totals


def build_batch(
    traces: Sequence[RunTrace], rule: LeaseRule, *, scope: Scope = "call", models: Mapping[int, str] | None = None
) -> Samples:
    """Turn the traces of a lease into samples of the rule's model.

    `rule` is what they were leased by: the calls and rewards that count there count here. `scope`: how far a reward
    reaches (see `returns`); a call that none reaches is excluded. `models`: version -> its model, of all versions that
    spans name (see `spanned_versions`); None: nobody looked. The order of `traces` is the order of the plan and
    is kept.

    Raises:
        SampleError: an open or eval run, or two current rewards of one name on one target.
    """
    choices: list[ChoiceSample] = []
    consumption: list[Consumption] = []
    rewards: dict[str, tuple[Reward, ...]] = {}
    run_groups: dict[str, str] = {}
    graphs: dict[str, RunGraph] = {}
    roles: dict[tuple[str, str], str] = {}
    for trace in traces:
        _check_run(trace)
        run_id = trace.run.run_id
        counted = counted_rewards(trace, rule)
        graph = run_graph(trace)
        reached = reached_calls(graph, counted, scope)
        repeated = frozenset(call.retry_of for call in trace.calls)
        if trace.run.status == "closed":
            rewards[run_id] = counted
            graphs[run_id] = graph
            run_groups[run_id] = trace.run.group_id if trace.run.group_id is not None else run_id
        for call in trace.calls:
            if call.attribution.role is not None:
                roles[run_id, call.call_id] = call.attribution.role
            for choice in call.choices:
                reason = exclusion(trace, call, choice, rule, reached, repeated=repeated, models=models)
                n_tokens = len(choice.token_ids)
                consumption.append(
                    Consumption(
                        run_id=run_id,
                        call_id=call.call_id,
                        choice_index=choice.index,
                        trained_tokens=n_tokens if reason is None else 0,
                        excluded_tokens=0 if reason is None else n_tokens,
                        reason=reason,
                    )
                )
                if reason is None:
                    choices.append(_sample(trace, call, choice))
    return Samples(
        choices=tuple(choices),
        consumption=tuple(consumption),
        rewards=rewards,
        run_groups=run_groups,
        graphs=graphs,
        roles=roles,
    )


def counted_rewards(trace: RunTrace, rule: LeaseRule) -> tuple[Reward, ...]:
    """Return the run's rewards that count by the rule.

    Raises:
        SampleError: two rewards of one name on one target; the store's current view holds the newest only.
    """
    seen: set[tuple[str, str | None, str | None]] = set()
    counted = []
    for reward in trace.rewards:
        if not reward_counts(rule, reward):
            continue
        target = (reward.name, reward.call_id, None if reward.call_id is not None else reward.role)
        if target in seen:
            raise SampleError(
                f"run {trace.run.run_id}: reward {reward.name!r} stands twice on one target "
                f"({reward.reward_id}); pass the current view of the rewards"
            )
        seen.add(target)
        counted.append(reward)
    return tuple(counted)


def spanned_versions(traces: Iterable[RunTrace]) -> set[int]:
    """Return the versions that version spans of these runs name."""
    choices = (choice for trace in traces for call in trace.calls for choice in call.choices)
    return {version for choice in choices for _, version in choice.version_spans}


def exclusion(
    trace: RunTrace,
    call: Call,
    choice: Choice,
    rule: LeaseRule,
    reached: Container[str],
    *,
    repeated: Container[str | None],
    models: Mapping[int, str] | None = None,
) -> str | None:
    """Return why the choice must not train, or None. The first reason that holds is the one counted.

    `reached`: the calls that a counted reward reaches (`returns.reached_calls`). `repeated`: those that
    another was sent for again. `models`: as for `build_batch`.
    """
    return (
        wrong_owner(rule, call)
        or (RUN_FAILED if trace.run.status == "failed" else None)
        or _bad_call(call, choice)
        or _bad_tokens(call, choice)
        or _bad_spans(call, choice, models)
        or _not_a_sample_of_the_policy(call, choice)
        or (None if call.call_id in reached else NO_REWARD)
        or (SUPERSEDED if call.call_id in repeated else None)
    )


def turn_of(span: Span | None) -> Turn:
    """Return the place of a span: superstep and namespace without execution ids."""
    if span is None:
        return Turn()
    path = None if span.namespace is None else _NAMESPACE_ID.sub("", span.namespace)
    return Turn(superstep=span.superstep, path=path)


def effective_temperature(call: Call) -> float:
    """Return the temperature the engine sampled at; vLLM's own default where the request has none (1.0)."""
    value = call.effective.get("temperature")
    return 1.0 if value is None else float(value)


def _check_run(trace: RunTrace) -> None:
    run = trace.run
    if run.status == "open":
        raise SampleError(f"run {run.run_id} is still open: only closed runs are leased")
    if run.purpose == "eval":
        raise SampleError(f"run {run.run_id} has purpose eval: it is never trained")


def _bad_call(call: Call, choice: Choice) -> str | None:
    if call.status == "failed":
        return FAILED_CALL
    if call.status == "aborted" or choice.finish_reason in {None, "abort", "error"}:
        return ABORTED
    if call.quarantine is not None:
        return QUARANTINED + call.quarantine
    if call.version_dispatched is None:
        return NO_VERSION
    told = any(each.version_spans for each in call.choices)  # the choices without are all of the version at dispatch
    return None if told or call.version_completed == call.version_dispatched else VERSION_CHANGED


def _bad_tokens(call: Call, choice: Choice) -> str | None:
    if not call.prompt_ids:
        return NO_PROMPT
    if not choice.token_ids:
        return EMPTY
    if choice.logprobs is None:
        return NO_LOGPROBS
    if len(choice.logprobs) != len(choice.token_ids):
        return LENGTH_MISMATCH
    return None if all(math.isfinite(value) for value in choice.logprobs) else NAN_LOGPROB


def _bad_spans(call: Call, choice: Choice, models: Mapping[int, str] | None) -> str | None:
    """Where several versions sampled it: each token's is known, and one of the model's (law 8)."""
    spans = choice.version_spans
    if not spans or (cover(spans, len(choice.token_ids)) and (models is None or are_of(spans, call.model, models))):
        return None
    return BAD_SPANS


def _not_a_sample_of_the_policy(call: Call, choice: Choice) -> str | None:
    """The proxy's flags, and again the parameters themselves: tokens not drawn from softmax(logits / T)."""
    sent = {**call.request, **call.effective}
    if "greedy" in choice.flags or effective_temperature(call) < MIN_TEMPERATURE:
        return GREEDY
    if "constrained" in choice.flags or _constrained(sent):
        return CONSTRAINED
    if "penalised" in choice.flags or _penalised(sent):
        return PENALISED
    unknown = "truncated_sampling" in choice.flags or (choice.kept_ids is None and _truncated(sent))
    return TRUNCATED if unknown else None


def _constrained(sent: Mapping[str, Any]) -> bool:
    tool_choice = sent.get("tool_choice") or "auto"
    return (
        (sent.get("response_format") or {}).get("type", "text") != "text"
        or tool_choice not in ("auto", "none")
        or any(bool(sent.get(key)) for key in _GRAMMARS)
    )


def _penalised(sent: Mapping[str, Any]) -> bool:
    return (
        any((sent.get(key) or 0.0) != 0.0 for key in ("presence_penalty", "frequency_penalty", "min_tokens"))
        or (sent.get("repetition_penalty") or 1.0) != 1.0
        or any(bool(sent.get(key)) for key in ("logit_bias", "bad_words", "allowed_token_ids"))
    )


def _truncated(sent: Mapping[str, Any]) -> bool:
    top_p = sent.get("top_p")
    return (top_p is not None and top_p < 1.0) or any((sent.get(key) or 0) > 0 for key in ("top_k", "min_p"))


def _sample(trace: RunTrace, call: Call, choice: Choice) -> ChoiceSample:
    assert call.prompt_ids is not None
    assert choice.logprobs is not None
    assert choice.finish_reason is not None
    assert call.version_dispatched is not None
    return ChoiceSample(
        run_id=trace.run.run_id,
        group_id=trace.run.group_id,
        task_id=trace.run.task_id,
        call_id=call.call_id,
        choice_index=choice.index,
        role=call.attribution.role,
        turn=turn_of(call.attribution.span),
        prompt_ids=call.prompt_ids,
        token_ids=choice.token_ids,
        behaviour_logprobs=choice.logprobs,
        temperature=effective_temperature(call),
        finish_reason=choice.finish_reason,
        version_id=call.version_dispatched,
        kept_ids=choice.kept_ids,
        version_spans=choice.version_spans,
    )
