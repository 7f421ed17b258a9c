"""The meeting place of proxy and trainer (law 10): one object, one method per transaction.

Synchronous and thread-safe. Every method either did all it says, durably, or raised an error of
`tracegrad.tracestore.errors` and did nothing; any failure to reach or commit to the database is StoreUnavailable.
The methods live by noun in the modules beside this one.
"""

import time
from collections.abc import Callable

from tracegrad.tracestore import migrate
from tracegrad.tracestore.attributions import Attributions
from tracegrad.tracestore.blocks import KnownBlocks
from tracegrad.tracestore.branches import Branches
from tracegrad.tracestore.calls import Calls
from tracegrad.tracestore.conservation import Conservation
from tracegrad.tracestore.continued import Continued
from tracegrad.tracestore.database import Database
from tracegrad.tracestore.diagnosis import Diagnosis
from tracegrad.tracestore.diagnosis_groups import GroupDiagnosis
from tracegrad.tracestore.diagnosis_jobs import JobDiagnosis
from tracegrad.tracestore.diagnosis_payloads import PayloadDiagnosis
from tracegrad.tracestore.diagnosis_siblings import SiblingDiagnosis
from tracegrad.tracestore.diagnosis_spans import SpanDiagnosis
from tracegrad.tracestore.evaluations import Evaluations
from tracegrad.tracestore.interchange import Interchange
from tracegrad.tracestore.jobs import Jobs
from tracegrad.tracestore.keys import Keys
from tracegrad.tracestore.langsmith_runs import LangSmithRuns
from tracegrad.tracestore.leases import Leases
from tracegrad.tracestore.ledger import Ledger
from tracegrad.tracestore.overview import Overview
from tracegrad.tracestore.parents import Parents
from tracegrad.tracestore.pins import Pins
from tracegrad.tracestore.provenance import Provenance
from tracegrad.tracestore.publishes import Publishes
from tracegrad.tracestore.queue import QueueView
from tracegrad.tracestore.removal import Removal
from tracegrad.tracestore.retention import Retention
from tracegrad.tracestore.rewards import Rewards
from tracegrad.tracestore.run_list import RunList
from tracegrad.tracestore.runs import Runs
from tracegrad.tracestore.spans import Spans
from tracegrad.tracestore.tasks import Tasks
from tracegrad.tracestore.traces import Traces
from tracegrad.tracestore.trainers import Trainers
from tracegrad.tracestore.upkeep import Upkeep
from tracegrad.tracestore.versions import Versions


class Store(
    Tasks,
    Runs,
    RunList,
    Spans,
    Calls,
    Attributions,
    LangSmithRuns,
    Traces,
    Continued,
    Parents,
    Rewards,
    Jobs,
    Leases,
    Ledger,
    Conservation,
    QueueView,
    Provenance,
    Versions,
    Branches,
    Publishes,
    Evaluations,
    Pins,
    Trainers,
    Overview,
    Diagnosis,
    GroupDiagnosis,
    SiblingDiagnosis,
    JobDiagnosis,
    PayloadDiagnosis,
    SpanDiagnosis,
    Keys,
    Removal,
    Retention,
    Upkeep,
    Interchange,
):
    """A trace store. Made by `open_store`."""

    def __init__(self, database: Database) -> None:
        self._db = database
        self._blocks = KnownBlocks()
        self.url = database.url.render_as_string(hide_password=False)

    @property
    def place(self) -> str:
        """Where it is, without a password: for messages."""
        return self._db.url.render_as_string(hide_password=True)

    def now(self) -> float:
        """Return the store's time, Unix seconds."""
        return self._db.now()

    def close(self) -> None:
        """Give the connections back. The store is not used afterwards."""
        self._db.close()


def open_store(url: str, *, create: bool = True, clock: Callable[[], float] = time.time) -> Store:
    """Open the store at a SQLAlchemy URL (``sqlite:///PATH`` or ``postgresql://…``).

    With `create` the schema is made or migrated first; any number of processes may do so at once. `clock` gives Unix
    seconds; tests replace it.

    Raises:
        ConfigError: the URL names no database that the store speaks.
        StoreUnavailable: it cannot be reached, or does not exist and `create` is False.
        SchemaMismatch: it was made by a newer version, or by an older one and `create` is False.
    """
    database = Database(url, clock=clock)
    try:
        migrate.prepare(database, create=create)
    except BaseException:
        database.close()
        raise
    return Store(database)
