"""Any value becomes JSON of bounded size."""

import json
import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, ToolMessage, messages_to_dict
from langgraph.types import Command, Send
from pydantic import BaseModel

from tracegrad.adapters.plain_json import plain


@dataclass
class Point:
    x: int
    y: Any


class Model(BaseModel):
    name: str
    inner: list[Point] = []


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_json_stays_as_it_is() -> None:
    value = {"a": [1, 2.5, None, True, "x"], "b": {"c": "d"}}
    assert plain(value) == value


def test_messages_keep_what_they_say() -> None:
    said = AIMessage(
        "hi", id="m1", usage_metadata={"input_tokens": 1, "output_tokens": 1, "total_tokens": 2},
        tool_calls=[{"name": "f", "args": {"x": 1}, "id": "c"}], response_metadata={"id": "chatcmpl-1"},
    )  # fmt: skip
    call = {"name": "f", "args": {"x": 1}, "id": "c", "type": "tool_call"}
    assert plain(said) == {"type": "ai", "content": "hi", "tool_calls": [call]}
    answer = ToolMessage("no", name="f", tool_call_id="c", status="error")
    assert plain([HumanMessage("q"), answer]) == [
        {"type": "human", "content": "q"},
        {"type": "tool", "name": "f", "content": "no", "tool_call_id": "c", "status": "error"},
    ]
    assert plain(json.loads(json.dumps(messages_to_dict([said])[0]["data"]))) == plain(said), "as LangSmith posts it"


def test_messages_as_javascript_posts_them() -> None:
    def posted(name: str, **kwargs: Any) -> dict[str, Any]:
        more = {"additional_kwargs": {}, "response_metadata": {}, "id": "m1"}
        return {
            "lc": 1,
            "type": "constructor",
            "id": ["langchain_core", "messages", name],
            "kwargs": {**more, **kwargs},
        }

    call = {"name": "f", "args": {"x": 1}, "id": "c", "type": "tool_call"}
    assert plain(posted("AIMessageChunk", content="", tool_calls=[call], invalid_tool_calls=[])) == {
        "type": "ai", "content": "", "tool_calls": [call],
    }  # fmt: skip
    assert plain([posted("ToolMessage", content="no", tool_call_id="c", status="success")]) == [
        {"type": "tool", "content": "no", "tool_call_id": "c"}
    ]
    other = {"lc": 1, "type": "constructor", "id": ["langchain", "Prompt"], "kwargs": {"content": "x"}}
    assert plain(other) == other


def test_objects_become_their_fields_or_their_repr() -> None:
    assert plain(Point(1, {2})) == {"x": 1, "y": [2]}
    assert plain(Model(name="n", inner=[Point(1, 2)])) == {"name": "n", "inner": [{"x": 1, "y": 2}]}
    assert plain({1: uuid.UUID(int=0)}) == {"1": "UUID('00000000-0000-0000-0000-000000000000')"}
    assert plain(datetime(2026, 1, 2)) == "datetime.datetime(2026, 1, 2, 0, 0)"
    assert plain(float("nan")) == "nan"
    assert plain(Hostile()) == "<Hostile>"
    assert plain(Command(goto="x", update={"a": 1}))["update"] == {"a": 1}
    assert "work" in str(plain(Send("work", {"a": 1})))


def test_what_is_too_large_is_cut_and_says_so() -> None:
    for value in ("x" * 1_000_000, ["y" * 100] * 10_000, {str(i): "z" * 100 for i in range(10_000)}):
        cut = json.dumps(plain(value))
        assert len(cut) < 80_000 and "cut" in cut
    ring: list[Any] = []
    ring.append(ring)
    assert "[[" in json.dumps(plain(ring))
