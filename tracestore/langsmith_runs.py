"""What the runs of posted LangSmith trees became here, so that whoever names one later means a run, a span or a call.

LangSmith's ids are its own: a node's span has another id here, a model run is a call. Feedback names them, days later
and in another process. Rows are of the project that posted the tree and not to be seen from others; a part told again
completes its row. Refuses nothing. Called by the proxy, through `Store`.
"""

from collections.abc import Sequence

from sqlalchemy import case, func, literal_column, select, type_coerce
from sqlalchemy.types import Text

from tracegrad.tracestore.database import insert
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import LangSmithRun
from tracegrad.tracestore.runs import open_unknown
from tracegrad.tracestore.schema import langsmith_runs


class LangSmithRuns(Noun):
    """The part of the store that knows the runs of LangSmith trees."""

    def put_langsmith_runs(self, told: Sequence[LangSmithRun], project: str = "default") -> None:
        """Write what they became; of what was known the newer counts, where it says anything.

        Unknown runs are opened as live runs of `project`.
        """
        if not told:
            return
        with self._db.write() as connection:
            run_ids = {one.run_id for one in told if one.run_id is not None}
            if run_ids:
                open_unknown(connection, run_ids, project, self._db.now())
            statement = insert(connection, langsmith_runs)
            given, known = statement.excluded, langsmith_runs.c
            names_none = type_coerce(given.named, Text) == literal_column("'[]'")
            changed = {
                "run_id": func.coalesce(given.run_id, known.run_id),
                "span_id": func.coalesce(given.span_id, known.span_id),
                "named": case((names_none, known.named), else_=given.named),
            }
            rows = [
                {
                    "project": project,
                    "langsmith_id": one.langsmith_id,
                    "trace_id": one.trace_id,
                    "run_id": one.run_id,
                    "span_id": one.span_id,
                    "named": one.named,
                }
                for one in sorted(told, key=lambda one: one.langsmith_id)  # in one order: two proxies may tell the same
            ]
            keys = ["project", "langsmith_id"]
            connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed), rows)

    def find_langsmith_run(self, langsmith_id: str, project: str = "default") -> LangSmithRun | None:
        """Return what a run of LangSmith became in this project; None where no tree told of it."""
        here = (langsmith_runs.c.project == project, langsmith_runs.c.langsmith_id == langsmith_id)
        with self._db.read() as connection:
            row = connection.execute(select(langsmith_runs).where(*here)).one_or_none()
        if row is None:
            return None
        return LangSmithRun(
            langsmith_id=row.langsmith_id,
            trace_id=row.trace_id,
            run_id=row.run_id,
            span_id=row.span_id,
            named=tuple(row.named),
        )

    def runs_of_trace(self, trace_id: str, project: str = "default") -> list[str]:
        """Return the runs that parts of a trace belong to, by id: the hook may have made several of one trace."""
        here = (langsmith_runs.c.project == project, langsmith_runs.c.trace_id == trace_id)
        wanted = select(langsmith_runs.c.run_id).where(*here, langsmith_runs.c.run_id.is_not(None))
        with self._db.read() as connection:
            return sorted(connection.execute(wanted.distinct()).scalars())
