"""How long a request may be held, and when the client shall come back.

A client that is left waiting beyond its own time-out sees a broken connection; answered 503 shortly before, with a
`retry-after` that the SDKs honour, it comes back by itself. The OpenAI SDK for Python sends its read time-out with
every request (`x-stainless-read-timeout`, seconds); the one for JavaScript sends a time-out given for that request
only (`x-stainless-timeout`, whole seconds, rounded down). Who says nothing is held for `proxy.hold_timeout_s`.
Refuses nothing: a header that is no number counts as absent. Called by `exchange` and `chat`.

Source: openai-python `_base_client._build_headers`, `_calculate_retry_timeout`; openai-node `client.buildHeaders`.
"""

import math
from collections.abc import Mapping

_TIMEOUT_HEADERS = (b"x-stainless-read-timeout", b"x-stainless-timeout")
_SHORTEST_S = 0.5
"""JavaScript rounds time-outs below a second down to 0."""
_MARGIN_SHARE, _MARGIN_MAX_S = 0.2, 5.0
LONGEST_RETRY_S = 60
"""SDKs ignore a `retry-after` beyond this. Source: openai-python 1.x and 2.x; 3.x takes up to 120."""


def client_timeout_s(headers: Mapping[bytes, bytes]) -> float | None:
    """Return the client's own time-out in seconds, None where it does not say."""
    for name in _TIMEOUT_HEADERS:
        try:
            value = float(headers[name])
        except (KeyError, ValueError):
            continue
        if math.isfinite(value) and value >= 0:
            return max(value, _SHORTEST_S)
    return None


def patience_s(headers: Mapping[bytes, bytes], *, stream: bool, hold_timeout_s: float) -> float:
    """Return for how many seconds from its arrival a request may be held: a margin short of when its client leaves.

    Heartbeats reset the time-out of a stream, so only `hold_timeout_s` counts for it.
    """
    said = None if stream else client_timeout_s(headers)
    limit = hold_timeout_s if said is None else min(said, hold_timeout_s)
    return limit - min(_MARGIN_SHARE * limit, _MARGIN_MAX_S)


def beat_s(headers: Mapping[bytes, bytes], longest_s: float) -> float:
    """Return the pause between heartbeats of a held stream: at most `longest_s`, and well inside the client's limit."""
    said = client_timeout_s(headers)
    return longest_s if said is None else min(longest_s, said / 2)


def retry_after_s(waited_s: float, retry: int = 0) -> int:
    """Return the seconds after which to come back: a pause that has lasted so long may last as long again.

    `retry` is the number of this retry: before it lie as many waits as long as this one, and as many pauses.
    """
    return max(1, min(LONGEST_RETRY_S, round(waited_s * (2 * retry + 1))))
