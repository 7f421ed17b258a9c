"""What a configured training job may lease and what of it counts, as a rule for store and trainer.

The proxy's backlog, the trainer's leases and its credit must mean the same runs, calls and rewards, so all read the
rule that is made here. What it means in SQL stands in `readiness`, what it means for one call and one reward here; a
contract test holds the two together. Refuses nothing: the configuration is checked when it is read.
"""

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.moments import moment_of
from tracegrad.tracestore.reasons import NO_ROLE, OTHER_MODEL, OTHER_ROLE
from tracegrad.tracestore.records import Call, LeaseRule, ModelCalls, Reward

ANY_STALENESS = 2**31 - 1


def lease_rule(config: Config, *, model: str | None = None, offline: bool = False) -> LeaseRule:
    """Return which groups the job takes: its models, its roles, its rewards, its window, its bound on staleness.

    `model`: for this one of its models alone.

    Offline there is no bound, and other models' calls may count: whoever trains from stored runs has asked for what
    older or other weights sampled.
    """
    trainer, runs, credit = config.trainer, config.trainer.batch.runs, config.trainer.algorithm.credit
    models = config.trained_models() if model is None else (model,)
    return LeaseRule(
        trained=tuple(_calls_of(config, each) for each in models),
        recorded_models=tuple(sorted({*runs.recorded_models} - {*models})) if offline else (),
        purposes=runs.purposes,
        max_staleness=ANY_STALENESS if offline else trainer.batch.max_staleness,
        min_group=trainer.batch.min_group if credit.grouped else 1,
        reward_names=tuple(sorted(credit.reward_weights)),
        reward_sources=tuple(sorted(runs.reward_sources)),
        grace_s=runs.grace_s,
        since=None if runs.since is None else moment_of(runs.since, "trainer.batch.runs.since"),
        until=None if runs.until is None else moment_of(runs.until, "trainer.batch.runs.until"),
        epoch=runs.epoch,
        project=config.project,
    )


def _calls_of(config: Config, model: str) -> ModelCalls:
    named = config.trainer.batch.runs.roles
    own = {role for role, owner in config.roles.items() if owner == model and role != "*"}
    others = tuple(sorted(role for role, owner in config.roles.items() if owner != model and role != "*"))
    everybody = config.roles.get("*") == model
    if named:
        wanted = {role for role in named if role in own or (everybody and role not in others)}
        return ModelCalls(model=model, roles=tuple(sorted(wanted)), other_roles=others)
    return ModelCalls(model=model, roles=None if everybody else tuple(sorted(own)), other_roles=others)


def wrong_owner(rule: LeaseRule, call: Call) -> str | None:
    """Return the reason for which a call is no model's of the rule, by its model and its role; None where it is."""
    said = {_wrong_for(each, rule, call) for each in rule.trained}
    return None if None in said else min(said - {OTHER_MODEL}, default=OTHER_MODEL, key=str)


def _wrong_for(of: ModelCalls, rule: LeaseRule, call: Call) -> str | None:
    role = call.attribution.role
    if call.model not in (of.model, *rule.recorded_models) or role in of.other_roles:
        return OTHER_MODEL
    if of.roles is None or role in of.roles:
        return None
    return NO_ROLE if role is None else OTHER_ROLE


def reward_counts(rule: LeaseRule, reward: Reward) -> bool:
    """Whether a reward makes a run ready, and is credit."""
    named = not rule.reward_names or reward.name in rule.reward_names
    return named and (not rule.reward_sources or reward.source in rule.reward_sources)
