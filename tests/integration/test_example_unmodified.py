"""The example's app, as a program: straight at the real vLLM and under `tracegrad run` it prints the same."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_vllm
import pytest

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.store import open_store

pytestmark = pytest.mark.engine

ROOT = Path(__file__).resolve().parents[2]
CORPUS = {
    "1": {"title": "Mowgli", "extract": "Mowgli is a boy in a book by Kipling."},
    "2": {"title": "Kim", "extract": "Kim is a novel by Kipling about India."},
}
QUESTIONS = ["who wrote Kim", "who is Mowgli", "what is India"]


def _answers(folder: Path, env: dict[str, str], *launcher: str) -> list[str]:
    corpus = folder / "corpus.json"
    corpus.write_text(json.dumps(CORPUS))
    printed = []
    for question in QUESTIONS:
        done = subprocess.run(
            [*launcher, sys.executable, "-m", "examples.rag_qa.app", question],
            cwd=ROOT,
            env={**os.environ, "RAG_QA_CORPUS": str(corpus), "OPENAI_API_KEY": "x", **env},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        printed.append(done.stdout)
    return printed


@pytest.mark.timeout(400)
def test_the_same_program_prints_the_same_through_the_proxy(engine: Any, tmp_path: Path) -> None:
    engine.reset()
    config = parse_config(
        {
            "store": f"sqlite:///{tmp_path / 'trace.db'}",
            "models": {engine.name: {"checkpoint": "none", "engine": {"url": engine.url, "external": True}}},
            "roles": {"rewriter": engine.name, "answerer": engine.name},
            "trainer": {"model": engine.name},
        }
    )
    store = open_store(config.store)
    direct = _answers(tmp_path, {"OPENAI_BASE_URL": f"{engine.url}/v1", "RAG_QA_MODEL": engine.name})
    with fake_vllm.ServerThread(ProxyApp(config, store)) as server:
        launcher = (sys.executable, "-m", "tracegrad.adapters.cli", "run", "--proxy", server.url, "--")
        through = _answers(tmp_path, {}, *launcher)
    assert through == direct
    assert len(set(direct)) > 1, "the outputs must depend on the question for this to mean anything"
    runs = store.list_runs(limit=10)
    assert [summary.run.status for summary in runs] == ["closed"] * len(QUESTIONS)
    for trace in store.traces([summary.run.run_id for summary in runs]):
        assert [call.attribution.role for call in trace.calls] == ["rewriter", "answerer"]
        assert [call.requested_model for call in trace.calls] == ["gpt-4o-mini"] * 2
        assert all(call.quarantine is None and "greedy" in call.choices[0].flags for call in trace.calls)
    store.close()
