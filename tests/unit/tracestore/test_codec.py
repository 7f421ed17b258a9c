"""The codecs: what goes in comes out, at four bytes an element."""

import math
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracegrad.tracestore.codec import (
    decode_float32,
    decode_int32,
    decode_json,
    encode_float32,
    encode_int32,
    encode_json,
    packed,
    unpacked,
)
from tracegrad.tracestore.deflate_words import WORDS
from tracegrad.tracestore.errors import InvalidRecord

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab\0é", max_size=3), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=50).map(tuple))
def test_token_ids_round_trip(ids: tuple[int, ...]) -> None:
    blob = encode_int32(ids)
    assert blob == struct.pack(f"<{len(ids)}i", *ids)
    assert decode_int32(blob) == ids


@given(st.lists(st.floats(width=32), max_size=50).map(tuple))
def test_float32_values_round_trip_exactly(values: tuple[float, ...]) -> None:
    blob = encode_float32(values)
    assert len(blob) == 4 * len(values)
    assert repr(decode_float32(blob)) == repr(values)


def test_known_bytes() -> None:
    assert encode_int32((1, -1)) == b"\x01\0\0\0\xff\xff\xff\xff"
    assert encode_float32((-0.5, -math.inf)) == b"\0\0\0\xbf\0\0\x80\xff"
    assert math.isnan(decode_float32(encode_float32((math.nan,)))[0])
    assert decode_float32(encode_float32((-0.1,))) == (-0.10000000149011612,)


@pytest.mark.parametrize("ids", [(2**31,), (-(2**31) - 1,), (1.5,), ("1",), (None,)])
def test_what_is_no_token_id_is_refused(ids: tuple[int, ...]) -> None:
    with pytest.raises(InvalidRecord, match="int32"):
        encode_int32(ids)


@pytest.mark.parametrize("values", [("x",), (None,)])
def test_what_is_no_logprob_is_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(InvalidRecord, match="numbers"):
        encode_float32(values)


@given(json_values)
def test_json_round_trips(value: object) -> None:
    text = encode_json(value)
    assert decode_json(text) == value
    assert "\0" not in text


@pytest.mark.parametrize("value", [object(), {1j}, "\ud800", {"x": b"\xff".decode("latin1"), "y": {object(): 1}}])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(InvalidRecord, match="JSON"):
        encode_json(value)


def test_text_is_deflated_against_words_that_never_change() -> None:
    """A text of this store, and of those framed by zlib, with the words and before them; what is cut off is told."""
    text = b'{"role":"user","content":"Which of these questions should have been answered by the system before?"}' * 2
    blob = packed(text)
    assert len(blob) < len(text) / 3 and unpacked(blob) == text
    framed = zlib.compressobj(6, zlib.DEFLATED, 12, 6, zlib.Z_DEFAULT_STRATEGY, WORDS)
    framed_blob = framed.compress(text) + framed.flush()
    assert unpacked(framed_blob) == unpacked(zlib.compress(text, wbits=12)) == text
    assert blob[:1] == b"R" and framed_blob[:1] == b"H" and len(blob) == len(framed_blob) - 9
    assert (len(WORDS), zlib.adler32(WORDS)) == (2889, 4223997762)
    for broken in (blob[:-1], blob + b"x", b"R", b"R\xff" + blob[2:], framed_blob[:-1], b"H" + blob[2:]):
        with pytest.raises(ValueError, match="cannot be inflated"):
            unpacked(broken)
