"""LangSmith feedback as rewards: named by its key, source `langsmith`, appended like any other reward.

What the feedback is about decides the target. The trace's root, or the only graph at the top of its run: the run. A
model run: its call. A node, tool or graph in which one call was made: that call. Feedback without a score is no reward
(law 6). A score that is changed later is a second reward of that name on the same target: the newer counts. Refuses
(404) what no tree has told of yet, so that the client sends it again; (400) what is no single target: a step with no
call or several, a trace of several runs, a call without a run, a LangSmith project; (403) a key without the scope
`reward`. Feedback that came in one form with runs waits for them here, `WAIT_S` at most. Called by `langsmith`.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from uuid import UUID

from tracegrad.adapters.proxy.errors import InvalidRequest, MissingScope, ProxyError, from_store
from tracegrad.adapters.proxy.langsmith_wire import Feedback, read_feedback, read_new_score
from tracegrad.tracestore.errors import NotFound, StoreUnavailable, TraceStoreError
from tracegrad.tracestore.ids import new_id
from tracegrad.tracestore.records import ApiKey, LangSmithRun, Reward
from tracegrad.tracestore.store import Store

SOURCE = "langsmith"
WAIT_S = 60.0
MAX_WAITING = 10_000
log = logging.getLogger("tracegrad.proxy")


class Feedbacks:
    """The way from feedback to the store. `keys_wanted`: whether a key must have the scope."""

    def __init__(self, store: Store, *, keys_wanted: bool) -> None:
        self._store = store
        self._keys_wanted = keys_wanted
        self._waiting: list[tuple[Feedback, str, float]] = []

    async def answer(self, what: str, body: bytes, project: str) -> dict[str, object]:
        """Answer `feedback` or `feedback/{id}`. Raises ProxyError."""
        try:
            return {"reward_id": await asyncio.to_thread(self._answer, what, body, project)}
        except TraceStoreError as error:
            raise from_store(error) from error

    def _answer(self, what: str, body: bytes, project: str) -> str | None:
        _, _, named = what.partition("/")
        if not named:
            return self.add(read_feedback(body), project)
        score = read_new_score(body)
        return None if score is None else self.change(named, score, project)

    def check(self, key: ApiKey | None) -> None:
        """Raise MissingScope where a key that may post runs may not give rewards."""
        if self._keys_wanted and key is not None and not key.may("reward"):
            raise MissingScope(
                f"the key {key.key_id} has not the scope 'reward', which feedback needs; the runs beside it are taken"
            )

    def take(self, given: Sequence[Feedback], project: str) -> None:
        """Take feedback in that came with runs. Raises StoreUnavailable."""
        self._waiting += [(feedback, project, time.monotonic()) for feedback in given]
        self.try_again()

    def try_again(self, *, last: bool = False) -> None:
        """Write what waits for its tree. What cannot be a reward is logged. Raises StoreUnavailable."""
        waiting, self._waiting = self._waiting, []
        for number, (feedback, project, since) in enumerate(waiting):
            try:
                self.add(feedback, project)
            except NotFound as error:
                if last or time.monotonic() - since > WAIT_S or len(self._waiting) >= MAX_WAITING:
                    log.warning("LangSmith feedback %s is left out: %s", feedback.feedback_id, error)
                else:
                    self._waiting.append((feedback, project, since))
            except StoreUnavailable:
                self._waiting += waiting[number:]
                raise
            except (TraceStoreError, ProxyError) as error:
                log.warning("LangSmith feedback %s is left out: %s", feedback.feedback_id, error)

    def add(self, feedback: Feedback, project: str) -> str | None:
        """Append the reward and return its id, None where there is no score. The same feedback again is a no-op.

        Raises:
            NotFound: no tree of the project has told of the run.
            InvalidRequest: the run is no single target of a reward.
            Conflict: feedback with this id said something else.
        """
        if feedback.about is None:
            raise InvalidRequest("feedback on a LangSmith project is on no run: give a run_id", param="run_id")
        if feedback.score is None:
            return None
        run_id, call_id = self._target(feedback.about, project)
        reward = Reward(
            reward_id=_reward_id(feedback.feedback_id),
            run_id=run_id,
            name=feedback.key,
            value=feedback.score,
            source=SOURCE,
            call_id=call_id,
        )
        return self._store.add_rewards([reward])[0].reward_id

    def change(self, feedback_id: str, score: float, project: str) -> str:
        """Append what a feedback says now, and return the new reward's id. Raises NotFound."""
        try:
            first = self._store.get_reward(_reward_id(UUID(feedback_id).hex))
        except ValueError as error:
            raise InvalidRequest(f"{feedback_id!r} is no id of feedback: {error}") from error
        if first.source != SOURCE or self._store.get_run(first.run_id).project != project:
            raise NotFound(f"no feedback {feedback_id} in project {project!r}")
        changed = Reward(
            reward_id=new_id("feedback"),
            run_id=first.run_id,
            name=first.name,
            value=score,
            source=SOURCE,
            call_id=first.call_id,
        )
        return self._store.add_rewards([changed])[0].reward_id

    def _target(self, langsmith_id: str, project: str) -> tuple[str, str | None]:
        """Return the run, and the call in it where one is meant."""
        known = self._store.find_langsmith_run(langsmith_id, project)
        if known is None:
            raise NotFound(f"no LangSmith tree in project {project!r} has told of the run {langsmith_id} yet")
        if known.named:
            return self._call_of(known, project)
        if known.run_id is None:
            raise InvalidRequest(f"the LangSmith run {langsmith_id} belongs to no run: nothing would read its reward")
        if known.langsmith_id == known.trace_id:
            several = known.span_id is None and len(self._store.runs_of_trace(known.trace_id, project)) > 1
            if several:
                raise InvalidRequest(f"the trace {langsmith_id} is several runs: give feedback on one of its graphs")
            return known.run_id, None
        return known.run_id, self._step(known, known.run_id)

    def _call_of(self, known: LangSmithRun, project: str) -> tuple[str, str]:
        found = set()
        for named in known.named:
            try:
                found.add(self._store.find_call(named, project))
            except NotFound:
                continue
        if not found:
            raise NotFound(f"the call {known.named[0]} of the LangSmith run {known.langsmith_id} is not stored yet")
        if len(found) > 1:
            raise InvalidRequest(f"the LangSmith run {known.langsmith_id} made {len(found)} calls: which is meant?")
        call_id, run_id = found.pop()
        if run_id is None:
            raise InvalidRequest(f"the call {call_id} belongs to no run, so a reward on it would never be read")
        return run_id, call_id

    def _step(self, known: LangSmithRun, run_id: str) -> str | None:
        """Return the only call of a step; None where the step is the whole run."""
        if known.span_id is None:
            raise InvalidRequest(
                f"the LangSmith run {known.langsmith_id} is no node, tool, graph or model: give feedback on one"
            )
        around = known.span_id
        graphs = [span for span in self._store.list_spans(run_id) if span.kind == "graph"]
        own = next((span for span in graphs if span.span_id == known.span_id), None)
        if own is not None:  # what it runs hangs below the node it runs in, beside it
            beside = [span for span in graphs if span.parent_span_id == own.parent_span_id]
            if len(beside) == 1:
                if own.parent_span_id is None:
                    return None
                around = own.parent_span_id
        calls = self._store.calls_within(run_id, around)
        if len(calls) != 1:
            raise InvalidRequest(
                f"{len(calls)} calls were made in the LangSmith run {known.langsmith_id}, and a reward is on one: "
                "give feedback on a model run, or on the root"
            )
        return calls[0]


def _reward_id(feedback_id: str) -> str:
    return f"feedback_{feedback_id}"
