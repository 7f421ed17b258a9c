"""The fake engine's wire around a real Llama folder: it loads what the trainer publishes, and scores it exactly."""

import math
import random
from pathlib import Path
from typing import Any

from fake_engine import FakeEngine, save_weight

from tracegrad.trainer.checkpoints import step_folder


class LlamaEngine(FakeEngine):
    """Serves the weights of a Hugging Face folder through transformers, in the test's process."""

    def __init__(self, base: Path, scratch: Path, name: str) -> None:
        super().__init__(save_weight(scratch, 1.0), name)
        self.max_model_len = 2048
        self._base, self._adapted = base, dict[str, Any]()
        self.load(base)

    def load(self, folder: Path) -> None:
        import torch
        from transformers import LlamaForCausalLM

        self._lm = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def _rpc(self, method: str, kwargs: dict[str, str]) -> tuple[int, Any]:
        if method == "tracegrad_info":
            return 200, {"results": [{"cpu": True, "tied": False, "products": True}]}
        if self.fail_reloads:
            self.fail_reloads -= 1
            return 500, {"error": {"message": "out of memory", "type": "Error", "param": None, "code": 0}}
        self.loaded.append(step_folder(kwargs["path"]).name)
        if not self.ignore_reload:
            self.load(Path(kwargs["path"]))
        return 200, {"results": [{"tied": False, "repacked": False}]}

    def load_adapter(self, name: str, folder: Path) -> None:
        import torch
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        base = LlamaForCausalLM.from_pretrained(self._base, dtype=torch.float32)
        self._adapted[name] = PeftModel.from_pretrained(base, folder)

    def _rows(self, model: str, ids: list[int], temperature: float) -> list[list[float]]:
        import torch

        with torch.no_grad():
            logits = self._adapted.get(model, self._lm)(torch.tensor([ids])).logits[0]
        rows: list[list[float]] = torch.log_softmax(logits / temperature, -1).tolist()
        return rows

    def _choice(self, index: int, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        rng = random.Random(body.get("seed", 0))
        temperature = body.get("temperature", 1.0) or 1.0
        ids, values, tops = list(prompt), [], []
        for _ in range(body["max_tokens"]):
            row = self._rows(body["model"], ids, temperature)[-1]
            token = rng.choices(range(len(row)), [math.exp(x) for x in row])[0]
            values.append(row[token])
            tops.append({f"token_id:{t}": row[t] for t in {*_best(row, body.get("logprobs", 0)), token}})
            ids.append(token)
        choice: dict[str, Any] = {"index": index, "text": "", "finish_reason": "length"}
        choice["token_ids"] = ids[len(prompt) :]
        choice["logprobs"] = {"token_logprobs": values, "top_logprobs": tops}
        if "prompt_logprobs" in body:
            scored = zip(self._rows(body["model"], prompt, 1.0), prompt[1:], strict=False)
            entries = [
                {str(t): {"logprob": row[t]} for t in {*_best(row, body["prompt_logprobs"]), token}}
                for row, token in scored
            ]
            choice["prompt_logprobs"] = [None, *entries]
        return choice


def _best(row: list[float], count: int) -> list[int]:
    return sorted(range(len(row)), key=lambda token: -row[token])[:count]
