"""What a running engine lacks, found by asking it: each finding says what to add to its launch command.

An engine that answers is not yet one that can be trained on: logprobs of the wrong kind, a head that a reload does
not reach, a top-p that comes from the model's own files all give plausible numbers and wrong gradients. Nothing here
trusts a flag; each property is measured over HTTP. Called by `tracegrad engine` after each start and by the trainer
before anything trains (`check`, which raises). Torch-free.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracegrad.tracestore.config import ModelConfig
from tracegrad.trainer.adapter_client import AdapterClient
from tracegrad.trainer.engine_client import EngineClient, Sampled
from tracegrad.trainer.engine_errors import EngineNotReady, EngineRefused
from tracegrad.trainer.engine_launch import EXTENSION, SPANS, TRANSFER_BACKENDS
from tracegrad.trainer.transfer_client import started_for

_PROMPT = (1, 2, 3, 4, 5, 6, 7, 8)
"""Any ids do: what is compared is the engine with itself. Every vocabulary has them."""
_TOKENS, _MANY_TOKENS = 24, 48
_TILT, _SIGMAS = 0.015, 4.0
_HOT = 2.0
_MASKED = -1000.0
"""vLLM reports a token that a mask removed as -9999 (JSON has no -inf)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is missing. `add` goes into the engine's launch command, environment or our configuration."""

    code: str
    what: str
    add: str

    def __str__(self) -> str:
        return f"{self.code}: {self.what}; add {self.add}"


def preflight(client: EngineClient, model: ModelConfig, *, in_flight: bool = False, slots: int = 0) -> list[Finding]:
    """Return everything that the engine behind `client` lacks for training `model`; empty when it is ready.

    `model` is what the engine was started with: for an adapter its base. `in_flight`: calls go on through publishes.
    `slots`: how many adapters it has to serve at once.
    """
    if not client.healthy(timeout_s=30):
        return [
            Finding(
                code="health",
                what=f"{client.url} does not answer",
                add=f"an engine there: `tracegrad engine --config FILE --model {client.name}`",
            )
        ]
    asked = client.base if isinstance(client, AdapterClient) else client
    findings = _served(asked, model)
    if any(f.code == "model" for f in findings):
        return findings
    findings += _control(asked, model) + _adapters(client) + _sampling(asked, model.engine.max_model_len)
    findings += _room(asked, slots) if slots and not findings else []
    return findings + _spans(asked) if in_flight and not findings else findings


def check(client: EngineClient, model: ModelConfig, *, in_flight: bool = False, slots: int = 0) -> None:
    """Raise where `preflight` finds anything.

    Raises:
        EngineNotReady: with one line for each finding.
    """
    findings = preflight(client, model, in_flight=in_flight, slots=slots)
    if findings:
        lines = "\n".join(f"  - {finding}" for finding in findings)
        raise EngineNotReady(f"the engine at {client.url} cannot be trained on yet:\n{lines}", findings)


def tied_head(checkpoint: str) -> bool:
    """Return whether the checkpoint's config.json ties the output head to the embedding (False where it is silent).

    A name that is no folder here (an engine with its own file system) is taken for tied: the careful answer.
    """
    path = Path(checkpoint) / "config.json"
    if not path.exists():
        return True
    config = json.loads(path.read_text())
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def _served(client: EngineClient, model: ModelConfig) -> list[Finding]:
    served = {m.name: m for m in client.models()}
    mine = served.get(client.name)
    if mine is None:
        names = ", ".join(sorted(served)) or "nothing"
        what = f"serves {names}, not {client.name!r}"
        return [Finding(code="model", what=what, add=f"--served-model-name {client.name}")]
    wanted = model.engine.max_model_len
    if mine.max_model_len is not None and mine.max_model_len < wanted:
        what = f"takes {mine.max_model_len} tokens, the configuration says {wanted}"
        return [Finding(code="max_model_len", what=what, add=f"--max-model-len {wanted}")]
    return []


def _control(client: EngineClient, model: ModelConfig) -> list[Finding]:
    """Development endpoints (reload, version, cache), and the extension where the head is tied."""
    try:
        client.version()
        extension = client.extension_info()
    except EngineRefused as error:
        if error.status != 404:
            raise
        what = "has no /collective_rpc, /weight_info and /reset_prefix_cache: weights cannot be swapped"
        found = [Finding(code="dev_mode", what=what, add="VLLM_SERVER_DEV_MODE=1 to its environment")]
        return found + (_no_extension("it cannot be asked for it") if tied_head(model.checkpoint) else [])
    if extension is None and tied_head(model.checkpoint):
        return _no_extension("a reload would leave it stale on a CPU")
    return _transfer(extension, model)


def _transfer(extension: Mapping[str, Any] | None, model: ModelConfig) -> list[Finding]:
    """Whether the engine takes weights as the configuration says they are sent. Every engine reads files."""
    wanted = TRANSFER_BACKENDS[model.engine.transfer.backend]
    if not wanted or (extension is not None and extension.get("transfer") == wanted):
        return []
    what = f"is to be sent weights by {model.engine.transfer.backend}: {started_for(extension)}"
    add = f"--weight-transfer-config '{json.dumps({'backend': wanted})}' --worker-extension-cls {EXTENSION}"
    return [Finding(code="transfer", what=what, add=add)]


def _room(client: EngineClient, slots: int) -> list[Finding]:
    """Whether as many adapters are served at once as there are, with those that are judged beside them."""
    room = (client.extension_info() or {}).get("max_loras")
    if room is None or room >= slots:
        return []
    what = f"serves {room} adapters at once, and {slots} are to be: those that are live, and their next versions"
    return [Finding(code="max_loras", what=what, add=f"--max-loras {slots} (engine.args, where it is set there)")]


