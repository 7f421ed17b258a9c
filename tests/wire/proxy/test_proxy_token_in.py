"""Calls that go on from an earlier call of their run: why their prompts drift, and prompts of sampled ids."""

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import fake_sampling
import httpx
import pytest
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from waits import wait_for

from tracegrad.adapters.proxy import continuing, rendering
from tracegrad.tracestore.records import Call, Continues
from tracegrad.tracestore.store import Store

CHAT = "/run/{}/role/{}/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
Said = list[dict[str, Any]]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


class Chat:
    """A client that keeps the whole conversation, as agents do."""

    def __init__(self, proxy: SimpleNamespace, run: str = "r", role: str = "agent", **always: Any) -> None:
        self.messages: Said = []
        self._proxy, self._run, self._role, self._always = proxy, run, role, always

    def say(self, *more: dict[str, Any], stream: bool = False, **extra: Any) -> httpx.Response:
        self.messages += more
        body = {"model": "main", "messages": self.messages, "stream": stream, **self._always, **extra}
        answer: httpx.Response = self._proxy.client.post(CHAT.format(self._run, self._role), json=body)
        assert answer.status_code == 200, answer.text
        if stream:
            deltas = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
            said = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in deltas if chunk["choices"])
            self.messages.append({"role": "assistant", "content": said})
        else:
            message = answer.json()["choices"][0]["message"]
            kept = {name: message[name] for name in ("role", "content", "tool_calls") if message.get(name)}
            self.messages.append({"content": None, **kept})
        return answer


def calls_of(store: Store, run: str = "r") -> tuple[Call, ...]:
    return store.trace(run).calls


def sampled(call: Call, choice: int = 0) -> list[int]:
    assert call.prompt_ids is not None
    return [*call.prompt_ids, *call.choices[choice].token_ids]


def begins_as_sampled(call: Call, earlier: Call) -> bool:
    ids = sampled(earlier)
    return list(call.prompt_ids or ())[: len(ids)] == ids


@pytest.fixture
def proxy(start_proxy: Callable[..., SimpleNamespace], engine_app: Any) -> SimpleNamespace:
    """Without token-in."""
    return start_proxy()


@pytest.fixture
def token_in(start_proxy: Callable[..., SimpleNamespace], engine_app: Any) -> SimpleNamespace:
    return start_proxy(token_in=["default"])


# -- which call a call goes on from


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_goes_on_as_sampled_has_no_drift(proxy: SimpleNamespace, store: Store, stream: bool) -> None:
    chat = Chat(proxy)
    for text in ("one", "two", "three"):
        chat.say(user(text), stream=stream)
    first, second, third = calls_of(store)
    assert first.continues is None
    assert second.continues == Continues(call_id=first.call_id, choice=0)
    assert third.continues == Continues(call_id=second.call_id, choice=0)
    assert begins_as_sampled(second, first) and begins_as_sampled(third, second)


def test_the_answer_that_was_chosen_is_the_one(proxy: SimpleNamespace, store: Store) -> None:
    chat = Chat(proxy)
    chat.say(user("one"), n=3)
    chat.messages[-1]["content"] = "2: one"
    chat.say(user("two"))
    first, second = calls_of(store)
    assert second.continues == Continues(call_id=first.call_id, choice=2)


def test_two_conversations_of_a_run_do_not_mix(proxy: SimpleNamespace, store: Store) -> None:
    """Nor do two runs, even with the same words; what stands alone continues nothing."""
    planner, writer = Chat(proxy, role="planner"), Chat(proxy, role="writer")
    other = Chat(proxy, run="other")
    for text in ("one", "two"):
        planner.say(user(f"plan {text}"))
        writer.say(user(f"write {text}"))
        other.say(user(f"plan {text}"))
    a, b, c, d = calls_of(store)
    assert (a.continues, b.continues) == (None, None)
    assert c.continues == Continues(call_id=a.call_id, choice=0)
    assert d.continues == Continues(call_id=b.call_id, choice=0)
    e, f = calls_of(store, "other")
    assert (e.continues, f.continues) == (None, Continues(call_id=e.call_id, choice=0))


def test_a_call_of_no_run_continues_nothing(proxy: SimpleNamespace, store: Store) -> None:
    said = [user("one"), {"role": "assistant", "content": "0: one"}, user("two")]
    for messages in (said[:1], said):
        answer = proxy.client.post("/v1/chat/completions", json={"model": "main", "messages": messages})
        assert answer.status_code == 200
        assert store.find_call(answer.headers["x-tracegrad-call"])[1] is None
    assert store.drift_counts("default") == []


