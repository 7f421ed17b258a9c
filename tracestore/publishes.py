"""Publishing as a state machine.

    requested -> draining -> swapping -> live | failed
                                      -> evaluating -> live                                    it passed
                                                    -> settling -> live | rejected | failed    engines change once more

One step at a time and never back. A publish with a gate passes through `evaluating`, and goes live with a decision that
passed only; one that nobody came to judge is rejected from `requested` on. `skipped` is a publish that was never tried.
Publishes of several models that one evaluation decides on are opened together; from `evaluating` on they move in one
transaction, so all are live or none. Each may fail by itself, and then none of the others can go on.
A model has at most one unfinished publish (a unique index says so too). Proxies are rows with a heartbeat: one that is
alive and has not acknowledged the drain at hand (draining, settling) is waited for, a dead one is not. A publish has a
heartbeat, too: its publisher's. Where that is silent before anything was swapped, whoever sees it ends the publish, and
the publisher that was only asleep is refused when it wants to swap. Called by the publisher and by the proxy's poll,
through `Store`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Select, bindparam, case, delete, func, select, update

from tracegrad.tracestore.database import insert
from tracegrad.tracestore.errors import Abandoned, Conflict, NotFound, Pinned, PublishUnderWay
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.pins import held_at, pinned_version, take_turn
from tracegrad.tracestore.records import Json, ModelState, PolicyVersion, Publish, PublishState
from tracegrad.tracestore.schema import (
    PUBLISH_STATES,
    UNFINISHED_STATES,
    proxies,
    publish_acks,
    publishes,
)
from tracegrad.tracestore.versions import abandon_newer, existing

SILENT_FOR_EVER_S = 86_400.0
REHEARSED = "~next"
"""What the name of an adapter ends with on its engine while its next version is probed, or judged, beside the one that
serves."""
UNFINISHED = UNFINISHED_STATES
_NEXT: dict[PublishState, tuple[PublishState, ...]] = {
    "requested": ("draining", "rejected", "failed"),
    "draining": ("swapping", "failed"),
    "swapping": ("live", "evaluating", "failed"),
    "evaluating": ("live", "settling"),
    "settling": ("live", "rejected", "failed"),
}
UNSWAPPED: tuple[PublishState, ...] = ("requested", "draining")
"""In these no engine has other weights yet. A publisher enters `swapping` here before it gives one to an engine."""
BEATS_A_LIFE = 5
"""Proxies and publishers beat so often in the time after which a proxy's heartbeat expires."""
SILENT_LIVES = 3.0
"""A publisher is taken for dead after so many lives of a heartbeat: 30 s, unless configured otherwise. Fifteen beats
are missing by then: no slow disk does that. Longer than a proxy's one life, because a publish that is ended in vain
costs its trainer a start, and held calls can wait for so long."""
_AS_ONE: tuple[PublishState, ...] = ("evaluating", "settling", "live")
"""What publishes that are judged together enter as one. Until then no proxy lets a call to a candidate."""


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
        select(
            found.c.model,
            found.c.newest,
            newest.c.state,
            newest.c.version_id.label("candidate"),
            newest.c.gate,
            newest.c.in_flight,
            newest.c.swapping_at,
            newest.c.evaluating_at,
            newest.c.settling_at,
            newest.c.beat_at,
            live.c.version_id,
        )
        .join(newest, newest.c.publish_id == found.c.newest)
        .outerjoin(live, live.c.publish_id == found.c.live)
    )


_VIEW = _view()


