"""What an operator asks first: which proxies there are, how many runs are open, since when.

Counts and heartbeats only; reads no payload. Called by `tracegrad status` and by the proxy's `/metrics`,
through `Store`; `drift_within` by `diagnosis` too.
"""

from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from tracegrad.tracestore.diagnosis_extent import calls_within
from tracegrad.tracestore.diagnosis_records import Extent
from tracegrad.tracestore.migrate import revision
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import Drift
from tracegrad.tracestore.schema import calls, proxies, runs


@dataclass(frozen=True, kw_only=True, slots=True)
class ProxyRow:
    """A registered proxy; `age_s` is the time since its last heartbeat, by the clock of the reader."""

    proxy_id: str
    url: str
    registered_at: float
    age_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRuns:
    """The runs that have not ended: how many, and when the quietest of them was last heard of."""

    count: int
    quietest_at: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftCount:
    """How many calls went on from an earlier one with this cause of drift (None: without), by way of their prompt."""

    model: str
    drift: Drift | None
    token_in: bool
    calls: int


class Overview(Noun):
    """The part of the store that is looked at from outside."""

    def schema_revision(self) -> str | None:
        """Return the revision of the tables that are there, or None where there are none."""
        with self._db.read() as connection:
            return revision(connection)

    def list_proxies(self) -> list[ProxyRow]:
        """Return every proxy that is registered, the newest heartbeat first."""
        chosen = select(proxies).order_by(proxies.c.beat_at.desc(), proxies.c.proxy_id)
        with self._db.read() as connection:
            return [
                ProxyRow(
                    proxy_id=row.proxy_id,
                    url=row.url,
                    registered_at=row.registered_at,
                    age_s=max(self._db.now() - row.beat_at, 0.0),
                )
                for row in connection.execute(chosen)
            ]

    def open_runs(self, project: str) -> OpenRuns:
        """Return how many runs of a project are open, and when the quietest of them was last heard of."""
        chosen = select(func.count(), func.min(runs.c.active_at)).where(
            runs.c.status == "open", runs.c.project == project
        )
        with self._db.read() as connection:
            count, quietest = connection.execute(chosen).one()
            return OpenRuns(count=int(count), quietest_at=quietest)

    def drift_counts(self, project: str) -> list[DriftCount]:
        """Return, by model and cause, how many calls of a project went on from an earlier call of their run."""
        with self._db.read() as connection:
            return drift_within(connection, Extent(project=project))


def drift_within(connection: Connection, extent: Extent) -> list[DriftCount]:
    """Return the calls that go on from an earlier call of their run, by model, cause and `token_in`."""
    by = (calls.c.model, calls.c.drift, calls.c.token_in)
    chosen = select(*by, func.count()).where(calls_within(extent), calls.c.continues.is_not(None))
    return [
        DriftCount(model=model, drift=drift, token_in=bool(token_in), calls=int(count))
        for model, drift, token_in, count in connection.execute(chosen.group_by(*by).order_by(*by))
    ]
