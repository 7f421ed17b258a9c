"""A fake engine that speaks the chat wire of vLLM 0.32: `/v1/chat/completions` (plain, SSE), `/v1/models`, `/health`.

What it samples is a function of the request: the answer repeats the last user message, one byte a token, so that a
test can tell whose answer it holds. Shapes, key order and nulls are vLLM's; `tests/integration/
test_fake_engine_is_faithful.py` compares them with the real one. Faults are set on the object, never by the client.
Run as a program it serves until killed: `python fake_vllm.py --port 0 --name NAME`.
"""

import argparse
import asyncio
import hashlib
import json
import socket
import struct
import threading
import time
from typing import Any

import uvicorn

EOS = 2
FIRST_BYTE = 3
FINGERPRINT = "vllm-0.32.0-fake"


def encode_text(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


def logprob_of(token_id: int, position: int, choice: int) -> float:
    """A float32 in (-4, 0), different for every place, as Python's double of it."""
    digest = hashlib.blake2b(f"{token_id}/{position}/{choice}".encode(), digest_size=4).digest()
    value = -4.0 * int.from_bytes(digest, "little") / 2**32 - 1e-6
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


class FakeEngine:
    """The ASGI application. Attributes are knobs for tests; `requests` are the bodies it was sent."""

    def __init__(self, name: str = "fake", *, token_delay_s: float = 0.0) -> None:
        self.name = name
        self.token_delay_s = token_delay_s
        self.max_model_len = 2048
        self.fault: str | None = None
        """no_token_ids, no_logprobs, short_logprobs, nan, missing_logprob, usage, drop, error_event, not_json"""
        self.answer_text: str | None = None
        self.plain_bytes: bytes | None = None
        """If set, sent as the plain answer whatever was asked (benchmarks)."""
        self.gate: threading.Event | None = None
        """If set, a stream stops before its last token, and a plain answer before it is sent, until it is set."""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.cancelled = 0
        self.finished = 0
        self.in_flight = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        where = (scope["method"], scope["path"])
        if where == ("GET", "/health"):
            await _reply(send, 200, b"", b"text/plain")
        elif where == ("GET", "/v1/models"):
            await _reply(send, 200, _dumps({"object": "list", "data": [self._card()]}))
        elif where == ("POST", "/v1/chat/completions"):
            await self._chat(scope, receive, send)
        else:
            await _reply(send, 404, _dumps({"detail": "Not Found"}))

    def _card(self) -> dict[str, Any]:
        permission = {
            "id": "modelperm-1", "object": "model_permission", "created": 1, "allow_create_engine": False,
            "allow_sampling": True, "allow_logprobs": True, "allow_search_indices": False, "allow_view": True,
            "allow_fine_tuning": False, "organization": "*", "group": None, "is_blocking": False,
        }  # fmt: skip
        return {
            "id": self.name, "object": "model", "created": 1, "owned_by": "vllm", "root": self.name, "parent": None,
            "max_model_len": self.max_model_len, "permission": [permission],
        }  # fmt: skip

    async def _chat(self, scope: Any, receive: Any, send: Any) -> None:
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        body = json.loads(raw)
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        self.requests.append(dict(body))
        self.headers.append(headers)
        body["_id"] = f"chatcmpl-{headers['x-request-id']}" if "x-request-id" in headers else _completion_id()
        if (refusal := self._refusal(body)) is not None:
            status, text, kind, param = refusal
            await _reply(
                send, status, _dumps({"error": {"message": text, "type": kind, "param": param, "code": status}})
            )
            return
        self.in_flight += 1
        try:
            work = self._stream(body, send) if body.get("stream") else self._plain(body, send)
            await self._while_connected(receive, work)
        finally:
            self.in_flight -= 1

    async def _while_connected(self, receive: Any, work: Any) -> None:
        """Stop sampling when the client is gone, as vLLM does."""
        task = asyncio.ensure_future(work)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            task.cancel()

        watcher = asyncio.ensure_future(watch())
        try:
            await task
            self.finished += 1
        except asyncio.CancelledError:
            self.cancelled += 1
        finally:
            watcher.cancel()

    def _refusal(self, body: dict[str, Any]) -> tuple[int, str, str, str | None] | None:
        bad = "BadRequestError"
        refusal: tuple[int, str, str, str | None] | None = None
        if body.get("model") not in (None, self.name):
            refusal = 404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model"
        elif body.get("tools") == []:
            refusal = 400, "`tools` must not be an empty array.", bad, "tools"
        elif body.get("stream_options") and not body.get("stream"):
            refusal = 400, "Stream options can only be defined when `stream=True`.", bad, "stream_options"
        elif (body.get("top_logprobs") or 0) > 0 and not body.get("logprobs"):
            refusal = 400, "when using `top_logprobs`, `logprobs` must be set to true.", bad, "top_logprobs"
        elif (body.get("n") or 1) > 1 and body.get("temperature") == 0:
            refusal = 400, "n must be 1 when using greedy sampling.", bad, None
        elif self.fault == "overloaded":
            refusal = 503, "the engine is overloaded", "ServiceUnavailableError", None
        return refusal

    def _prompt_ids(self, body: dict[str, Any]) -> list[int]:
        return [1, *encode_text("".join(f"<{m['role']}>{_text(m)}" for m in body["messages"]))]

    def _sample(self, body: dict[str, Any], choice: int) -> tuple[list[int], str, str]:
        """Return (token ids, text, finish reason)."""
        users = [_text(m) for m in body["messages"] if m["role"] == "user"]
        text = self.answer_text if self.answer_text is not None else f"{choice}: {users[-1] if users else ''}"
        ids = [*encode_text(text), EOS]
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        if limit is not None and limit < len(ids):
            kept = ids[:limit]
            return kept, bytes(i - FIRST_BYTE for i in kept).decode(errors="replace"), "length"
        return ids, text, "stop"

    async def _plain(self, body: dict[str, Any], send: Any) -> None:
        if self.gate is not None:
            await asyncio.to_thread(self.gate.wait, 30)
        if self.plain_bytes is not None:
            await _reply(send, 200, self.plain_bytes)
            return
        prompt, n = self._prompt_ids(body), body.get("n") or 1
        choices, total = [], 0
        for index in range(n):
            ids, text, finish = self._sample(body, index)
            await asyncio.sleep(self.token_delay_s * len(ids))
            total += len(ids)
            message = {
                "role": "assistant", "content": text, "refusal": None, "annotations": None, "audio": None,
                "function_call": None, "reasoning": None,
            }  # fmt: skip
            choices.append({
                "index": index, "message": message, "logprobs": self._logprobs(body, ids, 0, index),
                "finish_reason": finish, "stop_reason": None, "token_ids": ids if self._gives_ids(body) else None,
                "routed_experts": None,
            })  # fmt: skip
        answer = {
            "id": body["_id"], "object": "chat.completion", "created": int(time.time()), "model": self.name,
            "choices": choices, "service_tier": None, "system_fingerprint": FINGERPRINT,
            "usage": self._usage(len(prompt), total), "prompt_logprobs": None,
            "prompt_token_ids": prompt if self._gives_ids(body) else None, "prompt_text": None,
            "kv_transfer_params": None, "ec_transfer_params": None, "metrics": None,
        }  # fmt: skip
        if self.fault == "not_json":
            await _reply(send, 200, b"<html>", b"text/html")
        else:
            await _reply(send, 200, _dumps(answer), lie_about_length=self.fault == "drop")

    async def _stream(self, body: dict[str, Any], send: Any) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        prompt, n = self._prompt_ids(body), body.get("n") or 1
        options = body.get("stream_options") or {}
        with_usage = bool(options.get("include_usage"))
        continuous = with_usage and bool(options.get("continuous_usage_stats"))
        head = {
            "id": body["_id"], "object": "chat.completion.chunk", "created": int(time.time()), "model": self.name,
        }  # fmt: skip

        async def say(choices: list[Any], **extra: Any) -> None:
            chunk = {**head, "choices": choices, **extra}
            await send({"type": "http.response.body", "body": b"data: " + _dumps(chunk) + b"\n\n", "more_body": True})

        for index in range(n):
            first = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                     "finish_reason": None}  # fmt: skip
            usage = {"usage": self._usage_so_far(len(prompt), 0)} if continuous else {}
            ids_too = {"prompt_token_ids": prompt if self._gives_ids(body) else None, "prompt_text": None}
            await say([first], **usage, **ids_too)
        sampled = [self._sample(body, index) for index in range(n)]
        counts = [0] * n
        for position in range(max(len(ids) for ids, _, _ in sampled)):
            for index, (ids, _, finish) in enumerate(sampled):
                if position >= len(ids):
                    continue
                last = position == len(ids) - 1
                if last and self.gate is not None:
                    await asyncio.to_thread(self.gate.wait, 30)
                if position == 3 and self.fault == "drop":
                    raise ConnectionError("the engine died")
                if position == 3 and self.fault == "error_event":
                    error = {"message": "CUDA out of memory", "type": "InternalServerError", "param": None, "code": 500}
                    await self._end(send, b"data: " + _dumps({"error": error}) + b"\n\n")
                    return
                counts[index] += 1
                extra: dict[str, Any] = {"system_fingerprint": FINGERPRINT} if last and not with_usage else {}
                if continuous:
                    extra["usage"] = self._usage_so_far(len(prompt), counts[index])
                await say([self._delta(body, ids, position, index, finish if last else None)], **extra)
                if self.token_delay_s:
                    await asyncio.sleep(self.token_delay_s)
        tail = b""
        if with_usage:
            usage = {k: v for k, v in self._usage(len(prompt), sum(counts)).items() if v is not None}
            last_chunk = {**head, "choices": [], "usage": usage, "system_fingerprint": FINGERPRINT}
            tail = b"data: " + _dumps(last_chunk) + b"\n\n"
        await self._end(send, tail)

    async def _end(self, send: Any, tail: bytes) -> None:
        await send({"type": "http.response.body", "body": tail + b"data: [DONE]\n\n", "more_body": False})

    def _delta(self, body: dict[str, Any], ids: list[int], position: int, index: int, finish: str | None) -> Any:
        token = ids[position]
        choice: dict[str, Any] = {
            "index": index, "delta": {"content": _token_text(token)},
            "logprobs": self._logprobs(body, [token], position, index), "finish_reason": finish,
        }  # fmt: skip
        if finish is not None:
            choice["stop_reason"] = None
        choice["token_ids"] = [token] if self._gives_ids(body) else None
        return choice

    def _gives_ids(self, body: dict[str, Any]) -> bool:
        return bool(body.get("return_token_ids")) and self.fault != "no_token_ids"

    def _logprobs(self, body: dict[str, Any], ids: list[int], start: int, choice: int) -> Any:
        if not body.get("logprobs") or self.fault == "no_logprobs":
            return None
        content = []
        for offset, token in enumerate(ids):
            value: float | None = logprob_of(token, start + offset, choice)
            if start + offset == 1 and self.fault == "short_logprobs":
                continue
            if start + offset == 1 and self.fault == "nan":
                value = None  # how vLLM's chunks write a NaN
            if start + offset == 1 and self.fault == "missing_logprob":
                value = -9999.0
            entry = {"token": _token_text(token), "logprob": value, "bytes": list(_token_text(token).encode())}
            content.append({**entry, "top_logprobs": [entry] * (body.get("top_logprobs") or 0)})
        return {"content": content}

    def _usage(self, prompt: int, completion: int) -> dict[str, Any]:
        completion += self.fault == "usage"
        return {
            "prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion,
            "prompt_tokens_details": None, "completion_tokens_details": None,
        }  # fmt: skip

    def _usage_so_far(self, prompt: int, completion: int) -> dict[str, Any]:
        usage = self._usage(prompt, completion)
        del usage["prompt_tokens_details"]
        return usage


