"""An engine that speaks vLLM's wire and serves a toy model, for tests of everything around an engine.

The model: weights are one number, read from ``weight.json`` in the checkpoint's folder; with 11 tokens, the logit of
token t after token s is ``weight * cos(3 s + 7 t)``. Half of the vocabulary is the "head", which keeps its old weight
when `stale_head` is set. `logprobs` returns the exact values, so that a test plays the trainer.

Run as a program it is an engine for `EngineProcess`: it takes vLLM's arguments and writes them to ``argv.json`` in
the checkpoint's folder.
"""

import json
import math
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fake_transfer import STEPS, TransferWire, save_tensor

from tracegrad.trainer.engine_spans import HEADER, telling

VOCABULARY = 11


def save_weight(folder: Path, weight: float, *, tied: bool = False) -> Path:
    """Write a checkpoint of the toy model."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weight.json").write_text(json.dumps(weight))
    save_tensor(folder, weight)
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    return folder


def logprobs(weight: float, ids: Sequence[int], n_prompt: int, head_weight: float | None = None) -> list[float]:
    """Return the toy model's logprobs (T = 1) of ids[n_prompt:]."""
    return [_row(weight, ids[i - 1], 1.0, head_weight)[ids[i]] for i in range(n_prompt, len(ids))]


def _row(weight: float, after: int, temperature: float, head_weight: float | None = None) -> list[float]:
    head = weight if head_weight is None else head_weight
    logits = [(head if t % 2 else weight) * math.cos(3 * after + 7 * t) / temperature for t in range(VOCABULARY)]
    total = math.log(math.fsum(math.exp(x) for x in logits))
    return [x - total for x in logits]


