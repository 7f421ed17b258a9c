"""Prompts as chains: whatever is cut comes back, and blocks put together are what was appended, however it came."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from tracegrad.tracestore import blocks, chains
from tracegrad.tracestore.chains import (
    IDS_A_UNIT,
    chain_of,
    content_of,
    cut,
    cut_request,
    units_of_block,
    units_of_ids,
)
from tracegrad.tracestore.codec import decode_int32, encode_int32, json_bytes, narrow_int32, widen_int32, widened
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import make_call

int32 = st.integers(-(2**31), 2**31 - 1)
small = st.integers(0, 2**16 - 1)
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8,
)
long_text = words.map(lambda word: (word or "x") * 60)
message = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": long_text | values})
requests = st.dictionaries(
    st.sampled_from(["messages", "input", "tools", "prompt", "é", "", "response_format"]) | words,
    values | long_text | st.lists(message, max_size=5) | st.lists(values, max_size=3),
    max_size=6,
)


@given(st.lists(small, max_size=40) | st.lists(st.integers(0, 2**24 - 1), max_size=40) | st.lists(int32, max_size=40))
def test_narrow_ids_round_trip(ids: list[int]) -> None:
    blob = encode_int32(ids)
    width, narrow = narrow_int32(blob)
    assert len(narrow) == width * len(ids)
    assert widen_int32(width, narrow) == widened(narrow, len(ids)) == blob
    assert width == (2 if all(0 <= i < 2**16 for i in ids) else 3 if all(0 <= i < 2**24 for i in ids) else 4)


@pytest.mark.parametrize(("blob", "count"), [(b"\0", 1), (b"\0" * 5, 1), (b"\0" * 7, 3), (b"\0\0", 0), (b"", 2)])
def test_what_are_no_narrow_ids_is_refused(blob: bytes, count: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        widened(blob, count)


@given(requests)
def test_a_request_comes_back_byte_for_byte(request_: dict[str, Any]) -> None:
    whole = json_bytes(request_)
    made = cut_request(request_)
    assert made.whole == whole
    assert list(json.loads(made.whole)) == list(request_), "the order of the keys too"
    assert made == cut(whole), "whoever imports cuts as whoever appends"


@pytest.mark.parametrize(
    "odd",
    [
        '{"messages": [{"role":"user","content":"' + "x" * 300 + '"}]}',  # white space that our encoder does not write
        '{"a":"' + "x" * 300 + '","a":"' + "y" * 300 + '"}',  # a key twice
        '{"a":"\\u0041' + "x" * 300 + '","\\u0062":1}',  # an escape that is not ours
        "[" + "1," * 200 + "1]",
        "x" * 300,
    ],
)
def test_a_text_that_would_not_come_back_is_not_cut(odd: str) -> None:
    whole = odd.encode()
    assert cut(whole).whole == whole


def test_what_grows_is_last_and_cut_by_the_message() -> None:
    messages = [{"role": "user", "content": "m" * 200}, {"role": "assistant", "content": None}]
    tools = [{"type": "function", "name": "t" * 300}]
    made = cut_request({"messages": messages, "n": 1, "tools": tools})
    assert (made.rest, made.places) == (b'{"messages":[],"n":1,"tools":null}', "2,0*")
    assert [json.loads(unit) for unit in made.units] == [tools, *messages]


@given(st.lists(int32, max_size=3 * IDS_A_UNIT + 5))
@settings(max_examples=30)
def test_blocks_of_ids_hold_their_units(ids: list[int]) -> None:
    units, tail = units_of_ids(encode_int32(ids))
    assert b"".join(units) + tail == encode_int32(ids) and len(tail) < 4 * IDS_A_UNIT
    if units:
        assert units_of_block(*content_of(units, is_text=False)) == units


@given(st.lists(values, min_size=1, max_size=5))
def test_blocks_of_text_hold_their_units(items: list[Any]) -> None:
    units = [json_bytes(item) for item in items]
    assert units_of_block(*content_of(units, is_text=True)) == units


def test_equal_units_of_other_projects_kinds_and_places_have_other_hashes() -> None:
    unit = b"1" * 512
    seen = [chain_of(project, [unit, unit], is_text=kind).hashes for project in ("a", "b") for kind in (True, False)]
    assert len({one for hashes in seen for one in hashes}) == 8


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from("abc"), max_size=6), st.integers(0, 2), st.booleans()),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 4),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_prompts_in_any_batches_come_back(
    tmp_path: Path, empty_file: Path, asked: list[tuple[list[str], int, bool]], batch: int
) -> None:
    """Prompts that share beginnings, part in the middle of blocks, end within a unit; with and without remembering."""
    path = tmp_path / "chains.db"
    path.write_bytes(empty_file.read_bytes())
    store = open_store(f"sqlite:///{path}")
    calls = [_asked(number, *one) for number, one in enumerate(asked)]
    for start in range(0, len(calls), batch):
        store.append_calls(calls[start : start + batch])
        if calls[start].stream:
            store._blocks.forget()
    for call in calls:
        kept = store.get_call(call.call_id)
        assert (kept.prompt_ids, kept.request) == (call.prompt_ids, call.request)
    assert store.check() == []
    assert blocks_of(store) <= 2 * 2 * sum(len(letters) for letters, _, _ in asked), "bounded by what is new"
    store.close()


def _asked(number: int, letters: list[str], extra: int, forgets: bool) -> Call:
    ids = [ord(letter) for letter in letters for _ in range(IDS_A_UNIT)] + [7] * extra
    messages = [{"role": "user", "content": letter * 300} for letter in letters]
    request = {"messages": messages, "n": number % 2}
    return replace(make_call(f"c{number}", None, prompt_ids=tuple(ids), request=request), stream=forgets)


def blocks_of(store: Store) -> int:
    with store._db.read() as connection:
        return int(connection.execute(text("SELECT count(*) FROM blocks")).scalar_one())


def prompt(letters: Sequence[str], tail: int = 3) -> tuple[int, ...]:
    return tuple(ord(letter) for letter in letters for _ in range(IDS_A_UNIT)) + (7,) * tail


def test_what_is_remembered_is_bounded_and_a_hint() -> None:
    known = blocks.KnownBlocks(most=3)
    known.remember({bytes([n]): n for n in range(3)})
    known.remember({b"\0": 0})  # used again: the oldest is another now
    known.remember({b"\x09": 9})
    assert known.deepest([b"\x01"]) == (0, 0) and known.deepest([b"\0", b"\x07"]) == (1, 0)
    known.forget()
    assert known.deepest([b"\0"]) == (0, 0)


def test_a_long_prompt_is_several_blocks(store_url: str) -> None:
    store = open_store(store_url)
    ids = tuple(range((blocks.UNITS_A_BLOCK + 2) * IDS_A_UNIT))
    store.append_calls([make_call("c", "r", prompt_ids=ids)])
    assert blocks_of(store) == 2 and store.get_call("c").prompt_ids == ids
    store.close()


def test_ids_are_decoded_as_they_were() -> None:
    assert decode_int32(encode_int32((2**31 - 1, -(2**31), 0))) == (2**31 - 1, -(2**31), 0)
    assert chains.units_of_ids(b"") == ([], b"")
