"""What a proxy remembers of its runs."""

from typing import Any, cast

from tracegrad.adapters.proxy.continuing import Continuing
from tracegrad.tracestore.testing.rows import make_call


def test_logprobs_are_not_kept() -> None:
    """They would nearly double what an answer takes up, and nobody looks at them here."""
    memory = Continuing(cast(Any, None), cast(Any, None))
    memory.remember(make_call("c", "r", request={"messages": []}))
    (one,) = memory.remembered("r", "main")
    assert one.call.choices[0].token_ids == (4, 5, 6) and one.call.choices[0].logprobs is None
