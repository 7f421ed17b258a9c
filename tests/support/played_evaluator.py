"""An evaluator of several models that a test plays: it finds what it is told to, without an app."""

import contextlib
import threading
from collections.abc import Iterator, Mapping

from tracegrad.tracestore.evaluations import Evaluator
from tracegrad.tracestore.gating import evaluator_of
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.gating import evaluation

GATE = {"app": "a:g", "tasks": "t.jsonl", "reward": "r:f", "rule": {"max_drop": 0.1, "confidence": 0.5}}


@contextlib.contextmanager
def evaluator(store: Store, models: tuple[str, ...], by_step: Mapping[int, float]) -> Iterator[None]:
    """One that finds this of versions of these steps that are judged together; baselines too."""
    over = threading.Event()

    def work() -> None:
        me = Evaluator(evaluator_id="e", model=evaluator_of(models), tasks_hash="t", score="reward")
        while not over.wait(0.01):
            store.beat_evaluator(me)
            states = store.publish_view(models)
            versions = {name: state.live_version for name, state in states.items() if state.live_version is not None}
            if len(versions) < len(models):
                continue
            first = next((state.together[0] for state in states.values() if state.state == "evaluating"), None)
            if first is not None:
                versions |= {n: s.candidate for n, s in states.items() if s.state == "evaluating" and s.candidate}
            done = store.list_evaluations(publish_id=first) if first else store.find_baseline(versions, "t", "reward")
            newest = max(store.get_version(version_id).step for version_id in versions.values())
            if not done and newest in by_step:
                said = {"run_ids": ("a",), "n_failed": 0, "score": "reward", "values": {"one": by_step[newest]}}
                evaluation(store, versions[models[0]], versions=versions, publish_id=first, **said)

    thread = threading.Thread(target=work)
    thread.start()
    yield
    over.set()
    thread.join()