class Publishes(Noun):
    """The part of the store that knows how weights reach the engine, and who must stand still for it."""

    def request_publish(self, version_id: int, *, gate: Json | None = None, in_flight: bool = False) -> Publish:
        """Open a publish of a version; with `gate` (its terms) it goes live only where an evaluation says so.

        With `in_flight` proxies need not finish what they have with the engines before they acknowledge.

        Raises:
            NotFound: no such version.
            Pinned: the model is held at another version.
            Abandoned: the version is.
            PublishUnderWay: the model has an unfinished publish.
        """
        with self._db.write() as connection:
            return _request(connection, version_id, self._db.now(), gate, in_flight)

    def request_together(self, gates: Mapping[int, Json]) -> list[Publish]:
        """Open a publish for each of these versions (version -> the terms of its gate), which are judged as one.

        They come back in the order of their models. All are opened or none. Raises as `request_publish`.
        """
        with self._db.write() as connection:
            wanted = sorted(gates, key=lambda version_id: existing(connection, version_id).model)
            now = self._db.now()
            opened = [
                _request(connection, version_id, now, gates[version_id], in_flight=False).publish_id
                for version_id in wanted
            ]
            for version_id, publish_id in zip(wanted, opened, strict=True):
                terms = {**gates[version_id], "together": opened}
                connection.execute(update(publishes).where(publishes.c.publish_id == publish_id).values(gate=terms))
            return [_existing_publish(connection, publish_id) for publish_id in opened]

    def skip_publish(self, version_id: int, reason: str) -> Publish:
        """Write down that a version is not published, and why. Raises NotFound."""
        with self._db.write() as connection:
            now = self._db.now()
            version = existing(connection, version_id)
            return _add(connection, version, now, state="skipped", skipped_at=now, error=reason)

    def advance_publish(
        self,
        publish_id: int,
        state: PublishState,
        *,
        error: str | None = None,
        probe: Json | None = None,
        decision: Json | None = None,
        goes_back: bool = False,
    ) -> Publish:
        """Move a publish to `state`; being there already is a no-op. The other fields are kept where given.

        With `goes_back` a version that goes live leaves nothing newer to build on: see `abandon_newer`.

        Raises:
            NotFound: no such publish.
            Conflict: the state machine has no such step, the gate's decision forbids it, or it is judged together with
                others and does not move alone.
        """
        given = {"error": error, "probe": probe, "decision": decision}
        with self._db.write() as connection:
            stored = _existing_publish(connection, publish_id, lock=True)
            if state != stored.state and state in _AS_ONE and len(stored.together) > 1:
                others = ", ".join(str(each) for each in stored.together)
                raise Conflict(
                    f"publish {publish_id} becomes {state} together with the others of {others} or not at all"
                )
            _move(connection, stored, state, self._db.now(), given)
            if state == "live" and goes_back:
                abandon_newer(connection, existing(connection, stored.version_id))
            return _existing_publish(connection, publish_id)

    def advance_together(
        self,
        publish_id: int,
        state: PublishState,
        *,
        error: str | None = None,
        decision: Json | None = None,
        probes: Mapping[int, Json] | None = None,
    ) -> list[Publish]:
        """Move a publish and all that are judged together with it to `state`, in one transaction: all of them or none.

        `probes`: publish -> what is kept of it. Raises as `advance_publish`.
        """
        with self._db.write() as connection:
            together, now = _existing_publish(connection, publish_id).together, self._db.now()
            stored = [_existing_publish(connection, each, lock=True) for each in together]
            for each in stored:
                given = {"error": error, "probe": (probes or {}).get(each.publish_id), "decision": decision}
                _move(connection, each, state, now, given)
            return [_existing_publish(connection, each) for each in together]

    def beat_publishes(self, publish_ids: Sequence[int]) -> None:
        """Say that the publisher of these is alive; those that have ended stay as they are."""
        unfinished = update(publishes).where(publishes.c.state.in_(UNFINISHED))
        with self._db.write() as connection:
            for each in sorted(publish_ids):  # one by one, in the order in which all lock them who move several
                connection.execute(unfinished.where(publishes.c.publish_id == each).values(beat_at=self._db.now()))

    def end_unswapped(self, publish_id: int, *, silent_s: float | None = None) -> list[Publish]:
        """Move a publish that has swapped nothing to failed, because its publisher is gone; return what was moved.

        So are those that are judged together with it: none of them can go live any more. With `silent_s` only those
        that nobody was heard of for so long. One that swaps stays as it is, because nobody knows what engines hold; one
        that has ended, too.

        Raises:
            NotFound: no such publish.
        """
        with self._db.write() as connection:
            together, now = _existing_publish(connection, publish_id).together, self._db.now()
            ended = []
            for each in [_existing_publish(connection, one, lock=True) for one in together]:
                silence = silence_s(each.beat_at, now)
                if each.state in UNSWAPPED and (silent_s is None or silence > silent_s):
                    how = f"died while it was {each.state}" if silent_s is None else f"was silent for {silence:.0f} s"
                    error = f"its publisher {how}; nothing was swapped"
                    _move(connection, each, "failed", now, {"error": error, "probe": None, "decision": None})
                    ended.append(each.publish_id)
            return [_existing_publish(connection, each) for each in ended]

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

    def ack_publish(self, publish_id: int, proxy_id: str, phase: PublishState = "draining") -> None:
        """Say that `proxy_id` dispatches nothing for this drain, and has nothing in flight. Twice is a no-op.

        Of a publish that calls go on through, it may have calls in flight that the engine tells the versions of.

        Raises:
            NotFound: no such publish or proxy.
        """
        with self._db.write() as connection:
            _existing_publish(connection, publish_id)
            if connection.execute(select(proxies.c.proxy_id).where(proxies.c.proxy_id == proxy_id)).first() is None:
                raise NotFound(f"no proxy {proxy_id!r}: register it again with register_proxy")
            row = {"publish_id": publish_id, "proxy_id": proxy_id, "phase": phase, "acked_at": self._db.now()}
            connection.execute(insert(connection, publish_acks).on_conflict_do_nothing(), [row])

    def waiting_proxies(self, publish_id: int, expires_s: float) -> list[str]:
        """Return the proxies with a heartbeat younger than `expires_s` that have not acknowledged the drain at hand.

        Raises:
            NotFound: no such publish.
            Conflict: it has ended, and nobody drains for it any more.
        """
        with self._db.read() as connection:
            stored = _existing_publish(connection, publish_id)
            if stored.state not in UNFINISHED:
                raise Conflict(f"{_told(stored)}: no proxy drains for it any more")
            phase = "settling" if stored.state == "settling" else "draining"
            acked = select(publish_acks.c.proxy_id).where(
                publish_acks.c.publish_id == publish_id, publish_acks.c.phase == phase
            )
            alive = proxies.c.beat_at >= self._db.now() - expires_s
            chosen = select(proxies.c.proxy_id).where(alive, proxies.c.proxy_id.not_in(acked))
            return list(connection.execute(chosen.order_by(proxies.c.proxy_id)).scalars())

    def publish_view(self, models: Sequence[str]) -> dict[str, ModelState]:
        """Return, per model, the live version and the newest publish with its state: one query, for polling."""
        view = {model: ModelState(model=model, live_version=None, publish_id=None, state=None) for model in models}
        now = self._db.now()
        with self._db.read() as connection:
            for row in connection.execute(_VIEW, {"models": list(models)}):
                view[row.model] = ModelState(
                    model=row.model,
                    live_version=row.version_id,
                    publish_id=row.newest,
                    state=row.state,
                    candidate=row.candidate,
                    gate=row.gate,
                    in_flight=row.in_flight,
                    overdue=row.state == "evaluating" and now > row.evaluating_at + row.gate["timeout_s"],
                    silent_s=silence_s(row.beat_at, now),
                    swaps=(row.swapping_at is not None) + (row.settling_at is not None and row.state != "settling"),
                )
        return view


