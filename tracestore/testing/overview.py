"""What every backend must say to an operator: proxies with the age of their heartbeats, open runs, the revision."""

from tracegrad.tracestore.overview import OpenRuns
from tracegrad.tracestore.records import Run
from tracegrad.tracestore.schema import HEAD
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import Clock, first_version
from tracegrad.tracestore.trainers import TrainerAtWork


class OverviewContract:
    """Counts for `tracegrad status` and `/metrics`."""

    def test_proxies_are_listed_with_the_age_of_their_heartbeat(self, store: Store, clock: Clock) -> None:
        """The newest first; one that stopped is gone, one that died stays and ages."""
        assert store.list_proxies() == []
        for proxy_id in ("dead", "well", "gone"):
            store.register_proxy(proxy_id, f"http://{proxy_id}")
        store.remove_proxy("gone")
        clock.advance(20)
        store.beat_proxy("well")
        clock.advance(1)
        found = store.list_proxies()
        assert [(row.proxy_id, row.url, row.age_s) for row in found] == [
            ("well", "http://well", 1.0),
            ("dead", "http://dead", 21.0),
        ]
        assert {row.registered_at for row in found} == {1_000.0}

    def test_a_proxy_that_was_killed_is_forgotten_after_a_day(self, store: Store, clock: Clock) -> None:
        """By the next one that starts; its acknowledgements go with it."""
        publish_id = store.request_publish(first_version(store)).publish_id
        store.register_proxy("killed", "http://killed")
        store.ack_publish(publish_id, "killed")
        clock.advance(80_000)
        store.register_proxy("second", "http://second")
        assert {row.proxy_id for row in store.list_proxies()} == {"killed", "second"}
        clock.advance(10_000)
        store.register_proxy("third", "http://third")
        assert {row.proxy_id for row in store.list_proxies()} == {"second", "third"}

    def test_open_runs_are_counted_by_project(self, store: Store, clock: Clock) -> None:
        """Ended ones and those of other projects do not count."""
        assert store.open_runs("default") == OpenRuns(count=0, quietest_at=None)
        for number, project in enumerate(("default", "default", "other")):
            store.open_run(Run(run_id=f"r{number}", project=project))
            clock.advance(5)
        store.open_run(Run(run_id="ended"))
        store.end_run("ended", status="closed", ended_by="explicit")
        assert store.open_runs("default") == OpenRuns(count=2, quietest_at=1_000.0)
        assert store.open_runs("other").count == 1

    def test_the_revision_is_the_newest(self, store: Store) -> None:
        """Of an open store."""
        assert store.schema_revision() == HEAD

    def test_a_trainer_is_at_work_while_its_heart_beats(self, store: Store, clock: Clock) -> None:
        """One a job; the newest word counts; a silent one is none."""
        assert store.trainer_at_work("job", 10) is None
        store.beat_trainer("job", "loading", None, since=clock.now, started=clock.now)
        clock.advance(5)
        store.beat_trainer("job", "training", 3, since=clock.now - 1, started=clock.now - 5)
        clock.advance(4)
        assert store.trainer_at_work("job", 10) == TrainerAtWork(
            job_id="job", phase="training", step=3, phase_age_s=5.0, started_at=clock.now - 9
        )
        clock.advance(7)
        assert store.trainer_at_work("job", 10) is None and store.trainer_at_work("other", 99) is None
        store.remove_trainer("job")
        assert store.trainer_at_work("job", 99) is None
