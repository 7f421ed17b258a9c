"""The class that vLLM mixes into its workers: a reload that reaches a tied output head too.

vLLM loads it (``--worker-extension-cls tracegrad.trainer.worker_extension.TracegradWorkerExtension``); this is the one
module that may import vllm, and only inside its methods. It imports nothing of tracegrad, so that a copy of this file
alone serves an engine installed elsewhere. Called over HTTP: ``POST /collective_rpc``.

Why: on CPUs vLLM packs a linear's weight into a oneDNN (or sgl) handle when the model is loaded. A reload re-packs
every linear that has weights of its own in the checkpoint; a head tied to the embedding has none, and keeps serving
the old weights without an error. Source: vllm/model_executor/layers/utils.py, `dispatch_cpu_unquantized_gemm`.
"""

from typing import Any


class TracegradWorkerExtension:
    """Adds `tracegrad_info` and `tracegrad_load_weights` to a vLLM worker. Every name starts with `tracegrad_`."""

    def tracegrad_info(self) -> dict[str, bool]:
        """Say what this worker serves: ``cpu``, and whether the head is ``tied`` to the embedding."""
        from vllm.platforms import current_platform

        return {"cpu": bool(current_platform.is_cpu()), "tied": tracegrad_tied_head(self) is not None}

    def tracegrad_load_weights(self, path: str) -> dict[str, bool]:
        """Load the Hugging Face checkpoint at `path` in place; on a CPU, pack a tied head again.

        Raises whatever vLLM raises; the caller sees it as a 500 and must take the weights for broken.
        """
        from vllm.platforms import current_platform

        self.reload_weights(weights_path=path)  # type: ignore[attr-defined]
        head = tracegrad_tied_head(self)
        repack = head is not None and current_platform.is_cpu() and hasattr(head, "cpu_linear")
        if repack:
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(head, remove_weight=False)
        return {"tied": head is not None, "repacked": repack}


def tracegrad_tied_head(worker: Any) -> Any | None:
    """Return the output head that shares the input embedding's weight, or None where the head is its own.

    A wrapper (LoRA, multimodal) may hold the language model one level down; both levels are looked at.
    """
    model = worker.get_model()
    if not getattr(worker.model_config.hf_text_config, "tie_word_embeddings", False):
        return None
    for holder in (model, getattr(model, "language_model", None)):
        head = getattr(holder, "lm_head", None)
        if head is not None:
            return getattr(head, "base_layer", head)
    return None
