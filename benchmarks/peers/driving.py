"""How a driver of a peer and the benchmark talk: a line of JSON each way, so that rounds of several can alternate.

The driver is started with a scratch folder and a file of calls; it says what it is; each line that it reads names a
round, which it times and answers with figures; the end of its input ends it. Runs in the peers' own environments, so it
imports nothing but Python. Called by the drivers beside it.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

CALLS_PER_RUN = 4
_talk, sys.stdout = sys.stdout, sys.stderr  # libraries print too


def folder_and_calls() -> tuple[Path, list[dict[str, Any]]]:
    """Return the scratch folder and the calls: request, prompt_ids, token_ids, logprobs and message of each."""
    return Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())


def drive(about: dict[str, Any], play: Callable[[str], dict[str, float]]) -> None:
    """Say what the peer is, then play rounds until there are no more."""
    say(about)
    for name in rounds():
        say(play(name))


def rounds() -> Iterator[str]:
    """Yield the name of each round that is asked for, until there are no more."""
    for line in sys.stdin:
        yield line.strip()


def peak_rss_mb() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def per_second(work: Callable[[Any], object], items: Sequence[Any]) -> float:
    """Do `work` with each and return how many that makes in a second."""
    began = time.perf_counter()
    for item in items:
        work(item)
    return len(items) / (time.perf_counter() - began)


def say(what: dict[str, Any]) -> None:
    """Answer with a line."""
    _talk.write(json.dumps(what) + "\n")
    _talk.flush()
