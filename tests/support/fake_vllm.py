"""A fake engine that speaks vLLM 0.32's wire: chat and text completions (plain, SSE), embeddings, models, health.

What it samples is a function of the request (`fake_sampling`): the answer repeats the last user message, one byte a
token, so that a test can tell whose answer it holds. Shapes, key order and nulls are vLLM's; `tests/integration/
test_fake_engine_is_faithful.py` compares them with the real one (embeddings and reasoning are read from its source).
Faults are set on the object, never by the client.
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
import uvicorn.server
from fake_completions import CompletionsWire, body_of, dumps, lifespan, reply, start_stream
from fake_rendering import RenderingWire
from fake_sampling import (
    EOS,
    FINGERPRINT,
    FIRST_BYTE,
    ChoiceStream,
    Sampled,
    content_entry,
    encode_text,
    logprob_of,
    sample,
    script,
    split_calls,
    split_reasoning,
    too_many_tops,
)
from fake_swaps import SwapWire

from tracegrad.trainer.engine_spans import HEADER, telling

__all__ = ["EOS", "FINGERPRINT", "FIRST_BYTE", "FakeEngine", "ServerThread", "encode_text", "logprob_of"]


class FakeEngine(CompletionsWire, RenderingWire, SwapWire):
    """The ASGI application. Attributes are knobs for tests; `requests` are the bodies it was sent."""

    def __init__(self, name: str = "fake", *, token_delay_s: float = 0.0) -> None:
        RenderingWire.__init__(self)
        SwapWire.__init__(self)
        self.name = name
        self.token_delay_s = token_delay_s
        self.max_model_len = 2048
        self.max_logprobs = 20
        self.fault: str | None = None
        """no_token_ids, no_logprobs, short_logprobs, nan, missing_logprob, usage, drop, error_event, not_json"""
        self.event_error = {
            "message": "CUDA out of memory", "type": "InternalServerError", "param": None, "code": 500,
        }  # fmt: skip
        """What a stream ends with under the fault `error_event`."""
        self.raw_error: tuple[int, bytes, bytes] | None = None
        """If set, every request is answered with this status, body and content type."""
        self.tools_parser = True
        """Started with --enable-auto-tool-choice --tool-call-parser hermes."""
        self.answer_text: str | None = None
        self.plain_bytes: bytes | None = None
        """If set, sent as the plain answer whatever was asked (benchmarks)."""
        self.gate: threading.Event | None = None
        """If set, a stream stops before its last token, and a plain answer before it is sent, until it is set."""
        self.version: str | None = None
        """What `/weight_info` says; None: there is no such path (no development mode)."""
        self.gate_at = "end"
        """Where `gate` is waited for: headers (nothing was sent), body (the headers were), end (see `gate`)."""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.cancelled = 0
        self.finished = 0
        self.in_flight = 0
        self.at_gate = 0
        """How many answers came to the gate, ever."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        where = (scope["method"], scope["path"])
        if where == ("GET", "/health"):
            await reply(send, 200, b"", b"text/plain")
        elif where == ("GET", "/v1/models"):
            await reply(
                send, 200, dumps({"object": "list", "data": [self._card(), *self._adapter_cards(self._card())]})
            )
        elif where[0] == "POST" and where[1] in self._paths():
            await self._answer(scope, receive, send)
        elif where[0] == "POST" and where[1] in self.ADAPTER_PATHS:
            await self._exchange_adapter(where[1], receive, send)
        elif where == ("GET", "/weight_info") and self.version is not None:
            await reply(send, 200, dumps({"weight_version": self.version}))
        elif where[0] == "POST" and where[1] in self.PATHS and self.version is not None:
            await self._develop(where[1], receive, send)
        else:
            await reply(send, 404, dumps({"detail": "Not Found"}))

    def _paths(self) -> dict[str, Any]:
        """What is answered at each path: the prefix of its ids, how, and how in a stream."""
        paths: dict[str, Any] = {
            "/v1/chat/completions": ("chatcmpl", self._plain, self._stream),
            "/v1/completions": ("cmpl", self._plain_completion, self._stream_completion),
            "/v1/embeddings": ("embd", self._embeddings, self._embeddings),
            "/detokenize": ("tools", self._detokenize, self._detokenize),
        }
        if self.renders:
            paths["/v1/chat/completions/render"] = ("tools", self._render, self._render)
        return paths

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

    async def _answer(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads(await body_of(receive))
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        prefix, plain, stream = self._paths()[scope["path"]]
        if prefix != "tools":
            self.requests.append(dict(body))
            self.headers.append(headers)
        body["_id"] = f"{prefix}-{headers['x-request-id']}" if "x-request-id" in headers else _completion_id(prefix)
        if self.raw_error is not None:
            await reply(send, *self.raw_error)
            return
        if (refusal := self._refusal(body, prefix)) is not None:
            status, text, name, param = refusal
            error = {"error": {"message": text, "type": name, "param": param, "code": status}}
            if body.get("stream") and param == "logprobs":  # the engine itself finds it, after its server's 200
                await start_stream(send)
                await self._end(send, f"data: {json.dumps(error)}\n\n".encode())
            else:
                await reply(send, status, dumps(error))
            return
        self.in_flight += 1
        body["_heard"] = {}
        if self.tells_versions and HEADER.decode() in headers:
            said, send = send, lambda message: said(telling(message, body["_heard"]))
        try:
            await self._while_paused()
            await self._while_connected(receive, stream(body, send) if body.get("stream") else plain(body, send))
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

    def _refusal(self, body: dict[str, Any], prefix: str) -> tuple[int, str, str, str | None] | None:
        bad = "BadRequestError"
        refusal: tuple[int, str, str, str | None] | None = None
        if body.get("model") not in (None, self.name, *self.adapters) or not (self.loaded or prefix != "tools"):
            refusal = 404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model"
        elif body.get("tools") == []:
            refusal = 400, "`tools` must not be an empty array.", bad, "tools"
        elif body.get("stream_options") and not body.get("stream"):
            refusal = 400, "Stream options can only be defined when `stream=True`.", bad, "stream_options"
        elif prefix == "cmpl" and body.get("logprob_token_ids") and body.get("logprobs") is None:
            text = "when using `logprob_token_ids`, `logprobs` must be set."
            refusal = 400, text, bad, "logprob_token_ids"
        elif (body.get("top_logprobs") or 0) > 0 and not body.get("logprobs"):
            refusal = 400, "when using `top_logprobs`, `logprobs` must be set to true.", bad, "top_logprobs"
        elif (many := too_many_tops(body, self.max_logprobs)) is not None:
            refusal = 400, many, bad, "logprobs"
        elif (body.get("n") or 1) > 1 and body.get("temperature") == 0:
            refusal = 400, "n must be 1 when using greedy sampling.", bad, None
        elif self.fault == "overloaded":
            refusal = 503, "the engine is overloaded", "ServiceUnavailableError", None
        elif prefix == "chatcmpl" and len(self._prompt_ids(body)) > self.max_model_len:
            text = (
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains at "
                f"least {self.max_model_len + 1} input tokens, which exceeds this limit even without any output "
                "tokens. Please reduce the length of the input prompt. "
                f"(parameter=input_tokens, value={self.max_model_len + 1})"
            )
            refusal = 400, text, bad, "input_tokens"
        return refusal

    def _sample(self, body: dict[str, Any], text: str) -> Sampled:
        return self._as_sampled(sample(text if (own := self._answer_of(body.get("model"))) is None else own, body))

    def _uses_tools(self, body: dict[str, Any]) -> bool:
        return bool(self.tools_parser and body.get("tools") and body.get("tool_choice") != "none")

    def _parses_thoughts(self, body: dict[str, Any]) -> bool:
        return self.reasoning_parser and not self._thoughts_are_over(self._prompt_ids(body))

    def _finish(self, body: dict[str, Any], sampled: Sampled, called: bool) -> str:
        """A call that was forced by name ends like any text."""
        named = isinstance(body.get("tool_choice"), dict)
        return "tool_calls" if called and not named and sampled.finish == "stop" else sampled.finish

    def _message(self, body: dict[str, Any], sampled: Sampled, index: int) -> tuple[dict[str, Any], bool]:
        """Return the assistant message, parsed, and whether it holds calls."""
        reasoning, rest = split_reasoning(sampled.text) if self._parses_thoughts(body) else (None, sampled.text)
        content, calls = split_calls(rest) if self._uses_tools(body) else (rest, [])
        if body.get("parallel_tool_calls") is False:
            calls = calls[:1]
        if calls and body.get("tool_choice", "auto") != "auto":
            content = content or ""
        tool_calls = [
            {"id": f"chatcmpl-tool-{body['_id']}-{index}-{n}", "type": "function", "function": call}
            for n, call in enumerate(calls)
        ]
        if body.get("include_reasoning") is False:
            reasoning = None
        return {
            "role": "assistant", "content": content, "refusal": None, "annotations": None, "audio": None,
            "function_call": None, **({"tool_calls": tool_calls} if tool_calls else {}), "reasoning": reasoning,
        }, bool(calls)  # fmt: skip

    async def _plain(self, body: dict[str, Any], send: Any) -> None:
        await self._wait_at("headers")
        for index in range(body.get("n") or 1):
            self._mark(body, index)  # the first token, before the gate
        await self._wait_at("end")
        await self._while_paused()
        if self.plain_bytes is not None:
            await reply(send, 200, self.plain_bytes)
            return
        prompt, n = self._prompt_ids(body), body.get("n") or 1
        choices, total = [], 0
        for index in range(n):
            sampled = self._sample(body, script(body, index))
            await asyncio.sleep(self.token_delay_s * len(sampled.ids))
            total += len(sampled.ids)
            for _ in sampled.ids[1:]:
                self._mark(body, index)
            message, called = self._message(body, sampled, index)
            hidden = self._hides(body)
            choices.append({
                "index": index, "message": message,
                "logprobs": None if hidden else self._logprobs(body, sampled.ids, 0, index),
                "finish_reason": self._finish(body, sampled, called), "stop_reason": sampled.stop_reason,
                "token_ids": sampled.ids if self._gives_ids(body) and not hidden else None, "routed_experts": None,
            })  # fmt: skip
        answer = {
            "id": body["_id"], "object": "chat.completion", "created": int(time.time()),
            "model": body.get("model") or self.name,
            "choices": choices, "service_tier": None, "system_fingerprint": FINGERPRINT,
            "usage": self._usage(len(prompt), total), "prompt_logprobs": None,
            "prompt_token_ids": prompt if self._gives_ids(body) else None, "prompt_text": None,
            "kv_transfer_params": None, "ec_transfer_params": None, "metrics": None,
        }  # fmt: skip
        if self.fault == "not_json":
            await reply(send, 200, b"<html>", b"text/html")
        elif self.gate is not None and self.gate_at == "body":
            body_bytes = dumps(answer)
            headers = [(b"content-length", b"%d" % len(body_bytes)), (b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body_bytes[:100], "more_body": True})
            await self._wait_at("body")
            await send({"type": "http.response.body", "body": body_bytes[100:]})
        else:
            await reply(send, 200, dumps(answer), lie_about_length=self.fault == "drop")

    async def _wait_at(self, where: str) -> None:
        if self.gate is not None and self.gate_at == where:
            self.at_gate += 1
            await asyncio.to_thread(self.gate.wait, 30)

    async def _stream(self, body: dict[str, Any], send: Any) -> None:
        await self._wait_at("headers")
        await start_stream(send)
        await self._wait_at("body")
        prompt, n = self._prompt_ids(body), body.get("n") or 1
        options = body.get("stream_options") or {}
        with_usage = bool(options.get("include_usage"))
        continuous = with_usage and bool(options.get("continuous_usage_stats"))
        head = {
            "id": body["_id"], "object": "chat.completion.chunk", "created": int(time.time()),
            "model": body.get("model") or self.name,
        }  # fmt: skip

        async def say(choices: list[Any], **extra: Any) -> None:
            chunk = {**head, "choices": choices, **extra}
            await send({"type": "http.response.body", "body": b"data: " + dumps(chunk) + b"\n\n", "more_body": True})

        for index in range(n):
            first = {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                     "finish_reason": None}  # fmt: skip
            usage = {"usage": self._usage_so_far(len(prompt), 0)} if continuous else {}
            ids_too = {"prompt_token_ids": prompt if self._gives_ids(body) else None, "prompt_text": None}
            await say([first], **usage, **ids_too)
        sampled = [self._sample(body, script(body, index)) for index in range(n)]
        streams = [
            ChoiceStream(
                reasoning=self._parses_thoughts(body), parser=self.tools_parser, tools=self._uses_tools(body),
                call_id=f"chatcmpl-tool-{body['_id']}-{index}",
            )
            for index in range(n)
        ]  # fmt: skip
        counts = [0] * n
        for position in range(max(len(choice.ids) for choice in sampled)):
            for index, choice in enumerate(sampled):
                if position >= len(choice.ids):
                    continue
                last = position == len(choice.ids) - 1
                if not await self._goes_on(send, position, last=last):
                    return
                counts[index] += 1
                self._mark(body, index)
                said = self._delta(body, choice, position, index, streams[index])
                if said is None:
                    continue
                extra: dict[str, Any] = {}
                if continuous:
                    extra["usage"] = self._usage_so_far(len(prompt), counts[index])
                if last and not with_usage:
                    extra["system_fingerprint"] = FINGERPRINT
                await say([said], **extra)
                if self.token_delay_s:
                    await asyncio.sleep(self.token_delay_s)
        tail = b""
        if with_usage:
            usage = {k: v for k, v in self._usage(len(prompt), sum(counts)).items() if v is not None}
            last_chunk = {**head, "choices": [], "usage": usage, "system_fingerprint": FINGERPRINT}
            tail = b"data: " + dumps(last_chunk) + b"\n\n"
        await self._end(send, tail)

    async def _end(self, send: Any, tail: bytes) -> None:
        await send({"type": "http.response.body", "body": tail + b"data: [DONE]\n\n", "more_body": False})

    async def _goes_on(self, send: Any, position: int, *, last: bool) -> bool:
        """Wait at the gate, fail as the fault says. False: the stream has ended."""
        if last:
            await self._wait_at("end")
        await self._while_paused()
        if position == 3 and self.fault == "drop":
            raise ConnectionError("the engine died")
        if position == 3 and self.fault == "error_event":
            await self._end(send, f"data: {json.dumps({'error': self.event_error})}\n\n".encode())
            return False
        return True

    def _delta(
        self, body: dict[str, Any], sampled: Sampled, position: int, index: int, stream: ChoiceStream
    ) -> dict[str, Any] | None:
        """Return the choice of a chunk, None where vLLM sends none: the parser is silent and nobody wants the ids."""
        token, last, hidden = sampled.ids[position], position == len(sampled.ids) - 1, self._hides(body)
        delta = stream.feed(sampled.texts[position])
        if delta is not None and hidden:
            delta = {**delta, "reasoning": None} if delta.get("content") or delta.get("tool_calls") else None
        ids = [token] if self._gives_ids(body) and not hidden else None
        logprobs = None if hidden else self._logprobs(body, [token], position, index)
        if delta is None and not last and ids is None and logprobs is None:
            return None
        if delta is not None and "tool_calls" in delta and body.get("parallel_tool_calls") is False:
            delta["tool_calls"] = [call for call in delta["tool_calls"] if call["index"] == 0]
            if not delta["tool_calls"]:
                del delta["tool_calls"]
        finish = self._finish(body, sampled, stream.called) if last else None
        choice: dict[str, Any] = {"index": index, "delta": delta or {}, "logprobs": logprobs, "finish_reason": finish}
        if finish is not None:
            choice["stop_reason"] = sampled.stop_reason
        return {**choice, "token_ids": ids}

    def _hides(self, body: dict[str, Any]) -> bool:
        """With any parser, hidden reasoning hides ids and logprobs too."""
        return body.get("include_reasoning") is False and (self.tools_parser or self.reasoning_parser)

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
            content.append(content_entry(body, token, value))
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


class _Impatient:
    """asyncio as uvicorn's server sees it here: it naps for a tenth of a second when it stops, and tests stop many."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(min(seconds, 0.005))


uvicorn.server.asyncio = _Impatient()


class ServerThread:
    """Any ASGI application under a real uvicorn, in a thread with its own loop. `url` once entered."""

    def __init__(self, app: Any, *, timeout_graceful_s: int = 2, port: int = 0) -> None:
        self.app = app
        self._socket = socket.socket(proto=socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY where it knows the protocol
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._socket.listen(512)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        config = uvicorn.Config(
            app, http="httptools", ws="none", log_config=None, access_log=False, lifespan="on",
            timeout_keep_alive=5, timeout_graceful_shutdown=timeout_graceful_s, server_header=False, date_header=False,
        )  # fmt: skip
        self.server = uvicorn.Server(config)
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


def _completion_id(prefix: str) -> str:
    return f"{prefix}-{hashlib.blake2b(struct.pack('<d', time.perf_counter()), digest_size=8).hexdigest()}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--name", default="fake")
    parser.add_argument("--token-delay-s", type=float, default=0.0)
    asked = parser.parse_args()
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", asked.port))
    listener.listen(512)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    engine = FakeEngine(asked.name, token_delay_s=asked.token_delay_s)
    config = uvicorn.Config(engine, http="httptools", ws="none", log_config=None, access_log=False)
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
