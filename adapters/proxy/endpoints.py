"""The three endpoints of OpenAI that an engine answers, and what differs between them on the wire.

One `exchange` serves all three: what it must know of an endpoint stands here. Refuses nothing; no I/O.
Called by `app`, `capture`, `chat`, `exchange`, `engine_errors`. Source: vLLM 0.32, `entrypoints/openai/*/protocol.py`.
"""

from dataclasses import dataclass

from tracegrad.tracestore.records import Endpoint


@dataclass(frozen=True, slots=True)
class Shape:
    """One endpoint. `path` is the engine's, without a leading slash."""

    endpoint: Endpoint
    path: str
    prompt: str
    """The field that holds the input: what an error about its length names."""
    logprobs: bytes
    """What asks for the logprobs of the sampled tokens and no others, as JSON."""
    top_logprobs: str
    """The field that asks for those of so many others."""
    chunk: str
    """`object` of a stream's chunk."""
    prefix: str
    """Of the completion id."""


CHAT = Shape("chat", "v1/chat/completions", "messages", b"true", "top_logprobs", "chat.completion.chunk", "chatcmpl")
COMPLETIONS = Shape("completions", "v1/completions", "prompt", b"0", "logprobs", "text_completion", "cmpl")
EMBEDDINGS = Shape("embeddings", "v1/embeddings", "input", b"null", "top_logprobs", "list", "embd")
SHAPES = {"/" + shape.path: shape for shape in (CHAT, COMPLETIONS, EMBEDDINGS)}
"""By the path that a client uses."""