class _QuickServer(uvicorn.Server):
    """uvicorn looks for `should_exit` ten times a second; tests stop many servers."""

    async def main_loop(self) -> None:
        while not self.should_exit:
            await asyncio.sleep(0.005)


class ServerThread:
    """Any ASGI application under a real uvicorn, in a thread with its own loop. `url` once entered."""

    def __init__(self, app: Any, *, timeout_graceful_s: int = 2) -> None:
        self.app = app
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(512)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            app, http="httptools", ws="none", log_config=None, access_log=False, lifespan="on",
            timeout_keep_alive=5, timeout_graceful_shutdown=timeout_graceful_s, server_header=False, date_header=False,
        )  # fmt: skip
        self.server = _QuickServer(config)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.run(self.server.serve(sockets=[self._socket]))

    def __enter__(self) -> "ServerThread":
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self.server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise RuntimeError("the server did not start")
            time.sleep(0.002)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(10)
        self._socket.close()


def _text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _token_text(token: int) -> str:
    return "" if token == EOS else bytes([token - FIRST_BYTE]).decode(errors="replace")


def _completion_id() -> str:
    return f"chatcmpl-{hashlib.blake2b(struct.pack('<d', time.perf_counter()), digest_size=8).hexdigest()}"


def _dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


async def _reply(
    send: Any, status: int, body: bytes, kind: bytes = b"application/json", *, lie_about_length: bool = False
) -> None:
    length = len(body) + 100 * lie_about_length
    headers = [(b"content-length", str(length).encode()), (b"content-type", kind)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--name", default="fake")
    parser.add_argument("--token-delay-s", type=float, default=0.0)
    asked = parser.parse_args()
    listener = socket.socket()
    listener.bind(("127.0.0.1", asked.port))
    listener.listen(512)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    engine = FakeEngine(asked.name, token_delay_s=asked.token_delay_s)
    config = uvicorn.Config(engine, http="httptools", ws="none", log_config=None, access_log=False)
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
