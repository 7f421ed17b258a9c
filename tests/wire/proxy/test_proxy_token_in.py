"""Prompts of sampled ids, for calls that go on from an earlier call of their run."""

import itertools
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import fake_sampling
import pytest
from conversations import CHAT, Chat, begins_as_sampled, calls_of, rewritten, sampled, user
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI
from waits import wait_for

from tracegrad.tracestore.records import Continues
from tracegrad.tracestore.store import Store


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


def test_clients_cannot_send_ids(token_in: SimpleNamespace) -> None:
    body = {"model": "main", "messages": [user("x")], "kv_transfer_params": {"prompt_token_ids": [1]}}
    answer = token_in.client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "field_not_allowed")