class FakeEngine(TransferWire):
    """The engine in a thread of this process. Its faults are attributes, set at any time."""

    def __init__(self, checkpoint: Path, name: str = "main", port: int = 0) -> None:
        super().__init__()
        self.name = name
        self.root = str(checkpoint)
        self.weight = self.head_weight = float(json.loads((checkpoint / "weight.json").read_text()))
        self.version = "default"
        self.max_model_len = 64
        self.dev_mode = True
        self.extension = True
        self.token_ids = True
        self.processed = True
        self.default_top_k: int | None = None
        self.default_temperature = 1.0
        self.rounding = 0.0
        """Nats by which a reported logprob is off, as where a CPU has no instructions for bfloat16 (0.07 there)."""
        self.stale_head = False
        self.ignore_reload = False
        self.fail_reloads = 0
        self.busy = False
        """Something runs. While it is paused it is kept, without a cache: then nothing proves an idle engine."""
        self.running = threading.Event()
        self.running.set()
        self.tells_versions = True
        """Started with our middleware: a stream that asks for it is told which weights sampled what."""
        self.die_on_reload = False
        self.alive = True
        self.loaded: list[str] = []
        self.adapters: dict[str, str] = {}
        self.read_at_each_step: set[str] = set()
        """Adapters that were loaded in place: vLLM 0.32 goes on reading the folders of these."""
        """Name -> folder; None of them can be loaded without `takes_adapters`."""
        self.takes_adapters = True
        self.products = True
        self.max_loras: int | None = None
        self.adapter_weights: dict[str, float] = {}
        self.events: list[str] = []
        handler = type("Handler", (_Handler,), {"engine": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> "FakeEngine":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop answering: connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()
        self.alive = False

    def serve(self) -> None:
        """Serve in this thread, for ever."""
        self._server.serve_forever()

    # -- the endpoints: (status, body)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.events.append(path.removeprefix("/"))
        served = [{"id": self.name, "root": self.root, "max_model_len": self.max_model_len}]
        beside = {"parent": self.name, "max_model_len": None}
        served += [{"id": name, "root": root, **beside} for name, root in self.adapters.items()]
        run_time = {
            "/v1/load_lora_adapter": lambda: self._load_adapter(body),
            "/v1/unload_lora_adapter": lambda: self._unload_adapter(body),
        }
        open_to_all = {
            **(run_time if self.takes_adapters else {}),
            "/health": lambda: (200, None),
            "/v1/models": lambda: (200, {"data": served}),
            "/v1/completions": lambda: self._completions(body),
        }
        development = {
            "/collective_rpc": lambda: self._rpc(body["method"], body["kwargs"]),
            "/reset_prefix_cache": lambda: (200, {"success": not (self.busy and self.running.is_set())}),
            "/pause?mode=keep": lambda: (200, {"status": "paused", "was": self.running.clear()}),
            "/resume": lambda: (200, {"status": "resumed", "was": self.running.set()}),
            "/update_weight_version": lambda: self._set_version(body["new_version"]),
            "/weight_info": lambda: (200, {"weight_version": self.version}),
            **{f"/{step}": partial(self.transfer, step, body) for step in (*STEPS, "shutdown_weight_transfer_engine")},
            "/get_world_size": lambda: (200, {"world_size": 1}),
        }
        known = {**open_to_all, **(development if self.dev_mode else {})}
        return known[path]() if path in known else (404, {"detail": "Not Found"})

    def _load_adapter(self, body: dict[str, Any]) -> tuple[int, Any]:
        name, path = body["lora_name"], body["lora_path"]
        if not name or not path:
            return 400, _error("Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.adapters and not body.get("load_inplace"):
            return 400, _error(f"The lora adapter '{name}' has already been loaded.")
        if self.fail_reloads:
            self.fail_reloads -= 1
            return 500, _error("out of memory")
        self.loaded.append(path)
        if body.get("load_inplace"):
            self.read_at_each_step.add(name)
        if not self.ignore_reload:
            self.load_adapter(name, Path(path))
        self.adapters[name] = path
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def load_adapter(self, name: str, folder: Path) -> None:
        """Take an adapter's weights: of the toy, the number of a whole model."""
        self.adapter_weights[name] = float(json.loads((folder / "weight.json").read_text()))

    def _unload_adapter(self, body: dict[str, Any]) -> tuple[int, Any]:
        name = body["lora_name"]
        if name not in self.adapters:
            return 404, _error(f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return 200, f"Success: LoRA adapter '{name}' removed successfully."

    def _set_version(self, version: str) -> tuple[int, Any]:
        self.version = version
        return 200, {"success": True}

    def _rpc(self, method: str, kwargs: dict[str, str]) -> tuple[int, Any]:
        if method.startswith("tracegrad_") and not self.extension:
            return 500, _error(f"'CPUWorker' object has no attribute '{method}'")
        if method == "tracegrad_info":
            info = {"cpu": True, "tied": True, "transfer": self.transfer_backend, "process": self.process}
            info |= {"products": self.products, "max_loras": self.max_loras}
            return 200, {"results": [info]}
        if method == "tracegrad_break_off":
            self.update_active = False
            return 200, {"results": [None]}
        if self.die_on_reload:
            threading.Thread(target=self.close).start()
            raise ConnectionAbortedError
        if self.fail_reloads:
            self.fail_reloads -= 1
            return 500, _error("out of memory")
        path = kwargs.get("path") or kwargs["weights_path"]
        self.loaded.append(Path(path).name)
        if not self.ignore_reload:
            self.weight = json.loads((Path(path) / "weight.json").read_text())
        if not self.stale_head:
            self.head_weight = self.weight
        return 200, {"results": [{"tied": True, "repacked": True} if method.startswith("tracegrad") else None]}

    def _completions(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] not in (self.name, *self.adapters):
            return 404, _error(f"The model `{body['model']}` does not exist.")
        assert self.running.wait(5), "a paused engine answers nobody"
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        if any(len(p) + body["max_tokens"] > self.max_model_len for p in prompts):
            return 400, _error("longer than the maximum model length")
        answer = {"choices": [self._choice(i, p, body) for i, p in enumerate(prompts)]}
        if not body.get("stream"):
            return 200, answer
        heard = {0: [(self.version, 0, body["max_tokens"])]} if self.tells_versions and body["_asks"] else {}
        stream = f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n".encode()
        return 200, telling({"type": "http.response.body", "body": stream}, heard)["body"].decode()

    def _choice(self, index: int, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        rng = random.Random(body.get("seed", 0))
        temperature = body.get("temperature", self.default_temperature) or 1.0
        top_k = body.get("top_k", self.default_top_k)
        ids, values, tops = list(prompt), [], []
        for _ in range(body["max_tokens"]):
            sampled = _mask(self._logprobs(body, ids[-1], temperature), top_k)
            token = rng.choices(range(VOCABULARY), [math.exp(x) for x in sampled])[0]
            reported = sampled if self.processed else self._logprobs(body, ids[-1], 1.0)
            if self.rounding:
                noise = random.Random(f"{body.get('seed', 0)} {len(ids)}")
                reported = [x + noise.gauss(0.0, self.rounding) for x in reported]
            values.append(reported[token])
            best = sorted(range(VOCABULARY), key=lambda t: -reported[t])[: body.get("logprobs", 0)]
            tops.append({f"token_id:{t}": max(reported[t], -9999.0) for t in {*best, token}})
            ids.append(token)
        choice: dict[str, Any] = {"index": index, "text": "", "finish_reason": "length"}
        if self.token_ids and body.get("return_token_ids"):
            choice["token_ids"] = ids[len(prompt) :]
        if "logprobs" in body:
            choice["logprobs"] = {"token_logprobs": values, "top_logprobs": tops}
        if "prompt_logprobs" in body:
            choice["prompt_logprobs"] = [
                None,
                *(self._scored(body, prompt, i) for i in range(1, len(prompt))),
            ]
        return choice

    def _scored(self, body: dict[str, Any], prompt: list[int], i: int) -> dict[str, Any]:
        row = self._logprobs(body, prompt[i - 1], 1.0)
        best = sorted(range(VOCABULARY), key=lambda t: -row[t])[: body["prompt_logprobs"]]
        return {str(t): {"logprob": row[t]} for t in {*best, prompt[i]}}

    def _logprobs(self, body: dict[str, Any], after: int, temperature: float) -> list[float]:
        if body["model"] in self.adapters:
            return _row(self.adapter_weights[body["model"]], after % VOCABULARY, temperature)
        return _row(self.weight, after % VOCABULARY, temperature, self.head_weight)


def _mask(row: list[float], top_k: int | None) -> list[float]:
    if top_k is None or top_k < 1:
        return row
    kept = sorted(row, reverse=True)[:top_k]
    total = math.log(math.fsum(math.exp(x) for x in kept))
    return [x - total if x in kept else -math.inf for x in row]


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "Error", "param": None, "code": 0}}


class _Handler(BaseHTTPRequestHandler):
    engine: FakeEngine

    def do_GET(self) -> None:
        self._reply({})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(raw) if raw else {}
        self._reply({**body, "_asks": HEADER.decode() in self.headers} if body.get("stream") else body)

    def _reply(self, body: dict[str, Any]) -> None:
        try:
            status, answer = self.engine.answer(self.path, body)
        except ConnectionAbortedError:
            self.close_connection = True
            return
        raw = b"" if answer is None else answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


def main(argv: Sequence[str]) -> None:
    """Be an engine process: vLLM's arguments; ``--crash-at-start`` and ``--slow SECONDS`` are faults."""
    given = dict(zip(argv, [*argv[1:], ""], strict=True))
    checkpoint = Path(given["--model"])
    environment = {k: v for k, v in os.environ.items() if k.startswith(("VLLM_", "OMP_")) or k == "PYTHONPATH"}
    info = {"argv": list(argv), "environment": environment}
    (checkpoint / "argv.json").write_text(json.dumps(info))
    print("fake engine: reading weights", flush=True)
    if "--crash-at-start" in argv or (checkpoint / "crash").exists():
        sys.exit("fake engine: RuntimeError: no such kernel")
    child = os.fork()
    if child == 0:
        time.sleep(600)
        os._exit(0)
    (checkpoint / "child.pid").write_text(str(child))
    time.sleep(float(given.get("--slow", 0)))
    engine = FakeEngine(checkpoint, name=given["--served-model-name"], port=int(given["--port"]))
    modules = argv[argv.index("--lora-modules") + 1 :] if "--lora-modules" in argv else []
    for module in modules:
        if "=" not in module or module.startswith("--"):
            break
        name, _, folder = module.partition("=")
        engine.load_adapter(name, Path(folder))
        engine.adapters[name] = folder
    engine.serve()


if __name__ == "__main__":
    main(sys.argv[1:])
