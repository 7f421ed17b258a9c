"""What has vLLM say, beside an answer, which weights sampled which of its tokens: middleware for vLLM's server.

vLLM loads it (``--middleware tracegrad.trainer.engine_spans.TracegradSpans``); like `worker_extension` it may import
vllm, inside one function only, and nothing of tracegrad. vLLM marks what each step of the engine samples with the
version that it was last told, and knows the spans of a finished request; of its doors only `/inference/v1/generate`
tells them. Here they are taken where the server's handlers get their outputs, and told to whoever asks for them with
the header `x-tracegrad-versions`: in that header of a plain answer, in a comment before the `[DONE]` of a stream, as
JSON: choice -> [[version, first token, end], ...]. Whoever does not ask gets every byte as it was.

The marks are exact where weights and version change only while the engine stands still (`/pause?mode=keep`): a pause
ends when no batch is left whose tokens were not handed out. Source: vllm 0.32 `v1/engine/core.py`
(`_attach_weight_version`, `pause_scheduler`), `v1/engine/output_processor.py`.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]
HEADER = b"x-tracegrad-versions"
COMMENT = b": tracegrad-versions "
_DONE = b"data: [DONE]\n\n"
_heard: ContextVar[dict[int, list[tuple[str, int, int]]] | None] = ContextVar("tracegrad_heard", default=None)


class TracegradSpans:
    """The middleware, pure ASGI."""

    def __init__(self, app: Any) -> None:
        self._app = app
        tracegrad_listen()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Send) -> None:
        """Speak ASGI 3."""
        if scope["type"] != "http" or all(name != HEADER for name, _ in scope["headers"]):
            await self._app(scope, receive, send)
            return
        heard: dict[int, list[tuple[str, int, int]]] = {}
        token = _heard.set(heard)
        try:
            await self._app(scope, receive, lambda message: send(telling(message, heard)))
        finally:
            _heard.reset(token)


def telling(message: Message, heard: dict[int, list[tuple[str, int, int]]]) -> Message:
    """Add what was heard to the start of a plain answer (the engine has finished by then), or to a stream's end."""
    if not heard:
        return message
    told = json.dumps(heard, separators=(",", ":")).encode()
    if message["type"] == "http.response.start":
        return {**message, "headers": [*message["headers"], (HEADER, told)]}
    body = message.get("body", b"")
    if not body.endswith(_DONE):
        return message
    return {**message, "body": body[: -len(_DONE)] + COMMENT + told + b"\n\n" + _DONE}


def tracegrad_listen() -> None:
    """Have the engine's client note the spans of what it gives to a request that asked. May be called more than once.

    Children of a request (several choices, several prompts) run in tasks that copy its context, so all write into one.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    generate = AsyncLLM.generate
    if getattr(generate, "tracegrad", False):
        return

    def listened(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs, heard = generate(self, *args, **kwargs), _heard.get()
        return outputs if heard is None else _noted(outputs, heard)

    listened.tracegrad = True  # type: ignore[attr-defined]
    AsyncLLM.generate = listened


async def _noted(outputs: Any, heard: dict[int, list[tuple[str, int, int]]]) -> AsyncIterator[Any]:
    async with aclosing(outputs):
        async for output in outputs:
            for choice in output.outputs:
                spans = getattr(choice, "weight_versions", None)
                if spans is not None:
                    heard[choice.index] = [(span.version, span.start, span.end) for span in spans]
            yield output
