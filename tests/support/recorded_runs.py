"""Runs as a proxy would have recorded them, for trainers without an engine: a tiny random Llama and its traces.

The bandit: a prompt of three ids, answers of one to four ids, two roles, reward 1 where the answer starts with
`LUCKY`. Behaviour logprobs are the model's own (taken by the learner's `score`), so that ratios mean something.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracegrad.tracestore.config import Config, parse_config
from tracegrad.tracestore.records import (
    Attribution,
    Call,
    CallTiming,
    Choice,
    Group,
    LeaseRule,
    ModelCalls,
    Reward,
    Run,
    RunTrace,
    Task,
)
from tracegrad.tracestore.store import Store
from tracegrad.trainer.results import Scored

MODEL = "tiny"
VOCABULARY = 24
LUCKY = 7
ROLES = ("planner", "writer")
RULE = LeaseRule(trained=(ModelCalls(model=MODEL),), max_staleness=1, min_group=1)
Score = Callable[[Sequence[Scored], float], Sequence[Scored]]


def random_llama(folder: Path, *, tied: bool = False, seed: int = 0, hidden: int = 32, layers: int = 2) -> Path:
    """Write a random Llama of a few thousand parameters in Hugging Face format, with a stand-in tokenizer file."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 256}')
    return folder


def configuration(base: Path, output: Path, *, store: str = "sqlite:///unused.db", **trainer: Any) -> Config:
    """Return a configuration of one fp32 model for both roles; `trainer` overrides, nested mappings included."""
    settings: dict[str, Any] = {
        "job": "test",
        "model": MODEL,
        "output": str(output),
        "precision": "fp32",
        "workers": {"threads": 1},
        "steps": 4,
        "batch": {"groups": 2, "row_tokens": 64, "lease_s": 60.0, "poll_s": 0.01},
        "optimizer": {"lr": 1e-2, "critic_lr": 1e-2},
        "publish": {"probe_tokens": 16},
    }
    dtype = trainer.pop("dtype", "float32")
    for key, value in trainer.items():
        settings[key] = {**settings.get(key, {}), **value} if isinstance(value, dict) else value
    return parse_config(
        {
            "store": store,
            "models": {MODEL: {"checkpoint": str(base), "engine": {"dtype": dtype}}},
            "roles": dict.fromkeys(ROLES, MODEL),
            "trainer": settings,
        }
    )


@dataclass(frozen=True)
class Recorded:
    """What one group left in the store."""

    task: Task
    group: Group
    traces: tuple[RunTrace, ...]


def recorded_groups(
    count: int, *, score: Score, version_id: int = 1, size: int = 4, seed: int = 0, temperature: float = 1.0
) -> list[Recorded]:
    """Return `count` groups of `size` runs; each run has a call of each role. `score` gives behaviour logprobs."""
    rng = random.Random(seed)
    groups = []
    for number in range(count):
        key = f"s{seed}-g{number:03d}"
        drafts = [_draft(rng, number) for _ in range(size * len(ROLES))]
        answers = score([Scored(ids=p + a, n_prompt=len(p), logprobs=()) for p, a in drafts], temperature)
        traces = tuple(
            _trace(key, member, answers[member * 2 : member * 2 + 2], version_id, temperature) for member in range(size)
        )
        task = Task(task_id=f"task-{key}", input={"question": number})
        group = Group(group_id=key, task_id=task.task_id, planned_size=size, purpose="train")
        groups.append(Recorded(task=task, group=group, traces=traces))
    return groups


def stored_groups(folder: Path, *, groups: int, **trainer: Any) -> Config:
    """Fill a store in `folder` with groups that other weights, equal to the base, sampled; return the configuration."""
    base = random_llama(folder / "base", hidden=64)
    optimizer = {"epochs": 2, "minibatches": 2, "lr": 1e-3}
    config = configuration(base, folder / "out", store=f"sqlite:///{folder}/store.db", optimizer=optimizer, **trainer)
    sample_groups(config, folder / "sampler", groups)
    return config


