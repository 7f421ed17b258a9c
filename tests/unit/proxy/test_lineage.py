"""What a call goes on from, and prompts spliced from recorded ids."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracegrad.adapters.proxy import lineage
from tracegrad.adapters.proxy.lineage import (
    Told,
    begins_with,
    common_tail,
    difference,
    edited_from,
    ended,
    may_continue,
    only_text,
    origin_of,
    says_the_same,
    splice_point,
    takes_ids,
    told,
)
from tracegrad.tracestore.records import Choice, EarlierCall

END = 2
IDS = st.lists(st.integers(3, 9), max_size=6)


def said(content: Any = "x", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def calling(arguments: str, name: str = "f", call_id: str = "1") -> list[dict[str, Any]]:
    return [{"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}]


def answer(message: dict[str, Any], ids: tuple[int, ...] = (5, END), index: int = 0, **more: Any) -> Choice:
    fields: dict[str, Any] = {"finish_reason": "stop", **more}
    return Choice(index=index, token_ids=ids, logprobs=None, message=message, **fields)


def earlier(name: str, messages: list[Any], *choices: Choice, role: str = "a", **setting: Any) -> Told:
    return told(
        EarlierCall(
            call_id=name, role=role, request={"messages": messages, **setting}, prompt_ids=(1, 4), choices=choices
        )
    )


@pytest.mark.parametrize(
    ("sampled", "sent", "same"),
    [
        (said("hi"), {"role": "assistant", "content": "hi", "name": "writer"}, True),
        (said("hi"), said([{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]), True),
        (said("hi"), said("hi "), False),
        (said(None, tool_calls=calling('{"a":1,"b":[2]}')), said("", tool_calls=calling('{"b": [2], "a": 1}')), True),
        (said(None, tool_calls=calling("{}")), said(None, tool_calls=calling("{}", call_id="another")), True),
        (said(None, tool_calls=calling("{}")), said(None, tool_calls=calling("{}", name="g")), False),
        (said(None, tool_calls=calling('{"a":1}')), said(None, tool_calls=calling('{"a":2}')), False),
        (said(None, tool_calls=calling("no json")), said(None, tool_calls=calling("no json")), True),
        (said(None, tool_calls=calling("{}")), said(None), False),
        (said(None, tool_calls=calling("{}")), said(None, tool_calls=["odd"]), False),
        (said(None, tool_calls=calling("{}")), said(None, tool_calls=[{"function": "odd"}]), False),
        (said(None, tool_calls=calling('{"a":1}')), said(None, tool_calls=calling('{"a":1.0}')), True),
        (said(None, tool_calls=calling('{"a":1}')), said(None, tool_calls=calling('{"a":true}')), False),
        (said(None, tool_calls=calling('{"a":NaN}')), said(None, tool_calls=calling('{"a":NaN}')), True),
        (said("hi", reasoning="because"), said("hi"), True),
        (said("hi", reasoning="because"), said("hi", reasoning_content="because"), True),
        (said("hi", reasoning="because"), said("hi", reasoning="never mind"), False),
    ],
)
def test_what_is_said_counts_and_not_how(sampled: Any, sent: Any, same: bool) -> None:
    assert says_the_same(sampled, sent) is same


def test_the_longest_conversation_is_gone_on_from() -> None:
    """Of equal ones the newest, and of its answers the one that was taken."""
    u, v, w = ({"role": "user", "content": name} for name in "uvw")
    first = earlier("first", [u], answer(said("no"), index=0), answer(said("yes"), index=1))
    again = earlier("again", [u], answer(said("yes"), index=0))
    second = earlier("second", [u, said("yes"), v], answer(said("well")))
    past = [first, second, again]

    def found(*messages: dict[str, Any], **setting: Any) -> Any:
        origin = origin_of({"messages": list(messages), **setting}, "a", past)
        if origin is None:
            return None
        assert origin.choice is not None
        return origin.call.call_id, origin.choice.index, origin.n_messages, origin.newest, origin.same_setting

    assert found(u, said("no"), v) == ("first", 0, 2, True, True)
    assert found(u, said("yes"), w) == ("again", 0, 2, True, True)
    assert found(u, said("yes"), v, said("well"), w) == ("second", 0, 4, True, True)
    assert found(u, said("yes"), v, said("other"), w) == ("again", 0, 2, False, True)
    assert found(u, said("no"), v, tools=[{}]) == ("first", 0, 2, True, False)
    assert found(u) is None and found(v, said("yes")) is None and found(u, v) is None


def test_of_equal_conversations_the_likeliest_is_gone_on_from() -> None:
    """Branches that were asked and answered alike are told apart by the ids of their tool calls, role and tools."""
    u, v = {"role": "user", "content": "u"}, {"role": "user", "content": "v"}
    one, other = (said(None, tool_calls=calling("{}", call_id=name)) for name in ("1", "2"))

    def found(past: list[Told], *messages: Any, **setting: Any) -> tuple[str, int]:
        origin = origin_of({"messages": list(messages), **setting}, "a", past)
        assert origin is not None and origin.choice is not None
        return origin.call.call_id, origin.choice.index

    past = [earlier("first", [u], answer(one)), earlier("second", [u], answer(other), role="b")]
    assert found(past, u, one, v)[0] == found(past[::-1], u, one, v)[0] == "first"
    assert found(past, u, other, v)[0] == found(past[::-1], u, other, v)[0] == "second"
    assert found([earlier("both", [u], answer(one, index=0), answer(other, index=1))], u, other, v) == ("both", 1)
    past = [earlier("mine", [u], answer(said("x"))), earlier("theirs", [u], answer(said("x")), role="b")]
    assert found(past, u, said("x"), v)[0] == found(past[::-1], u, said("x"), v)[0] == "mine"
    past = [earlier("with", [u], answer(said("x")), tools=[{}]), earlier("without", [u], answer(said("x")))]
    assert found(past, u, said("x"), v, tools=[{}])[0] == "with"
    assert found(past, u, said("x"), v)[0] == "without"


def test_examples_in_a_prompt_are_no_history_that_was_edited() -> None:
    """A classifier answers with the words of its examples: that makes none of its calls a sequel of another."""
    shots = [{"role": "user", "content": "good"}, said("yes"), {"role": "user", "content": "bad"}, said("no")]
    past = [earlier("one", [*shots, {"role": "user", "content": "fine"}], answer(said("yes")))]
    assert edited_from({"messages": [*shots, {"role": "user", "content": "poor"}]}, "a", past) is None
    more = {"messages": [*shots[2:], {"role": "user", "content": "Fine!"}, said("yes"), {"role": "user"}]}
    assert edited_from(more, "a", past) is None, "as often as before"
    assert edited_from({"messages": [*more["messages"], said("yes")]}, "a", past) is not None


def test_each_answer_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many calls the run has: this is done for every call, on the event loop, also without token-in."""
    reads: list[Any] = []
    shots = [message for n in range(50) for message in ({"role": "user", "content": "u"}, said(str(n)))]
    past = [earlier(str(n), [*shots, {"role": "user", "content": str(n)}], answer(said("r"))) for n in range(500)]
    read = lineage._said
    monkeypatch.setattr(lineage, "_said", lambda message: [reads.append(message), read(message)][1])
    request = {"messages": [*shots, {"role": "user", "content": "new"}]}
    assert origin_of(request, "a", past) is None and edited_from(request, "a", past) is None
    assert len(reads) <= 50


