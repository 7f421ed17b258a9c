"""The part of the fake vLLM that takes new weights: its development endpoints, for a publisher on the real wire.

A checkpoint is a folder whose `answer.txt` holds what the model then says to everything (see `save_answers`). The
prefix cache is only forgotten while nothing runs, as in vLLM: a swap under a call is refused. A pause that keeps what
runs stops every stream before its next token, and which version sampled which token is told as our middleware tells it.
"""

import asyncio
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

    name: str
    version: str | None
    answer_text: str | None
    in_flight: int
    PATHS = ("/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/pause", "/resume")
    ADAPTER_PATHS = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")

    def __init__(self) -> None:
        self.swapped_in: list[str] = []
        self.swapped_under_calls = 0
        self.paused = False
        self.tells_versions = True
        """Started with our middleware."""
        self.adapters: dict[str, str] = {}
        """Name -> folder, as `--lora-modules` or a publisher loaded them."""

    def _adapter_cards(self, card: dict[str, Any]) -> list[dict[str, Any]]:
        """The cards of the adapters, after that of the base."""
        loaded = self.adapters.items()
        return [{**card, "id": name, "root": at, "parent": card["id"], "max_model_len": None} for name, at in loaded]

    def _answer_of(self, model: str | None) -> str | None:
        """What a model says to everything, where it has such an answer."""
        folder = self.adapters.get(model or "")
        return self.answer_text if folder is None else (Path(folder) / "answer.txt").read_text()

    async def _exchange_adapter(self, path: str, receive: Any, send: Any) -> None:
        """As vLLM 0.32, `entrypoints/openai/models/serving.py`; a success is plain text."""
        body = json.loads(await body_of(receive))
        name, folder = body.get("lora_name"), body.get("lora_path")
        if path == "/v1/unload_lora_adapter" and not name:
            await _refuse(send, 400, "'lora_name' needs to be provided to unload a LoRA adapter.", "InvalidUserInput")
        elif path == "/v1/unload_lora_adapter" and name not in self.adapters:
            await _refuse(send, 404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
        elif path == "/v1/unload_lora_adapter":
            del self.adapters[name]
            await reply(send, 200, f"Success: LoRA adapter '{name}' removed successfully.".encode(), b"text/plain")
        elif not name or not folder:
            await _refuse(send, 400, "Both 'lora_name' and 'lora_path' must be provided.", "InvalidUserInput")
        elif name == self.name:
            text = f"The lora adapter '{name}' conflicts with a served base model."
            await _refuse(send, 400, text, "InvalidUserInput")
        elif name in self.adapters and not body.get("load_inplace"):
            text = f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, set "
            await _refuse(send, 400, text + "'load_inplace' to True.", "InvalidUserInput")
        else:
            self.adapters[name] = folder
            await reply(send, 200, f"Success: LoRA adapter '{name}' added successfully.".encode(), b"text/plain")

    async def _while_paused(self) -> None:
        while self.paused:
            await asyncio.sleep(0.002)

    async def _develop(self, path: str, receive: Any, send: Any) -> None:
        body = json.loads(await body_of(receive) or b"{}")
        answer: dict[str, Any] = {"success": True}
        if path == "/reset_prefix_cache":
            answer = {"success": self.in_flight == 0 or self.paused}
        elif path in ("/pause", "/resume"):
            self.paused = path == "/pause"
            answer = {"status": "paused" if self.paused else "resumed"}
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif body["method"] == "tracegrad_load_weights":
            self.swapped_under_calls += 0 if self.paused else self.in_flight
            folder = Path(body["kwargs"]["path"])
            self.swapped_in.append(folder.name)
            self.answer_text = (folder / "answer.txt").read_text()
            answer = {"results": [{"tied": False, "repacked": False}]}
        else:
            answer = {"results": [{"cpu": True, "tied": False, "products": True}]}
        await reply(send, 200, dumps(answer))


async def _refuse(send: Any, status: int, text: str, kind: str) -> None:
    await reply(send, status, dumps({"error": {"message": text, "type": kind, "param": None, "code": status}}))
