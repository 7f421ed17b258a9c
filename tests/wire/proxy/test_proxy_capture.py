"""What is injected and stripped, at the level of single chunks: the cases the fake engine does not produce."""

import json
from typing import Any

import pytest

from tracegrad.adapters.proxy.capture import Injection, Stripper, plan_injection, read_ask, upstream_body

BOTH = Injection(token_ids=True, logprobs=True, usage=True)


def chunk(delta: dict[str, Any], **choice: Any) -> bytes:
    fields = {"index": 0, "delta": delta, "logprobs": {"content": []}, "finish_reason": None, "token_ids": [7]}
    return json.dumps({"id": "c", "choices": [{**fields, **choice}]}, separators=(",", ":")).encode()


def test_a_chunk_that_only_carries_ids_is_dropped() -> None:
    """vLLM sends it while a tool or reasoning parser waits for more, and only because ids were asked for."""
    assert Stripper(BOTH, alias=None).chunk(chunk({})) is None


@pytest.mark.parametrize("injection", [Injection(True, False, True), Injection(False, True, True)])
def test_it_is_kept_where_the_client_asked_for_ids_or_logprobs(injection: Injection) -> None:
    assert Stripper(injection, alias=None).chunk(chunk({})) is not None


@pytest.mark.parametrize(
    "silent", [chunk({"content": ""}), chunk({}, finish_reason="stop"), chunk({"role": "assistant"})]
)
def test_chunks_that_say_something_are_kept(silent: bytes) -> None:
    kept = Stripper(BOTH, alias=None).chunk(silent)
    assert kept is not None
    (choice,) = json.loads(kept)["choices"]
    assert choice["token_ids"] is None and choice["logprobs"] is None


def test_numbers_and_escapes_pass_as_they_came() -> None:
    raw = (
        b'{"model":"m","choices":[{"message":{"content":"\\u00e9","x":1.50e-07,"y":10000000000000000000}}],"usage":1.0}'
    )
    assert Stripper(BOTH, alias="a").plain(raw) == raw.replace(b'"m"', b'"a"')


def test_an_error_chunk_is_left_alone() -> None:
    raw = b'{"error":{"message":"x"}}'
    assert Stripper(BOTH, alias="a").chunk(raw) == raw


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, (True, True, False)),
        ({"stream": True}, (True, True, True)),
        ({"stream": True, "stream_options": {"include_usage": True}}, (True, True, False)),
        ({"logprobs": True, "return_token_ids": True}, (False, False, False)),
        ({"top_logprobs": 3}, (True, False, False)),
        ({"logprob_token_ids": [1]}, (True, False, False)),
        ({"logprobs": False, "top_logprobs": 0}, (True, True, False)),
        ({"stream": True, "stream_options": "wrong"}, (True, True, False)),
    ],
)
def test_what_is_injected(body: dict[str, Any], expected: tuple[bool, bool, bool]) -> None:
    plan = plan_injection(body)
    assert (plan.token_ids, plan.logprobs, plan.usage) == expected


def test_the_upstream_body_keeps_the_clients_bytes_and_order() -> None:
    ask = read_ask(b'{"messages":[1.0,  2],"seed":1,"temperature":0.10,"model":"alias","big":99999999999999999999999}')
    sent = upstream_body(
        ask,
        Injection(True, False, False),
        model="main",
        requested={"seed": 1, "temperature": 0.1},
        effective={"temperature": 0.9, "max_tokens": 4},
    )
    assert sent == (
        b'{"messages":[1.0,  2],"temperature":0.9,"model":"main","big":99999999999999999999999,'
        b'"max_tokens":4,"return_token_ids":true}'
    )
