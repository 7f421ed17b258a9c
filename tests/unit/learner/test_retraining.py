"""The same stored runs, trained once more without app or engine: by another role map, with new rewards."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import recorded_runs as recorded
from click.testing import CliRunner
from offline_training import train
from sqlalchemy import select
from versions import add_version

from tracegrad.adapters.reward_command import reward
from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.records import RunTrace, Task
from tracegrad.tracestore.rules import lease_rule
from tracegrad.tracestore.schema import calls, checkpoints, consumption, ledger
from tracegrad.tracestore.store import Store, open_store
from tracegrad.trainer.errors import TrainerError
from tracegrad.trainer.tokenizer_match import check_recorded_models

Configure = Callable[..., Config]


def brevity(trace: RunTrace, _task: Task | None) -> dict[str, float]:
    return {"brevity": 1.0 / sum(len(choice.token_ids) for call in trace.calls for choice in call.choices)}


def tokens(folder: Path, *words: str) -> None:
    (folder / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {word: n for n, word in enumerate(words)}}, "added_tokens": []})
    )


@pytest.fixture
def base(llama: Path, tmp_path: Path) -> Path:
    """The model with a tokenizer to compare."""
    folder = tmp_path / "base"
    shutil.copytree(llama, folder)
    tokens(folder, "a", "b")
    return folder


def split(config: Config, base: Path, model: str, **runs: Any) -> Config:
    """The other role map: a model for each role. The job is named after its model."""
    raw = msgspec.to_builtins(config)
    raw["models"] |= {
        name: {"checkpoint": str(base), "engine": {"dtype": "float32", "url": f"http://127.0.0.1:{port}"}}
        for name, port in (("plan_m", 8001), ("write_m", 8002))
    }
    raw["models"][recorded.MODEL]["checkpoint"] = str(base)
    raw["roles"] = {"planner": "plan_m", "writer": "write_m"}
    raw["trainer"] |= {"job": f"job-{model}", "model": model}
    raw["trainer"]["batch"]["runs"] |= runs
    return parse_config(raw)


def trained_calls(store: Store, job: str) -> dict[str, set[str]]:
    """Role -> the calls of which the job trained every token."""
    with store._db.read() as connection:
        rows = connection.execute(
            select(calls.c.role, calls.c.call_id)
            .join(consumption, consumption.c.seq == calls.c.seq)
            .where(consumption.c.job_id == job, consumption.c.trained_tokens == consumption.c.n_tokens)
        ).all()
    found: dict[str, set[str]] = {}
    for role, call_id in rows:
        found.setdefault(role, set()).add(call_id)
    return found


def accounts(store: Store, job: str) -> list[Any]:
    """Everything that the ledger says of a job."""
    with store._db.read() as connection:
        return [
            list(connection.execute(select(table).where(table.c.job_id == job).order_by(*table.primary_key)))
            for table in (ledger, consumption, checkpoints)
        ]


def every_call(store: Store, role: str) -> set[str]:
    with store._db.read() as connection:
        return set(connection.execute(select(calls.c.call_id).where(calls.c.role == role)).scalars())


def test_one_shared_model_becomes_two(configure: Configure, store: Store, base: Path) -> None:
    """Each role's calls reach the job of its model, and no other; what the first job did stays as it was."""
    shared = configure(steps=2)
    train(shared, store)
    before, planners, writers = accounts(store, "test"), every_call(store, "planner"), every_call(store, "writer")
    assert [len(rows) for rows in before] == [16, 32, 2]
    done = trained_calls(store, "test")
    assert done["planner"] < planners and done["writer"] < writers and len(done["planner"] | done["writer"]) == 32

    for model, role, theirs in (("plan_m", "planner", planners), ("write_m", "writer", writers)):
        asks = split(shared, base, model)
        assert train(asks, store)[-1].startswith("32 runs have calls of these roles that 'tiny' answered")
        assert accounts(store, f"job-{model}")[0] == []
        said = train(split(configure(steps=9), base, model, recorded_models=["tiny"]), store)
        assert said[-1] == "stopped after step 4: 0 ready groups are left, a step takes 2"
        assert trained_calls(store, f"job-{model}") == {role: theirs}
        report = store.consumption(f"job-{model}")
        assert report.conserved and report.excluded.keys() == {"other model"}
        assert {v.model for v in store.list_versions() if v.job_id == f"job-{model}"} == {model}
    assert accounts(store, "test") == before


