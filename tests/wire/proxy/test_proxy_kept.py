"""What top-p, top-k or min-p left is recorded, where the engine tells it and nobody sees the difference."""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from waits import wait_for

from tracegrad.adapters.proxy.kept import (
    REST,
    STEADY,
    Asked,
    KeptSets,
    Reach,
    Set,
    sets_of_chat,
    sets_of_completion,
)
from tracegrad.adapters.proxy.sampling import plan_sampling
from tracegrad.tracestore.config import parse_config
from tracegrad.tracestore.records import Call, Choice, Run
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import make_call

CHAT, COMPLETIONS = "chat/completions", "completions"
ASKED = {CHAT: {"messages": [{"role": "user", "content": "hello"}]}, COMPLETIONS: {"prompt": "hello"}}


def ask(proxy: SimpleNamespace, run: str = "r", path: str = CHAT, **extra: Any) -> Any:
    return proxy.client.post(f"/run/{run}/role/a/v1/{path}", json={"model": "main", **ASKED[path], **extra})


def only_choice(store: Store, run: str = "r") -> Choice:
    (call,) = store.trace(run).calls
    assert (call.status, call.quarantine) == ("complete", None)
    return call.choices[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1, "top_k": -1}])
def test_what_was_left_is_on_record(
    proxy: SimpleNamespace, store: Store, path: str, stream: bool, cut: dict[str, Any]
) -> None:
    assert ask(proxy, path=path, stream=stream, n=2, **cut).status_code == 200
    left = max(cut.get("top_k", 3), 3)
    choice = only_choice(store)
    assert choice.flags == () and choice.kept_ids is not None and len(choice.token_ids) > 3
    for token, kept in zip(choice.token_ids, choice.kept_ids, strict=True):
        assert kept[0] == token and len(set(kept)) == left


@pytest.mark.parametrize(
    ("body", "top_logprobs"),
    [
        ({"top_k": 5}, 13),
        ({"top_k": 40}, 48),
        ({"top_k": 40, "top_p": 0.9}, 20),
        ({"top_k": 5, "min_p": 0.1}, 13),
        ({"top_k": 250}, 256),
        ({"top_k": 257}, None),
        ({"top_p": 0.9}, 20),
        ({}, None),
        ({"top_p": 0.9, "temperature": 0}, None),
        ({"top_p": 0.9, "response_format": {"type": "json_object"}}, None),
        ({"top_p": 0.9, "logprobs": True}, None),
        ({"top_p": 0.9, "logprobs": True, "top_logprobs": 4}, 4),
    ],
)
def test_only_what_can_make_it_trainable_is_asked_for(
    proxy: SimpleNamespace, engine_app: Any, body: dict[str, Any], top_logprobs: int | None
) -> None:
    engine_app.max_logprobs = 256
    said = ask(proxy, **body).json()["choices"][0]
    (sent,) = engine_app.requests
    assert sent.get("top_logprobs") == top_logprobs
    assert sent.get("return_tokens_as_token_ids") == (None if "logprobs" in body or not top_logprobs else True)
    assert (said["logprobs"] is None) == ("logprobs" not in body)


@pytest.mark.parametrize("body", [{"top_k": 40, "top_p": 0.9}, {"top_p": 0.9, "logprobs": True, "top_logprobs": 20}])
def test_what_is_not_known_whole_stays_flagged(proxy: SimpleNamespace, store: Store, body: dict[str, Any]) -> None:
    """Forty were left and twenty are told; a client's own top logprobs name texts, not ids."""
    ask(proxy, **body)
    choice = only_choice(store)
    assert (choice.flags, choice.kept_ids) == (("truncated_sampling",), None)
    assert choice.logprobs is not None


def test_an_evaluation_a_frozen_model_and_who_does_not_want_it_are_not_asked(
    start_proxy: Callable[..., SimpleNamespace], store: Store, engine_app: Any, engine_url: str
) -> None:
    store.open_run(Run(run_id="judged", purpose="eval"))
    ask(start_proxy(), "judged", top_k=5)
    model = {"checkpoint": "none", "engine": {"url": engine_url}}
    other = {"checkpoint": "none", "engine": {"url": "http://127.0.0.1:9"}}
    frozen = {"models": {"main": {**model, "trained": False}, "other": other}}
    ask(start_proxy(**frozen), top_k=5)
    ask(start_proxy(proxy={"limits": {"max_kept": 0}}), top_k=5)
    assert [sent.get("top_logprobs") for sent in engine_app.requests] == [None] * 3


def test_more_are_asked_for_where_they_did_not_suffice(proxy: SimpleNamespace, store: Store, engine_app: Any) -> None:
    """Forty were left: the first answer does not tell them, the next does."""
    engine_app.max_logprobs = 256
    for run in ("first", "second", "third"):
        ask(proxy, run, top_k=40, top_p=0.9)
    assert [sent["top_logprobs"] for sent in engine_app.requests] == [20, 48, 48]
    assert [only_choice(store, run).kept_ids is None for run in ("first", "second", "third")] == [True, False, False]


