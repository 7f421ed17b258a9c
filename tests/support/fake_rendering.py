"""The fake engine's chat template and tokenizer, and the endpoints at which vLLM 0.32 lets others use its own.

Every message is `<role>` and its text, a byte a token, and ends with the token that ends a sampled answer: an answer
that is sent back is rendered as it was sampled, unless a knob says otherwise. Thoughts are left out, as many real
templates do.
"""

import json
from typing import Any

from fake_completions import dumps, reply
from fake_sampling import (
    BASE,
    CLOSE,
    EOS,
    FIRST_BYTE,
    OPEN,
    PAIRS,
    THOUGHT,
    Sampled,
    encode_text,
    message_text,
    token_text,
)

BOS = 1


class RenderingWire:
    """Rendering, its inverse, and prompts that come as ids."""

    def __init__(self) -> None:
        self.renders = True
        """Started with --enable-scale-out."""
        self.takes_ids = True
        """Prompts that come as ids are used."""
        self.samples_pairs = False
        """The first two bytes of an answer are sampled as one token, which the tokenizer never makes of text."""
        self.reasoning_parser = False
        self.reads_prompts = False
        """The parser of thoughts looks into the prompt, and takes no thoughts for any where it finds the end of one."""
        self.loaded = True
        """Rendering knows the model; an adapter may not be there yet."""
        self.trims = False
        """The template trims answers."""

    def render(self, body: dict[str, Any]) -> list[int]:
        ids = [BOS]
        for message in body["messages"]:
            ids += encode_text(f"<{message['role']}>{self._written(message)}")
            ids.append(EOS)
        return ids if body.get("add_generation_prompt") is False else [*ids, *encode_text("<assistant>")]

    def _written(self, message: dict[str, Any]) -> str:
        text = message_text(message)
        if self.trims and message["role"] == "assistant":
            text = text.strip()
        for call in message.get("tool_calls") or ():
            function = call["function"]
            said = {"name": function["name"], "arguments": json.loads(function["arguments"])}
            text += f"{OPEN}\n{json.dumps(said)}\n{CLOSE}"
        return text

    def _prompt_ids(self, body: dict[str, Any]) -> list[int]:
        given = (body.get("kv_transfer_params") or {}).get("prompt_token_ids")
        if given is None or body.get("echo") or not self.takes_ids:
            given = self.render(body)
            given = given[-(body.get("truncate_prompt_tokens") or len(given)) :]
        return given

    def _as_sampled(self, sampled: Sampled) -> Sampled:
        """Sample the first two bytes as one token, where that is wanted and there are two."""
        if not self.samples_pairs or sampled.n_visible < 2:
            return sampled
        first, second, *rest = sampled.ids
        texts = ["".join(sampled.texts[:2]), *sampled.texts[2:]]
        return Sampled(
            [PAIRS + BASE * first + second, *rest], texts, sampled.finish, sampled.stop_reason, sampled.n_visible - 1
        )

    def _thoughts_are_over(self, prompt: list[int]) -> bool:
        """What some parsers believe where they find the end of a thought in the prompt, whoever's it is."""
        return self.reads_prompts and THOUGHT in "".join(token_text(token) for token in prompt if token >= FIRST_BYTE)

    async def _render(self, body: dict[str, Any], send: Any) -> None:
        ids = self._prompt_ids(body)
        answer = {
            "request_id": body["_id"], "token_ids": ids, "token_offsets": None, "features": None,
            "content_parts": None, "sampling_params": {}, "model": body["model"],
            "reasoning_ended": self._thoughts_are_over(ids) if self.reasoning_parser else None,
        }  # fmt: skip
        await reply(send, 200, dumps(answer))

    async def _detokenize(self, body: dict[str, Any], send: Any) -> None:
        marks = {BOS: "<s>", EOS: "<end>"}
        await reply(send, 200, dumps({"prompt": "".join(marks.get(one) or token_text(one) for one in body["tokens"])}))
