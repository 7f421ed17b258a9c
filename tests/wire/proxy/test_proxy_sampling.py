"""The sampling override and the flags."""

from typing import Any

import pytest

from tracegrad.adapters.proxy.sampling import constrains_tools, flags_of, override_of, plan_sampling
from tracegrad.tracestore.config import SamplingOverride

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
STRICT = {"type": "function", "function": {"name": "f", "parameters": {}, "strict": True}}


def flags(**body: Any) -> tuple[str, ...]:
    return plan_sampling({"messages": [], **body}, purpose="live", override=None).flags


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, ()),
        ({"temperature": 0.7, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "stop": ["x"], "seed": 3}, ()),
        ({"temperature": 0}, ("greedy",)),
        ({"temperature": 1e-6}, ("greedy",)),
        ({"use_beam_search": True}, ("greedy",)),
        ({"response_format": {"type": "json_object"}}, ("constrained",)),
        ({"response_format": {"type": "text"}}, ()),
        ({"structured_outputs": {"choice": ["a"]}}, ("constrained",)),
        ({"tools": [TOOL], "tool_choice": "required"}, ("constrained",)),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, ("constrained",)),
        ({"tools": [TOOL], "tool_choice": "auto"}, ()),
        ({"tools": [STRICT]}, ("constrained",)),
        ({"tools": [STRICT], "tool_choice": "none"}, ()),
        ({"tools": [TOOL], "parallel_tool_calls": True}, ()),
        ({"tools": [TOOL], "parallel_tool_calls": False}, ("constrained",)),
        ({"tools": [TOOL], "parallel_tool_calls": False, "tool_choice": "none"}, ()),
        ({"parallel_tool_calls": False}, ()),
        ({"min_tokens": 4}, ("constrained",)),
        ({"presence_penalty": 0.1}, ("penalised",)),
        ({"repetition_penalty": 1.1}, ("penalised",)),
        ({"repetition_penalty": 1.0, "frequency_penalty": 0}, ()),
        ({"logit_bias": {"5": 1}}, ("penalised",)),
        ({"top_p": 0.9}, ("truncated_sampling",)),
        ({"top_k": 20}, ("truncated_sampling",)),
        ({"min_p": 0.05}, ("truncated_sampling",)),
        ({"temperature": 0, "top_p": 0.5, "logit_bias": {"5": 1}}, ("greedy", "penalised", "truncated_sampling")),
        ({"temperature": "hot"}, ()),
    ],
)
def test_flags(body: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert flags(**body) == expected


def test_the_override_replaces_drops_the_seed_and_clears_the_flag() -> None:
    body = {"messages": [], "temperature": 0, "seed": 7, "max_completion_tokens": 99, "top_p": 0.5}
    override = SamplingOverride(temperature=0.8, top_p=1.0, max_tokens=20)
    plan = plan_sampling(body, purpose="train", override=override)
    assert plan.requested == {"temperature": 0, "seed": 7, "max_completion_tokens": 99, "top_p": 0.5}
    assert plan.effective == {"temperature": 0.8, "max_completion_tokens": 20, "top_p": 1.0}
    assert plan.flags == ()


def test_max_tokens_is_set_under_the_older_name_where_the_client_sent_none() -> None:
    plan = plan_sampling({}, purpose="train", override=SamplingOverride(max_tokens=5))
    assert plan.effective == {"max_tokens": 5}


@pytest.mark.parametrize("purpose", ["eval", "live", None])
def test_only_purpose_train_is_overridden(purpose: Any) -> None:
    plan = plan_sampling({"temperature": 0}, purpose=purpose, override=SamplingOverride(temperature=0.8))
    assert plan.effective == plan.requested == {"temperature": 0}


def test_override_of_a_role_else_of_the_star() -> None:
    one, star = SamplingOverride(temperature=0.1), SamplingOverride(temperature=0.9)
    assert override_of({"a": one, "*": star}, "a") is one
    assert override_of({"a": one, "*": star}, "b") is star
    assert override_of({"a": one, "*": star}, None) is star
    assert override_of({"a": one}, "b") is None


def test_flags_look_at_what_is_effective() -> None:
    assert flags_of({"temperature": 0.8}, {"temperature": 0}) == ()


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ((), False),
        (("--enable-auto-tool-choice", "--tool-call-parser", "hermes"), False),
        (("--tool-call-parser", "glm47"), True),
        (("--tool-call-parser=mistral",), True),
        (("--tool-strict-level", "auto"), False),
        (("--tool-strict-level=parameter", "--tool-call-parser", "hermes"), True),
    ],
)
def test_an_engine_that_puts_a_grammar_on_every_tool_call_is_known_by_its_arguments(
    args: tuple[str, ...], expected: bool
) -> None:
    assert constrains_tools(args) is expected
    found = plan_sampling({"tools": [TOOL]}, purpose="live", override=None, strict_tools=expected).flags
    assert found == (("constrained",) if expected else ())
    assert plan_sampling({}, purpose="live", override=None, strict_tools=True).flags == ()
