"""LangSmith trees as its client posts them: a graph, its node, and the model run in it."""

import json
import uuid
from typing import Any

TRACE, NODE, MODEL = (str(uuid.UUID(int=number)) for number in (1, 2, 3))
METADATA = {
    "langgraph_node": "writer", "langgraph_checkpoint_ns": "writer:1f", "langgraph_step": 1,
    "langgraph_triggers": ["branch:to:writer"],
}  # fmt: skip


def tree(completion_id: str | None = None, *, ended: bool = True) -> list[dict[str, Any]]:
    """A graph, its node, and the model run in it, as a client posts them."""
    at, order = "2026-11-22T18:21:17.050231+00:00", ""
    runs = []
    for run_id, name, kind in ((TRACE, "LangGraph", "chain"), (NODE, "writer", "chain"), (MODEL, "ChatOpenAI", "llm")):
        order += f"{'.' if order else ''}20261122T182117036547Z{run_id}"
        run = {"id": run_id, "trace_id": TRACE, "dotted_order": order, "name": name, "run_type": kind, "start_time": at}
        run |= {"inputs": {"q": name}, "extra": {"metadata": {} if run_id == TRACE else METADATA}}
        run |= {"end_time": at, "outputs": {"a": name}} if ended else {}
        runs.append(run)
    runs[1]["parent_run_id"], runs[2]["parent_run_id"] = TRACE, NODE
    runs[1]["tags"] = ["graph:step:1"]
    if completion_id is not None:
        runs[2]["outputs"] = {"llm_output": {"id": completion_id}}
    return runs


def form(runs: list[dict[str, Any]], operation: str = "post") -> bytes:
    """The multipart body that langsmith's client writes."""
    parts = []
    for run in runs:
        apart = {name: run[name] for name in ("inputs", "outputs", "extra", "error") if name in run}
        rest = {name: value for name, value in run.items() if name not in apart}
        for name, value in {"": rest, **apart}.items():
            raw = json.dumps(value)
            head = f'Content-Disposition: form-data; name="{operation}.{run["id"]}{"." + name if name else ""}"'
            parts.append(
                f"--B\r\n{head}\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n{raw}\r\n"
            )
    return ("".join(parts) + "--B--\r\n").encode()