def _adapters(client: EngineClient) -> list[Finding]:
    if not isinstance(client, AdapterClient):
        return []
    if not client.takes_adapters():
        what = f"loads no adapters at run time, and {client.name!r} is one"
        return [Finding(code="adapters", what=what, add="--enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1")]
    extension = client.base.extension_info() or {}
    if extension.get("cpu") and not extension.get("products"):
        what = (
            f"answers for the base as for an adapter while both are asked, on a CPU: {client.base.name!r} is not served"
        )
        add = "tracegrad's plugin for vLLM: start it with `tracegrad engine`, without VLLM_PLUGINS in its environment"
        return [Finding(code="lora_products", what=what, add=add)]
    return []


def _spans(client: EngineClient) -> list[Finding]:
    if client.tells_versions():
        return []
    what = "does not say which weights sampled which token, and trainer.publish.mode is in_flight"
    add = f"--middleware {SPANS}, and tracegrad's trainer/engine_spans.py to its PYTHONPATH; or publish by drain"
    return [Finding(code="version_spans", what=what, add=add)]


def _no_extension(why: str) -> list[Finding]:
    add = f"--worker-extension-cls {EXTENSION}, and tracegrad's trainer/worker_extension.py to its PYTHONPATH"
    return [Finding(code="tied_head", what=f"the output head is tied to the embedding; {why}", add=add)]


def _sampling(client: EngineClient, max_model_len: int) -> list[Finding]:
    """Token ids, scores, and what the reported logprobs are logprobs of."""
    ignore = {"ignore_eos": True, "seed": 0}
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, **ignore}
    try:
        hot = client.sample(_PROMPT, max_tokens=_TOKENS, top=5, temperature=_HOT, **neutral)
    except EngineRefused as error:
        return [Finding(code="token_ids", what=str(error), add="nothing: install a newer vLLM")]
    try:
        cold = client.score_top((*_PROMPT, *hot.token_ids), len(_PROMPT), 5)
    except EngineRefused as error:
        what = f"cannot score a given sequence ({error}), so that no publish could be verified"
        return [Finding(code="prompt_logprobs", what=what, add="nothing: install a vLLM with prompt_logprobs")]
    slope = _slope(hot.top, cold)
    if slope is None:
        what = "gives the same logprob to every token: its logprobs mode cannot be told, its weights look broken"
        return [Finding(code="logprobs_mode", what=what, add="a checkpoint that was trained")]
    if not 0.9 / _HOT < slope < 1.1 / _HOT:
        what = f"reports logprobs that do not know the temperature (slope {slope:.2f} at T = {_HOT}, not {1 / _HOT})"
        return [Finding(code="logprobs_mode", what=what, add="--logprobs-mode processed_logprobs")]
    return _defaults(client, ignore, max_model_len)


def _defaults(client: EngineClient, fields: Mapping[str, object], max_model_len: int) -> list[Finding]:
    """Sample with nothing said about sampling: the logprobs must be those of the model itself at T = 1.

    In bfloat16 either is rounded, on a CPU without instructions for it by 0.07 nats a token: a mean within `_SIGMAS`
    standard errors of 0 says nothing. Rounding goes both ways, and a mask takes no sampled token below what it was: so
    how much is rounded is read from those below. A temperature shows in the slope, a mask in what it removed or in the
    mean, a penalty in slope and mean. (SmolLM2, so rounded: slopes of 0.992 to 1.001; 1.11 at T = 0.9, 0.96 with a
    presence penalty of 0.5, 0.94 with a repetition penalty of 1.05.)
    """
    most = min(_MANY_TOKENS, max_model_len - len(_PROMPT) - 1)
    sampled = client.sample(_PROMPT, max_tokens=most, top=20, **fields)
    own = client.score_top((*_PROMPT, *sampled.token_ids), len(_PROMPT), 20)
    away = [s - at[token] for s, at, token in zip(sampled.logprobs, own, sampled.token_ids, strict=True)]
    mean = math.fsum(away) / len(away)
    below = [a for a in away if a < 0.0]
    error = math.sqrt(math.fsum(a * a for a in below) / max(len(below), 1) / len(away))
    slope = _slope(sampled.top, own)
    tilted = slope is not None and abs(slope - 1.0) > _TILT
    if _masked(sampled) or tilted or abs(mean) > max(0.02, _SIGMAS * error):
        what = (
            "changes the sampling of a request that says nothing about it (its logprobs are "
            f"{math.fsum(map(abs, away)) / len(away):.2f} nats from the model's own): generation_config.json of the "
            "model is applied"
        )
        return [Finding(code="generation_config", what=what, add="--generation-config vllm")]
    return []


def _masked(sampled: Sampled) -> bool:
    return any(value < _MASKED for position in sampled.top for value in position.values())


def _slope(hot: Sequence[Mapping[int, float]], cold: Sequence[Mapping[int, float]]) -> float | None:
    """How differences between two tokens' logprobs shrink from T = 1 (`cold`) to `hot`: 1/T exactly, if T applies.

    Normalisation cancels in the differences, so this holds position by position. None where there is nothing to see.
    """
    numerator = denominator = 0.0
    for at_hot, at_cold in zip(hot, cold, strict=True):
        shared = sorted(at_hot.keys() & at_cold.keys(), key=at_cold.__getitem__)
        if len(shared) >= 2:
            first, last = shared[0], shared[-1]
            numerator += at_hot[last] - at_hot[first]
            denominator += at_cold[last] - at_cold[first]
    return numerator / denominator if denominator > 0.01 else None