def test_pictures_are_not_looked_at(token_in: SimpleNamespace, store: Store) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    chat = Chat(token_in)
    chat.say({"role": "user", "content": [{"type": "text", "text": "one"}, picture]})
    chat.say(user("two"))
    assert [call.continues for call in calls_of(store)] == [None, None]


@pytest.mark.parametrize("forgotten", [False, True])
def test_the_past_is_found_through_another_process(
    start_proxy: Callable[..., SimpleNamespace], store: Store, monkeypatch: pytest.MonkeyPatch, forgotten: bool
) -> None:
    """And where this one has forgotten it."""
    if forgotten:
        monkeypatch.setattr(continuing, "CAPACITY_TOKENS", 0)
    first, second = start_proxy(), start_proxy()
    chat, again = Chat(first), Chat(first if forgotten else second)
    chat.say(user("one"))
    if forgotten:
        Chat(first, run="another").say(user("in between"))
    again.messages = chat.messages
    again.say(user("two"))
    chat.say(user("three"))
    a, b, c = calls_of(store)
    assert b.continues == Continues(call_id=a.call_id, choice=0)
    assert c.continues == Continues(call_id=b.call_id, choice=0)


def test_memory_is_bounded_within_a_run_too(
    proxy: SimpleNamespace, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is forgotten is read again where it is needed."""
    monkeypatch.setattr(continuing, "CAPACITY_TOKENS", 500)
    chat = Chat(proxy)
    chat.say(user("one"))
    for number in range(20):
        Chat(proxy).say(user(f"something else {number}"))
    kept = proxy.app.continuing
    assert kept._n_tokens <= 500
    assert {call_id for run in kept._runs.values() for call_id in run.calls} == {one[1] for one in kept._kept}
    chat.say(user("two"))
    first, *_, last = calls_of(store)
    assert last.continues == Continues(call_id=first.call_id, choice=0)
    monkeypatch.setattr(continuing, "CAPACITY_TOKENS", 0)
    Chat(proxy).say(user("the end"))
    assert (kept._n_tokens, len(kept._kept), [run for run in kept._runs.values() if run.calls]) == (0, 0, [])


# -- the causes of drift


def test_other_ids_for_the_same_text(proxy: SimpleNamespace, store: Store, engine_app: Any) -> None:
    engine_app.samples_pairs = True
    chat = Chat(proxy)
    chat.say(user("one"))
    chat.say(user("two"))
    first, second = calls_of(store)
    assert second.continues == Continues(call_id=first.call_id, choice=0, drift="retokenised")
    assert not begins_as_sampled(second, first)


@pytest.mark.parametrize("how", ["trimmed", "thoughts", "a tool call in another form"])
def test_a_template_that_writes_something_else(proxy: SimpleNamespace, store: Store, engine_app: Any, how: str) -> None:
    chat = rewritten(proxy, engine_app, how)
    chat.say(user("two"))
    first, second = calls_of(store)
    assert second.continues == Continues(call_id=first.call_id, choice=0, drift="template")


def rewritten(proxy: SimpleNamespace, engine_app: Any, how: str) -> Chat:
    """A conversation whose first answer the template will not write as it was sampled."""
    chat = Chat(proxy, tools=[TOOL])
    if how == "trimmed":
        engine_app.trims, engine_app.answer_text = True, " an answer \n"
        chat.say(user("one"))
    elif how == "thoughts":
        engine_app.reasoning_parser = True
        chat.say(user("think"))
    else:
        engine_app.answer_text = f'{fake_sampling.OPEN}{{"arguments": {{}},  "name": "add"}}{fake_sampling.CLOSE}'
        chat.say(user("call"))
        assert chat.messages[-1]["tool_calls"][0]["function"]["name"] == "add"
        chat.messages.append({"role": "tool", "tool_call_id": chat.messages[-1]["tool_calls"][0]["id"], "content": "3"})
    return chat


@pytest.mark.parametrize("how", ["another answer", "other tools", "an earlier message", "fewer messages"])
def test_an_app_that_changes_history(token_in: SimpleNamespace, store: Store, engine_app: Any, how: str) -> None:
    """Also with token-in: what the app says counts."""
    chat, changed = Chat(token_in, tools=[TOOL]), {}
    chat.say({"role": "system", "content": "be brief"}, user("one"))
    if how == "another answer":
        chat.messages[-1]["content"] = "0: something else"
    elif how == "other tools":
        engine_app.samples_pairs = True
        chat.messages[:] = []
        chat.say({"role": "system", "content": "be brief"}, user("one"))
        changed = {"tools": [TOOL, {**TOOL, "function": {**TOOL["function"], "name": "subtract"}}]}
    elif how == "an earlier message":
        chat.messages[0]["content"] = "be verbose"
    else:
        del chat.messages[0]
    chat.say(user("two"), **changed)
    *_, first, second = calls_of(store)
    choice = 0 if how == "other tools" else None
    assert second.continues == Continues(call_id=first.call_id, choice=choice, drift="edited")
    assert list(second.prompt_ids or ()) == engine_app.render({"messages": chat.messages[:-1]})


def test_an_engine_that_cannot_say(
    proxy: SimpleNamespace, store: Store, engine_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_app.samples_pairs = True
    paths = engine_app._paths()
    monkeypatch.setattr(engine_app, "_paths", lambda: {path: how for path, how in paths.items() if "detok" not in path})
    chat = Chat(proxy)
    chat.say(user("one"))
    chat.say(user("two"))
    assert calls_of(store)[1].continues.drift == "unexplained"


@pytest.mark.parametrize("how", ["detokenize", "render"])
def test_an_engine_that_is_silent_keeps_no_answer_back(
    token_in: SimpleNamespace, store: Store, engine_app: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(rendering, "PATIENCE_S", 0.1)
    engine_app.samples_pairs = True
    chat = Chat(token_in)
    chat.say(user("one"))

    async def silent(*_: Any) -> None:
        await asyncio.sleep(5)

    monkeypatch.setattr(engine_app, f"_{how}", silent)
    began = time.monotonic()
    chat.say(user("two"))
    assert time.monotonic() - began < 3
    drift = "unexplained" if how == "detokenize" else "retokenised"
    assert calls_of(store)[1].continues == Continues(call_id=calls_of(store)[0].call_id, choice=0, drift=drift)


# -- token-in


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_built_from_what_was_sampled(
    token_in: SimpleNamespace, store: Store, engine_app: Any, stream: bool
) -> None:
    engine_app.samples_pairs = True
    chat = Chat(token_in)
    for text in ("one", "two", "three"):
        chat.say(user(text), stream=stream)
    first, second, third = calls_of(store)
    assert second.continues == Continues(call_id=first.call_id, choice=0, drift="retokenised", token_in=True)
    assert third.continues == Continues(call_id=second.call_id, choice=0, drift="retokenised", token_in=True)
    asked = fake_sampling.encode_text("<user>three")
    assert list(third.prompt_ids or ()) == [
        *sampled(second), *asked, fake_sampling.EOS, *fake_sampling.encode_text("<assistant>"),
    ]  # fmt: skip
    assert sampled(second)[: len(sampled(first))] == sampled(first)
    assert all(call.quarantine is None for call in calls_of(store))
    assert [body["messages"] for body in engine_app.requests][-1] == chat.messages[:-1], "parsers see the messages"


@pytest.mark.parametrize("how", ["trimmed", "thoughts", "a tool call in another form"])
def test_what_a_template_would_rewrite_stays(
    token_in: SimpleNamespace, store: Store, engine_app: Any, how: str
) -> None:
    chat = rewritten(token_in, engine_app, how)
    engine_app.answer_text = None
    answer = chat.say(user("call two"))
    first, second = calls_of(store)
    assert second.continues == Continues(call_id=first.call_id, choice=0, drift="template", token_in=True)
    assert begins_as_sampled(second, first)
    assert answer.json()["choices"][0]["message"]["tool_calls"], "what is answered to ids is parsed like any answer"
    assert "kv_transfer_params" not in second.request and answer.json()["prompt_token_ids"] is None


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reads_prompts", [False, True])
def test_a_parser_that_would_be_misled_gets_the_rendered_prompt(
    token_in: SimpleNamespace, store: Store, engine_app: Any, stream: bool, reads_prompts: bool
) -> None:
    """Thoughts that stay in the prompt must not make content of the next ones."""
    engine_app.reasoning_parser, engine_app.reads_prompts = True, reads_prompts
    chat = Chat(token_in)
    chat.say(user("think"))
    chat.say(user("think again"), stream=stream)
    first, second = calls_of(store)
    assert second.continues == Continues(call_id=first.call_id, choice=0, drift="template", token_in=not reads_prompts)
    assert second.choices[0].message["reasoning"] == "because" and "reasoning" in second.choices[0].flags


def test_a_call_that_its_client_left_says_that_its_prompt_was_ours(
    token_in: SimpleNamespace, store: Store, engine_app: Any
) -> None:
    engine_app.samples_pairs = True
    chat = Chat(token_in)
    chat.say(user("one"))
    engine_app.gate = threading.Event()
    body = {"model": "main", "messages": [*chat.messages, user("two")], "stream": True}
    with token_in.client.stream("POST", CHAT.format("r", "agent"), json=body) as answer:
        next(answer.iter_bytes())
    wait_for(lambda: len(calls_of(store)) == 2, "the second call is stored")
    engine_app.gate.set()
    first, second = calls_of(store)
    assert second.status == "aborted" and begins_as_sampled(second, first)
    assert second.continues == Continues(call_id=first.call_id, choice=0, drift="retokenised", token_in=True)


def test_an_answer_that_was_cut_short_goes_on(token_in: SimpleNamespace, store: Store, engine_app: Any) -> None:
    """The template ends its turn, so it is ended in the ids as well."""
    engine_app.samples_pairs = True
    chat = Chat(token_in)
    chat.say(user("one"), max_tokens=4)
    chat.say(user("two"))
    first, second = calls_of(store)
    assert first.choices[0].finish_reason == "length"
    assert second.continues == Continues(call_id=first.call_id, choice=0, drift="retokenised", token_in=True)
    assert (second.prompt_ids or ())[len(sampled(first))] == fake_sampling.EOS
    assert begins_as_sampled(second, first)


def test_a_client_that_was_told_less_is_told_no_more(token_in: SimpleNamespace, store: Store, engine_app: Any) -> None:
    """After a stop string the client has another history than was sampled."""
    engine_app.samples_pairs = True
    chat = Chat(token_in)
    chat.say(user("one more"), stop=["more"])
    chat.say(user("two"))
    first, second = calls_of(store)
    assert "stop_string" in first.choices[0].flags
    assert second.continues == Continues(call_id=first.call_id, choice=0, drift="template")


def test_only_projects_that_opted_in_have_it(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any
) -> None:
    engine_app.samples_pairs = True
    for number, (projects, used) in enumerate([(["another"], False), (["*"], True)]):
        chat = Chat(start_proxy(token_in=projects), run=f"r{number}")
        chat.say(user("one"))
        chat.say(user("two"))
        assert calls_of(store, f"r{number}")[1].continues.token_in is used


@pytest.mark.parametrize("lacking", ["renders", "takes_ids"])
def test_an_engine_without_it_is_asked_as_always(
    token_in: SimpleNamespace, store: Store, engine_app: Any, lacking: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine says what it was prompted with: that is recorded, and token-in is over for the model."""
    engine_app.samples_pairs = True
    setattr(engine_app, lacking, False)
    chat = Chat(token_in)
    for text in ("one", "two", "three"):
        chat.say(user(text))
    _, second, third = calls_of(store)
    for call in (second, third):
        assert (call.continues.drift, call.continues.token_in, call.quarantine) == ("retokenised", False, None)
    assert list(third.prompt_ids or ()) == engine_app.render({"messages": chat.messages[:-1]})
    assert [record for record in caplog.messages if "token-in is off for model main" in record]
    health = token_in.client.get("/health").json()["models"]["main"]
    assert health["token_in"].startswith("its engine")
    assert "kv_transfer_params" not in engine_app.requests[-1]
    setattr(engine_app, lacking, True)
    token_in.app.upstream.pools["main"]._changed()  # it was down, and is seen to be up again
    chat.say(user("four"))
    assert calls_of(store)[-1].continues.token_in


def test_ids_that_the_engine_refuses_are_not_insisted_on(
    token_in: SimpleNamespace, store: Store, engine_app: Any
) -> None:
    """Thoughts that were sampled make a prompt longer than the one that leaves them out."""
    engine_app.reasoning_parser = True
    chat = Chat(token_in)
    chat.say(user("think"))
    engine_app.max_model_len = len(engine_app.render({"messages": [*chat.messages, user("two")]}))
    chat.say(user("two"))
    second = calls_of(store)[1]
    assert (second.continues.drift, second.continues.token_in) == ("template", False)
    assert "kv_transfer_params" not in engine_app.requests[-1]
    assert "kv_transfer_params" in engine_app.requests[-2]


@pytest.mark.parametrize("field", [{"echo": True}, {"truncate_prompt_tokens": 20}, {"return_prompt_text": True}])
def test_a_request_that_needs_rendering_is_rendered(
    token_in: SimpleNamespace, store: Store, engine_app: Any, field: dict[str, Any]
) -> None:
    """And is no sign that the engine takes no ids: a later one is built from them again."""
    engine_app.samples_pairs = True
    chat = Chat(token_in)
    chat.say(user("one"))
    chat.say(user("two"), **field)
    assert "kv_transfer_params" not in engine_app.requests[-1]
    chat.say(user("three"))
    chat.say(user("four"))
    _, second, third, fourth = calls_of(store)
    assert (second.continues.token_in, fourth.continues.token_in) == (False, True)
    assert third.continues.token_in is ("truncate_prompt_tokens" not in field), (
        "nor is a prompt that was cut gone on from"
    )
    assert "token_in" not in token_in.client.get("/health").json()["models"]["main"]


def test_an_adapter_that_is_not_loaded_yet_does_not_end_it(
    token_in: SimpleNamespace, store: Store, engine_app: Any
) -> None:
    """The engine says 404 to that as well as to a path that it has not."""
    engine_app.samples_pairs = True
    chat = Chat(token_in)
    chat.say(user("one"))
    engine_app.loaded = False
    chat.say(user("two"))
    engine_app.loaded = True
    chat.say(user("three"))
    assert [call.continues.token_in for call in calls_of(store)[1:]] == [False, True]


def test_a_template_without_an_end_of_turn_is_asked_once(
    token_in: SimpleNamespace, engine_app: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_app.samples_pairs = True
    render = engine_app.render
    monkeypatch.setattr(
        engine_app, "render", lambda body: render(body)[: -1 if body.get("add_generation_prompt") is False else None]
    )
    chat = Chat(token_in)
    chat.say(user("one"))
    chat.say(user("two"))
    assert "no token" in token_in.client.get("/health").json()["models"]["main"]["token_in"]


def test_a_real_agent_loop(start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any) -> None:
    """LangChain writes answers and tool calls in its own way; `create_agent` goes on exactly all the same."""
    engine_app.samples_pairs = True

    def add(a: int, b: int) -> int:
        """Add."""
        return a + b

    proxy = start_proxy(token_in=["*"])
    model = ChatOpenAI(model="main", base_url=f"{proxy.url}/run/r/role/agent/v1", api_key="none")
    agent = create_agent(model, [add], system_prompt="call tools")
    state: dict[str, Any] = {"messages": [{"role": "user", "content": "call"}]}
    with pytest.raises(Exception, match="ecursion"):
        agent.invoke(state, {"recursion_limit": 6})
    calls = calls_of(store)
    assert len(calls) == 3
    for earlier, call in itertools.pairwise(calls):
        assert call.continues == Continues(call_id=earlier.call_id, choice=0, drift=call.continues.drift, token_in=True)
        assert begins_as_sampled(call, earlier)


def test_drift_is_counted(proxy: SimpleNamespace, store: Store, engine_app: Any) -> None:
    chat = Chat(proxy)
    chat.say(user("one"))
    chat.say(user("two"))
    engine_app.samples_pairs = True
    chat.say(user("three"))
    chat.say(user("four"))
    page = proxy.client.get("/metrics").text
    wanted = {
        'tracegrad_calls_continued_total{drift="",model="main",token_in="false",worker="0"} 2.0',
        'tracegrad_calls_continued_total{drift="retokenised",model="main",token_in="false",worker="0"} 1.0',
    }
    assert wanted <= set(page.splitlines())
    assert {one.drift: one.calls for one in store.drift_counts("default")} == {None: 2, "retokenised": 1}


def test_clients_cannot_send_ids(token_in: SimpleNamespace) -> None:
    body = {"model": "main", "messages": [user("x")], "kv_transfer_params": {"prompt_token_ids": [1]}}
    answer = token_in.client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "field_not_allowed")