def test_two_models_become_one(configure: Configure, base: Path, tmp_path: Path, make_store: Store) -> None:
    """Recorded by a model for each role, trained as one; a role that the map gives elsewhere stays out."""
    both = configure(base, job="both", steps=9, batch={"runs": {"recorded_models": ["plan_m", "write_m"]}})
    raw = msgspec.to_builtins(both)
    raw["models"] |= {
        name: {"checkpoint": str(base), "engine": {"url": f"http://127.0.0.1:{port}"}}
        for name, port in (("plan_m", 8001), ("write_m", 8002))
    }
    train(parse_config(raw), make_store)
    assert trained_calls(make_store, "both") == {r: every_call(make_store, r) for r in recorded.ROLES}
    raw["roles"] = {"*": "tiny", "writer": "write_m"}
    raw["trainer"]["job"] = "part"
    train(parse_config(raw), make_store)
    assert trained_calls(make_store, "part") == {"planner": every_call(make_store, "planner")}


@pytest.fixture
def make_store(configure: Configure) -> Iterator[Store]:
    """Two groups whose planner and writer were answered by models of their own."""
    with closing(open_store(configure().store)) as opened:
        versions = {
            role: add_version(opened, model, model=model)
            for role, model in zip(recorded.ROLES, ("plan_m", "write_m"), strict=True)
        }

        def score(sequences: Any, _temperature: float) -> Any:
            return [replace(one, logprobs=(-1.0,) * (len(one.ids) - one.n_prompt)) for one in sequences]

        def answered(trace: RunTrace) -> RunTrace:
            def by(call: Any) -> Any:
                version = versions[call.attribution.role]
                return replace(
                    call,
                    model=version.model,
                    version_dispatched=version.version_id,
                    version_completed=version.version_id,
                )

            return replace(trace, calls=tuple(map(by, trace.calls)))

        groups = recorded.recorded_groups(2, score=score)
        recorded.fill(opened, [replace(one, traces=tuple(map(answered, one.traces))) for one in groups])
        yield opened


def test_ids_never_cross_tokenizers(configure: Configure, store: Store, base: Path, tmp_path: Path) -> None:
    """Refused before anything is leased: where the ids mean other tokens, and where nobody can say."""
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokens(other, "b", "a")
    raw = msgspec.to_builtins(split(configure(), base, "plan_m", recorded_models=["tiny"]))
    raw["models"]["plan_m"]["checkpoint"] = str(other)
    with pytest.raises(TrainerError, match=r"calls of 'tiny' cannot train 'plan_m': the token ids of .*base are not"):
        train(parse_config(raw), store)
    unknown = split(configure(), base, "plan_m", recorded_models=["lost"])
    with pytest.raises(TrainerError, match=r"the tokenizer of 'lost' is not to be found .*models\.lost\.checkpoint"):
        train(unknown, store)
    online = split(configure(), base, "plan_m", recorded_models=["tiny"])
    with pytest.raises(TrainerError, match="--offline only"):
        check_recorded_models(store, online, lease_rule(online), offline=False)
    assert [job.job_id for job in store.list_jobs()] == []


def test_new_rewards_train_in_the_next_epoch_and_in_a_new_job(configure: Configure, store: Store) -> None:
    """`tracegrad reward --with` over stored runs: the job that trained them takes them again, and so does another."""
    by_brevity = {"algorithm": {"credit": {"reward_weights": {"brevity": 1.0}}}}
    train(configure(), store)
    first = accounts(store, "test")
    assert train(configure(steps=9, **by_brevity), store)[-1].startswith("stopped after step 4: 0 ready groups")
    given = CliRunner().invoke(reward, ["--with", f"{__name__}:brevity", "--store", store.url, "--json"])
    told = json.loads(given.output)
    assert (told["rewarded"], told["late"]) == (32, {"test": 32})

    said = train(configure(steps=9, batch={"runs": {"epoch": 1}}, **by_brevity), store)
    assert said[-1] == "stopped after step 8: 0 ready groups are left, a step takes 2"
    assert store.consumption("test", 1).conserved
    assert store.consumption("test", 1).trained == store.consumption("test", 0).trained > 0
    entered = accounts(store, "test")
    assert [row for row in entered[0] if row.epoch == 0] == first[0]
    means = [row.metrics["reward"] for row in entered[2]]
    lengths = 1 / means[4]
    assert 2 < lengths < 8 and means[4] != means[0], "the second pass is rewarded for brevity"

    train(configure(job="again", **by_brevity), store)
    assert store.consumption("again").trained == store.consumption("test", 0).trained
    assert accounts(store, "test")[0] == entered[0]