def test_what_vllm_can_only_render_takes_no_ids() -> None:
    assert takes_ids({"echo": False, "truncate_prompt_tokens": None})
    for field in ({"echo": True}, {"truncate_prompt_tokens": -1}, {"truncate_prompt_tokens": 9}):
        assert not takes_ids(field)


def test_an_edited_history_is_one_of_the_same_role() -> None:
    u, v = {"role": "user", "content": "u"}, {"role": "user", "content": "v"}
    past = [earlier("mine", [u], answer(said("yes"))), earlier("theirs", [u], answer(said("yes")), role="b")]

    def found(role: str, *messages: Any) -> str | None:
        origin = edited_from({"messages": list(messages)}, role, past)
        return None if origin is None else origin.call.call_id

    assert found("a", u, said("no"), v) == "mine"
    assert found("a", v, said("yes"), u) == "mine"
    assert found("b", u, said("no"), v) == "theirs"
    assert found("c", u, said("no"), v) is None
    assert found("a", v, said("no"), u) is None and found("a", v, said(""), u) is None


@pytest.mark.parametrize(
    "request_body",
    [{}, {"messages": None}, {"messages": "x"}, {"messages": [1, ["a"]]}, {"messages": [{"role": "user"}]}],
)
def test_what_is_no_conversation_continues_nothing(request_body: dict[str, Any]) -> None:
    assert not may_continue(request_body)