def silence_s(beat_at: float | None, now: float) -> float:
    """Return for how long a publisher has said nothing; 0 for one that never says anything."""
    return 0.0 if beat_at is None else max(now - beat_at, 0.0)


def is_publishing(connection: Connection, models: Sequence[str]) -> bool:
    """Whether one of the models has an unfinished publish."""
    chosen = select(publishes.c.publish_id).where(publishes.c.model.in_(models), publishes.c.state.in_(UNFINISHED))
    return connection.execute(chosen).first() is not None


def _request(connection: Connection, version_id: int, now: float, gate: Json | None, in_flight: bool) -> Publish:
    """Open a publish inside a transaction, the model's turn taken. Raises as `request_publish`."""
    take_turn(connection, existing(connection, version_id).model)
    version = existing(connection, version_id)
    if version.abandoned:
        raise Abandoned(f"version {version_id} is abandoned: publish another one")
    pin = pinned_version(connection, version.model)
    if pin is not None and pin != version_id:
        raise Pinned(held_at(version.model, pin))
    unfinished = connection.execute(
        select(publishes.c.publish_id, publishes.c.state).where(
            publishes.c.model == version.model, publishes.c.state.in_(UNFINISHED)
        )
    ).first()
    if unfinished is not None:
        raise PublishUnderWay(
            f"publish {unfinished.publish_id} of model {version.model!r} is {unfinished.state}: "
            "wait for it, or advance it to failed"
        )
    return _add(connection, version, now, state="requested", beat_at=now, gate=gate, in_flight=in_flight)