def sample_groups(config: Config, folder: Path, count: int) -> None:
    """Fill the store of a configuration with groups that weights of another job sampled, which begin as its own."""
    from tracegrad.tracestore.store import open_store
    from tracegrad.trainer.learner import Learner

    learner = Learner(config)
    made = learner.create(str(folder))
    with closing(open_store(config.store)) as store:
        version = store.add_version(
            model=MODEL,
            kind="initial",
            parent_id=None,
            checkpoint_path=made.path,
            checkpoint_hash=made.hash,
            step=0,
            job_id=None,
        )
        fill(store, recorded_groups(count, score=learner.score, version_id=version.version_id))


def fill(store: Store, groups: Sequence[Recorded]) -> None:
    """Put the groups into a store as proxy and driver would."""
    for recorded in groups:
        store.put_tasks([recorded.task])
        store.put_groups([recorded.group])
        for trace in recorded.traces:
            run = trace.run
            store.open_run(
                Run(
                    run_id=run.run_id,
                    purpose="train",
                    task_id=run.task_id,
                    group_id=run.group_id,
                    member=run.member,
                    opened_at=run.opened_at,
                )
            )
            store.append_calls(trace.calls)
            store.add_rewards(trace.rewards)
            store.end_run(run.run_id, status="closed", ended_by="explicit")


def traces_of(groups: Sequence[Recorded]) -> list[RunTrace]:
    """Return the traces of all groups, in order."""
    return [trace for recorded in groups for trace in recorded.traces]


def call_of(
    run_id: str, role: str, answer: Scored, *, version_id: int, temperature: float, order: int, call_id: str
) -> Call:
    """Return a complete call with one choice."""
    return Call(
        call_id=call_id,
        completion_id=None,
        attribution=Attribution(run_id=run_id, run_source="header", role=role, role_source="header"),
        model=MODEL,
        requested_model=MODEL,
        version_dispatched=version_id,
        version_completed=version_id,
        prompt_ids=answer.ids[: answer.n_prompt],
        choices=(
            Choice(
                index=0,
                token_ids=answer.ids[answer.n_prompt :],
                logprobs=answer.logprobs,
                finish_reason="stop",
            ),
        ),
        status="complete",
        timing=CallTiming(
            received_at=1000.0 + order, dispatched_at=1000.0 + order, first_token_at=None, completed_at=1001.0 + order
        ),
        request={"messages": []},
        requested={"temperature": temperature},
        effective={"temperature": temperature},
    )


def _draft(rng: random.Random, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    prompt = (3, 4 + number % 16, 5)
    first = LUCKY if rng.random() < 0.4 else rng.randrange(8, VOCABULARY)
    return prompt, (first, *(rng.randrange(8, VOCABULARY) for _ in range(rng.randrange(4))))


def _trace(key: str, member: int, answers: Sequence[Scored], version_id: int, temperature: float) -> RunTrace:
    run_id = f"run-{key}-{member}"
    calls = tuple(
        call_of(
            run_id,
            role,
            answer,
            version_id=version_id,
            temperature=temperature,
            order=order,
            call_id=f"call-{key}-{member}-{role}",
        )
        for order, (role, answer) in enumerate(zip(ROLES, answers, strict=True))
    )
    hits = [answer.ids[answer.n_prompt] == LUCKY for answer in answers]
    rewards = (
        Reward(reward_id=f"rw-{run_id}", run_id=run_id, name="score", value=sum(hits) / 2, source="test"),
        Reward(
            reward_id=f"rw-{run_id}-writer",
            run_id=run_id,
            name="style",
            value=float(hits[1]),
            source="test",
            role=ROLES[1],
        ),
    )
    run = Run(
        run_id=run_id,
        purpose="train",
        task_id=f"task-{key}",
        group_id=key,
        member=member,
        status="closed",
        ended_by="explicit",
        opened_at=1000.0,
    )
    return RunTrace(run=run, calls=calls, rewards=rewards)


def bandit_trace(key: str, member: int, answer: Scored, *, reward: float) -> RunTrace:
    """Return a run of group `key` with one call of the first role and one reward on the run."""
    run_id = f"{key}-{member}"
    call = call_of(run_id, ROLES[0], answer, version_id=1, temperature=1.0, order=0, call_id=f"call-{run_id}")
    run = Run(run_id=run_id, purpose="train", task_id="t", group_id=key, member=member, status="closed")
    given = Reward(reward_id=f"rw-{run_id}", run_id=run_id, name="score", value=reward, source="test")
    return RunTrace(run=run, calls=(call,), rewards=(given,))
