"""Publishing as a state machine: requested -> draining -> swapping -> live | failed.

One step at a time and never back; any unfinished state may fail. A model has at most one unfinished publish (a unique
index says so too). Proxies are rows with a heartbeat: one that is alive and has not acknowledged is waited for, a dead
one is not. Called by the publisher and by the proxy's poll, through `Store`.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, bindparam, case, delete, func, select, update

from tracegrad.tracestore.database import insert
from tracegrad.tracestore.errors import Conflict, NotFound
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import Json, ModelState, Publish, PublishState
from tracegrad.tracestore.schema import policy_versions, proxies, publish_acks, publishes
from tracegrad.tracestore.versions import existing

SILENT_FOR_EVER_S = 86_400.0
STATES: tuple[PublishState, ...] = ("requested", "draining", "swapping", "live", "failed")
UNFINISHED: tuple[PublishState, ...] = ("requested", "draining", "swapping")
_NEXT: dict[PublishState, tuple[PublishState, ...]] = {
    "requested": ("draining", "failed"),
    "draining": ("swapping", "failed"),
    "swapping": ("live", "failed"),
    "live": (),
    "failed": (),
}


def _view() -> Select[Any]:
    """Select, per model, the newest publish with its state and the version of the newest one that went live."""
    went_live = case((publishes.c.state == "live", publishes.c.publish_id))
    found = (
        select(publishes.c.model, func.max(publishes.c.publish_id).label("newest"), func.max(went_live).label("live"))
        .where(publishes.c.model.in_(bindparam("models", expanding=True)))
        .group_by(publishes.c.model)
        .subquery()
    )
    newest, live = publishes.alias("newest_publish"), publishes.alias("live_publish")
    return (
        select(found.c.model, found.c.newest, newest.c.state, live.c.version_id)
        .join(newest, newest.c.publish_id == found.c.newest)
        .outerjoin(live, live.c.publish_id == found.c.live)
    )


_VIEW = _view()


class Publishes(Noun):
    """The part of the store that knows how weights reach the engine, and who must stand still for it."""

    def request_publish(self, version_id: int) -> Publish:
        """Open a publish of a version.

        Raises:
            NotFound: no such version.
            Conflict: the version is abandoned, or the model has an unfinished publish.
        """
        with self._db.write() as connection:
            version = existing(connection, version_id)
            if version.abandoned:
                raise Conflict(f"version {version_id} is abandoned: publish another one")
            unfinished = connection.execute(
                select(publishes.c.publish_id, publishes.c.state).where(
                    publishes.c.model == version.model, publishes.c.state.in_(UNFINISHED)
                )
            ).first()
            if unfinished is not None:
                raise Conflict(
                    f"publish {unfinished.publish_id} of model {version.model!r} is {unfinished.state}: "
                    "wait for it, or advance it to failed"
                )
            statement = (
                insert(connection, publishes)
                .values(version_id=version_id, model=version.model, state="requested", requested_at=self._db.now())
                .returning(publishes)
            )
            return publish_of(connection.execute(statement).one())

    def advance_publish(
        self, publish_id: int, state: PublishState, *, error: str | None = None, probe: Json | None = None
    ) -> Publish:
        """Move a publish to `state`; being there already is a no-op. `error` and `probe` are kept where given.

        Raises:
            NotFound: no such publish.
            Conflict: the state machine has no such step.
        """
        with self._db.write() as connection:
            stored = _existing_publish(connection, publish_id, lock=True)
            if stored.state == state:
                return stored
            if state not in _NEXT[stored.state]:
                legal = " or ".join(_NEXT[stored.state]) or "nothing: it is finished"
                raise Conflict(f"publish {publish_id} is {stored.state} and cannot become {state}: next is {legal}")
            values: dict[str, Any] = {"state": state, f"{state}_at": self._db.now()}
            if error is not None:
                values["error"] = error
            if probe is not None:
                values["probe"] = probe
            connection.execute(update(publishes).where(publishes.c.publish_id == publish_id).values(**values))
            return _existing_publish(connection, publish_id)

    def last_publish(self, model: str) -> Publish | None:
        """Return the newest publish of a model in whatever state, or None."""
        with self._db.read() as connection:
            row = connection.execute(
                select(publishes).where(publishes.c.model == model).order_by(publishes.c.publish_id.desc()).limit(1)
            ).one_or_none()
            return None if row is None else publish_of(row)

    def list_publishes(self, model: str | None = None) -> list[Publish]:
        """Return the publishes, of one model or of all, oldest first."""
        chosen = select(publishes).order_by(publishes.c.publish_id)
        if model is not None:
            chosen = chosen.where(publishes.c.model == model)
        with self._db.read() as connection:
            return [publish_of(row) for row in connection.execute(chosen)]

    def register_proxy(self, proxy_id: str, url: str) -> None:
        """Announce a proxy, or renew its announcement; it is waited for from now on.

        Forgets those that were silent for `SILENT_FOR_EVER_S`: killed ones leave their rows.
        """
        now = self._db.now()
        with self._db.write() as connection:
            connection.execute(delete(proxies).where(proxies.c.beat_at < now - SILENT_FOR_EVER_S))
            statement = insert(connection, proxies).values(proxy_id=proxy_id, url=url, registered_at=now, beat_at=now)
            connection.execute(
                statement.on_conflict_do_update(index_elements=["proxy_id"], set_={"url": url, "beat_at": now})
            )

    def beat_proxy(self, proxy_id: str) -> None:
        """Say that a proxy is alive. Raises NotFound where it is not registered (any more)."""
        with self._db.write() as connection:
            beat = connection.execute(
                update(proxies).where(proxies.c.proxy_id == proxy_id).values(beat_at=self._db.now())
            )
            if beat.rowcount == 0:
                raise NotFound(f"no proxy {proxy_id!r}: register it again with register_proxy")

    def remove_proxy(self, proxy_id: str) -> None:
        """Forget a proxy that stops; unknown ones are a no-op."""
        with self._db.write() as connection:
            connection.execute(delete(proxies).where(proxies.c.proxy_id == proxy_id))

    def ack_publish(self, publish_id: int, proxy_id: str) -> None:
        """Say that `proxy_id` dispatches nothing and has nothing in flight for this publish. Twice is a no-op.

        Raises:
            NotFound: no such publish or proxy.
        """
        with self._db.write() as connection:
            _existing_publish(connection, publish_id)
            if connection.execute(select(proxies.c.proxy_id).where(proxies.c.proxy_id == proxy_id)).first() is None:
                raise NotFound(f"no proxy {proxy_id!r}: register it again with register_proxy")
            row = {"publish_id": publish_id, "proxy_id": proxy_id, "acked_at": self._db.now()}
            connection.execute(insert(connection, publish_acks).on_conflict_do_nothing(), [row])

    def waiting_proxies(self, publish_id: int, expires_s: float) -> list[str]:
        """Return the proxies with a heartbeat younger than `expires_s` that have not acknowledged. Raises NotFound."""
        with self._db.read() as connection:
            _existing_publish(connection, publish_id)
            acked = select(publish_acks.c.proxy_id).where(publish_acks.c.publish_id == publish_id)
            alive = proxies.c.beat_at >= self._db.now() - expires_s
            chosen = select(proxies.c.proxy_id).where(alive, proxies.c.proxy_id.not_in(acked))
            return list(connection.execute(chosen.order_by(proxies.c.proxy_id)).scalars())

    def publish_view(self, models: Sequence[str]) -> dict[str, ModelState]:
        """Return, per model, the live version and the newest publish with its state: one query, for polling."""
        view = {model: ModelState(model=model, live_version=None, publish_id=None, state=None) for model in models}
        with self._db.read() as connection:
            for row in connection.execute(_VIEW, {"models": list(models)}):
                view[row.model] = ModelState(
                    model=row.model, live_version=row.version_id, publish_id=row.newest, state=row.state
                )
        return view


def is_publishing(connection: Connection, model: str) -> bool:
    """Whether the model has an unfinished publish."""
    chosen = select(publishes.c.publish_id).where(publishes.c.model == model, publishes.c.state.in_(UNFINISHED))
    return connection.execute(chosen).first() is not None


def live_step(connection: Connection, model: str) -> int | None:
    """Return the step of the live version of `model`, or None where nothing is live."""
    return connection.execute(
        select(policy_versions.c.step)
        .join(publishes, publishes.c.version_id == policy_versions.c.version_id)
        .where(publishes.c.model == model, publishes.c.state == "live")
        .order_by(publishes.c.publish_id.desc())
        .limit(1)
    ).scalar()


def _existing_publish(connection: Connection, publish_id: int, *, lock: bool = False) -> Publish:
    chosen = select(publishes).where(publishes.c.publish_id == publish_id)
    row = connection.execute(chosen.with_for_update() if lock else chosen).one_or_none()
    if row is None:
        raise NotFound(f"no publish {publish_id}: open one with request_publish")
    return publish_of(row)


def publish_of(row: Any) -> Publish:
    """Return the row of a publish as a record."""
    times = {state: getattr(row, f"{state}_at") for state in STATES}
    return Publish(
        publish_id=row.publish_id,
        version_id=row.version_id,
        model=row.model,
        state=row.state,
        error=row.error,
        probe=row.probe,
        entered={state: at for state, at in times.items() if at is not None},
    )
