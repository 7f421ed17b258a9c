"""What the engine's tokenizer and chat template make of messages and ids, asked over its own HTTP endpoints.

The proxy has no tokenizer: `/v1/chat/completions/render` (vLLM with `--enable-scale-out`) turns a chat request into the
ids that the same request would be answered from, `/detokenize` turns ids into text. Says None where the engine cannot,
and why where that will not change. Source: vLLM 0.32, `entrypoints/scale_out/render`, `entrypoints/serve/tokenize`.
Called by `continuing`.
"""

import asyncio
import logging
from collections.abc import Sequence

import msgspec

from tracegrad.adapters.proxy.errors import EngineTimeout, EngineUnreachable
from tracegrad.adapters.proxy.lineage import common_tail
from tracegrad.adapters.proxy.upstream import Upstream

log = logging.getLogger("tracegrad.proxy")
RENDER_PATH, DETOKENIZE_PATH = "v1/chat/completions/render", "detokenize"
_HEADERS = ((b"content-type", b"application/json"),)
PATIENCE_S = 10.0
"""A client waits for this with its prompt, or with the end of its answer; a publish waits for it as well."""


class Rendered(msgspec.Struct):
    """A prompt. `reasoning_ended`: whether the engine's parser takes what follows it for no thought.

    None where the engine has no such parser.
    """

    token_ids: list[int]
    reasoning_ended: bool | None = None


class _Text(msgspec.Struct):
    prompt: str


class _Refusal(msgspec.Struct):
    error: msgspec.Raw


_decode_prompt = msgspec.json.Decoder(Rendered).decode
_decode_text = msgspec.json.Decoder(_Text).decode
_decode_refusal = msgspec.json.Decoder(_Refusal).decode


class Rendering:
    """The engines' own words. `missing` names, by model, what its engine lacks for token-in."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self.missing: dict[str, str] = {}
        self._ends: dict[str, int] = {}

    def lacks(self, model: str, what: str) -> None:
        """Remember, and say once, that the engines of `model` cannot be given token ids."""
        if model not in self.missing:
            self.missing[model] = what
            log.warning("token-in is off for model %s: %s; its prompts are rendered from text", model, what)

    def ask_again(self, model: str) -> None:
        """Forget what was learnt of the engines of `model`: one of them was started anew."""
        self.missing.pop(model, None)
        self._ends.pop(model, None)

    async def prompt(self, model: str, body: bytes, run_id: str | None) -> Rendered | None:
        """Return the prompt of a chat request, None where the engine gives none (it may refuse the request too).

        Raises:
            NotSent: as `Upstream.post`.
        """
        status, answer = await self._ask(model, RENDER_PATH, body, run_id)
        if status == 404 and not _is_refusal(answer):
            self.lacks(model, "its engine has no /v1/chat/completions/render (start it with --enable-scale-out)")
        if status != 200:
            return None
        try:
            return _decode_prompt(answer)
        except msgspec.MsgspecError as error:
            self.lacks(model, f"its engine answers /{RENDER_PATH} in another form ({error})")
            return None

    async def end_of_turn(self, model: str, run_id: str | None) -> int | None:
        """Return the id with which the chat template ends an answer: the first after which any two are alike.

        None where the engine cannot say. Raises as `prompt`.
        """
        if model not in self._ends:
            rendered = []
            for answer in ("b", "c"):
                messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
                asked = {"model": model, "messages": messages, "add_generation_prompt": False}
                prompt = await self.prompt(model, msgspec.json.encode(asked), run_id)
                if prompt is None:
                    return None
                rendered.append(prompt.token_ids)
            tail = common_tail(*rendered)
            if not tail:
                self.lacks(model, "its chat template ends answers with no token")
                return None
            self._ends[model] = tail[0]
        return self._ends[model]

    async def text(self, model: str, ids: Sequence[int], run_id: str | None) -> str | None:
        """Return the text of `ids`, special tokens included, None where the engine cannot say. Raises as `prompt`."""
        body = msgspec.json.encode({"model": model, "tokens": ids})
        status, answer = await self._ask(model, DETOKENIZE_PATH, body, run_id)
        if status != 200:
            return None
        try:
            return _decode_text(answer).prompt
        except msgspec.MsgspecError as error:
            log.warning("the engine of model %s answers /%s in another form: %s", model, DETOKENIZE_PATH, error)
            return None

    async def _ask(self, model: str, path: str, body: bytes, run_id: str | None) -> tuple[int, bytes]:
        try:
            async with asyncio.timeout(PATIENCE_S):
                answer = await self._upstream.post(model, path, body, _HEADERS, run_id=run_id)
                try:
                    return answer.status, await answer.read()
                finally:
                    answer.release()
        except (EngineUnreachable, EngineTimeout, TimeoutError) as error:
            log.warning("the engine of model %s did not answer /%s: %s", model, path, error or "no answer in time")
            return 0, b""


def _is_refusal(answer: bytes) -> bool:
    """Whether a 404 is the engine's own word on the request (an adapter is not loaded yet, say): the path exists."""
    try:
        _decode_refusal(answer)
    except msgspec.MsgspecError:
        return False
    return True
