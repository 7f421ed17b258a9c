"""The workers of one group as Ray actors: each in a process of its own, called as one.

Every call goes to all of them with the same arguments, and what the first returns is the group's answer. Several meet
by torch.distributed: the first opens a port that was free and tells the others, so no port is configured. A worker that
dies ends its company, which waits for it in the middle of a step; the next call starts them all anew, without
weights. Errors come back as the classes they were raised as. Refuses a worker that dies (WorkerDied) and what has no
name of ours (WorkerFailed). Called by `workers` and `ray_groups`.
"""

import os
from collections.abc import Callable, Sequence
from threading import Event
from typing import Any

from tracegrad.tracestore.config import Config
from tracegrad.trainer.errors import TrainerError, WorkerDied, WorkerFailed

Make = Callable[[Config, Any], Any]
"""Makes what a worker holds, of the configuration and its `Ranks`. Runs inside the worker."""
_WAIT_S = 0.5
_GRACE_S = 5.0
"""How long the others may take to fail or to end once one has failed: ranks that decide alike need no more."""


class Member:
    """Runs inside the Ray worker; torch is imported here and not before."""

    def __init__(self, make: Make, config: Config, rank: int) -> None:
        self._make, self._config, self._rank = make, config, rank
        self._size = config.trainer.workers.per_group
        self._store: Any = None
        self._held: Any = None

    def process(self) -> int:
        """Return the id of this process."""
        return os.getpid()

    def open(self) -> tuple[str, int]:
        """Open the place where the group's workers meet; return its address and port."""
        from ray.util import get_node_ip_address

        from tracegrad.trainer.ranks import meeting_place

        host = get_node_ip_address()
        self._store = meeting_place(host, self._size)
        return host, self._store.port

    def join(self, place: tuple[str, int] | None) -> None:
        """Meet the others, where there are any, and make what this worker holds."""
        from tracegrad.trainer.ranks import Ranks, device_of, join, meeting_place

        device = self._config.trainer.workers.device
        if place is None:
            self._held = self._make(self._config, Ranks(device=device_of(device)))
            return
        store = self._store or meeting_place(place[0], self._size, port=place[1])
        self._held = self._make(self._config, join(self._rank, self._size, device, store))

    def call(self, method: str, given: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        """Call a method of what this worker holds; only the first worker returns what it returned."""
        answer = getattr(self._held, method)(*given[0], **given[1])
        return answer if self._rank == 0 else None


class RayTeam:
    """The workers of one group. `what`: how messages name it; `places`: where each of them runs."""

    def __init__(self, make: Make, config: Config, *, what: str, places: Sequence[dict[str, Any]]) -> None:
        self._make, self._config = make, config
        self._what, self._places = what, places
        self._members: list[Any] = []
        self._met = False

    def call(self, method: str, *args: Any, stop: Event | None = None, **kwargs: Any) -> Any:
        """Wait in slices, so that signals reach the process; raise what the method raised.

        Raises:
            WorkerDied: a process ended in the middle.
            WorkerFailed: something without a name of ours was raised, or `stop` was set meanwhile.
        """
        import ray

        members = self._alive()
        given = ray.put((args, kwargs))
        references = [member.call.remote(method, given) for member in members]
        self._wait(references, f"{method} of {self._what}", stop)
        return ray.get(references[0])

    def start(self) -> None:
        """Start the workers, if none are there, without waiting for them."""
        import ray

        if not self._members:
            self._members = [
                ray.remote(**place)(Member).remote(self._make, self._config, rank)
                for rank, place in enumerate(self._places)
            ]

    def end(self) -> None:
        """End the processes."""
        import ray

        members, self._members, self._met = self._members, [], False
        for member in members:
            ray.kill(member)

    def processes(self) -> list[int]:
        """Return the id of each worker's process."""
        import ray

        return [int(pid) for pid in ray.get([member.process.remote() for member in self._alive()])]

    # -- inside

    def _alive(self) -> list[Any]:
        self.start()
        if not self._met:
            place = None
            if len(self._members) > 1:
                opened = self._members[0].open.remote()
                self._wait([opened], f"the start of {self._what}", None)
                place = _got(opened)
            joined = [member.join.remote(place) for member in self._members]
            self._wait(joined, f"the start of {self._what}", None)
            self._met = True
        return self._members

    def _wait(self, references: Sequence[Any], what: str, stop: Event | None) -> None:
        """Wait for all, or for the first that fails; then see what the others say of it, and raise the plainest."""
        import ray

        waiting = list(references)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=_WAIT_S)
            errors = [error for reference in done if (error := _error(reference, what)) is not None]
            if errors:
                late, hanging = ray.wait(waiting, num_returns=len(waiting), timeout=_GRACE_S) if waiting else ([], [])
                errors += [error for reference in late if (error := _error(reference, what)) is not None]
                plain = [error for error in errors if not isinstance(error, WorkerFailed)]
                died = [error for error in errors if isinstance(error, WorkerDied)]
                if hanging or not plain or died:
                    self.end()
                raise (died or plain or errors)[0]
            if stop is not None and stop.is_set():
                raise WorkerFailed(f"{what} is given up: another group has failed")


def _got(reference: Any) -> Any:
    import ray

    return ray.get(reference)


def _error(reference: Any, what: str) -> TrainerError | None:
    """Return what a finished call raised, by a name of ours; None where it returned."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        _got(reference)
    except RayTaskError as error:
        if isinstance(error.cause, TrainerError):
            return error.cause
        return WorkerFailed(f"{what} failed in a worker: {type(error.cause).__name__}: {error.cause}")
    except RayActorError as error:
        return WorkerDied(f"a worker died during {what} ({error}); start again: training resumes from the last step")
    return None
