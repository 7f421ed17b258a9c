"""Text completions are captured as exactly as chat, embeddings pass and are noted, models can be looked up."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from wire_bytes import SAME_ID, timeless, without_fingerprints

from tracegrad.tracestore.store import Store

ASK: dict[str, Any] = {"model": "main", "prompt": "hello"}
COMPLETIONS = "/v1/completions"


def sdk(proxy: SimpleNamespace) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{proxy.url}/run/r/role/a/v1", api_key="none", max_retries=0, timeout=20)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"n": 2},
        {"prompt": [70, 71, 72]},
        {"prompt": ["hello"]},
        {"prompt": ["one", "two"]},
        {"prompt": [[70, 71], [72]], "n": 2},
        {"echo": True},
        {"echo": True, "logprobs": 1},
        {"logprobs": 0},
        {"logprobs": 3},
        {"logprobs": None, "return_token_ids": True},
        {"max_tokens": 3, "temperature": 0.5},
        {"stop": ["ll"]},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_answer_is_byte_for_byte_the_direct_one(
    proxy: SimpleNamespace, direct: httpx.Client, extra: dict[str, Any], stream: bool
) -> None:
    ask = {**ASK, **extra, "stream": stream}
    through, straight = (
        client.post(COMPLETIONS, json=ask, headers=SAME_ID).content for client in (proxy.client, direct)
    )
    if stream and (extra.get("n") or len(extra.get("prompt", "")) == 2):  # earlier choices' fingerprints: an exception
        through, straight = without_fingerprints(through), without_fingerprints(straight)
    assert timeless(through) == timeless(straight)
    assert b'"choices"' in through


@pytest.mark.parametrize(
    "options", [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
def test_usage_is_sent_where_it_is_asked_for(
    proxy: SimpleNamespace, direct: httpx.Client, options: dict[str, Any] | None
) -> None:
    ask = {**ASK, "stream": True, "stream_options": options}
    through, straight = (
        client.post(COMPLETIONS, json=ask, headers=SAME_ID).content for client in (proxy.client, direct)
    )
    assert timeless(through) == timeless(straight)
    assert (b'"usage"' in through) == bool(options)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hello", [70, 71, 72]])
def test_every_choice_is_stored_with_its_ids_and_logprobs(
    proxy: SimpleNamespace, store: Store, fake: Any, stream: bool, prompt: Any
) -> None:
    ask = {**ASK, "prompt": prompt, "n": 2, "stream": stream, "temperature": 0.5}
    assert proxy.client.post(f"/run/r/role/a{COMPLETIONS}", json=ask).status_code == 200
    (call,) = store.trace("r").calls
    assert (call.status, call.quarantine, call.endpoint, call.stream) == ("complete", None, "completions", stream)
    text = prompt if isinstance(prompt, str) else bytes(token - 3 for token in prompt).decode()
    assert call.prompt_ids == ((1, *fake.encode_text(prompt)) if isinstance(prompt, str) else tuple(prompt))
    for index, choice in enumerate(call.choices):
        ids = (*fake.encode_text(f"{index}: {text}"), fake.EOS)
        assert choice.token_ids == ids
        assert choice.logprobs == tuple(fake.logprob_of(t, i, index) for i, t in enumerate(ids))
        assert choice.message == {"content": f"{index}: {text}"}
        assert (choice.finish_reason, choice.flags) == ("stop", ())
    assert call.request["prompt"] == prompt and call.effective == {"n": 2, "temperature": 0.5}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"prompt": ["one", "two"], "n": 2}, "several prompts"),
        ({"prompt": [[70], [71]]}, "several prompts"),
        ({"echo": True}, "echo"),
        ({"echo": True, "logprobs": 1, "return_token_ids": True}, "echo"),
    ],
)
def test_what_cannot_be_recorded_exactly_is_answered_and_quarantined(
    proxy: SimpleNamespace, store: Store, stream: bool, extra: dict[str, Any], reason: str
) -> None:
    answer = proxy.client.post(f"/run/r{COMPLETIONS}", json={**ASK, **extra, "stream": stream})
    assert answer.status_code == 200
    (call,) = store.trace("r").calls
    assert (call.status, call.quarantine) == ("complete", reason)
    assert len(call.choices) == (4 if extra.get("n") else 2 if reason == "several prompts" else 1)
    if reason == "several prompts":
        assert call.prompt_ids is None, "no single prompt is every choice's"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [("short_logprobs", "length mismatch"), ("nan", "nan logprob"),
                                   ("no_logprobs", "no logprobs"), ("usage", "usage mismatch")])  # fmt: skip
def test_inexact_completions_are_quarantined(
    proxy: SimpleNamespace, store: Store, engine_app: Any, stream: bool, fault: tuple[str, str]
) -> None:
    engine_app.fault = fault[0]
    proxy.client.post(f"/run/r{COMPLETIONS}", json={**ASK, "stream": stream})
    assert [call.quarantine for call in store.trace("r").calls] == [fault[1]]


def test_a_request_that_the_engine_refuses_stays_refused(proxy: SimpleNamespace) -> None:
    """Were logprobs injected beside `logprob_token_ids`, this error would become an answer."""
    answer = proxy.client.post(COMPLETIONS, json={**ASK, "logprob_token_ids": [5]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logprob_token_ids")


def test_the_sdks_completions_work(proxy: SimpleNamespace, store: Store) -> None:
    client = sdk(proxy)
    plain = client.completions.create(model="gpt-3.5-turbo-instruct", prompt="hello")
    chunks = list(client.completions.create(model="gpt-3.5-turbo-instruct", prompt="hello", stream=True))
    assert plain.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks) == "0: hello"
    assert {plain.model, *(chunk.model for chunk in chunks)} == {"gpt-3.5-turbo-instruct"}
    assert [call.attribution.role for call in store.trace("r").calls] == ["a", "a"]


def test_a_streams_end_waits_for_the_commit(start_proxy: Callable[..., SimpleNamespace], blocked_store: Any) -> None:
    proxy = start_proxy(store_object=blocked_store)
    chunks: list[Any] = []
    reading = threading.Thread(
        target=lambda: chunks.extend(sdk(proxy).completions.create(model="main", prompt="hello", stream=True))
    )
    reading.start()
    assert blocked_store.reached.wait(10)
    reading.join(0.2)
    assert reading.is_alive()
    blocked_store.let_go.set()
    reading.join(10)
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize("format_", [None, "float", "base64", "bytes"])
@pytest.mark.parametrize("given", ["hello", ["a", "bc"], [5, 6, 7], [[5, 6], [7]]])
def test_embeddings_pass_and_are_noted(
    proxy: SimpleNamespace, direct: httpx.Client, store: Store, format_: str | None, given: Any
) -> None:
    ask = {"model": "main", "input": given, "encoding_format": format_, "stream": True}
    through, straight = (
        client.post(f"{prefix}/v1/embeddings", json=ask, headers=SAME_ID)
        for client, prefix in ((proxy.client, "/run/r/role/a"), (direct, ""))
    )
    assert timeless(through.content) == timeless(straight.content)
    assert through.headers["content-type"] == straight.headers["content-type"]
    (call,) = store.trace("r").calls
    assert (call.endpoint, call.status, call.quarantine, call.choices) == ("embeddings", "complete", None, ())
    assert (call.prompt_ids, call.request["input"], call.attribution.role) == (None, given, "a")


def test_the_sdks_embeddings_work(proxy: SimpleNamespace, engine_app: Any) -> None:
    """The SDK asks for base64 and decodes it."""
    answer = sdk(proxy).embeddings.create(model="text-embedding-3-small", input=[[5, 6, 7]])
    assert answer.data[0].embedding == [3.0, 5.0]
    assert answer.model == "text-embedding-3-small"
    sent = engine_app.requests[0]
    assert sent["encoding_format"] == "base64" and "return_token_ids" not in sent and "logprobs" not in sent


def test_embeddings_come_from_the_model_that_is_asked_for_and_are_not_sampled(
    start_proxy: Callable[..., SimpleNamespace], engine_url: str, engine_app: Any
) -> None:
    """A role's weights speak for it; its vectors are another model's. The sampling override has no place here."""
    models = {
        "main": {"checkpoint": "none", "engine": {"url": "http://127.0.0.1:9"}},
        "vectors": {"checkpoint": "none", "trained": False, "engine": {"url": engine_url}},
    }
    engine_app.name = "vectors"
    proxy = start_proxy(models=models, roles={"*": "main"}, proxy={"sampling": {"*": {"temperature": 0.9}}})
    proxy.client.post("/tracegrad/v1/runs", json={"run_id": "r", "purpose": "train"})
    answer = proxy.client.post("/run/r/role/a/v1/embeddings", json={"model": "vectors", "input": "x"})
    assert answer.status_code == 200
    assert "temperature" not in engine_app.requests[0]


def test_a_model_can_be_looked_up(proxy: SimpleNamespace, direct: httpx.Client) -> None:
    (card,) = direct.get("/v1/models").json()["data"]
    assert proxy.client.get("/v1/models/main").json() == card
    assert sdk(proxy).models.retrieve("main").id == "main"


def test_an_id_may_have_slashes(start_proxy: Callable[..., SimpleNamespace], engine_url: str, engine_app: Any) -> None:
    engine_app.name = "acme/small-7b"
    models = {"acme/small-7b": {"checkpoint": "none", "trained": False, "engine": {"url": engine_url}}}
    proxy = start_proxy(models=models, roles={"*": "acme/small-7b"}, trainer={})
    for path in ("/v1/models/acme/small-7b", "/v1/models/acme%2Fsmall-7b", "/run/r/v1/models/acme/small-7b"):
        assert proxy.client.get(path).json()["id"] == "acme/small-7b"
    assert sdk(proxy).models.retrieve("acme/small-7b").id == "acme/small-7b"


def test_a_role_or_an_alias_is_no_model(start_proxy: Callable[..., SimpleNamespace]) -> None:
    proxy = start_proxy(roles={"planner": "main", "*": "main"})
    for name in ("planner", "gpt-4o", "*", ""):
        answer = proxy.client.get(f"/v1/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), name
    with pytest.raises(openai.NotFoundError, match="did you mean main") as caught:
        sdk(proxy).models.retrieve("mian")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_an_engines_error_on_its_models_is_told_in_openais_words(proxy: SimpleNamespace) -> None:
    engine = proxy.app.upstream.pools["main"].engines[0]
    engine.url /= "nowhere"
    answer = proxy.client.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
