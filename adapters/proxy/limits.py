"""How much a request may be: bytes of headers and body, messages, tools, and what a compressed body unpacks to.

A compressed body is unpacked piece by piece and never further than the limit, whatever its header promises. Refuses
(413) too many bytes, (400) everything else. zstd needs the package `zstandard`, which LangSmith's client brings along.
Called by `wire` (bodies), `app` (headers) and `chat` (counts).
"""

import importlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from tracegrad.adapters.proxy.errors import BodyTooLarge, InvalidRequest
from tracegrad.tracestore.config import LimitsConfig

_GZIP, _ZLIB, _RAW_DEFLATE = 31, 15, -15
"""`wbits` of zlib: which wrapper it expects."""
_ZSTD_WINDOW_BYTES = 2**23
"""What RFC 8878 asks a decoder to support at least, and all that a client may make us reserve."""
_ZSTD_STEP_BYTES = 256
"""Its decoder takes no bound on what it returns, so it gets little at a time: 4 bytes may stand for 128 KiB."""


def check_header_bytes(headers: Iterable[tuple[bytes, bytes]], limits: LimitsConfig) -> None:
    """Raise InvalidRequest where names and values together have more than `max_header_bytes`."""
    size = sum(len(name) + len(value) for name, value in headers)
    if size > limits.max_header_bytes:
        raise InvalidRequest(
            f"the headers have {size} bytes; at most {limits.max_header_bytes} (proxy.limits.max_header_bytes)",
            code="headers_too_large",
        )


def check_counts(body: Mapping[str, Any], limits: LimitsConfig) -> None:
    """Raise InvalidRequest where a decoded request has too many messages or tools."""
    for name, most in (("messages", limits.max_messages), ("tools", limits.max_tools)):
        held = body.get(name)
        if isinstance(held, list) and len(held) > most:
            raise InvalidRequest(
                f"the request has {len(held)} {name}; at most {most} (proxy.limits.max_{name})",
                code=f"too_many_{name}",
                param=name,
            )


def unpacked(body: bytes, encoding: bytes, limit: int) -> bytes:
    """Return a body without its content encoding (gzip, deflate, zstd or identity).

    Raises:
        BodyTooLarge: it unpacks to more than `limit` bytes.
        InvalidRequest: the encoding is not one of these, or the body is not in it.
    """
    name = encoding.strip().lower()
    try:
        if name in (b"", b"identity"):
            plain = body
        elif name in (b"gzip", b"x-gzip"):
            plain = _inflated(body, _GZIP, limit)
        elif name == b"deflate":
            plain = _inflated(body, _ZLIB if _has_zlib_header(body) else _RAW_DEFLATE, limit)
        elif name == b"zstd":
            plain = _unpacked_zstd(body, limit)
        else:
            raise InvalidRequest(
                f"the content-encoding {name[:40].decode('latin-1')!r} is not supported; send gzip, deflate, zstd or "
                "none",
                code="unsupported_encoding",
            )
    except (zlib.error, EOFError) as error:
        raise InvalidRequest(
            f"the body is not {name.decode('latin-1')}, as content-encoding says: {error}", code="invalid_encoding"
        ) from error
    if len(plain) > limit:
        raise BodyTooLarge(f"the body unpacks to more than {limit} bytes (proxy.limits.max_body_bytes)")
    return plain


def _inflated(body: bytes, wbits: int, limit: int) -> bytes:
    """Unpack at most ``limit + 1`` bytes; a gzip body may have several members."""
    parts: list[bytes] = []
    left = limit + 1
    while body and left > 0:
        inflater = zlib.decompressobj(wbits)
        parts.append(inflater.decompress(body, left))
        left -= len(parts[-1])
        if left > 0 and not inflater.eof:
            raise EOFError("it ends too early")
        body = inflater.unused_data
        if body and (wbits != _GZIP or not parts[-1]):  # empty members without end would cost time and yield nothing
            raise EOFError("something follows its end")
    return b"".join(parts)


def _has_zlib_header(body: bytes) -> bool:
    """Some clients say deflate and send the bare stream. Source: RFC 1950, section 2.2."""
    return len(body) >= 2 and body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0


def _unpacked_zstd(body: bytes, limit: int) -> bytes:
    try:
        zstandard = importlib.import_module("zstandard")
    except ModuleNotFoundError as error:
        raise InvalidRequest(
            "the content-encoding zstd needs the package zstandard beside the proxy; install it, or send gzip",
            code="unsupported_encoding",
        ) from error
    parts: list[bytes] = []
    left = limit
    while body and left >= 0:
        inflater = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES).decompressobj()
        try:
            for start in range(0, len(body), _ZSTD_STEP_BYTES):
                parts.append(inflater.decompress(body[start : start + _ZSTD_STEP_BYTES]))
                left -= len(parts[-1])
                if left < 0 or inflater.eof:
                    break
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from error
        if left >= 0 and not inflater.eof:
            raise EOFError("it ends too early")
        body = inflater.unused_data + body[start + _ZSTD_STEP_BYTES :]
        if body and not parts[-1]:
            raise EOFError("something follows its end")
    return b"".join(parts)
