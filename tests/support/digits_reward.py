"""The reward of `digits_app`: of the run, shared by both roles, for the final answer."""

from typing import Any


def reward(task: Any, output: dict[str, str]) -> float:
    return float(output["answer"] == task.reference["answer"])
