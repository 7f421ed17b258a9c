"""A reasoning model behind the real vLLM: thoughts are parsed, passed on, recorded exactly, and kept by token-in.

The tiny model with a tokenizer in which two bytes that it never uses are `<think>` and `</think>`; an engine of its own
with `--reasoning-parser`. What it thinks is drawn from a few tokens, so that every answer has thoughts and an end.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_vllm
import httpx
import pytest
from langchain_openai import ChatOpenAI
from pydantic import SecretStr
from wire_bytes import merged

from tracegrad.adapters.proxy.app import ProxyApp
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.records import Continues
from tracegrad.tracestore.store import open_store
from tracegrad.trainer.engine import EngineProcess

pytestmark = [pytest.mark.engine, pytest.mark.long]

CHAT = "/v1/chat/completions"
THINK, THOUGHT, END = 254, 255, 258
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "max of 3 and 5"}]
THINKING: dict[str, Any] = {
    "model": "tiny",
    "max_tokens": 60,
    "temperature": 1.5,
    "allowed_token_ids": [*range(15, 25), THOUGHT, END],
    "logit_bias": {str(THOUGHT): 5},
    "min_tokens": 6,
    "seed": 2,
}


def thinking_model(source: Path, target: Path, *, begins_thoughts: bool) -> Path:
    """Copy the tiny model, its tokenizer with two words more and two bytes less; its prompts may begin a thought."""
    shutil.copytree(source, target)
    if begins_thoughts:
        template = target / "chat_template.jinja"
        template.write_text(template.read_text().replace("assistant\\n' }}{% endif", "assistant\\n<think>' }}{% endif"))
    path = target / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    for token_id, word in ((THINK, "<think>"), (THOUGHT, "</think>")):
        del vocabulary[next(text for text, number in vocabulary.items() if number == token_id)]
        entry = {**tokenizer["added_tokens"][0], "id": token_id, "content": word, "special": False}
        tokenizer["added_tokens"].append(entry)
    tokenizer["added_tokens"].sort(key=lambda entry: entry["id"])  # ids are given in this order
    path.write_text(json.dumps(tokenizer))
    return target


@pytest.fixture(scope="module", params=[True, False], ids=["prompts begin a thought", "prompts do not"])
def served(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    start_engine: Callable[..., EngineProcess],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SimpleNamespace]:
    folder = tmp_path_factory.mktemp("reasoning")
    model = thinking_model(tiny_model, folder / "model", begins_thoughts=request.param)
    process = start_engine(model, folder / "engine.log", "--reasoning-parser", "deepseek_r1")
    url = process.client.url
    proxy_config = parse_config(
        {
            "store": f"sqlite:///{folder / 'store.db'}",
            "models": {"tiny": {"checkpoint": "none", "engine": {"url": url}}},
            "roles": {"*": "tiny"},
            "trainer": {"model": "tiny"},
            "token_in": ["*"],
        }
    )
    store = open_store(proxy_config.store)
    try:
        with (
            fake_vllm.ServerThread(ProxyApp(proxy_config, store)) as server,
            httpx.Client(base_url=server.url, timeout=120, verify=False) as proxy,
            httpx.Client(base_url=url, timeout=120, verify=False) as engine,
        ):
            yield SimpleNamespace(
                proxy=proxy, engine=engine, store=store, url=server.url, begins_thoughts=request.param
            )
    finally:
        store.close()
        process.stop()


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_are_passed_on_and_recorded(served: SimpleNamespace, stream: bool) -> None:
    body = {**THINKING, "messages": MESSAGES, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    headers = {"x-request-id": "same"}
    through = served.proxy.post(f"/run/r{stream}/role/a{CHAT}", json=body, headers=headers)
    direct = served.engine.post(CHAT, json=body, headers=headers)
    if stream:
        said = [merged(levelled(answer.content)) for answer in (through, direct)]
        assert said[0] == said[1]
    else:
        assert levelled(through.content) == levelled(direct.content)
    (call,) = served.store.trace(f"r{stream}").calls
    (choice,) = call.choices
    assert call.quarantine is None and "reasoning" in choice.flags
    thoughts, told = choice.message["reasoning"], choice.message["content"]
    assert thoughts and told, "the seed gives both"
    as_text = served.engine.post("/detokenize", json={"model": "tiny", "tokens": list(choice.token_ids)}).json()[
        "prompt"
    ]
    assert as_text == f"{thoughts}</think>{told}<end>"


def levelled(body: bytes) -> bytes:
    """Without the time, which no two answers share."""
    return re.sub(rb'"created":\d+', b'"created":0', body)


def test_hidden_thoughts_are_quarantined(served: SimpleNamespace) -> None:
    body = {**THINKING, "messages": MESSAGES, "include_reasoning": False}
    answer = served.proxy.post(f"/run/hidden/role/a{CHAT}", json=body)
    assert answer.json()["choices"][0]["message"]["reasoning"] is None
    (call,) = served.store.trace("hidden").calls
    assert call.quarantine == "reasoning hidden"


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_keeps_the_thoughts_that_its_template_drops(served: SimpleNamespace, stream: bool) -> None:
    """LangChain does not send them back, and the template would not write them: the ids have them all the same.

    Unless the parser of DeepSeek R1 would take the end of a thought in the prompt for that of the next one.
    """
    run = f"conversation-{stream}"
    extra = {name: THINKING[name] for name in ("allowed_token_ids", "min_tokens")}
    model = ChatOpenAI(
        model="tiny",
        base_url=f"{served.url}/run/{run}/role/a/v1",
        api_key=SecretStr("none"),
        max_completion_tokens=60,
        temperature=1.5,
        seed=2,
        streaming=stream,
        logit_bias=THINKING["logit_bias"],
        extra_body=extra,
    )
    history: list[Any] = [("user", "max of 3 and 5")]
    for question in ("max of 7 and 1", "max of 2 and 2"):
        history += [model.invoke(history), ("user", question)]
    model.invoke(history)
    first, second, third = served.store.trace(run).calls
    for earlier, call in ((first, second), (second, third)):
        assert "reasoning" in earlier.choices[0].flags
        assert call.continues == Continues(
            call_id=earlier.call_id, choice=0, drift="template", token_in=served.begins_thoughts
        )
        sampled = [*earlier.prompt_ids, *earlier.choices[0].token_ids]
        assert (list(call.prompt_ids[: len(sampled)]) == sampled) is served.begins_thoughts
        assert call.quarantine is None
    assert all(call.choices[0].message["reasoning"] for call in (first, second, third))
