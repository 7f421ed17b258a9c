"""Calls that go on from an earlier call of their run: drift is told by its cause, and with token-in there is none.

A chat template renders the whole history anew for each call. The ids it makes of an answer need not be those that were
sampled (other ids for the same text, thoughts left out, tool calls written in another form), and the app may edit what
it sends back. Every call says so (`records.Continues`), whether or not its project has token-in. In a project that has,
the prompt of such a call is the earlier prompt and answer as they were sampled, then the rendered rest: given to the
engine as ids, while its parsers for tools and thoughts go on as ever. What cannot be built with certainty is rendered
as always.

Without token-in nothing is asked before the call is dispatched: the past is looked up while the engine works, and text
is compared only where ids differ. Not looked at are calls whose run is told later, and messages with pictures or sound
(vLLM takes no ids for them, and nobody wants them in memory). Called by `exchange`.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import msgspec

from tracegrad.adapters.proxy.capture import with_prompt_ids
from tracegrad.adapters.proxy.lineage import (
    Origin,
    Told,
    begins_with,
    difference,
    edited_from,
    ended,
    marks_in,
    marks_of,
    may_continue,
    only_text,
    origin_of,
    splice_point,
    takes_ids,
    told,
)
from tracegrad.adapters.proxy.recorder import Draft
from tracegrad.adapters.proxy.rendering import Rendered, Rendering
from tracegrad.adapters.proxy.upstream import NotSent, Upstream
from tracegrad.tracestore.records import Call, Continues, Drift, EarlierCall, Json
from tracegrad.tracestore.store import Store

CAPACITY_TOKENS = 1_000_000
"""Of prompts and answers kept in memory, about 40 bytes each; what is forgotten is read from the store again."""
_ENTRY_TOKENS = 50
"""What a call costs beside its tokens."""
CAPACITY_MARKS = 100_000
"""Of calls that were forgotten, about 100 bytes each."""
_RUN_MARKS = 5
"""What a run costs beside them."""
EVERY_PROJECT = "*"
_Raw = dict[str, msgspec.Raw]
_RunKey = tuple[str, str]


@dataclass(slots=True)
class _Run:
    """What is known of a run and a model. `mark`: how far the store was read; `forgotten`: what tells who would go on
    from one of the calls that were forgotten.
    """

    calls: dict[str, Told] = field(default_factory=dict)
    mark: int = 0
    forgotten: set[int] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class _Plan:
    """A prompt of ours in place of the rendered one, and why that one is not as sampled."""

    ids: list[int]
    drift: Drift


class Continuing:
    """What one proxy process remembers of its runs, and its way to the engines' tokenizers."""

    def __init__(self, store: Store, upstream: Upstream, token_in: Collection[str] = ()) -> None:
        self.rendering = Rendering(upstream)
        self._store = store
        self._token_in = frozenset(token_in)
        self._runs: dict[_RunKey, _Run] = {}
        self._kept: deque[tuple[_RunKey, str, int]] = deque()
        self._n_tokens = self._n_marks = 0

    def past(self, draft: Draft, body: bytes) -> "Past | None":
        """Return what is to be found out of a call's past; None where it can have none. `body` goes upstream."""
        run_id = draft.attribution.run_id
        if draft.endpoint != "chat" or draft.outside is not None or run_id is None or not may_continue(draft.body):
            return None
        return Past(self, draft, run_id, body)

    def remember(self, call: Call) -> None:
        """Keep a call that others of its run may go on from."""
        run_id = call.attribution.run_id
        if call.status != "complete" or call.quarantine is not None or call.endpoint != "chat":
            return
        if run_id is None or call.prompt_ids is None or not only_text(call.request):
            return
        kept = EarlierCall(
            call_id=call.call_id,
            role=call.attribution.role,
            request=call.request,
            prompt_ids=call.prompt_ids,
            choices=tuple(replace(choice, logprobs=None) for choice in call.choices),
        )
        self._keep(run_id, call.model, [told(kept)])

    async def earlier(self, run_id: str, model: str, request: Json) -> list[Told]:
        """Return what is known of a run, and what the store has beside it. Raises TraceStoreError.

        What was forgotten is read again only where `request` seems to go on from it: most that find no origin in memory
        have none at all, and a run may be long.
        """
        run = self._runs.setdefault((run_id, model), _Run())
        known = dict(run.calls)
        missed = bool(run.forgotten) and not run.forgotten.isdisjoint(marks_in(request))
        after = 0 if missed else run.mark
        found, mark = await asyncio.to_thread(self._store.earlier_calls, run_id, model, after=after, known=known.keys())
        run.mark = max(run.mark, mark)
        learnt = [told(call) for call in found]
        self._keep(run_id, model, learnt)
        return [*known.values(), *learnt]

    def remembered(self, run_id: str, model: str) -> list[Told]:
        """Return what this process knows of a run."""
        run = self._runs.get((run_id, model))
        return [] if run is None else list(run.calls.values())

    def wanted(self, draft: Draft) -> bool:
        """Whether the prompt is to be built from sampled ids, and the engines can take them."""
        opted_in = EVERY_PROJECT in self._token_in or draft.project in self._token_in
        return opted_in and draft.model not in self.rendering.missing and takes_ids(draft.body)

    def _keep(self, run_id: str, model: str, calls: Iterable[Told]) -> None:
        key = (run_id, model)
        run = self._runs.setdefault(key, _Run())
        for one in calls:
            call = one.call
            if call.call_id not in run.calls:
                cost = _ENTRY_TOKENS + len(call.prompt_ids) + sum(len(choice.token_ids) for choice in call.choices)
                run.calls[call.call_id] = one
                self._kept.append((key, call.call_id, cost))
                self._n_tokens += cost
        while self._n_tokens > CAPACITY_TOKENS:
            self._forget(*self._kept.popleft())
        if not run.calls and not run.forgotten:
            self._runs.pop(key, None)
        while self._n_marks + _RUN_MARKS * len(self._runs) > CAPACITY_MARKS:
            self._n_marks -= len(self._runs.pop(next(iter(self._runs))).forgotten)

    def _forget(self, key: _RunKey, call_id: str, cost: int) -> None:
        self._n_tokens -= cost
        run = self._runs.get(key)
        if run is not None and call_id in run.calls:
            marks = marks_of(run.calls.pop(call_id)) - run.forgotten
            run.forgotten |= marks
            self._n_marks += len(marks)


