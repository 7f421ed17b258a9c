"""The class that vLLM mixes into its workers: a reload that reaches a tied output head too, and is whole or not there.

vLLM loads it (``--worker-extension-cls tracegrad.trainer.worker_extension.TracegradWorkerExtension``); beside
`weight_receiver` it is the one module that may import vllm, and only inside its functions. Of tracegrad it imports
`lora_products` alone, so that a copy of the three files serves an engine installed elsewhere. Called over HTTP:
``POST /collective_rpc``; `tracegrad_register` by vLLM itself, as a general plugin.

Why: on CPUs vLLM packs a linear's weight into a oneDNN (or sgl) handle when the model is loaded. A reload re-packs
every linear that has weights of its own in the checkpoint; a head tied to the embedding has none, and keeps serving
the old weights without an error. Source: vllm/model_executor/layers/utils.py, `dispatch_cpu_unquantized_gemm`.

A reload that breaks off (a tensor of the wrong shape, a trainer that died) leaves layers in which some tensors were
counted as loaded; the next reload goes on counting, and takes a layer for complete too early. So what is left of a
broken one is thrown away first. Source: vllm/model_executor/model_loader/reload/layerwise.py.
"""

from typing import Any

RECEIVER = "tracegrad.trainer.weight_receiver"


def tracegrad_register() -> None:
    """Prepare a process of vLLM's: our weight-transfer backend, and on a CPU our products of adapters.

    May be called more than once.
    """
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory
    from vllm.platforms import current_platform

    if "tracegrad" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("tracegrad", RECEIVER, "SharedMemoryEngine")
    if current_platform.is_cpu():
        from vllm.lora.ops.torch_ops import lora_ops
        from vllm.lora.punica_wrapper import punica_cpu

        from tracegrad.trainer.lora_products import put_in_place

        put_in_place(lora_ops, punica_cpu)


def tracegrad_has_products() -> bool:
    """Return whether this process computes adapters on a CPU as `lora_products` does."""
    from vllm.lora.punica_wrapper import punica_cpu

    return bool(punica_cpu.bgmv_expand.__module__ == "tracegrad.trainer.lora_products")


class TracegradWorkerExtension:
    """Adds methods to a vLLM worker. Every name starts with `tracegrad_`."""

    def tracegrad_info(self) -> dict[str, Any]:
        """Say what this worker serves: ``cpu``, and whether the head is ``tied`` to the embedding.

        How it takes weights besides from files: ``transfer`` names vLLM's backend ("" for none). Whether adapters are
        computed by our ``products``, which matters on CPUs; ``max_loras`` is how many are served at once (None: no
        adapters). ``process`` is another one after each restart.
        """
        import os

        from vllm.platforms import current_platform

        transfer = self.vllm_config.weight_transfer_config  # type: ignore[attr-defined]
        lora = self.vllm_config.lora_config  # type: ignore[attr-defined]
        return {
            "cpu": bool(current_platform.is_cpu()),
            "tied": tracegrad_tied_head(self.get_model(), self.model_config) is not None,  # type: ignore[attr-defined]
            "transfer": "" if transfer is None else str(transfer.backend),
            "products": tracegrad_has_products(),
            "max_loras": None if lora is None else int(lora.max_loras),
            "process": os.getpid(),
        }

    def tracegrad_load_weights(self, path: str) -> dict[str, bool]:
        """Load the Hugging Face checkpoint at `path` in place; on a CPU, pack a tied head again.

        Raises whatever vLLM raises; the caller sees it as a 500 and must take the weights for broken.
        """
        model = self.get_model()  # type: ignore[attr-defined]
        self.tracegrad_break_off()
        self.reload_weights(weights_path=path)  # type: ignore[attr-defined]
        return tracegrad_repack(model, self.model_config)  # type: ignore[attr-defined]

    def tracegrad_break_off(self) -> None:
        """Forget an update of weights that was begun and never finished: its trainer died, or it failed."""
        tracegrad_discard(self.get_model())  # type: ignore[attr-defined]
        self._weight_update_active = False


def tracegrad_discard(model: Any) -> None:
    """Put the tensors that served before back into every layer that a broken reload left without."""
    from vllm.model_executor.model_loader.reload import layerwise

    for layer in model.modules():
        info = layerwise.get_layerwise_info(layer)
        if info.can_load() and info.kernel_tensors is not None:
            layerwise._place_kernel_tensors(layer, info)
            info.reset()
    if hasattr(model, "_original_do_torchao_reload"):
        model._do_torchao_reload = model._original_do_torchao_reload


def tracegrad_repack(model: Any, model_config: Any) -> dict[str, bool]:
    """On a CPU, pack a tied head again; say whether there is one, and whether that was done."""
    from vllm.platforms import current_platform

    head = tracegrad_tied_head(model, model_config)
    repack = head is not None and current_platform.is_cpu() and hasattr(head, "cpu_linear")
    if repack:
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
    return {"tied": head is not None, "repacked": repack}


def tracegrad_tied_head(model: Any, model_config: Any) -> Any | None:
    """Return the output head that shares the input embedding's weight, or None where the head is its own.

    A wrapper (LoRA, multimodal) may hold the language model one level down; both levels are looked at.
    """
    if not getattr(model_config.hf_text_config, "tie_word_embeddings", False):
        return None
    for holder in (model, getattr(model, "language_model", None)):
        head = getattr(holder, "lm_head", None)
        if head is not None:
            return getattr(head, "base_layer", head)
    return None
