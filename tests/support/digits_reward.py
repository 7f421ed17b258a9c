"""The reward of `digits_app`: the run's for the final answer, the solver's own for its first one."""

from typing import Any


def reward(task: Any, output: dict[str, str]) -> list[dict[str, Any]]:
    right = task.reference["answer"]
    return [
        {"name": "correct", "value": float(output["answer"] == right)},
        {"name": "first", "value": float(output["first"] == right), "role": "solver"},
    ]
