"""How values lie in the database: int32 and float32 blobs, JSON text.

Token ids are little-endian int32, logprobs little-endian float32, four bytes an element, so that the schema can check
a length with ``length(blob) = 4 * n``. JSON is text written by msgspec. Refuses what cannot be stored exactly (a token
id outside int32, a value JSON has no word for). Called by `schema` as column types; nobody else needs it.
"""

import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Dialect
from sqlalchemy.types import LargeBinary, Text, TypeDecorator

from tracegrad.tracestore.deflate_words import WORDS
from tracegrad.tracestore.errors import InvalidRecord

_SWAP = sys.byteorder == "big"
_LEAST_DEFLATED, _MOST_DEFLATED = 128, 4_096
_DECODER = msgspec.json.Decoder()

if array("i").itemsize != 4 or array("f").itemsize != 4:  # pragma: no cover - no such platform is supported
    raise ImportError("tracegrad needs a platform whose C int and float are four bytes")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise NotImplementedError(f"{type(value).__name__} is not JSON")


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)


def encode_int32(values: Sequence[int]) -> bytes:
    """Return ``4 * len(values)`` bytes. Raises InvalidRecord for an id outside int32."""
    try:
        return struct.pack(f"<{len(values)}i", *values)  # a third of what array("i") takes
    except (struct.error, TypeError) as error:
        raise InvalidRecord(f"token ids must be integers that fit int32: {error}") from error


def decode_int32(blob: bytes) -> tuple[int, ...]:
    """Inverse of `encode_int32`."""
    return struct.unpack(f"<{len(blob) // 4}i", blob)


def packed(text: bytes) -> bytes:
    """Return JSON text deflated where that is worth it. Which it is, the first byte says: no JSON begins with an R.

    Without zlib's header and checksum, which are a fortieth of a message and a fifth of the time: the hash of a block
    is over its text. Long texts stay as they are: a client waits for the commit (PostgreSQL compresses them itself).
    """
    if not _LEAST_DEFLATED <= len(text) <= _MOST_DEFLATED:
        return text
    # A window of 4 KB, small tables: zlib's own take longer to be cleared than a message takes to be deflated.
    deflater = zlib.compressobj(6, zlib.DEFLATED, -12, 6, zlib.Z_DEFAULT_STRATEGY, WORDS)
    deflated = b"R" + deflater.compress(text) + deflater.flush()
    return deflated if len(deflated) < 0.9 * len(text) else text


def unpacked(blob: bytes) -> bytes:
    """Inverse of `packed`. Raises ValueError for what cannot be inflated."""
    if blob.startswith(b"R"):
        inflater, blob = zlib.decompressobj(-12, zdict=WORDS), blob[1:]
    elif blob.startswith(b"H"):  # as zlib frames it, as we did first; without the words it says so itself
        inflater = zlib.decompressobj(zdict=WORDS)
    else:
        return blob
    try:
        text = inflater.decompress(blob) + inflater.flush()
    except zlib.error as error:
        raise ValueError(f"text that cannot be inflated: {error}") from error
    if not inflater.eof or inflater.unused_data:
        raise ValueError("text that cannot be inflated: it is cut off, or longer than it says")
    return text


def narrow_int32(blob: bytes) -> tuple[int, bytes]:
    """Return the fewest bytes an id (2, 3 or 4) that hold all these int32 ids, and the ids in so many bytes each."""
    count = len(blob) // 4
    if blob[3::4].count(0) < count:
        return 4, blob
    width = 2 if blob[2::4].count(0) == count else 3
    narrow = bytearray(width * count)
    for place in range(width):
        narrow[place::width] = blob[place::4]
    return width, bytes(narrow)


def widen_int32(width: int, blob: bytes) -> bytes:
    """Inverse of `narrow_int32`. Raises ValueError for a width or a length that it does not give."""
    if width not in (2, 3, 4) or len(blob) % width:
        raise ValueError(f"{len(blob)} bytes are no token ids of {width} bytes each")
    if width == 4:
        return blob
    wide = bytearray(len(blob) // width * 4)
    for place in range(width):
        wide[place::4] = blob[place::width]
    return bytes(wide)


def widened(blob: bytes, count: int) -> bytes:
    """Return the int32 of `count` narrowed ids. Raises ValueError where the bytes are not 2, 3 or 4 each."""
    if not count:
        if blob:
            raise ValueError(f"{len(blob)} bytes for no token ids")
        return b""
    return widen_int32(len(blob) // count if len(blob) % count == 0 else 0, blob)


def encode_float32(values: Iterable[float]) -> bytes:
    """Return ``4 * len(values)`` bytes; each value is rounded to float32. NaN and infinities are kept."""
    try:
        return _to_bytes(array("f", values))
    except (OverflowError, TypeError) as error:
        raise InvalidRecord(f"logprobs must be numbers: {error}") from error


def decode_float32(blob: bytes) -> tuple[float, ...]:
    """Inverse of `encode_float32`: float32 values held as Python floats."""
    return tuple(_from_bytes("f", blob))


def encode_json(value: Any) -> str:
    """Return compact JSON text. Raises InvalidRecord for what JSON cannot hold."""
    return json_bytes(value).decode()


def json_bytes(value: Any) -> bytes:
    """As `encode_json`, in UTF-8."""
    try:
        return _ENCODER.encode(value)
    except (TypeError, ValueError, OverflowError, NotImplementedError, msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRecord(f"a value cannot be written as JSON: {error}") from error


def decode_json(text: str | bytes) -> Any:
    """Inverse of `encode_json`; arrays come back as lists."""
    return _DECODER.decode(text)


def _to_bytes(values: "array[Any]") -> bytes:
    if _SWAP:  # pragma: no cover - big-endian machines only
        values.byteswap()
    return values.tobytes()


def _from_bytes(code: str, blob: bytes) -> "array[Any]":
    values: array[Any] = array(code)
    values.frombytes(blob)
    if _SWAP:  # pragma: no cover - big-endian machines only
        values.byteswap()
    return values


class Float32s(TypeDecorator[tuple[float, ...]]):
    """A tuple of logprobs as a blob of float32."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: tuple[float, ...] | None, dialect: Dialect) -> bytes | None:
        """Encode one parameter."""
        return None if value is None else encode_float32(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> tuple[float, ...] | None:
        """Decode one column."""
        return None if value is None else decode_float32(value)


class JsonText(TypeDecorator[Any]):
    """JSON as text, so that a row reads the same on every backend."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any | None, dialect: Dialect) -> str | None:
        """Encode one parameter."""
        return None if value is None else encode_json(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> Any | None:
        """Decode one column."""
        return None if value is None else decode_json(value)
