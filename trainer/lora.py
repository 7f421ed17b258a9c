"""LoRA adapters on one base: the base is held once, each adapter is a policy with its own critic.

peft's layers are put into the stock model, so that adapters compute as peft computes them and are saved in the format
that engines load. The base has no gradients and no masters: it lies in the precision that computes. A and B are float32
and are their own masters. Which adapter computes is the trunk's state: every use of a policy's `lm` sets it, and a
pass that recomputes activations sets it again as it was. Over several ranks the base and its adapters are divided, once
all of them are there. Refuses targets that the base does not have.
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
from tracegrad.trainer.ranks import ALONE, Ranks
from tracegrad.trainer.sharding import is_sharded, let_go, place, shard_model

_PREFIX = "base_model.model."
"""What peft writes before the name of the module that an adapter lies on."""


class Trunk:
    """A frozen base model and the adapters on it."""

    def __init__(
        self,
        lm: Any,
        *,
        precision: Precision = "fp32",
        gradient_checkpointing: bool = False,
        slot_chunk: int = 256,
        ranks: Ranks = ALONE,
    ) -> None:
        settings = {"use_reentrant": False, "context_fn": self._contexts} if gradient_checkpointing else None
        prepare(lm, gradient_checkpointing=settings)
        self.lm: Any = lm.float()
        self.ranks = ranks
        self.precision: Precision = precision
        self.slot_chunk = slot_chunk
        self._adapters: dict[str, tuple[str, LoraConfig]] = {}
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
        if ranks.size == 1:
            lm.to(ranks.device)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        precision: Precision,
        *,
        gradient_checkpointing: bool = False,
        verify: bool = True,
        ranks: Ranks = ALONE,
    ) -> "Trunk":
        """Load a folder in Hugging Face format.

        Raises:
            UnsupportedModel: see `Policy.verify`.
        """
        lm = load_language_model(path)
        trunk = cls(lm, precision=precision, gradient_checkpointing=gradient_checkpointing, ranks=ranks)
        if verify:
            trunk.bare().verify()
        return trunk

    def adapter(self, name: str, config: AdapterConfig, *, seed: int = 0) -> "AdapterPolicy":
        """Put an adapter on the base, or have the one of that name begin anew.

        A is drawn from `seed` and `name`; B is 0: it computes what the base does.

        Raises:
            UnsupportedModel: a target is not the name of a linear layer of the base.
        """
        if name not in self._adapters:
            self._adapters[name] = self._inject(name, config)
        key, lora = self._adapters[name]
        self._draw(key, int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:4], "big"))
        return AdapterPolicy(self, key, lora)

    def divide(self) -> None:
        """Divide the base and what lies on it over the ranks. Every adapter must be there; all ranks call it."""
        if self.ranks.size > 1:
            shard_model(self.lm, self.ranks)

    def _inject(self, name: str, config: AdapterConfig) -> tuple[str, LoraConfig]:
        assert not is_sharded(self.lm), "adapters come first: they are divided with the base"
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
        self._layers = [module for module in self.lm.modules() if isinstance(module, LoraLayer)]
        for parameter in self.masters(key).values():
            parameter.data = parameter.data.float()  # peft takes over the base's precision
        self.lm.train(self.lm.is_gradient_checkpointing)
        self._set_active(None)
        return key, lora

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
        let_go(self.lm)
        end = f".{key}.weight"
        return {
            _PREFIX + name.removesuffix(end) + ".weight": parameter
            for name, parameter in self.lm.named_parameters()
            if name.endswith(end)
        }

    def _draw(self, key: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.masters(key).items():
            value = torch.zeros(parameter.shape)
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator)
            place(parameter, value)

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
        self.ranks, self.precision, self.detach_value, self.slot_chunk = (
            trunk.ranks,
            trunk.precision,
            False,
            trunk.slot_chunk,
        )
        self._set_up(trunk.lm, {} if key is None else trunk.masters(key))

    @property
    def lm(self) -> Any:
        """The trunk's model with this adapter computing."""
        self._trunk.activate(self._key)
        return self._trunk.lm
