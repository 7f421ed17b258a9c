"""How values lie in the database: int32 and float32 blobs, JSON text.

Token ids are little-endian int32, logprobs little-endian float32, four bytes an element, so that the schema can check
a length with ``length(blob) = 4 * n``. JSON is text written by msgspec. Refuses what cannot be stored exactly (a token
id outside int32, a value JSON has no word for). Called by `schema` as column types; nobody else needs it.
"""

import sys
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from sqlalchemy import Dialect
from sqlalchemy.types import LargeBinary, Text, TypeDecorator

from tracegrad.tracestore.errors import InvalidRecord

_SWAP = sys.byteorder == "big"
_DECODER = msgspec.json.Decoder()

if array("i").itemsize != 4 or array("f").itemsize != 4:  # pragma: no cover - no such platform is supported
    raise ImportError("tracegrad needs a platform whose C int and float are four bytes")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise NotImplementedError(f"{type(value).__name__} is not JSON")


_ENCODER = msgspec.json.Encoder(enc_hook=_plain)


def encode_int32(values: Iterable[int]) -> bytes:
    """Return ``4 * len(values)`` bytes. Raises InvalidRecord for an id outside int32."""
    try:
        return _to_bytes(array("i", values))
    except (OverflowError, TypeError) as error:
        raise InvalidRecord(f"token ids must be integers that fit int32: {error}") from error


def decode_int32(blob: bytes) -> tuple[int, ...]:
    """Inverse of `encode_int32`."""
    return tuple(_from_bytes("i", blob))


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
    try:
        return _ENCODER.encode(value).decode()
    except (TypeError, ValueError, OverflowError, NotImplementedError, msgspec.MsgspecError, RecursionError) as error:
        raise InvalidRecord(f"a value cannot be written as JSON: {error}") from error


def decode_json(text: str) -> Any:
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


class Int32s(TypeDecorator[tuple[int, ...]]):
    """A tuple of token ids as a blob of int32."""

    impl = LargeBinary
    cache_ok = True

    def process_bind_param(self, value: tuple[int, ...] | None, dialect: Dialect) -> bytes | None:
        """Encode one parameter."""
        return None if value is None else encode_int32(value)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> tuple[int, ...] | None:
        """Decode one column."""
        return None if value is None else decode_int32(value)


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
