"""Sampling parameters: as requested, as sent to the engine, and what the trainer must know of them.

The override is the one thing that changes what is sampled: it applies to runs with purpose `train`, per role, where
the configuration says so, and drops the client's seed (equal seeds would make the members of a group equal).
Refuses nothing: what the engine does not accept, the engine refuses. Called by `chat`.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tracegrad.tracestore.config import SamplingOverride
from tracegrad.tracestore.records import Purpose

# fmt: off
SAMPLING_FIELDS = frozenset(
    {
        "temperature", "top_p", "top_k", "min_p", "n", "seed", "max_tokens", "max_completion_tokens",
        "min_tokens", "stop", "stop_token_ids", "ignore_eos", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "allowed_token_ids", "bad_words", "use_beam_search", "length_penalty",
        "watermarking", "thinking_token_budget", "repetition_detection", "include_stop_str_in_output",
        "vllm_xargs",
    }
)
# fmt: on
"""Fields of the request that decide how tokens are chosen; everything else is the request itself."""

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy. Source: vLLM, `sampling_params._SAMPLING_EPS`."""


STRICT_PARSERS = frozenset({"glm45", "glm47", "mistral", "cohere_command3", "cohere_command4", "hy_v4", "kimi_k3"})
"""Tool parsers that put a grammar on every call with tools, whatever its fields say. Source: vLLM 0.32, `parser/`,
`tool_parsers/` (`default_tool_strict_level`, `adjust_request`)."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """`requested` as the client sent it, `effective` as the engine gets it, `flags` for every choice of the call."""

    requested: Mapping[str, Any]
    effective: Mapping[str, Any]
    flags: tuple[str, ...]


def override_of(overrides: Mapping[str, SamplingOverride], role: str | None) -> SamplingOverride | None:
    """Return the override for `role`, else the one for `*`, else None."""
    return overrides.get(role or "*") or overrides.get("*")


def constrains_tools(engine_args: Sequence[str]) -> bool:
    """Whether an engine started with these arguments samples every call with tools under a grammar."""
    values = dict(itertools.pairwise(engine_args))
    joined = (arg.partition("=") for arg in engine_args if arg.startswith("--") and "=" in arg)
    values.update((name, value) for name, _, value in joined)
    strict = values.get("--tool-strict-level", "auto") != "auto"
    return strict or values.get("--tool-call-parser") in STRICT_PARSERS


def plan_sampling(
    body: Mapping[str, Any], *, purpose: Purpose | None, override: SamplingOverride | None, strict_tools: bool = False
) -> Sampling:
    """Return what was asked, what will be sent and the flags. `body` is the client's decoded request.

    `strict_tools`: the engine puts a grammar on every call with tools.
    """
    requested = {name: value for name, value in body.items() if name in SAMPLING_FIELDS}
    effective = dict(requested)
    if purpose == "train" and override is not None:
        effective = _overridden(effective, override)
    return Sampling(requested, effective, flags_of(effective, body, strict_tools=strict_tools))


def flags_of(effective: Mapping[str, Any], body: Mapping[str, Any], *, strict_tools: bool = False) -> tuple[str, ...]:
    """Name what keeps the choices of a call from being plain samples of the policy at its temperature."""
    flags = []
    if _number(effective, "temperature", 1.0) < GREEDY_BELOW or effective.get("use_beam_search"):
        flags.append("greedy")
    if _constrained(effective, body, strict_tools):
        flags.append("constrained")
    if _penalised(effective):
        flags.append("penalised")
    if _truncated(effective):
        flags.append("truncated_sampling")
    return tuple(flags)


def _overridden(effective: dict[str, Any], override: SamplingOverride) -> dict[str, Any]:
    effective.pop("seed", None)
    for name in ("temperature", "top_p", "top_k"):
        if (value := getattr(override, name)) is not None:
            effective[name] = value
    if override.max_tokens is not None:
        given = "max_completion_tokens" if "max_completion_tokens" in effective else "max_tokens"
        effective[given] = override.max_tokens
    return effective


def _constrained(effective: Mapping[str, Any], body: Mapping[str, Any], strict_tools: bool) -> bool:
    """True where the engine masks tokens: grammars, forced, single or strict tools, token lists, a minimum length."""
    wanted = body.get("response_format")
    if isinstance(wanted, Mapping) and wanted.get("type") not in (None, "text"):
        return True
    if body.get("structured_outputs") or any(name.startswith("guided_") and body[name] for name in body):
        return True
    choice, tools = body.get("tool_choice"), body.get("tools")
    if choice == "required" or isinstance(choice, Mapping):
        return True
    if choice != "none" and isinstance(tools, list) and tools:
        # one call at most: vLLM 0.32 ends the call list by grammar, also with `auto` (`Parser._apply_structural_tag`)
        single = body.get("parallel_tool_calls") is False
        if single or strict_tools or any(_strict(tool) for tool in tools):
            return True
    return any(
        effective.get(name)
        for name in ("allowed_token_ids", "bad_words", "min_tokens", "thinking_token_budget", "vllm_xargs")
    )


def _strict(tool: Any) -> bool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    return isinstance(function, Mapping) and bool(function.get("strict"))


def _penalised(effective: Mapping[str, Any]) -> bool:
    return bool(
        effective.get("logit_bias")
        or effective.get("watermarking")
        or _number(effective, "presence_penalty", 0.0) != 0.0
        or _number(effective, "frequency_penalty", 0.0) != 0.0
        or _number(effective, "repetition_penalty", 1.0) != 1.0
    )


def _truncated(effective: Mapping[str, Any]) -> bool:
    """True where the tail of the distribution is cut: top-p, top-k or min-p, without a recorded sampling mask."""
    return (
        _number(effective, "top_p", 1.0) < 1.0
        or _number(effective, "top_k", 0.0) > 0
        or _number(effective, "min_p", 0.0) > 0.0
    )


def _number(values: Mapping[str, Any], name: str, default: float) -> float:
    """Return a numeric field; what is no number is the engine's to refuse, and the default here."""
    value = values.get(name)
    return float(value) if isinstance(value, int | float) else default
