"""HTTP to one LoRA adapter on an engine: loaded beside its base, exchanged at run time, scored by its name.

An adapter is known to the engine by its model's name, and what it is by the folder that it was loaded from: each
version has a folder of its own, and the engine's list of models names it. So nothing has to be marked, and no cached
prefix goes stale: vLLM keeps prefixes apart by name and folder. Calls to other adapters of the base go on meanwhile,
so an idle engine cannot be asked for; that no call of this adapter runs, the proxies' acknowledgements say. Refuses an
engine without `--enable-lora`, or without run-time loading (EngineRefused). Called by the publisher, by the engine's
watcher and by `trainer.command`.

Source: vllm 0.32 `entrypoints/openai/models/serving.py`, `v1/core/kv_cache_utils.py`.
"""

from tracegrad.tracestore.config import Config
from tracegrad.tracestore.publishes import REHEARSED
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import EngineRefused
from tracegrad.trainer.transfer_client import TransferClient, sender_for


class AdapterClient(EngineClient):
    """The adapter `name` on the engine at `url`, which serves its base as `base`."""

    def __init__(self, url: str, name: str, base: str, *, timeout_s: float = 60.0) -> None:
        super().__init__(url, name, timeout_s=timeout_s)
        self.base = EngineClient(url, base, timeout_s=timeout_s)

    @property
    def has_head(self) -> bool:
        """Never: adapters lie on the layers below it."""
        return False

    def swap(self, path: str, mark: str, *, timeout_s: float = 120.0) -> str:
        """Load the adapter at `path` instead of the one before; return `mark` where the engine lists that folder.

        Not with `load_inplace`: vLLM keeps that with the adapter, and then reads the folder again at every step.
        """
        self.disown(mark)
        body = {"lora_name": self.name, "lora_path": path}
        self._send("POST", "/v1/load_lora_adapter", body, timeout_s=timeout_s)
        return mark if self.loaded() == path else str(self.loaded())

    def serves(self, path: str, _mark: str) -> bool:
        """Return whether the engine lists the adapter with that folder."""
        return self.loaded() == path

    def disown(self, _mark: str) -> None:
        """Take the adapter away: calls to it are refused until the next publish."""
        if self.loaded() is not None:
            self._send("POST", "/v1/unload_lora_adapter", {"lora_name": self.name})

    def prove_idle(self) -> None:
        """Nothing: calls to other models of the engine may run."""

    def beside(self) -> "AdapterClient | None":
        """Return a client for the next version of the adapter, under a name of its own."""
        return _NextClient(self.url, self.name + REHEARSED, self.base.name, timeout_s=self.timeout_s)

    def clear_beside(self) -> None:
        """Unload the next version, where one is loaded."""
        if (beside := self.beside()) is not None:
            beside.disown("")

    def max_model_len(self) -> int | None:
        """Return how many tokens its base takes."""
        return self.base.max_model_len()

    def loaded(self) -> str | None:
        """Return the folder that the engine serves the adapter from; None where it serves none."""
        return next((model.root for model in self.models() if model.name == self.name), None)

    def takes_adapters(self) -> bool:
        """Return whether the engine loads adapters at run time: it refuses one without a name, and knows the path."""
        try:
            self._send("POST", "/v1/load_lora_adapter", {"lora_name": "", "lora_path": ""})
        except EngineRefused as error:
            return error.status != 404
        return True


class _NextClient(AdapterClient):
    """The next version of an adapter, beside the one that serves: it comes and goes, and nothing comes after it."""

    @property
    def is_beside(self) -> bool:
        """Yes."""
        return True

    def beside(self) -> None:
        """Nothing."""

    def clear_beside(self) -> None:
        """Unload it, where it is loaded."""
        self.disown("")


def engine_clients(config: Config, name: str) -> tuple[EngineClient, ...]:
    """Return a client for each engine that serves a model: what is published goes to all of them."""
    held_by = config.held_by(name)
    engines = [each.engine for each in config.engines_of(name)]
    if held_by != name:
        return tuple(AdapterClient(each.url, name, held_by) for each in engines)
    backend = engines[0].transfer.backend
    if backend == "files":
        return tuple(EngineClient(each.url, name) for each in engines)
    sender = sender_for(config.models[name])
    return tuple(TransferClient(each.url, name, backend, sender) for each in engines)
