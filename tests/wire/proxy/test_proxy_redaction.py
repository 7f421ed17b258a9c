"""What must not be written is not: masked text, no tokens that spell it, no header, and an answer as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tracegrad.adapters.proxy.redaction import TOKEN_IDS, TOO_DEEP, RedactingStore, Redactor
from tracegrad.tracestore.config import Redaction, dump_config, parse_config
from tracegrad.tracestore.errors import ConfigError
from tracegrad.tracestore.records import Span
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import make_call

CHAT = "/v1/chat/completions"
EMAIL = {"pattern": r"[\w.]+@[\w.]+\w", "with": "[email]"}
NAME = {"pattern": "Müller", "with": r"\1 \g<0> [name]"}
SECRET = "bob.secret@example.org"


def redactor(*rules: dict[str, str]) -> Redactor:
    return Redactor([Redaction(pattern=rule["pattern"], replacement=rule["with"]) for rule in rules or (EMAIL, NAME)])


def on_disk(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.glob("store.db*")))


@pytest.mark.parametrize("stream", [False, True])
def test_masked_in_the_store_untouched_for_the_client_and_never_trained(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any, tmp_path: Path, stream: bool
) -> None:
    proxy = start_proxy(redact=[EMAIL])
    body = {
        "messages": [{"role": "user", "content": f"mail {SECRET} now"}],
        "stop": [f"not {SECRET}"],
        "stream": stream,
    }
    plain = proxy.client.post("/run/clean" + CHAT, json={"messages": [{"role": "user", "content": "hello"}]})
    answer = proxy.client.post("/run/r" + CHAT, json=body)
    if stream:
        chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
        said = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    else:
        said = answer.json()["choices"][0]["message"]["content"]
    assert said == f"0: mail {SECRET} now"
    assert SECRET in str(engine_app.requests[-1])
    (call,) = store.trace("r").calls
    assert (call.status, call.quarantine, call.prompt_ids) == ("complete", "redacted", None)
    assert [(choice.token_ids, choice.logprobs, choice.finish_reason) for choice in call.choices] == [
        ((), None, "stop")
    ]
    assert call.request["messages"][0]["content"] == "mail [email] now" and call.requested["stop"] == ["not [email]"]
    assert call.choices[0].message["content"] == "0: mail [email] now"
    assert SECRET.encode() not in on_disk(tmp_path) and b"bob" not in on_disk(tmp_path)
    (clean,) = store.trace("clean").calls
    assert plain.status_code == 200 and (clean.quarantine, len(clean.choices[0].token_ids)) == (None, 9)


def test_what_the_engine_complains_about_is_masked_as_well(
    start_proxy: Callable[..., SimpleNamespace], store: Store, tmp_path: Path
) -> None:
    proxy = start_proxy(redact=[EMAIL])
    proxy.client.post("/run/r" + CHAT, json={"messages": [], "model": "main", "tools": [], "user": SECRET})
    proxy.client.post("/tracegrad/v1/runs/r/end", json={"status": "failed", "error": f"KeyError: {SECRET}"})
    assert store.get_run("r").error == "KeyError: [email]"
    assert b"bob" not in on_disk(tmp_path)


def test_tool_arguments_are_masked_whatever_their_escapes() -> None:
    arguments = json.dumps({"to": "Müller", "note": {"mail": [SECRET]}, SECRET: 1})
    assert "Müller" not in arguments  # json.dumps escapes it, as LangChain does
    function = {"name": "send", "arguments": arguments}
    message = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": function}]}
    call = make_call("c", "r", request={"messages": [message]})
    masked = redactor().call(call)
    (told,) = masked.request["messages"]
    said = json.loads(told["tool_calls"][0]["function"]["arguments"])
    assert said == {"to": r"\1 \g<0> [name]", "note": {"mail": ["[email]"]}, "[email]": 1}
    assert told["tool_calls"][0]["id"] == "c" and masked.quarantine == "redacted"
    broken = make_call("c", "r", request={"messages": [{"role": "tool", "content": '{"mail": "' + SECRET}]})
    assert redactor().call(broken).request["messages"][0]["content"] == '{"mail": "[email]'


def test_a_call_without_a_match_stays_the_same_object() -> None:
    call = make_call("c", "r", request={"messages": [{"role": "tool", "content": '{"a":  1}'}], "n": 1})
    assert redactor().call(call) is call


def test_what_cannot_be_looked_through_is_not_kept() -> None:
    deep: Any = "x"
    for _ in range(3000):
        deep = [deep]
    masked = redactor().call(make_call("c", "r", request={"messages": deep, "model": "m"}))
    assert masked.request == {"redacted": TOO_DEEP} and masked.quarantine == "redacted"
    for request in ({"prompt": [1, 2]}, {"input": [[1, 2], [3]]}):
        masked = redactor().call(make_call("c", "r", request=request))
        assert set(masked.request.values()) == {TOKEN_IDS} and (masked.prompt_ids, masked.quarantine) == (
            None,
            "redacted",
        )
    for request in ({"prompt": "plain"}, {"input": ["plain"]}):
        assert redactor().call(make_call("c", "r", request=request)).quarantine is None
    call = make_call("c", "r")
    (choice,) = call.choices
    partly = make_call("c", "r", choices=(type(choice)(index=0, token_ids=(1,), logprobs=(-1.0,), finish_reason="stop",
                                                       flags=("hidden_tool_calls",)),))  # fmt: skip
    assert redactor().call(partly).choices[0].token_ids == ()


def test_spans_are_masked_on_every_way_into_the_store(store: Store) -> None:
    masking = RedactingStore(store, redactor())
    span = Span(span_id="s", run_id="r", name="n", input={"q": SECRET}, output=[SECRET], error=f"no {SECRET}")
    masking.put_spans([span], "p")
    (stored,) = store.list_spans("r")
    assert (stored.input, stored.output, stored.error) == ({"q": "[email]"}, ["[email]"], "no [email]")
    assert store.get_run("r").project == "p" and masking.list_spans("r") == [stored]
    call = make_call("c", "r")
    assert call.attribution.span is not None
    masking.append_calls([redactor().call(call)])
    assert masking.trace("r").calls[0].quarantine is None


def test_the_patterns_apply_in_their_order_and_the_mask_is_literal() -> None:
    rules = redactor({"pattern": r"\d+", "with": "<n>"}, {"pattern": "<n>-<n>", "with": r"\2"})
    assert rules.text("call 12-34 or 5") == r"call \2 or <n>"


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ({"pattern": "("}, "is no regular expression"),
        ({"pattern": "x*"}, "matches where nothing is"),
        ({"pattern": "x", "wiht": "y"}, "did you mean with"),
        ({"with": "y"}, "pattern"),
    ],
)
def test_a_redaction_that_cannot_work_is_refused(rule: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config({"redact": [rule]})


def test_redactions_are_printed_as_they_are_written() -> None:
    config = parse_config({"redact": [EMAIL, {"pattern": "x"}]})
    assert "with: '[email]'" in dump_config(config)
    assert parse_config(yaml.safe_load(dump_config(config))) == config


def test_no_header_is_ever_stored(proxy: SimpleNamespace, store: Store, tmp_path: Path) -> None:
    """Not of the request, not of the answer; only what names run, role and span is read out of them."""
    marker = "marker-7f3a"
    names = (
        "authorization",
        "cookie",
        "user-agent",
        "x-custom",
        "x-api-key",
        "openai-organization",
        "baggage",
        "referer",
    )
    headers = {name: f"{marker}-{name}" for name in names}
    asked = {"messages": [{"role": "user", "content": "in the body"}]}
    for stream in (False, True):
        answer = proxy.client.post("/run/r/role/a" + CHAT, json={**asked, "stream": stream}, headers=headers)
        assert answer.status_code == 200
    proxy.client.post(CHAT, json={**asked, "tools": []}, headers=headers)  # the engine refuses this one
    proxy.client.post("/tracegrad/v1/tasks", json={"tasks": [{"task_id": "t", "input": {}}]}, headers=headers)
    proxy.client.post("/tracegrad/v1/runs/r/end", json={}, headers=headers)
    assert len(store.trace("r").calls) == 2
    assert b"in the body" in on_disk(tmp_path)  # the search finds what is there
    assert marker.encode() not in on_disk(tmp_path)
