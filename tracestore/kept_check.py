"""Whether kept sets are as many as they are counted.

Reads page by page, each page a snapshot, so that memory is bounded and a long check holds nobody back; of the ids
themselves, which are most of it, only how many bytes they are. Called by `upkeep`.
"""

from collections.abc import Callable, Iterator

from sqlalchemy import func, or_, select, tuple_

from tracegrad.tracestore.block_check import Found
from tracegrad.tracestore.database import Database
from tracegrad.tracestore.kept_sets import are_counted
from tracegrad.tracestore.payload_schema import choice_payloads
from tracegrad.tracestore.schema import calls

_PAGE = 400
_EXAMPLES = 5
_P = choice_payloads.c
_PLACE = tuple_(_P.seq, _P.choice_index)
_KEPT = (
    select(_P.seq, _P.choice_index, _P.n_tokens, _P.kept_counts, func.length(_P.kept_ids).label("n_bytes"))
    .add_columns(calls.c.call_id)
    .join_from(choice_payloads, calls, calls.c.seq == _P.seq)
    .where(or_(_P.kept_counts.is_not(None), _P.kept_ids.is_not(None)))
    .order_by(_P.seq, _P.choice_index)
    .limit(_PAGE)
)


def sets_checked(database: Database, heard: Callable[[str], None]) -> Iterator[Found]:
    """Count the kept sets of every choice; yield what is wrong, with how many choices and some of their calls."""
    what = "choices whose kept sets are not as many as counted"
    heard(what)
    wrong: list[str] = []
    last = (-1, -1)
    while True:
        with database.read() as connection:
            rows = connection.execute(_KEPT.where(last < _PLACE)).all()
        if not rows:
            break
        last = (rows[-1].seq, rows[-1].choice_index)
        wrong += [row.call_id for row in rows if not are_counted(row.kept_counts, row.n_bytes, row.n_tokens)]
    if wrong:
        yield what, len(wrong), tuple(wrong[:_EXAMPLES])
