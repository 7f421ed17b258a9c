"""One publish in a process of its own, so that its publisher can be killed or stopped.

As a program: STORE ENGINE VERSION EXPIRES_S STATE. It prints each state that the publish enters, and in STATE waits
for a line on its standard input; then it prints how it ended.
"""

import sys

from tracegrad.tracestore.config import PublishConfig
from tracegrad.tracestore.store import open_store
from tracegrad.trainer.engine_client import EngineClient
from tracegrad.trainer.engine_errors import PublishFailed
from tracegrad.trainer.publish import Publisher


def main(store_url: str, engine_url: str, version: str, expires_s: str, waits_in: str) -> None:
    def told(state: str) -> None:
        print(state, flush=True)
        if state == waits_in:
            sys.stdin.readline()

    store, settings = open_store(store_url, create=False), PublishConfig(drain_timeout_s=60)
    engine = EngineClient(engine_url, "main", timeout_s=5)
    publisher = Publisher(store, "main", [engine], settings, heartbeat_expires_s=float(expires_s), on_state=told)
    try:
        publisher.publish(int(version))
    except PublishFailed as error:
        print(error, flush=True)
    store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
