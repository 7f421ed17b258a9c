"""What a configured training job may lease, as a rule for the store.

The proxy's backlog and the trainer's leases must mean the same groups, so both read it here.
"""

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import LeaseRule

ANY_STALENESS = 2**31 - 1


def lease_rule(config: Config, *, offline: bool = False) -> LeaseRule:
    """Return which groups the job takes: its roles, its rewards, its bound on staleness.

    Offline there is no bound: whoever trains from stored runs has asked for what older weights sampled.
    """
    trainer = config.trainer
    credit = trainer.algorithm.credit
    by_name = tuple(sorted(role for role, model in config.roles.items() if model == trainer.model and role != "*"))
    return LeaseRule(
        model=trainer.model,
        roles=None if config.roles.get("*") == trainer.model else by_name,
        max_staleness=ANY_STALENESS if offline else trainer.batch.max_staleness,
        min_group=trainer.batch.min_group if credit.grouped else 1,
        reward_names=tuple(sorted(credit.reward_weights)),
        project=config.project,
    )