@pytest.mark.parametrize(("path", "stream"), [(CHAT, False), (CHAT, True), (COMPLETIONS, False), (COMPLETIONS, True)])
def test_an_engine_that_allows_fewer_is_asked_for_as_many_as_any_allows(
    proxy: SimpleNamespace, store: Store, engine_app: Any, path: str, stream: bool
) -> None:
    """A stream is refused inside of a 200; the client sees nothing of it, and the refused call itself has its sets."""
    for run in ("wide", "narrow", "narrower"):
        wide = {"top_k": 40} if run == "wide" else {}
        assert ask(proxy, run, path, stream=stream, top_p=0.9, **wide).status_code == 200
    refused = ask(proxy, "refused", path, stream=stream, top_p=0.9)
    assert refused.status_code == 200 and "error" not in refused.text
    asked = [sent.get("logprobs" if path == COMPLETIONS else "top_logprobs") for sent in engine_app.requests]
    assert asked == [20, 80, 20, 20, 20]
    known = {run: only_choice(store, run).kept_ids is not None for run in ("wide", "narrow", "narrower", "refused")}
    assert known == {"wide": False, "narrow": True, "narrower": True, "refused": True}


def test_what_an_engine_has_allowed_is_asked_for_after_it_refuses_more(
    proxy: SimpleNamespace, store: Store, engine_app: Any
) -> None:
    """Of 90 the 80 do not tell, and more are refused: the 80 go on to tell others."""
    engine_app.max_logprobs = 100
    wide = {"top_p": 0.9, "top_k": 90}
    for run, body in enumerate(({"top_p": 0.9, "top_k": 40}, {"top_p": 0.9}, wide, wide, {"top_p": 0.9, "top_k": 40})):
        assert ask(proxy, str(run), **body).status_code == 200
    assert [sent["top_logprobs"] for sent in engine_app.requests] == [20, 80, 80, 98, 48]
    assert only_choice(store, "4").kept_ids is not None


