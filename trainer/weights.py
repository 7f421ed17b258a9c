"""What is in a checkpoint folder: the model in Hugging Face format, and the state that lets training go on exactly.

At the top, `model.safetensors` in the serving dtype (each value the rounded float32 master), `config.json`, and the
base's tokenizer files: vLLM and transformers load the folder as it is. Of an adapter, `adapter_model.safetensors` and
`adapter_config.json`, as peft saves it and vLLM loads it beside the base. Under `trainer_state/`: the value head,
AdamW's two moments and step counts, and, where the serving dtype is not float32, the masters. No generator state:
whatever is random in a step is drawn from the seed of its plan, which commits with the lease.
The files are the same whatever the number of ranks: the first of them writes, the others hand their shards over, and
each takes its own shards out of whole files again. Refuses a state of another model. Called by the learner;
`tracegrad.trainer.checkpoints` knows the folder around it.
"""

import copy
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tracegrad.trainer.checkpoints import STATE_FOLDER
from tracegrad.trainer.errors import UnsupportedModel
from tracegrad.trainer.policy import Policy
from tracegrad.trainer.sharding import like
from tracegrad.trainer.tensor_files import hand_over, write_tensors

MODEL = "model.safetensors"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
VALUE_HEAD = f"{STATE_FOLDER}/value_head.safetensors"
MASTERS = f"{STATE_FOLDER}/masters.safetensors"
MOMENTS = {name: f"{STATE_FOLDER}/{name}.safetensors" for name in ("exp_avg", "exp_avg_sq")}
STEPS = f"{STATE_FOLDER}/optimizer_steps.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_ASSETS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "generation_config.json",
)


def named_masters(policy: Policy) -> dict[str, torch.nn.Parameter]:
    """Return every trained tensor: ``lm.<name>`` and ``value_head.<name>``, float32."""
    return {
        **{f"lm.{name}": parameter for name, parameter in policy.lm_masters().items()},
        **{f"value_head.{name}": parameter for name, parameter in policy.value_masters().items()},
    }


def save_serving(folder: Path, policy: Policy, dtype: torch.dtype, base: Path) -> dict[str, str]:
    """Write what the engine loads, a model or an adapter; return the sha256 of the weights by file name."""
    file = MODEL if policy.peft_config is None else ADAPTER
    if policy.ranks.leads and policy.peft_config is None:
        _save_config(folder, policy, dtype, base)
    elif policy.ranks.leads:
        _save_adapter_config(folder, policy, base)
    return _write(folder, policy, {file: policy.lm_state()}, dtype)


def save_state(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> dict[str, str]:
    """Write what training needs beside the serving files, each file in its own thread; return their sha256."""
    masters = named_masters(policy)
    states = {name: optimizer.state[p] for name, p in masters.items() if p in optimizer.state}
    if policy.ranks.leads:
        (folder / STATE_FOLDER).mkdir()
        steps = {name: int(state["step"]) for name, state in states.items()}
        (folder / STEPS).write_text(json.dumps(steps, indent=0, sort_keys=True))
    files: dict[str, Mapping[str, Tensor]] = {VALUE_HEAD: policy.value_state()}
    if dtype != torch.float32:
        files[MASTERS] = policy.lm_state()
    for moment, file in MOMENTS.items():
        files[file] = {name: state[moment] for name, state in states.items()}
    return _write(folder, policy, files)


def load_state(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Put masters, value head and AdamW's state back, bitwise.

    Raises:
        UnsupportedModel: the folder holds another model's tensors.
    """
    masters, served = folder / MASTERS, folder / (MODEL if policy.peft_config is None else ADAPTER)
    policy.load_lm_state(load_file(masters if masters.exists() else served))
    policy.load_value_state(load_file(folder / VALUE_HEAD))
    parameters = named_masters(policy)
    steps: dict[str, int] = json.loads((folder / STEPS).read_text())
    moments = {moment: load_file(folder / file) for moment, file in MOMENTS.items()}
    unknown = sorted(steps.keys() - parameters.keys())
    if unknown:
        raise UnsupportedModel(f"{folder}: the optimizer state names {unknown[:3]}, which this model does not have")
    optimizer.state.clear()
    for name, count in steps.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {
            "step": torch.tensor(float(count), device=parameter.device),
            **{moment: like(parameter, tensors[name]).clone() for moment, tensors in moments.items()},
        }


def check_names(base: Path, policy: Policy) -> None:
    """Refuse a base whose files name their tensors otherwise than the loaded model does.

    Raises:
        UnsupportedModel: weights that transformers fuses or renames while loading would be served under wrong names.
    """
    from safetensors import safe_open

    stored: set[str] = set()
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            stored |= set(tensors.keys())
    missing = sorted(set(policy.lm_state()) - stored)
    if missing:
        raise UnsupportedModel(
            f"{base}: its safetensors files lack {missing[:3]} that the loaded model has; "
            "save the model in plain Hugging Face safetensors format first"
        )


def _write(
    folder: Path, policy: Policy, files: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype | None = None
) -> dict[str, str]:
    """Write the files, each in its own thread; over several ranks in turn, as all must gather in one order."""
    if not policy.ranks.leads:
        for tensors in files.values():
            hand_over(tensors)
        return {}
    with ThreadPoolExecutor(len(files) if policy.ranks.size == 1 else 1) as pool:
        digests = pool.map(lambda item: write_tensors(folder / item[0], item[1], dtype), files.items())
        return dict(zip(files, digests, strict=True))


def _save_config(folder: Path, policy: Policy, dtype: torch.dtype, base: Path) -> None:
    config = copy.deepcopy(policy.lm.config)
    config.dtype = dtype
    config.architectures = config.architectures or [type(policy.lm).__name__.removeprefix("FSDP")]
    config.save_pretrained(folder)
    for pattern in _ASSETS:
        for source in base.glob(pattern):
            if source.is_file():
                shutil.copyfile(source, folder / source.name)


def _save_adapter_config(folder: Path, policy: Policy, base: Path) -> None:
    """In peft's format, its sets in a fixed order: equal adapters have equal files."""
    config = {**policy.peft_config.to_dict(), "base_model_name_or_path": str(base), "inference_mode": True}
    stated = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(stated, indent=2, sort_keys=True))
