"""Shares: what each model of a job trains on, out of one lease, and one account over all of them (laws 4, 5).

A call belongs to the model that sampled it: its ids are of that model's tokenizer, its logprobs of its weights. So of
every sampled token one model decides whether it trains or why not, and calls to what the job does not train are left
out as such. What other models recorded (`recorded_models`, offline) belongs to the model whose role it is now. Refuses
an account in which a choice stands twice or is trained by two. No I/O. Called by `leased`; `samples` decides for each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tracegrad.tracestore.reasons import OTHER_MODEL
from tracegrad.tracestore.records import Consumption, RunTrace
from tracegrad.trainer.errors import SampleError
from tracegrad.trainer.samples import Samples


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """The samples of each model, and the account of every sampled token of the runs, in the order of the traces.

    The `consumption` of a model's samples holds its own calls only; that of calls to no model of the job stands only
    here. Invariant: trained tokens add up over the models to those of the account, as do all sampled tokens with
    the job's strangers.
    """

    by_model: Mapping[str, Samples]
    consumption: tuple[Consumption, ...]

    @property
    def n_trained_tokens(self) -> int:
        """Sampled tokens that train, over all models."""
        return sum(entry.trained_tokens for entry in self.consumption)


def share(
    traces: Sequence[RunTrace], models: Sequence[str], build: Callable[[Sequence[RunTrace], str], Samples]
) -> Shares:
    """Give every choice of the traces to the model that sampled it. `build`: traces, a model -> its samples.

    Rewards and groups of every run go to every model: they are facts of the run, and of its group's statistics.

    Raises:
        SampleError: as `build`; or its accounts disagree about the choices there are.
    """
    built = {model: build(traces, model) for model in models}
    accounts = {model: {_key(entry): entry for entry in samples.consumption} for model, samples in built.items()}
    consumption = []
    own: dict[str, list[Consumption]] = {model: [] for model in models}
    for trace in traces:
        for call in trace.calls:
            for choice in call.choices:
                key = (trace.run.run_id, call.call_id, choice.index)
                if any(key not in account for account in accounts.values()):
                    raise SampleError(f"choice {choice.index} of call {call.call_id} is missing in a model's account")
                trained_by = [model for model, account in accounts.items() if account[key].trained_tokens]
                judge = call.model if call.model in accounts else next(iter(trained_by), None)
                if trained_by not in ([], [judge]):
                    raise SampleError(
                        f"choice {choice.index} of call {call.call_id} was sampled by {call.model!r} and would be "
                        f"trained by {', '.join(trained_by)}: tokens never cross models"
                    )
                entry = _told(accounts, key) if judge is None else accounts[judge][key]
                if judge is not None:
                    own[judge].append(entry)
                consumption.append(entry if judge in (None, call.model) else replace(entry, model=judge))
    if any(len(samples.consumption) != len(consumption) for samples in built.values()):
        raise SampleError(f"a model's account has another number of choices than the runs ({len(consumption)})")
    by_model = {model: replace(samples, consumption=tuple(own[model])) for model, samples in built.items()}
    return Shares(by_model=by_model, consumption=tuple(consumption))


def _told(accounts: Mapping[str, Mapping[tuple[str, str, int], Consumption]], key: tuple[str, str, int]) -> Consumption:
    """The reason why nobody trains what no model of the job sampled: that of the model whose role it is, if any is."""
    said = [account[key] for account in accounts.values()]
    return next((entry for entry in said if entry.reason != OTHER_MODEL), said[0])


def _key(entry: Consumption) -> tuple[str, str, int]:
    return entry.run_id, entry.call_id, entry.choice_index
