"""The parts of the fake engine that answer `/v1/completions` and `/v1/embeddings`, in the shapes of vLLM 0.32."""

import asyncio
import base64
import json
import struct
import time
from typing import Any

from fake_sampling import FINGERPRINT, FIRST_BYTE, Sampled, encode_text, logprob_of, token_name, token_text, tops_of


class CompletionsWire:
    """To be mixed into the fake engine, whose knobs it reads."""

    name: str
    fault: str | None
    token_delay_s: float
    gate: Any
    version: str | None

    def _prompts(self, body: dict[str, Any]) -> list[tuple[str, list[int]]]:
        """Return (text, ids) of each prompt."""
        prompt = body["prompt"]
        several = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
        found = []
        for one in several:
            text = one if isinstance(one, str) else "".join(token_text(token) for token in one if token >= FIRST_BYTE)
            found.append((text, [1, *encode_text(one)] if isinstance(one, str) else list(one)))
        return found

    async def _plain_completion(self, body: dict[str, Any], send: Any) -> None:
        if self.gate is not None:
            await asyncio.to_thread(self.gate.wait, 30)
        choices: list[dict[str, Any]] = []
        n_prompt = n_sampled = 0
        ids, echo = self._gives_ids(body), bool(body.get("echo"))
        for text, prompt in self._prompts(body):
            n_prompt += len(prompt)
            for number in range(body.get("n") or 1):
                sampled = self._sample(body, f"{number}: {text}")
                n_sampled += len(sampled.ids)
                for _ in sampled.ids:
                    self._mark(body, len(choices))
                shown = (("" if ids else text) if echo else "") + sampled.text
                choices.append({
                    "index": len(choices), "text": shown,
                    "logprobs": self._completion_logprobs(body, sampled.ids, 0, number, prompt if echo else []),
                    "finish_reason": sampled.finish, "stop_reason": sampled.stop_reason,
                    "token_ids": sampled.ids if ids else None,
                    "prompt_logprobs": _prompt_logprobs(prompt) if echo and body.get("logprobs") is not None else None,
                    "prompt_token_ids": prompt if ids else None, "routed_experts": None,
                })  # fmt: skip
        answer = {
            "id": body["_id"], "object": "text_completion", "created": int(time.time()), "model": self.name,
            "choices": choices, "service_tier": None, "system_fingerprint": FINGERPRINT,
            "usage": self._usage(n_prompt, n_sampled), "kv_transfer_params": None, "ec_transfer_params": None,
            "metrics": None,
        }  # fmt: skip
        await reply(send, 200, dumps(answer), lie_about_length=self.fault == "drop")

    async def _stream_completion(self, body: dict[str, Any], send: Any) -> None:
        await start_stream(send)
        options = body.get("stream_options") or {}
        with_usage = bool(options.get("include_usage"))
        continuous = with_usage and bool(options.get("continuous_usage_stats"))
        head = {"id": body["_id"], "object": "text_completion", "created": int(time.time()), "model": self.name}
        prompts, numbers = self._prompts(body), range(body.get("n") or 1)
        asked = [(prompt, text, number) for text, prompt in prompts for number in numbers]
        choices = [self._sample(body, f"{number}: {text}") for _, text, number in asked]
        total = 0
        for position in range(max(len(choice.ids) for choice in choices)):
            for index, ((prompt, text, number), choice) in enumerate(zip(asked, choices, strict=True)):
                if position >= len(choice.ids):
                    continue
                last = position == len(choice.ids) - 1
                if not await self._goes_on(send, position, last=last):
                    return
                total += 1
                self._mark(body, index)
                said = self._completion_delta(body, choice, position, (text, prompt, number))
                chunk: dict[str, Any] = {**head, "choices": [{"index": index, **said}]}
                if continuous:
                    chunk["usage"] = {
                        "prompt_tokens": len(prompt), "total_tokens": len(prompt) + position + 1,
                        "completion_tokens": position + 1,
                    }  # fmt: skip
                if last and not with_usage:
                    chunk["system_fingerprint"] = FINGERPRINT
                data = b"data: " + dumps(chunk) + b"\n\n"
                await send({"type": "http.response.body", "body": data, "more_body": True})
                if self.token_delay_s:
                    await asyncio.sleep(self.token_delay_s)
        usage = {k: v for k, v in self._usage(sum(len(ids) for _, ids in prompts), total).items() if v is not None}
        last_chunk = {**head, "choices": [], "usage": usage, "system_fingerprint": FINGERPRINT}
        await self._end(send, b"data: " + dumps(last_chunk) + b"\n\n" if with_usage else b"")

    def _completion_delta(
        self, body: dict[str, Any], choice: Sampled, position: int, asked: tuple[str, list[int], int]
    ) -> dict[str, Any]:
        text, prompt, number = asked
        last, ids = position == len(choice.ids) - 1, self._gives_ids(body)
        echoed = prompt if body.get("echo") and position == 0 else []
        token = choice.ids[position]
        return {
            "text": (text if echoed and not ids else "") + choice.texts[position],
            "logprobs": self._completion_logprobs(body, [token], position, number, echoed),
            "finish_reason": choice.finish if last else None,
            "stop_reason": choice.stop_reason if last else None,
            "prompt_token_ids": prompt if position == 0 and (ids or echoed) else None,
            "token_ids": [token] if ids else None,
        }

    def _completion_logprobs(
        self, body: dict[str, Any], ids: list[int], start: int, choice: int, echoed: list[int]
    ) -> Any:
        if body.get("logprobs") is None or self.fault == "no_logprobs":
            return None
        texts = [token_text(token) if token >= FIRST_BYTE else "" for token in [*echoed, *ids]]
        values: list[float | None] = [None if n == 0 else -1.0 for n in range(len(echoed))]
        for offset, token in enumerate(ids):
            fault = self.fault if start + offset == 1 else None
            if fault != "short_logprobs":
                value = logprob_of(token, start + offset, choice)
                values.append(None if fault == "nan" else -9999.0 if fault == "missing_logprob" else value)
        offsets = [sum(map(len, texts[:n])) for n in range(len(texts))]
        said = zip([*echoed, *ids], values, strict=False)
        tops = [
            None
            if value is None
            else {
                token_name(body, one): number for one, number in tops_of(body, token, value, body["logprobs"]).items()
            }
            for token, value in said
        ]
        return {"text_offset": offsets, "token_logprobs": values, "tokens": texts, "top_logprobs": tops}

    async def _embeddings(self, body: dict[str, Any], send: Any) -> None:
        """Each input's vector is its length and its first token, written as `encoding_format` says."""
        given = body["input"]
        several = given if isinstance(given, list) and given and not isinstance(given[0], int) else [given]
        ids = [one if isinstance(one, list) else encode_text(one) for one in several]
        vectors = [[float(len(one)), float(one[0])] for one in ids]
        packed = [struct.pack("<2f", *vector) for vector in vectors]
        if body.get("encoding_format") == "bytes":
            await reply(send, 200, b"".join(packed), b"application/octet-stream")
            return
        as_text = body.get("encoding_format") == "base64"
        written = [base64.b64encode(raw).decode() for raw in packed] if as_text else vectors
        answer = {
            "id": body["_id"], "object": "list", "created": int(time.time()), "model": self.name,
            "data": [{"index": n, "object": "embedding", "embedding": one} for n, one in enumerate(written)],
            "usage": self._usage(sum(map(len, ids)), 0),
        }  # fmt: skip
        await reply(send, 200, dumps(answer))

    def _mark(self, body: dict[str, Any], index: int) -> None:
        """Note which version samples the next token of a choice."""
        spans = body["_heard"].setdefault(index, [])
        n = spans[-1][2] if spans else 0
        if spans and spans[-1][0] == self.version:
            spans[-1] = (self.version, spans[-1][1], n + 1)
        else:
            spans.append((self.version or "default", n, n + 1))

    # what the fake engine has
    def _gives_ids(self, body: dict[str, Any]) -> bool:
        raise NotImplementedError

    def _sample(self, body: dict[str, Any], text: str) -> Sampled:
        raise NotImplementedError

    def _usage(self, prompt: int, completion: int) -> dict[str, Any]:
        raise NotImplementedError

    async def _goes_on(self, send: Any, position: int, *, last: bool) -> bool:
        raise NotImplementedError

    async def _end(self, send: Any, tail: bytes) -> None:
        raise NotImplementedError


def _prompt_logprobs(prompt: list[int]) -> list[Any]:
    return [None, *({str(token): {"logprob": -1.0, "rank": 1, "decoded_token": "x"}} for token in prompt[1:])]


def dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


async def start_stream(send: Any) -> None:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def lifespan(receive: Any, send: Any) -> None:
    """Say to the server that all is up, and later that all is down."""
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


async def body_of(receive: Any) -> bytes:
    """The whole body of a request."""
    raw = b""
    while True:
        message = await receive()
        raw += message.get("body", b"")
        if not message.get("more_body"):
            return raw


async def reply(
    send: Any, status: int, body: bytes, kind: bytes = b"application/json", *, lie_about_length: bool = False
) -> None:
    length = len(body) + 100 * lie_about_length
    headers = [(b"content-length", str(length).encode()), (b"content-type", kind)]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
