"""Pins: a model whose serving is held at one version, whatever is trained meanwhile. Append-only, the newest counts.

While a model is pinned, `request_publish` refuses every other version. Refuses to pin while another version is being
published. Whoever pins, opens a publish or makes one live takes turns, model by model: what one has looked at, no other
changes before its commit. Called by `tracegrad pin` and `tracegrad rollback`, the publisher and `tracegrad versions`,
through `Store`.
"""

from sqlalchemy import Connection, func, select

from tracegrad.tracestore.errors import Abandoned, PublishUnderWay
from tracegrad.tracestore.gate_schema import pins
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.schema import UNFINISHED_STATES, publishes
from tracegrad.tracestore.versions import existing

_TURN = 0x7475726E  # "turn"


class Pins(Noun):
    """The part of the store that knows where serving is held."""

    def pin_version(self, version_id: int, reason: str) -> None:
        """Hold the version's model at it; what is already so is a no-op.

        Raises:
            NotFound: no such version.
            Abandoned: it is.
            PublishUnderWay: another version is being published.
        """
        with self._db.write() as connection:
            take_turn(connection, existing(connection, version_id).model)
            version = existing(connection, version_id)
            if version.abandoned:
                raise Abandoned(f"version {version_id} is abandoned: pin another one")
            under_way = connection.execute(
                select(publishes.c.publish_id, publishes.c.version_id, publishes.c.state).where(
                    publishes.c.model == version.model, publishes.c.state.in_(UNFINISHED_STATES)
                )
            ).first()
            if under_way is not None and under_way.version_id != version_id:
                raise PublishUnderWay(
                    f"publish {under_way.publish_id} of version {under_way.version_id} is {under_way.state}: "
                    "try again when it is over (`tracegrad versions` says so)"
                )
            if pinned_version(connection, version.model) != version_id:
                _add(connection, version.model, version_id, reason, self._db.now())

    def unpin(self, model: str, reason: str) -> int | None:
        """Take the pin of a model off and return the version it was held at; None where there was no pin."""
        with self._db.write() as connection:
            take_turn(connection, model)
            was = pinned_version(connection, model)
            if was is not None:
                _add(connection, model, None, reason, self._db.now())
            return was

    def pinned(self, model: str) -> int | None:
        """Return the version at which a model is held, or None."""
        with self._db.read() as connection:
            return pinned_version(connection, model)


def take_turn(connection: Connection, model: str) -> None:
    """Wait until no other transaction pins the model or changes what of it is published. SQLite's writers always do."""
    if connection.dialect.name == "postgresql":
        connection.execute(select(func.pg_advisory_xact_lock(_TURN, func.hashtext(model))))


def pinned_version(connection: Connection, model: str) -> int | None:
    """Return the version at which a model is held, or None, inside a transaction."""
    chosen = select(pins.c.version_id).where(pins.c.model == model).order_by(pins.c.pin_id.desc()).limit(1)
    return connection.execute(chosen).scalar()


def held_at(model: str, pin: int) -> str:
    """Say why no other version of a pinned model is published."""
    return f"model {model!r} is pinned at version {pin} (`tracegrad pin --off` ends that)"


def _add(connection: Connection, model: str, version_id: int | None, reason: str, now: float) -> None:
    row = {"model": model, "version_id": version_id, "reason": reason, "created_at": now}
    connection.execute(pins.insert(), row)
