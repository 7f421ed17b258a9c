"""Back-pressure: no more groups ahead of the trainer than asked for, so that traffic stays near on-policy.

Counted are the groups that are ready, those that the trainer holds, and our own that are still being sampled; while
weights are being swapped nothing new starts either. What no published version sampled cannot be trained (law 8), so
runs for training wait for the first one. Refuses nothing; it waits. Called by the rollout driver before each group.
"""

import asyncio
import time
from collections.abc import Callable

from tracegrad.adapters.control import Control


class Pacer:
    """Holds new groups back. `ahead` None: whatever the trainer has in hand; `needs_version`: until weights are live.

    `say` is told why it waits, and None when it goes on.
    """

    def __init__(
        self,
        control: Control,
        *,
        ahead: int | None,
        needs_version: bool,
        say: Callable[[str | None], None],
        poll_s: float = 0.25,
    ) -> None:
        self._control = control
        self._ahead = ahead
        self._needs_version = needs_version
        self._say = say
        self._poll_s = poll_s
        self.waited_s = 0.0

    async def hold(self, in_flight: Callable[[], int]) -> None:
        """Return when one more group may start; `in_flight` counts our groups that have not ended."""
        if self._ahead is None and not self._needs_version:
            return
        started = time.monotonic()
        waited = False
        while (why := await self._reason(in_flight)) is not None:
            self._say(why)
            waited = True
            await asyncio.sleep(self._poll_s)
        if waited:
            self.waited_s += time.monotonic() - started
            self._say(None)

    async def _reason(self, in_flight: Callable[[], int]) -> str | None:
        # Counted before the proxy is asked: a group that ends meanwhile is counted twice, never missed.
        sampling = in_flight()
        backlog = await self._control.backlog()
        if self._needs_version and None in backlog["live"].values():
            return "no weights are live yet; the trainer (`tracegrad train`) publishes the first version"
        self._needs_version = False
        if self._ahead is None:
            return None
        if backlog["publishing"]:
            return "new weights are being published"
        ready, leased = backlog["ready_groups"], backlog["leased_groups"]
        if ready + leased + sampling < self._ahead:
            return None
        return f"the trainer has {ready} groups waiting and {leased} in hand, {sampling} are being sampled"
