"""What top-p, top-k or min-p left when a token was sampled: asked for as top logprobs, read from them (law 4).

A token drawn from a truncated distribution can be trained on where its kept set is known. Nothing in an answer of vLLM
tells it, but with processed logprobs what was cut off has none, and what was left sums to one. So the proxy asks for
the likeliest tokens; where they hold all of the probability the set is known, else the choice stays flagged
"truncated_sampling" and is context only. Each of them is JSON that the engine writes and the proxy reads, and nobody
knows before how many are left: how many an answer is asked for follows what earlier ones told (`Reach`). An engine
that allows fewer refuses the request, a stream's inside of its 200: it is sent again asking for fewer, and no more are
asked for until that engine was away.
Called by `exchange` and `recorder`. Source: vLLM 0.32, `chat_completion/serving.py`, `completion/serving.py`.
"""

import logging
import math
from collections.abc import Iterable
from typing import Any

import msgspec

from tracegrad.adapters.proxy.sampling import Sampling, flags_of
from tracegrad.tracestore.config import Config
from tracegrad.tracestore.records import Call, Purpose

MISSING_LOGPROB = -9999.0
"""What vLLM writes where it has no logprob: of a sampled token it does not know, of a token that was cut off.
Source: vLLM, `ChatCompletionLogProb.logprob`."""
LOST = 1e-5
"""How much probability a known set may miss: what rounding takes from a sum of float32 logprobs."""
FIRST = 20
"""What any vLLM allows unless `--max-logprobs` says less."""
STEADY, REST = 64, 1_000
_TIES = 8
"""More than top-k may be left: what is as likely as the last of them. In bfloat16 that is nothing rare."""
_PREFIX = "token_id:"
_FLAG = "truncated_sampling"
log = logging.getLogger("tracegrad.proxy")

Set = tuple[int, ...]


class Reach:
    """How many of the likeliest tokens the answers of one model are asked for, `most` at most.

    Four times as many after an answer whose sets were not all known; half as many after STEADY in a row that needed no
    more than that. What even the most does not tell STEADY times in a row is not worth its cost: FIRST, for REST
    answers.
    """

    def __init__(self, most: int) -> None:
        self.most = self.wished = most
        self.now = min(FIRST, most)
        self.proved = 0
        """How many the engine is known to allow."""
        self._few = self._short = self._resting = 0

    def refused(self, allowed: int) -> bool:
        """The engine allows so many and not many more. Returns whether this is news."""
        news, self.most = allowed < self.most, min(allowed, self.most)
        self._ask_for(self.now)
        return news

    def heard(self, asked: int, largest: int | None) -> None:
        """The largest set of an answer that was asked for so many; None: they did not tell all sets."""
        if asked != self.now:
            return  # it left before the last change
        if self._resting:
            self._resting -= 1
            return
        self._few = self._few + 1 if largest is not None and 2 * largest <= self.now else 0
        self._short = self._short + 1 if largest is None else 0
        if self._short and self.now < self.most:
            self._ask_for(4 * self.now)
        elif self._short >= STEADY and self.now > FIRST:
            self._ask_for(FIRST)
            self._resting = REST
        elif self._few >= STEADY and self.now > FIRST:
            self._ask_for(self.now // 2)

    def _ask_for(self, count: int) -> None:
        self.now = min(max(count, FIRST), self.most)
        self._few = self._short = 0


class Asked:
    """How many top logprobs one call is asked for (0: none); what became of them is told here."""

    def __init__(self, model: str, reach: Reach, count: int) -> None:
        self._model = model
        self._reach = reach
        self._before = reach.now
        self.begin(count)

    def begin(self, count: int) -> None:
        """The request leaves, asking for so many."""
        self._first = self.count = count

    @property
    def unproved(self) -> bool:
        """Whether the engine may refuse so many."""
        return self.count > self._reach.proved

    def fewer(self) -> int:
        """The engine refused the request, perhaps for these. Returns how many to ask for instead."""
        self.count = max(each for each in (0, FIRST, self._reach.proved) if each == 0 or each < self.count)
        return self.count

    def heard(self, call: Call) -> None:
        """The call was answered. An answer that is not exact says nothing of how many were left."""
        if not self._first or call.status != "complete":
            return
        self._allowed()
        sampled = [choice for choice in call.choices if choice.token_ids]
        if self.count and sampled and call.quarantine is None and all(one.logprobs for one in sampled):
            sets = [choice.kept_ids for choice in sampled]
            if None not in sets:
                self._reach.heard(self._before, max(len(ids) for each in sets for ids in each or ()))
            elif self.count == self._before:  # else it was asked for fewer than there may be
                self._reach.heard(self._before, None)

    def _allowed(self) -> None:
        """The engine took the request as it was asked at last."""
        self._reach.proved = max(self._reach.proved, self.count)
        if self.count < self._first and self._reach.refused(self.count):
            log.warning(
                "the engine of model %r refuses %d top logprobs: answers where top-p, top-k or min-p left more than "
                "%d tokens are context only; start it with `--max-logprobs %d`, or lower `proxy.limits.max_kept`",
                *(self._model, self._first, self._reach.most, self._reach.wished),
            )


class KeptSets:
    """Which calls are asked about. One per proxy process."""

    def __init__(self, config: Config) -> None:
        self._most = config.proxy.limits.max_kept
        self._trained = frozenset(config.trained_models())
        self._reaches: dict[tuple[str, bool], Reach] = {}

    def asked_of(self, model: str, sampling: Sampling, purpose: Purpose) -> Asked:
        """Return how many top logprobs to ask for: none where a known set would make nothing trainable."""
        top_k = sampling.effective.get("top_k")
        bound = top_k + _TIES if isinstance(top_k, int) and top_k > 0 else None
        # Of top-k alone as many are left as it says: nothing is to be learnt of it, nor from it of other calls.
        alone = bound is not None and _FLAG not in flags_of({**sampling.effective, "top_k": 0}, {})
        reach = self._reaches.setdefault((model, alone), Reach(self._most))
        if sampling.flags != (_FLAG,) or purpose == "eval" or model not in self._trained:
            count = 0
        elif bound is not None and alone:
            count = min(reach.most, bound) if bound - _TIES <= reach.most else 0
        else:
            count = reach.now if bound is None else min(reach.now, bound)
        return Asked(model, reach, count)

    def ask_again(self, model: str) -> None:
        """The engine was away, and may allow more now."""
        for alone in (True, False):
            self._reaches.pop((model, alone), None)


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