def _move(connection: Connection, stored: Publish, state: PublishState, now: float, given: Mapping[str, Any]) -> None:
    """Move one publish, whose row is locked, to `state`; being there already is a no-op. Raises Conflict."""
    if stored.state == state:
        return
    legal = _NEXT.get(stored.state, ())
    if state not in legal:
        said = " or ".join(legal) or "nothing: it is finished"
        raise Conflict(f"{_told(stored)} and cannot become {state}: next is {said}")
    _check_decision(stored, state, stored.decision if given["decision"] is None else given["decision"])
    if state == "live":
        take_turn(connection, stored.model)
    values: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    values |= {"state": state, f"{state}_at": now}
    connection.execute(update(publishes).where(publishes.c.publish_id == stored.publish_id).values(**values))


def _told(stored: Publish) -> str:
    return f"publish {stored.publish_id} is {stored.state}" + (f" ({stored.error})" if stored.error else "")


def _existing_publish(connection: Connection, publish_id: int, *, lock: bool = False) -> Publish:
    chosen = select(publishes).where(publishes.c.publish_id == publish_id)
    row = connection.execute(chosen.with_for_update() if lock else chosen).one_or_none()
    if row is None:
        raise NotFound(f"no publish {publish_id}: open one with request_publish")
    return publish_of(row)


def _add(connection: Connection, version: PolicyVersion, now: float, **values: Any) -> Publish:
    row = {"version_id": version.version_id, "model": version.model, "requested_at": now, **values}
    return publish_of(connection.execute(insert(connection, publishes).values(**row).returning(publishes)).one())


def _check_decision(stored: Publish, state: PublishState, decision: Json | None) -> None:
    """What has a gate serves only after it passed, and is rejected only for a reason (law 9). Raises Conflict."""
    passed = decision is not None and bool(decision["passed"])
    if state == "evaluating" and stored.gate is None:
        raise Conflict(f"publish {stored.publish_id} has no gate: nothing is to be evaluated")
    if state == "live" and stored.gate is not None and not (passed and stored.state != "swapping"):
        raise Conflict(f"publish {stored.publish_id} has a gate that version {stored.version_id} has not passed")
    if state == "rejected" and (passed or decision is None):
        raise Conflict(f"publish {stored.publish_id} cannot be rejected without a decision against it")


def publish_of(row: Any) -> Publish:
    """Return the row of a publish as a record."""
    times = {state: getattr(row, f"{state}_at") for state in PUBLISH_STATES}
    return Publish(
        publish_id=row.publish_id,
        version_id=row.version_id,
        model=row.model,
        state=row.state,
        error=row.error,
        probe=row.probe,
        gate=row.gate,
        decision=row.decision,
        in_flight=row.in_flight,
        beat_at=row.beat_at,
        entered={state: at for state, at in times.items() if at is not None},
    )
