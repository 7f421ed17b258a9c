"""The part of the fake vLLM that takes new weights: its development endpoints, for a publisher on the real wire.

A checkpoint is a folder whose `answer.txt` holds what the model then says to everything (see `save_answers`). The
prefix cache is only forgotten while nothing runs, as in vLLM: a swap under a call is refused.
"""

import json
from pathlib import Path
from typing import Any

from fake_completions import body_of, dumps, reply


def save_answers(folder: Path, answer: str) -> Path:
    """Write a checkpoint of the fake."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "answer.txt").write_text(answer)
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    return folder


class SwapWire:
    """To be mixed into the fake engine, whose knobs it reads and sets."""

    version: str | None
    answer_text: str | None
    in_flight: int
    PATHS = ("/collective_rpc", "/reset_prefix_cache", "/update_weight_version")

    def __init__(self) -> None:
        self.swapped_in: list[str] = []
        self.swapped_under_calls = 0

    async def _develop(self, path: str, receive: Any, send: Any) -> None:
        body = json.loads(await body_of(receive))
        answer: dict[str, Any] = {"success": True}
        if path == "/reset_prefix_cache":
            answer = {"success": self.in_flight == 0}
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif body["method"] == "tracegrad_load_weights":
            self.swapped_under_calls += self.in_flight
            folder = Path(body["kwargs"]["path"])
            self.swapped_in.append(folder.name)
            self.answer_text = (folder / "answer.txt").read_text()
            answer = {"results": [{"tied": False, "repacked": False}]}
        else:
            answer = {"results": [{"cpu": True, "tied": False}]}
        await reply(send, 200, dumps(answer))
