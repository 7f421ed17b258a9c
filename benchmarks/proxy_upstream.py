"""An in-memory engine for the proxy benchmark: one fixed 35 KB answer in vLLM's shape, as fast as asyncio can send it.

Run by `proxy_overhead.py` as its own process; prints its URL. Answers every POST alike and knows nothing else.
"""

import asyncio
import json
import random
import socket

PROMPT_TOKENS, SAMPLED_TOKENS = 2000, 200


def answer_body(seed: int = 0) -> bytes:
    """Return vLLM's JSON for one choice of 200 tokens after a prompt of 2,000: about 35 KB."""
    rng = random.Random(seed)
    words = [rng.choice(["the ", "proxy ", "answers ", "with ", "tokens ", "again "]) for _ in range(SAMPLED_TOKENS)]
    content = [
        {"token": word, "logprob": -rng.expovariate(1.0), "bytes": list(word.encode()), "top_logprobs": []}
        for word in words
    ]
    message = {"role": "assistant", "content": "".join(words), "refusal": None, "annotations": None, "audio": None}
    choice = {
        "index": 0,
        "message": {**message, "function_call": None, "reasoning": None},
        "logprobs": {"content": content},
        "finish_reason": "stop",
        "stop_reason": None,
        "token_ids": [rng.randrange(50_000) for _ in words],
        "routed_experts": None,
    }
    usage = {
        "prompt_tokens": PROMPT_TOKENS,
        "total_tokens": PROMPT_TOKENS + SAMPLED_TOKENS,
        "completion_tokens": SAMPLED_TOKENS,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
    answer = {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1,
        "model": "main",
        "choices": [choice],
        "service_tier": None,
        "system_fingerprint": "vllm-0.32.0",
        "usage": usage,
        "prompt_logprobs": None,
        "prompt_token_ids": [rng.randrange(50_000) for _ in range(PROMPT_TOKENS)],
        "prompt_text": None,
        "kv_transfer_params": None,
        "ec_transfer_params": None,
        "metrics": None,
    }
    return json.dumps(answer, separators=(",", ":")).encode()


class _Connection(asyncio.Protocol):
    """Reads requests by their content-length and writes the one answer."""

    def __init__(self, response: bytes) -> None:
        self._response = response
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._buffer[:end]).lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            del self._buffer[: end + 4 + length]
            self._transport.write(self._response)


async def main() -> None:
    """Serve until killed."""
    body = answer_body()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = await asyncio.get_running_loop().create_server(lambda: _Connection(head + body), sock=listener)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
