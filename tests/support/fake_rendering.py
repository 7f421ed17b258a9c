"""The fake engine's chat template and tokenizer, and the endpoints at which vLLM 0.32 lets others use its own.

Every message is `<role>` and its text, a byte a token, and ends with the token that ends a sampled answer: an answer
that is sent back is rendered as it was sampled, unless a knob says otherwise. Thoughts are left out, as many real
templates do.
"""

import json
from typing import Any

from fake_completions import dumps, reply
from fake_sampling import BASE, CLOSE, EOS, OPEN, PAIRS, Sampled, encode_text, message_text, token_text

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
        return given if given is not None and self.takes_ids else self.render(body)

    def _as_sampled(self, sampled: Sampled) -> Sampled:
        """Sample the first two bytes as one token, where that is wanted and there are two."""
        if not self.samples_pairs or sampled.n_visible < 2:
            return sampled
        first, second, *rest = sampled.ids
        texts = ["".join(sampled.texts[:2]), *sampled.texts[2:]]
        return Sampled(
            [PAIRS + BASE * first + second, *rest], texts, sampled.finish, sampled.stop_reason, sampled.n_visible - 1
        )

    async def _render(self, body: dict[str, Any], send: Any) -> None:
        answer = {
            "request_id": body["_id"], "token_ids": self.render(body), "token_offsets": None, "features": None,
            "content_parts": None, "sampling_params": {}, "model": body["model"],
        }  # fmt: skip
        await reply(send, 200, dumps(answer))

    async def _detokenize(self, body: dict[str, Any], send: Any) -> None:
        marks = {BOS: "<s>", EOS: "<end>"}
        await reply(send, 200, dumps({"prompt": "".join(marks.get(one) or token_text(one) for one in body["tokens"])}))
