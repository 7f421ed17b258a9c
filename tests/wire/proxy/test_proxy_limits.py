"""How much a request may be, and compressed bodies: what is too much is refused before it costs anything."""

import gzip
import json
import random
import tracemalloc
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tracegrad.adapters.proxy.errors import BodyTooLarge, InvalidRequest, ProxyError
from tracegrad.adapters.proxy.limits import unpacked
from tracegrad.tracestore.store import Store

CHAT = "/v1/chat/completions"
MESSAGE = {"role": "user", "content": "hello"}
ASK = json.dumps({"messages": [MESSAGE]}).encode()
ZSTD = zstandard.ZstdCompressor()


def raw_deflate(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


def streamed_zstd(body: bytes) -> bytes:
    """As LangSmith's client writes it: no content size in the frame."""
    packer = ZSTD.compressobj()
    return packer.compress(body) + packer.flush()


PACKERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("identity", bytes),
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("zstd", ZSTD.compress),
    ("zstd", streamed_zstd),
]


@given(st.binary(max_size=2000), st.sampled_from(PACKERS))
def test_what_was_packed_comes_out_again(body: bytes, packer: tuple[str, Callable[[bytes], bytes]]) -> None:
    assert unpacked(packer[1](body), packer[0].encode(), 2000) == body


@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate", "zstd"]), st.integers(0, 200))
def test_no_bytes_break_the_unpacking(body: bytes, encoding: str, limit: int) -> None:
    try:
        assert len(unpacked(body, encoding.encode(), limit)) <= limit
    except ProxyError as error:
        assert error.status in (400, 413)


@pytest.mark.parametrize(("encoding", "pack"), PACKERS[1:])
def test_a_bomb_goes_off_no_further_than_the_limit(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    bomb = pack(bytes(64 * 1024 * 1024))
    assert len(bomb) < 200_000
    limit = 100_000
    assert len(unpacked(pack(bytes(limit)), encoding.encode(), limit)) == limit
    with pytest.raises(BodyTooLarge, match="unpacks to more than 100000"):
        unpacked(pack(bytes(limit + 1)), encoding.encode(), limit)
    tracemalloc.start()
    with pytest.raises(BodyTooLarge):
        unpacked(bomb, encoding.encode(), limit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 1024 * 1024


@pytest.mark.parametrize(("encoding", "pack"), PACKERS[1:])
def test_a_body_that_is_cut_off_or_goes_on_is_refused(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    whole = pack(random.Random(0).randbytes(1000))
    for broken in (whole[:-1], whole[:20], whole + b"\0more"):
        with pytest.raises(InvalidRequest, match="as content-encoding says"):
            unpacked(broken, encoding.encode(), 100_000)


def test_a_body_in_several_members_is_one_body() -> None:
    parts = [b"one ", b"two ", b"three"]
    assert unpacked(b"".join(map(gzip.compress, parts)), b"GZIP", 100) == b"one two three"
    assert unpacked(b"".join(map(ZSTD.compress, parts)), b"zstd", 100) == b"one two three"


def test_a_window_larger_than_a_decoder_must_have_is_refused() -> None:
    wide = zstandard.ZstdCompressor(compression_params=zstandard.ZstdCompressionParameters(window_log=27)).compressobj()
    body = wide.compress(bytes(1000)) + wide.flush()
    with pytest.raises(InvalidRequest, match="too much memory"):
        unpacked(body, b"zstd", 100_000)


def test_zstd_without_its_package_is_a_plain_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr("tracegrad.adapters.proxy.limits.importlib.import_module", missing)
    with pytest.raises(InvalidRequest, match="needs the package zstandard"):
        unpacked(b"x", b"zstd", 10)


@pytest.mark.parametrize(("encoding", "pack"), PACKERS)
def test_a_compressed_request_is_answered_and_reaches_the_engine_plain(
    proxy: SimpleNamespace, store: Store, engine_app: Any, encoding: str, pack: Callable[[bytes], bytes]
) -> None:
    headers = {"content-encoding": encoding, "content-type": "application/json"}
    answer = proxy.client.post("/run/r" + CHAT, content=pack(ASK), headers=headers)
    assert answer.status_code == 200, answer.text
    assert engine_app.requests[0]["messages"] == [MESSAGE]
    assert "content-encoding" not in engine_app.headers[0]
    assert store.trace("r").calls[0].request["messages"] == [MESSAGE]


LIMITS = {"max_body_bytes": 1000, "max_header_bytes": 2000, "max_messages": 3, "max_tools": 2}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
DEEP = b'{"messages":' + b"[" * 5000 + b"]" * 5000 + b"}"


@pytest.mark.parametrize(
    ("ask", "status", "code"),
    [
        ({"json": {"messages": [MESSAGE] * 3, "tools": [TOOL] * 2}}, 200, None),
        ({"json": {"messages": [MESSAGE] * 4}}, 400, "too_many_messages"),
        ({"json": {"messages": [MESSAGE], "tools": [TOOL] * 3}}, 400, "too_many_tools"),
        ({"content": ASK, "headers": {"x-long": "y" * 2001}}, 400, "headers_too_large"),
        ({"content": ASK + b" " * 1000}, 413, "body_too_large"),
        ({"content": gzip.compress(ASK + b" " * 1000), "headers": {"content-encoding": "gzip"}}, 413, "body_too_large"),
        ({"content": ASK, "headers": {"content-encoding": "gzip"}}, 400, "invalid_encoding"),
        ({"content": ASK, "headers": {"content-encoding": "br"}}, 400, "unsupported_encoding"),
        ({"content": ASK, "headers": {"content-encoding": "gzip, gzip"}}, 400, "unsupported_encoding"),
        (
            {"content": gzip.compress(DEEP), "headers": {"content-encoding": "gzip"}, "room": 20_000},
            400,
            "invalid_json",
        ),
    ],
)
def test_too_much_is_a_plain_error_and_reaches_no_engine(
    start_proxy: Callable[..., SimpleNamespace], engine_app: Any, ask: dict[str, Any], status: int, code: str | None
) -> None:
    room = {"max_body_bytes": ask["room"]} if "room" in ask else {}
    proxy = start_proxy(proxy={"limits": LIMITS | room})
    answer = proxy.client.post(CHAT, **{key: value for key, value in ask.items() if key != "room"})
    assert answer.status_code == status, answer.text
    if code is not None:
        assert answer.json()["error"]["code"] == code
        assert engine_app.requests == []


def test_the_proxys_own_paths_have_the_same_limits(start_proxy: Callable[..., SimpleNamespace]) -> None:
    proxy = start_proxy(proxy={"limits": LIMITS})
    tasks = {"tasks": [{"task_id": "t", "input": {"text": "x" * 2000}}]}
    packed = gzip.compress(json.dumps(tasks).encode())
    for sent in ({"json": tasks}, {"content": packed, "headers": {"content-encoding": "gzip"}}):
        answer = proxy.client.post("/tracegrad/v1/tasks", **sent)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert proxy.client.post("/tracegrad/v1/tasks", content=DEEP[:900]).status_code == 400