def test_that_an_engine_allows_fewer_is_told_once(proxy: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(4):
        ask(proxy, top_p=0.9, top_k=40)
    (told,) = [r.getMessage() for r in caplog.records if "--max-logprobs" in r.getMessage()]
    assert "refuses 48 top logprobs" in told and "more than 20 tokens" in told and "--max-logprobs 256" in told


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_allows_hardly_any_is_asked_once(
    proxy: SimpleNamespace, store: Store, engine_app: Any, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    """The app gets its answer either way; when the engine was away it may have been started with other flags."""
    engine_app.max_logprobs = 5
    for run in ("first", "second"):
        answer = ask(proxy, run, top_p=0.9, stream=stream)
        assert answer.status_code == 200 and "error" not in answer.text
        assert only_choice(store, run).flags == ("truncated_sampling",)
    assert [sent.get("top_logprobs") for sent in engine_app.requests] == [20, None, None]
    assert "more than 0 tokens" in caplog.text
    engine_app.max_logprobs = 20
    proxy.app._engine_is_back("main")
    ask(proxy, "third", top_p=0.9, stream=stream)
    assert only_choice(store, "third").kept_ids is not None


def test_a_stream_is_passed_on_at_once_when_its_engine_is_known_to_allow_as_many(
    proxy: SimpleNamespace, engine_app: Any
) -> None:
    """Only the first waits for its first event before its headers leave."""
    asked = {"model": "main", **ASKED[CHAT], "stream": True, "top_p": 0.9}
    headers_came = []
    for number in range(2):
        engine_app.gate, engine_app.gate_at = threading.Event(), "body"
        if not number:
            threading.Timer(0.3, engine_app.gate.set).start()
        with proxy.client.stream("POST", f"/run/{number}/v1/{CHAT}", json=asked) as answer:
            headers_came.append("after" if engine_app.gate.is_set() else "before")
            engine_app.gate.set()
            answer.read()
    assert headers_came == ["after", "before"]


def test_a_client_that_leaves_before_the_first_event_stops_the_engine(
    proxy: SimpleNamespace, store: Store, engine_app: Any
) -> None:
    engine_app.gate, engine_app.gate_at = threading.Event(), "body"
    body = {"model": "main", **ASKED[CHAT], "stream": True, "top_p": 0.9}
    with pytest.raises(httpx.ReadTimeout):
        proxy.client.post(f"/run/r/v1/{CHAT}", json=body, timeout=0.3)
    wait_for(lambda: engine_app.cancelled, "the engine noticed")
    wait_for(store.list_runs, "the call was stored")
    assert [call.status for call in store.trace("r").calls] == ["aborted"]
    (engine,) = proxy.app.upstream.pools["main"].engines
    assert (engine.in_flight, proxy.app.hold.gates["main"].in_flight) == (0, 0)
    engine_app.gate.set()
    engine_app.gate = None
    assert ask(proxy, "after", stream=True, top_p=0.9).status_code == 200


def test_a_request_that_is_wrong_for_another_reason_is_refused_as_before(
    proxy: SimpleNamespace, engine_app: Any
) -> None:
    answer = ask(proxy, top_p=0.9, messages=[{"role": "user", "content": "x" * 5000}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages")
    ask(proxy, top_p=0.9)
    assert engine_app.requests[-1]["top_logprobs"] == 20


def told(reach: Reach, times: int, largest: int | None) -> int:
    for _ in range(times):
        reach.heard(reach.now, largest)
    return reach.now


def test_fewer_are_asked_for_once_that_would_long_have_sufficed() -> None:
    reach = Reach(256)
    assert [told(reach, 1, None) for _ in range(3)] == [80, 256, 256]
    assert told(reach, STEADY - 1, 128) == 256 and told(reach, 1, 129) == 256 and told(reach, STEADY - 1, 1) == 256
    assert told(reach, 1, 1) == 128 and [told(reach, STEADY, 1) for _ in range(4)] == [64, 32, 20, 20]
    reach.heard(256, None)
    assert reach.now == 20, "an answer from before the change says nothing of it"


def test_what_the_most_does_not_tell_is_not_paid_for() -> None:
    reach = Reach(40)
    assert told(reach, STEADY, None) == 40 and told(reach, 1, 21) == 40 and told(reach, STEADY - 1, None) == 40
    assert told(reach, 1, None) == 20
    assert told(reach, REST, None) == 20 and told(reach, 1, None) == 40, "it is tried again"


def asked_of(kept: KeptSets, **body: Any) -> Asked:
    return kept.asked_of("main", plan_sampling(body, purpose="live", override=None), "live")


def answered(largest: int | None, **changed: Any) -> Call:
    """A call with one token, of whose set so many are known."""
    (choice,) = make_call("c", "r", tokens=((4,),)).choices
    kept = None if largest is None else (tuple(range(4, 4 + largest)),)
    return make_call("c", "r", choices=(replace(choice, kept_ids=kept, **changed),))


@pytest.fixture
def kept() -> KeptSets:
    model = {"checkpoint": "none", "engine": {"url": "http://127.0.0.1:9"}}
    return KeptSets(parse_config({"store": "sqlite:///none.db", "models": {"main": model}, "roles": {"*": "main"}}))


def test_calls_that_top_k_bounds_as_well_ask_for_fewer_again(kept: KeptSets) -> None:
    """The first asks for what its top-k leaves at most: that it was not whole then says nothing of more."""
    mixed = {"top_k": 50, "top_p": 0.9}
    asked_of(kept, **mixed).heard(answered(None))
    assert asked_of(kept, **mixed).count == 58
    asked_of(kept, **mixed).heard(answered(None))
    assert asked_of(kept, top_p=0.9).count == 80
    for _ in range(2 * STEADY):
        asked_of(kept, **mixed).heard(answered(5))
    assert asked_of(kept, **mixed).count == 20


def test_what_says_nothing_of_how_many_were_left_changes_nothing(kept: KeptSets) -> None:
    asked_of(kept, top_k=12).heard(answered(None))
    for inexact in (answered(None, logprobs=None), replace(answered(None), quarantine="usage mismatch")):
        asked_of(kept, top_p=0.9).heard(inexact)
    unasked = asked_of(kept, top_p=0.9)
    unasked.begin(0)
    unasked.heard(answered(None))
    asked_of(kept, top_p=0.9).heard(replace(answered(None), status="aborted"))
    assert asked_of(kept, top_p=0.9).count == 20
    asked_of(kept, top_p=0.9).heard(answered(None))
    assert asked_of(kept, top_p=0.9).count == 80 and asked_of(kept, top_k=12).count == 20


@pytest.mark.parametrize("most", [0, 7, 20])
def test_no_more_than_the_configuration_says(most: int) -> None:
    assert told(Reach(most), STEADY + 1, None) == most


def likely(*shares: float) -> list[float]:
    return [math.log(share) if share else -9999.0 for share in shares]


@pytest.mark.parametrize(
    ("names", "logprobs", "expected"),
    [
        (("token_id:7", "token_id:3", "token_id:9"), likely(0.25, 0.75, 0), (7, 3)),
        (("token_id:7",), [0.0], (7,)),
        (("token_id:7", "token_id:3"), likely(0.25, 0.7499), None),
        (("token_id:7", "a"), likely(0.25, 0.75), None),
        (("token_id:x",), [0.0], None),
        (("token_id:7", "token_id:3"), [0.0, None], (7,)),
        (("token_id:7",), [None], None),
        ((), [], None),
    ],
)
def test_a_set_is_known_where_it_holds_all_of_the_probability(
    names: tuple[str, ...], logprobs: list[float | None], expected: Set | None
) -> None:
    chat = [{"token": name, "logprob": value} for name, value in zip(names, logprobs, strict=True)]
    assert sets_of_chat([raw(chat)]) == [expected]
    assert sets_of_completion(raw([dict(zip(names, logprobs, strict=True))])) == [expected]


def test_what_is_no_list_of_them_is_no_set() -> None:
    assert sets_of_chat([raw(None), raw({"a": 1})]) == [None, None]
    assert sets_of_completion(raw(7)) == [] and sets_of_completion(raw([None])) == [None]


def raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