class Past:
    """The past of one call: `body` before it is dispatched, `settle` when it is answered, `drop` in any case."""

    def __init__(self, continuing: Continuing, draft: Draft, run_id: str, body: bytes) -> None:
        self._continuing = continuing
        self._draft = draft
        self._run_id = run_id
        self._body = body
        self._plan: _Plan | None = None
        self._refused = False
        self.sent: Continues | None = None
        """What the call goes on from if its prompt went up as ids, also where nothing complete comes back."""
        self._looking: asyncio.Task[Origin | None] | None = None

    async def body(self) -> bytes:
        """Return what is to be sent upstream. Begins to look for the past.

        Raises:
            NotSent: no engine of the model is up.
            TraceStoreError: the past of the run cannot be read.
        """
        self._plan, self._refused, self.sent = None, False, None
        self._looking = asyncio.create_task(self._look())
        if not self._continuing.wanted(self._draft):
            return self._body
        origin = await self._looking
        if origin is None or not origin.continuable:
            return self._body
        self._plan = await self._planned(origin)
        if self._plan is None:
            return self._body
        self.sent = replace(_continues(origin), drift=self._plan.drift, token_in=True)
        return with_prompt_ids(self._body, self._plan.ids)

    def refused(self) -> bytes | None:
        """Return what to send instead where the engine refused the ids (too long, say); None where it got none."""
        self._refused, self.sent = self._plan is not None, None
        return self._body if self._refused else None

    async def settle(self, prompt_ids: list[int] | None) -> Continues | None:
        """Return what the call goes on from, now that the prompt it was answered from is known.

        Raises:
            TraceStoreError: the past of the run cannot be read.
        """
        origin = None if self._looking is None else await self._looking
        if origin is None or prompt_ids is None:
            return None
        continues = _continues(origin)
        if self._plan is not None and prompt_ids == self._plan.ids:
            return replace(continues, drift=self._plan.drift, token_in=True)
        if self._plan is not None and not self._refused:
            self._continuing.rendering.lacks(self._draft.model, "its engine takes no prompts of token ids")
        return replace(continues, drift=await self._drift(origin, prompt_ids))

    def drop(self) -> None:
        """Stop looking; what was not waited for does not matter any more."""
        if self._looking is not None and not self._looking.cancel() and not self._looking.cancelled():
            self._looking.exception()

    async def _look(self) -> Origin | None:
        """Look in memory, then in the store; an edited history is taken for one only where no other fits."""
        request, model, continuing = self._draft.body, self._draft.model, self._continuing
        role = self._draft.attribution.role
        found = origin_of(request, role, continuing.remembered(self._run_id, model))
        if found is None or not found.newest:
            earlier = await continuing.earlier(self._run_id, model, request)
            found = origin_of(request, role, earlier) or edited_from(request, role, earlier)
        return found

    async def _drift(self, origin: Origin, prompt_ids: list[int]) -> Drift | None:
        """Compare ids, then text."""
        if origin.choice is None:
            return "edited"
        sampled = origin.sampled
        if begins_with(prompt_ids, sampled):
            return None
        if not origin.same_setting:
            return "edited"
        at = difference(prompt_ids, sampled)
        ours, theirs = await asyncio.gather(self._text(sampled[at:]), self._text(prompt_ids[at:]))
        if ours is None or theirs is None:
            return "unexplained"
        return "retokenised" if theirs.startswith(ours) else "template"

    async def _planned(self, origin: Origin) -> _Plan | None:
        """Build the prompt; None where the rendered one is as sampled, or where it cannot be done with certainty."""
        rendering, model = self._continuing.rendering, self._draft.model
        rendered = await rendering.prompt(model, self._body, self._run_id)
        if rendered is None or origin.choice is None or begins_with(rendered.token_ids, origin.sampled):
            return None
        end = await rendering.end_of_turn(model, self._run_id)
        sampled = None if end is None else ended(origin.sampled, origin.choice, end)
        if end is None or sampled is None or (rest := splice_point(rendered.token_ids, sampled, end)) is None:
            return None
        at, ids = difference(rendered.token_ids, sampled), rendered.token_ids
        ours, theirs = await asyncio.gather(self._text(sampled[at:]), self._text(ids[at:rest]))
        same_text = ours is not None and ours == theirs
        if ours is None or not (same_text or await self._ends_there(origin, ids, rest, end)):
            return None
        plan = _Plan(sampled + ids[rest:], "retokenised" if same_text else "template")
        return plan if await self._parses_as(rendered, plan) else None

    async def _ends_there(self, origin: Origin, rendered: list[int], rest: int, end: int) -> bool:
        """Whether the history up to the answer, rendered alone, has as many turns and goes on as the whole does."""
        fields = msgspec.json.decode(self._body, type=_Raw)
        history = self._draft.body["messages"][: origin.n_messages]
        fields["messages"] = msgspec.Raw(msgspec.json.encode(history))
        fields["add_generation_prompt"] = msgspec.Raw(b"false")
        body = msgspec.json.encode(fields)
        alone = await self._continuing.rendering.prompt(self._draft.model, body, self._run_id)
        if alone is None or alone.token_ids.count(end) != rendered[:rest].count(end):
            return False
        ids = alone.token_ids
        tail = ids[len(ids) - ids[::-1].index(end) :]
        return rendered[rest : rest + len(tail)] == tail

    async def _parses_as(self, rendered: Rendered, plan: _Plan) -> bool:
        """Whether the engine would parse an answer to our prompt as one to the rendered prompt.

        Some parsers of thoughts (vLLM 0.32: DeepSeek R1's and those like it) look for the end of a thought anywhere in
        the prompt, find that of an earlier answer, and take the next thoughts for content.
        """
        if rendered.reasoning_ended is None:
            return True
        body = with_prompt_ids(self._body, plan.ids)
        ours = await self._continuing.rendering.prompt(self._draft.model, body, self._run_id)
        return ours is not None and ours.reasoning_ended == rendered.reasoning_ended

    async def _text(self, ids: list[int]) -> str | None:
        try:
            return await self._continuing.rendering.text(self._draft.model, ids, self._run_id)
        except NotSent:
            return None


def _continues(origin: Origin) -> Continues:
    return Continues(call_id=origin.call.call_id, choice=None if origin.choice is None else origin.choice.index)
