"""The SSE parser: whatever the chunk boundaries, the same events; the raw bytes are never lost."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracegrad.adapters.proxy.sse import Event, SSEParser, encode

STREAM = (
    b': keep-alive\n\ndata: {"a":"\xc3\xa9"}\n\nevent: x\r\nid: 1\r\ndata: two\r\ndata:lines\r\n\r\n'
    b"data: cr\r\rdata: [DONE]\n\n"
)
DATA = [None, '{"a":"é"}'.encode(), b"two\nlines", b"cr", b"[DONE]"]


def parse(chunks: list[bytes]) -> list[Event]:
    parser = SSEParser()
    return [event for chunk in chunks for event in parser.feed(chunk)] + parser.close()


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_boundaries_do_not_matter(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    events = parse([STREAM[a:b] for a, b in itertools.pairwise(edges)])
    assert [event.data for event in events] == DATA
    assert b"".join(event.raw for event in events) == STREAM


@given(st.lists(st.text().map(lambda s: re.sub(r"[\r\n]", "", s).encode()), max_size=8), st.integers(1, 7))
def test_encode_and_parse_are_inverse(payloads: list[bytes], size: int) -> None:
    stream = b"".join(encode(payload) for payload in payloads)
    events = parse([stream[i : i + size] for i in range(0, len(stream), size)])
    assert [event.data for event in events] == payloads


def test_an_unterminated_event_comes_out_at_the_end() -> None:
    parser = SSEParser()
    assert parser.feed(b"data: half") == []
    assert parser.close() == [Event(b"data: half", b"half")]
    assert parser.close() == []


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
def test_an_event_is_out_as_soon_as_it_is_unambiguous(end: bytes) -> None:
    events = SSEParser().feed(b"data: x" + end + b"d")
    assert [event.data for event in events] == [b"x"]
