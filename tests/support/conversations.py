"""Conversations with a proxy by a client that keeps them whole, as agents do, and what is stored of their calls."""

import json
from types import SimpleNamespace
from typing import Any

import fake_sampling
import httpx

from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.records import Call
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


def calls_of(store: Store, run_id: str = "r") -> tuple[Call, ...]:
    """The stored calls of a run; none where its first is not committed yet."""
    try:
        return store.trace(run_id).calls
    except NotFound:
        return ()


def sampled(call: Call, choice: int = 0) -> list[int]:
    assert call.prompt_ids is not None
    return [*call.prompt_ids, *call.choices[choice].token_ids]


def begins_as_sampled(call: Call, earlier: Call) -> bool:
    ids = sampled(earlier)
    return list(call.prompt_ids or ())[: len(ids)] == ids


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
