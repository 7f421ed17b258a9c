"""A client cannot reach deeper into an engine than the operator lets it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tracegrad.adapters.proxy.errors import InvalidRequest
from tracegrad.adapters.proxy.fields import check_body, salt_of

ASK: dict[str, Any] = {"model": "main", "messages": [{"role": "user", "content": "hello"}]}
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]


def with_part(part: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "text", "text": "look"}, part]}]}


NEVER: list[tuple[dict[str, Any], str]] = [
    ({"kv_transfer_params": {"prompt_token_ids": [1]}}, "kv_transfer_params"),
    ({"ec_transfer_params": {"x": 1}}, "ec_transfer_params"),
    ({"vllm_xargs": {"kv_transfer_params": "x"}}, "kv_transfer_params"),
    ({"extra_body": {"ec_transfer_params": {}}}, "ec_transfer_params"),
    ({"lora_path": "/etc"}, "lora_path"),
    ({"lora_request": {"lora_name": "a", "lora_path": "/x"}}, "lora_request"),
]
SWITCHED: list[tuple[dict[str, Any], str, str]] = [
    ({"chat_template": "{{ 1 }}"}, "chat_template", "chat_template"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template", "chat_template"),
    ({"mm_processor_kwargs": {"num_crops": 999}}, "mm_processor_kwargs", "media_kwargs"),
    ({"media_io_kwargs": {"video": {"num_frames": 9999}}}, "media_io_kwargs", "media_kwargs"),
    ({"prompt_embeds": "AAAA"}, "prompt_embeds", "embeds"),
    ({"priority": -5}, "priority", "priority"),
    (with_part({"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}),
     "messages[].content[].image_url", "media_urls"),
    (with_part({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}),
     "messages[].content[].image_url", "media_urls"),
    (with_part({"image_url": "https://example.com/x.png"}), "messages[].content[].image_url", "media_urls"),
    (with_part({"audio_url": {"url": "HTTP://x"}}), "messages[].content[].audio_url", "media_urls"),
    (with_part({"video_url": {"url": " data:,"}}), "messages[].content[].video_url", "media_urls"),
    (with_part({"type": "image_embeds", "image_embeds": "AAAA"}), "messages[].content[].image_embeds", "embeds"),
    (with_part({"type": "prompt_embeds", "data": "AAAA"}), "messages[].content[].prompt_embeds", "embeds"),
    ({"input": [{"role": "user", "content": [{"image_url": {"url": "ftp://x"}}]}]},
     "input[].content[].image_url", "media_urls"),
    ({"messages": [[{"role": "user", "content": [{"image_url": {"url": "ftp://x"}}]}]]},
     "messages[].content[].image_url", "media_urls"),
]  # fmt: skip
FREE: list[dict[str, Any]] = [
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"kv_transfer_params": None, "priority": 0, "chat_template": None, "mm_processor_kwargs": {}},
    {"vllm_xargs": {"session_id": "s"}},
    {"some_new_field": {"kv": 1}},
    with_part({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
    with_part({"type": "image_url", "image_url": {"url": None}, "uuid": "u"}),
    with_part({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}),
    {"input": ["text", [1, 2, 3]]},
    {"messages": "not a list"},
]


@pytest.mark.parametrize(("body", "param"), NEVER)
def test_some_fields_pass_under_no_configuration(body: dict[str, Any], param: str) -> None:
    every = ("chat_template", "media_urls", "media_kwargs", "embeds", "priority")
    with pytest.raises(InvalidRequest, match=r"remove it$") as caught:
        check_body({**ASK, **body}, every)  # type: ignore[arg-type]
    assert (caught.value.code, caught.value.param) == ("field_not_allowed", param)


@pytest.mark.parametrize(("body", "param", "switch"), SWITCHED)
def test_others_pass_where_the_operator_says_so(body: dict[str, Any], param: str, switch: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"proxy\.access\.allow: \[{switch}\]") as caught:
        check_body({**ASK, **body}, ())
    assert (caught.value.code, caught.value.param) == ("field_not_allowed", param)
    check_body({**ASK, **body}, (switch,))


@pytest.mark.parametrize("body", FREE)
def test_everything_else_passes(body: dict[str, Any]) -> None:
    check_body({**ASK, **body}, ())


@pytest.mark.parametrize("path", PATHS)
def test_a_refused_field_never_reaches_an_engine(proxy: SimpleNamespace, engine_app: Any, path: str) -> None:
    for body, param in [*NEVER, *[(body, param) for body, param, _ in SWITCHED]]:
        answer = proxy.client.post(path, json={**ASK, "prompt": "x", **body})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "field_not_allowed"), body
        assert answer.json()["error"]["param"] == param
    assert engine_app.requests == []


@pytest.mark.parametrize("header", ["X-Vllm-Priority", "X-data-parallel-rank"])
def test_nor_do_headers_that_say_the_same(
    start_proxy: Callable[..., SimpleNamespace], engine_app: Any, header: str
) -> None:
    answer = start_proxy().client.post(PATHS[0], json=ASK, headers={header: "-1"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "field_not_allowed")
    assert engine_app.requests == []


def test_allowed_fields_pass_unchanged(start_proxy: Callable[..., SimpleNamespace], engine_app: Any) -> None:
    proxy = start_proxy(proxy={"access": {"allow": ["priority", "media_urls"]}})
    body = {**ASK, "priority": 3, **with_part({"image_url": "https://example.com/x.png"})}
    assert proxy.client.post(PATHS[0], json=body, headers={"X-Vllm-Priority": "3"}).status_code == 200
    assert engine_app.requests[0]["priority"] == 3
    assert engine_app.requests[0]["messages"] == body["messages"]


def test_each_project_has_its_own_cache_salt(
    start_proxy: Callable[..., SimpleNamespace], store: Any, engine_app: Any
) -> None:
    for project in ("shop", "bank"):
        client = start_proxy(project=project).client
        client.post("/run/r/v1/chat/completions", json=ASK)
        client.post(PATHS[0], json={**ASK, "cache_salt": "mine"})
    salts = [request["cache_salt"] for request in engine_app.requests]
    assert len(set(salts)) == 4
    assert salts == [salt_of(p, s) for p in ("shop", "bank") for s in (None, "mine")]
    assert "cache_salt" not in store.trace("r").calls[0].request, "what the client sent is what is stored"


def test_a_salt_is_one_that_vllm_takes() -> None:
    salt = salt_of("a/b@c\\", None)
    assert salt is not None and 0 < len(salt) <= 128 and not set(salt) & set("@/\\\0")


@pytest.mark.parametrize("theirs", ["", "a/b", "x" * 129, 7, ["x"]])
def test_a_salt_that_the_engine_refuses_stays_its_to_refuse(
    proxy: SimpleNamespace, engine_app: Any, theirs: Any
) -> None:
    proxy.client.post(PATHS[0], json={**ASK, "cache_salt": theirs})
    assert engine_app.requests[0]["cache_salt"] == theirs
