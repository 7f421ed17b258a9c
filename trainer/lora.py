"""LoRA adapters on one base: the base is held once, each adapter is a policy with its own critic.

peft's layers are put into the stock model, so that adapters compute as peft computes them and are saved in the format
that engines load. The base has no gradients and no masters: it lies in the precision that computes. A and B are float32
and are their own masters. Which adapter computes is the trunk's state: every use of a policy's `lm` sets it, and a
pass that recomputes activations sets it again as it was. Refuses targets that the base does not have.
Called by the learner.
"""

import hashlib
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from tracegrad.tracestore.config import AdapterConfig
from tracegrad.tracestore.section import near_misses
from tracegrad.trainer.errors import UnsupportedModel
from tracegrad.trainer.policy import Policy, Precision, load_language_model, prepare, round_weights

_PREFIX = "base_model.model."
"""What peft writes before the name of the module that an adapter lies on."""


class Trunk:
    """A frozen base model and the adapters on it."""

    def __init__(
        self, lm: Any, *, precision: Precision = "fp32", gradient_checkpointing: bool = False, slot_chunk: int = 256
    ) -> None:
        settings = {"use_reentrant": False, "context_fn": self._contexts} if gradient_checkpointing else None
        prepare(lm, gradient_checkpointing=settings)
        self.lm: Any = lm.float()
        self.precision: Precision = precision
        self.slot_chunk = slot_chunk
        self._adapters: list[str] = []
        self._active: str | None = None
        self._layers: list[LoraLayer] = []
        head = lm.get_output_embeddings()
        self._linear = {
            name.rsplit(".", 1)[-1]
            for name, module in lm.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        lm.requires_grad_(False)
        if precision == "bf16":
            round_weights(lm)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, precision: Precision, *, gradient_checkpointing: bool = False, verify: bool = True
    ) -> "Trunk":
        """Load a folder in Hugging Face format.

        Raises:
            UnsupportedModel: see `Policy.verify`.
        """
        trunk = cls(load_language_model(path), precision=precision, gradient_checkpointing=gradient_checkpointing)
        if verify:
            trunk.bare().verify()
        return trunk

    def adapter(self, name: str, config: AdapterConfig, *, seed: int = 0) -> "AdapterPolicy":
        """Put a new adapter on the base. A is drawn from `seed` and `name`; B is 0: it computes what the base does.

        Raises:
            UnsupportedModel: a target is not the name of a linear layer of the base.
        """
        unknown = sorted(set(config.targets) - self._linear)
        if unknown:
            raise UnsupportedModel(
                f"models.{name}.adapter.targets names {unknown[0]!r}, which is no linear layer below the head of "
                f"models.{config.of}{near_misses(unknown[0], self._linear)}"
            )
        key = f"a{len(self._adapters)}"
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type, unused-ignore]
            target_modules=sorted(config.targets or self._linear),
            lora_dropout=0.0,
            bias="none",
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the point
            inject_adapter_in_model(lora, self.lm, key)
        self._adapters.append(key)
        self._layers = [module for module in self.lm.modules() if isinstance(module, LoraLayer)]
        self._draw(key, int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big"))
        self.lm.train(self.lm.is_gradient_checkpointing)
        self._set_active(None)
        return AdapterPolicy(self, key, lora)

    def bare(self) -> "AdapterPolicy":
        """Return the base itself as a policy that trains nothing: what adapters start from and are compared with."""
        return AdapterPolicy(self, None, None)

    def activate(self, key: str | None) -> None:
        """Have this adapter, or none, compute from now on."""
        if self._active != key:
            self._set_active(key)

    def _set_active(self, key: str | None) -> None:
        """peft freezes the adapters that do not compute, which would drop gradients still on their way to them."""
        for layer in self._layers:
            layer.set_adapter([] if key is None else [key])
            for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
                parameter.requires_grad_(True)
        self._active = key

    def masters(self, key: str) -> dict[str, nn.Parameter]:
        """Name, as peft saves it -> A or B of one adapter."""
        end = f".{key}.weight"
        return {
            _PREFIX + name.removesuffix(end) + ".weight": parameter
            for name, parameter in self.lm.named_parameters()
            if name.endswith(end)
        }

    def _draw(self, key: str, seed: int) -> None:
        """Start in float32 whatever the base's precision is (peft would take over the base's)."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.masters(key).items():
            parameter.data = torch.zeros(parameter.shape, dtype=torch.float32)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Of one checkpointed layer: for its pass, and for the recomputation, perhaps under another adapter."""
        return nullcontext(), self._again(self._active)

    @contextmanager
    def _again(self, key: str | None) -> Iterator[None]:
        now = self._active
        self.activate(key)
        try:
            yield
        finally:
            self.activate(now)


class AdapterPolicy(Policy):
    """One adapter with its critic as a policy. Its `lm_state` has peft's names. Without an adapter: the base itself."""

    def __init__(self, trunk: Trunk, key: str | None, config: LoraConfig | None) -> None:
        nn.Module.__init__(self)
        self._trunk, self._key, self.peft_config = trunk, key, config
        masters = {} if key is None else trunk.masters(key)
        self._set_up(trunk.lm, masters, trunk.precision, detach_value=False, slot_chunk=trunk.slot_chunk)

    @property
    def lm(self) -> Any:
        """The trunk's model with this adapter computing."""
        self._trunk.activate(self._key)
        return self._trunk.lm