def test_only_text_is_text() -> None:
    assert only_text({"messages": [said(None), said([]), said([{"type": "text", "text": "x"}])]})
    assert not only_text({"messages": [said("x"), {"role": "user", "content": [{"type": "image_url"}]}]})
    assert not only_text({"messages": [{"role": "user", "content": ["x"]}]})
    assert not only_text({"messages": [said([{"type": "text", "text": "x", "image_url": {"url": "data:"}}])]})


def test_a_turn_that_was_cut_short_is_ended() -> None:
    """One that the model ended in another way is not ended twice."""
    assert ended([5, END], answer(said()), END) == [5, END]
    assert ended([5, 6], answer(said(), finish_reason="length"), END) == [5, 6, END]
    assert ended([5, 6], answer(said(), finish_reason="tool_calls"), END) is None


@given(IDS, IDS, IDS)
def test_the_common_tail_is_what_both_end_with(one: list[int], other: list[int], shared: list[int]) -> None:
    tail = common_tail(one + shared, other + shared)
    assert tail[len(tail) - len(shared) :] == shared
    assert (
        (one + shared)[len(one + shared) - len(tail) :] == tail == (other + shared)[len(other + shared) - len(tail) :]
    )
    assert common_tail([1, *tail], [0, *tail]) == tail


@given(IDS, IDS, IDS)
def test_the_difference_is_where_it_is(shared: list[int], one: list[int], other: list[int]) -> None:
    a, b = shared + one, shared + other
    naive = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert difference(a, b) == difference(b, a) == max(naive - 4, 0)


@pytest.mark.parametrize("shared", [510, 511, 512, 513, 1024, 1500])
def test_the_difference_is_found_in_a_long_prompt(shared: int) -> None:
    same = list(range(shared))
    assert difference([*same, -1, 5], [*same, -2, 5]) == difference(same, [*same, 5]) == shared - 4


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5), IDS.filter(bool), st.lists(IDS, max_size=3))
def test_the_rest_is_found_however_the_turns_were_written_anew(
    turns: list[tuple[list[int], list[int]]], asked: list[int], more: list[list[int]]
) -> None:
    """Each turn has ids as sampled and ids as rendered; what follows the last of them is what is asked now."""
    sampled = [one for turn, _ in turns for one in (*turn, END)]
    history = [one for _, turn in turns for one in (*turn, END)]
    rest = [*(one for turn in more for one in (*turn, END)), *asked]
    point = splice_point(history + rest, sampled, END)
    assert point == len(history)
    assert begins_with(sampled + (history + rest)[point:], sampled)


def test_there_is_no_rest_where_turns_are_missing() -> None:
    assert splice_point([3, END, 4], [3, END, 4, END], END) is None
    assert splice_point([3, END], [3, END], END) is None
    assert splice_point([3, END, 4], [3, 4], END) is None
