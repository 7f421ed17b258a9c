"""What top-p, top-k or min-p left when a token was sampled: asked for as top logprobs, read from them (law 4).

A token drawn from a truncated distribution can be trained on where its kept set is known. Nothing in an answer of vLLM
tells it, but with processed logprobs what was cut off has none, and what was left sums to one. So the proxy asks for
as many of the likeliest tokens as it may; where they hold all of the probability the set is known, else the choice
stays flagged "truncated_sampling" and is context only. An engine that allows fewer top logprobs refuses the request:
it is sent again without, and that model is not asked any more until its engine was away.
Called by `exchange` and `recorder`. Source: vLLM 0.32, `chat_completion/serving.py`, `completion/serving.py`.
"""

import logging
import math
from collections.abc import Iterable
from typing import Any

import msgspec

from tracegrad.adapters.proxy.sampling import Sampling
from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import Purpose

MISSING_LOGPROB = -9999.0
"""What vLLM writes where it has no logprob: of a sampled token it does not know, of a token that was cut off.
Source: vLLM, `ChatCompletionLogProb.logprob`."""
LOST = 1e-5
"""How much probability a known set may miss: what rounding takes from a sum of float32 logprobs."""
_TIES = 8
"""More than top-k may be left: what is as likely as the last of them. In bfloat16 that is nothing rare."""
_PREFIX = "token_id:"
_FLAG = "truncated_sampling"
log = logging.getLogger("tracegrad.proxy")

Set = tuple[int, ...]


class KeptSets:
    """Which calls are asked about. One per proxy process."""

    def __init__(self, config: Config) -> None:
        self._most = config.proxy.limits.max_kept
        self._trained = frozenset(config.trained_models())
        self._refused: set[str] = set()

    def wanted(self, model: str, sampling: Sampling, purpose: Purpose) -> int:
        """Return how many top logprobs to ask for; 0 where a known set would make nothing trainable."""
        if sampling.flags != (_FLAG,) or purpose == "eval" or model not in self._trained or model in self._refused:
            return 0
        top_k = sampling.effective.get("top_k")
        return min(self._most, top_k + _TIES) if isinstance(top_k, int) and top_k > 0 else self._most

    def refused(self, model: str) -> None:
        """The engine took the request only without them."""
        if model not in self._refused:
            self._refused.add(model)
            log.warning(
                "the engine of model %r refuses top logprobs: answers with top-p, top-k or min-p are context only; "
                "start it with `--max-logprobs %d`, or lower `proxy.limits.max_kept`",
                *(model, self._most),
            )

    def ask_again(self, model: str) -> None:
        """The engine was away, and may allow more now."""
        self._refused.discard(model)


def flags_with(flags: tuple[str, ...], kept: tuple[Set, ...] | None) -> tuple[str, ...]:
    """Return the flags of a choice whose sets are known: that it was truncated is no obstacle any more."""
    return flags if kept is None else tuple(flag for flag in flags if flag != _FLAG)


def sets_of_chat(tops: Iterable[msgspec.Raw]) -> list[Set | None]:
    """Return the kept set of each token of a chat choice, None where it is not known. `tops`: its `top_logprobs`."""
    return [_set_of((one.token, one.logprob) for one in _read(raw, _chat)) for raw in tops]


def sets_of_completion(tops: msgspec.Raw) -> list[Set | None]:
    """As `sets_of_chat`, of a completion, whose `top_logprobs` are one list."""
    return [_set_of((one or {}).items()) for one in _read(tops, _completion)]


class _Top(msgspec.Struct):
    token: str = ""
    logprob: float | None = None


_chat = msgspec.json.Decoder(list[_Top])
_completion = msgspec.json.Decoder(list[dict[str, float | None] | None])


def _read(raw: msgspec.Raw, decoder: "msgspec.json.Decoder[Any]") -> Any:
    try:
        return decoder.decode(raw)
    except msgspec.MsgspecError:
        return ()


def _set_of(tops: Iterable[tuple[str, float | None]]) -> Set | None:
    left = {token: value for token, value in tops if value is not None and value > MISSING_LOGPROB}
    if not left or not math.fsum(map(math.exp, left.values())) >= 1.0 - LOST:
        return None
    named = [token.removeprefix(_PREFIX) for token in left if token.startswith(_PREFIX)]
    known = len(named) == len(left) and all(map(str.isdecimal, named))
    return tuple(map(int, named)) if known else None
