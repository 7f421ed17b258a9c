"""The middleware that vLLM loads, without vLLM: who asks is told which version sampled which token, nobody else."""

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace as Some
from typing import Any

import pytest

from tracegrad.trainer import engine_spans

TOLD = b'{"0":[["7",0,2],["8",2,5]],"1":[["8",0,4]]}'


async def outputs() -> AsyncIterator[Any]:
    """As vLLM gives them: spans with what finishes, and nothing before."""
    seven, eight = Some(version="7", start=0, end=2), Some(version="8", start=2, end=5)
    yield Some(outputs=[Some(index=0, weight_versions=None)])
    yield Some(outputs=[Some(index=0, weight_versions=[seven, eight])])
    yield Some(outputs=[Some(index=1, weight_versions=[Some(version="8", start=0, end=4)])])


async def plain(_scope: Any, _receive: Any, send: Any) -> None:
    heard = engine_spans._heard.get()
    async for _ in outputs() if heard is None else engine_spans._noted(outputs(), heard):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b"{}"})


async def stream(_scope: Any, _receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    heard = engine_spans._heard.get()
    async for _ in outputs() if heard is None else engine_spans._noted(outputs(), heard):
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": True})


def said(app: Any, *headers: tuple[bytes, bytes]) -> tuple[list[Any], bytes]:
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {"type": "http", "headers": [(b"host", b"x"), *headers]}
    asyncio.run(engine_spans.TracegradSpans(app)(scope, None, send))
    return messages[0]["headers"], b"".join(message.get("body", b"") for message in messages)


def test_who_asks_is_told_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_spans, "tracegrad_listen", lambda: None)
    asks = (b"x-tracegrad-versions", b"1")
    assert said(plain) == ([(b"a", b"b")], b"{}")
    assert said(plain, asks) == ([(b"a", b"b"), (b"x-tracegrad-versions", TOLD)], b"{}")
    chunks = b"data: {}\n\n" * 3
    assert said(stream) == ([], chunks + b"data: [DONE]\n\n")
    assert said(stream, asks) == ([], chunks + b": tracegrad-versions " + TOLD + b"\n\ndata: [DONE]\n\n")
