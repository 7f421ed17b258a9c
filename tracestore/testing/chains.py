"""What every backend must do with prompts that begin alike: store each part once, give it back, forget it whole."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Connection, select, text

from tracegrad.tracestore.blocks import KnownBlocks
from tracegrad.tracestore.chains import IDS_A_UNIT, plain_of
from tracegrad.tracestore.errors import (
    Conflict,
    InvalidRecord,
    KeyTaken,
    MissingRow,
    NotFound,
    TraceStoreError,
)
from tracegrad.tracestore.parents import ChainParent
from tracegrad.tracestore.payload_schema import blocks
from tracegrad.tracestore.records import Call
from tracegrad.tracestore.schema import metadata
from tracegrad.tracestore.serials import Serials
from tracegrad.tracestore.store import Store, open_store
from tracegrad.tracestore.testing.rows import (
    add_group,
    live_version,
    make_call,
    make_choice,
    make_reward,
    sql,
    train,
)

UNIT = IDS_A_UNIT


def said(word: str) -> dict[str, Any]:
    """Return a message that is large enough to be taken out of its request."""
    return {"role": "user", "content": f"{word} " * 100}


def asked(call_id: str, run_id: str | None, words: Sequence[str], tail: int = 5, **changed: Any) -> Call:
    """Return a call whose prompt is so many units of ids and so many messages, each of one word, and a few ids more."""
    ids = tuple(sum(map(ord, word)) for word in words for _ in range(UNIT)) + (1,) * tail
    request = {"messages": [said(word) for word in words], "seed": 1}
    return make_call(call_id, run_id, prompt_ids=ids, request=request, **changed)


def stored_units(store: Store) -> tuple[int, int]:
    """Count the units of ids and the messages that are stored."""
    with store._db.read() as connection:
        rows = connection.execute(select(blocks.c.coding, blocks.c.n_items)).all()
    return sum(row.n_items for row in rows if row.coding) // UNIT, sum(row.n_items for row in rows if not row.coding)


def mentions(store: Store, word: str) -> int:
    """Count the rows of all tables in which a word stands, packed or not."""
    count = 0
    with store._db.read() as connection:
        for table in metadata.sorted_tables:
            for row in connection.execute(text(f"SELECT * FROM {table.name}")).mappings():
                cells = [
                    plain_of(0, bytes(cell)) if isinstance(cell, bytes | memoryview) else cell for cell in row.values()
                ]
                count += any(
                    word in (cell.decode("latin1") if isinstance(cell, bytes) else str(cell)) for cell in cells
                )
    return count


def twice(store: Store) -> None:
    """Store every block once more, as a writer does who did not see it: the last calls name the later ones."""
    columns = "first, n_items, coding, hash, project, content"
    with store._db.write() as connection:
        rows = connection.execute(text("SELECT block_id, parent_id FROM blocks ORDER BY block_id")).all()
        again: dict[int | None, int | None] = {None: None}
        for block_id, parent_id in rows:
            (again[block_id],) = Serials(connection).take("blocks", 1)
            connection.execute(
                text(
                    f"INSERT INTO blocks (block_id, parent_id, {columns})"
                    f" SELECT :new, :parent, {columns} FROM blocks WHERE block_id = :old"
                ),
                {"new": again[block_id], "parent": again[parent_id], "old": block_id},
            )
        last = connection.execute(text("SELECT * FROM call_payloads ORDER BY seq DESC LIMIT 1")).one()
        heads = {"ids": again[last.ids_head], "text": again[last.text_head], "seq": last.seq}
        connection.execute(text("UPDATE call_payloads SET ids_head = :ids, text_head = :text WHERE seq = :seq"), heads)
        for block_id in sorted(
            (one for pair in again.items() for one in pair if one is not None), reverse=True
        ):  # that nothing names
            connection.execute(
                text(
                    "DELETE FROM blocks WHERE block_id = :id"
                    " AND NOT EXISTS (SELECT 1 FROM call_payloads p WHERE :id IN (p.ids_head, p.text_head))"
                    " AND NOT EXISTS (SELECT 1 FROM blocks k WHERE k.parent_id = :id)"
                ),
                {"id": block_id},
            )


class ChainContract:
    """Prompts as chains over shared blocks."""

    def test_a_conversation_costs_its_new_tokens(self, store: Store) -> None:
        """Twenty turns, each with the whole history: every unit and every message once."""
        words = [f"turn{number}" for number in range(20)]
        calls = [asked(f"c{n}", "r", words[: n + 1]) for n in range(20)]
        for call in calls:
            store.append_calls([call])
        assert stored_units(store) == (20, 20)
        kept = {call.call_id: call for call in store.trace("r").calls}
        assert all((kept[c.call_id].prompt_ids, kept[c.call_id].request) == (c.prompt_ids, c.request) for c in calls)
        assert list(kept["c3"].request) == ["messages", "seed"]
        assert store.check() == []

    def test_runs_with_one_system_prompt_cost_their_own_words(self, store: Store) -> None:
        """One by one and in one batch: the shared beginning lies there once more where a block had to be parted."""
        system = ["be", "kind", "and", "brief"]
        for number in range(10):
            store.append_calls([asked(f"c{number}", f"r{number}", [*system, f"q{number}"])])
        assert stored_units(store) == (4 + 10 + 4, 4 + 10 + 4)
        store.append_calls([asked(f"d{n}", f"s{n}", ["other", "system", f"p{n}"]) for n in range(10)])
        assert stored_units(store) == (18 + 2 + 10, 18 + 2 + 10)
        assert [store.trace(f"s{n}").calls[0].request["messages"][2] for n in range(10)] == [
            said(f"p{n}") for n in range(10)
        ]
        assert store.check() == []

    def test_samples_of_one_prompt_store_it_once(self, store: Store) -> None:
        """A group; also by another process, that remembers nothing."""
        store.append_calls([asked("a", "r0", ["x", "y"]), asked("b", "r1", ["x", "y"])])
        other = open_store(store.url)
        other.append_calls([asked("c", "r2", ["x", "y"])])
        assert stored_units(store) == (2, 2)
        assert other.get_call("a").request == store.get_call("c").request
        other.close()

    def test_a_block_that_lies_twice_is_a_block(self, store: Store) -> None:
        """Two writers may not see one another: whoever comes later goes on from either."""
        store.append_calls([asked("a", "r", ["x", "y"]), asked("b", "r", ["x", "y", "z"], tail=0)])
        units = stored_units(store)
        twice(store)
        assert stored_units(store) > units
        other = open_store(store.url)  # it remembers nothing
        other.append_calls([asked("c", "r", ["x", "y", "z", "w"]), asked("d", "s", ["x", "q"])])
        other.close()
        assert store.parent_call("c") == ChainParent(call_id="b", by="ids", shared=3 * UNIT)
        assert store.get_call("d").request["messages"] == [said("x"), said("q")]
        assert store.check() == []
        store.delete_runs(["r", "s"], busy="force")
        assert stored_units(store) == (0, 0)

    def test_projects_share_nothing(self, store: Store) -> None:
        """Not even what is equal."""
        for project in ("a", "b"):
            store.append_calls([asked(f"c-{project}", None, ["x", "y"], project=project)])
        assert stored_units(store) == (4, 4)
        with store._db.read() as connection:
            roots = connection.execute(select(blocks.c.project).where(blocks.c.parent_id.is_(None))).scalars()
            assert sorted(roots) == ["a", "a", "b", "b"]

    def test_other_large_values_and_other_shapes_come_back(self, store: Store) -> None:
        """Tools, schemas, prompts of strings or ids, inputs: alone, in a list, null, empty; any order of keys."""
        large = "w" * 300
        requests: list[dict[str, Any]] = [
            {"tools": [{"name": large}], "messages": [said("a"), said("b")], "response_format": {"x": large}},
            {"messages": [said("a"), said("b"), said("c")], "tools": [{"name": large}]},
            {"input": [large, "y"], "model": "m"},
            {"prompt": list(range(400))},
            {"prompt": large, "suffix": None, "messages": []},
            {"messages": [{}, *[said("a")]], "input": [{"t": large}]},
            {},
        ]
        for n, request in enumerate(requests):
            store.append_calls([make_call(f"c{n}", "r", request=request, prompt_ids=None)])
        kept = {call.call_id: call.request for call in store.trace("r").calls}
        assert kept == {f"c{n}": request for n, request in enumerate(requests)}
        assert [list(kept[f"c{n}"]) for n in range(len(requests))] == [list(request) for request in requests]
        store.append_calls([make_call("c0", "r", request=requests[0], prompt_ids=None)])
        with pytest.raises(Conflict, match="request"):
            turned = dict(reversed(requests[0].items()))
            store.append_calls([make_call("c0", "r", request=turned, prompt_ids=None)])

    def test_ids_take_as_few_bytes_as_the_largest_needs(self, store: Store) -> None:
        """Prompts and answers; the largest and the smallest int32 come back."""
        for n, largest in enumerate((2**16 - 1, 2**16, 2**24 - 1, 2**24, 2**31 - 1, -(2**31), -1)):
            ids = (0,) * UNIT + (largest,) * UNIT + (largest, 1)
            call = make_call(f"c{n}", "r", prompt_ids=ids, choices=(make_choice(0, (largest, 2)),))
            store.append_calls([call])
            kept = store.get_call(f"c{n}")
            assert (kept.prompt_ids, kept.choices[0].token_ids) == (ids, (largest, 2))

    def test_the_words_of_a_deleted_run_are_gone_and_shared_ones_stay(self, store: Store) -> None:
        """By query in every table; the last one that goes takes the blocks along."""
        store.append_calls([asked("a", "ra", ["shared", "secret"]), asked("a2", "ra", ["shared", "secret", "more"])])
        store.append_calls(
            [asked("b", "rb", ["shared", "public"]), asked("free", None, ["shared", "loose"], role=None)]
        )
        assert mentions(store, "secret") and mentions(store, "loose")
        done = store.delete_runs(["ra"], busy="force")
        assert done.rows["blocks"] > 0 and done.left == {}
        assert mentions(store, "secret") == mentions(store, "more ") == 0
        assert store.get_call("b").request["messages"] == [said("shared"), said("public")]
        assert store.check() == []
        store.delete_unplaced_calls("default", 1e12)
        assert mentions(store, "loose") == 0 and mentions(store, "shared")
        store.delete_runs(["rb"], busy="force")
        assert stored_units(store) == (0, 0)

    def test_a_block_that_another_deleted_is_written_again(self, store: Store) -> None:
        """What this process remembers is not there any more: nothing dangles, nothing is lost."""
        store.append_calls([asked("a", "ra", ["x", "y"])])
        other = open_store(store.url)
        other.delete_runs(["ra"], busy="force")
        store.append_calls([asked("b", "rb", ["x", "y"]), asked("c", "rb", ["x", "y", "z"])])
        assert store.get_call("c").request["messages"] == [said("x"), said("y"), said("z")]
        assert stored_units(store) == (3, 3) and store.check() == []
        other.close()

    def test_only_what_another_attempt_may_mend_is_tried_again(self, store: Store) -> None:
        """A row that is gone, a call that came meanwhile: told by the kind of the error, never by its words."""
        store.append_calls([asked("a", "ra", ["x", "y"]), asked("b", "rb", ["z"])])
        cases: list[tuple[str | Exception, type[Exception], int]] = [
            (Conflict("call_id 'blocks' is stored with other content, FOREIGN KEY or not"), Conflict, 1),
            (InvalidRecord("call_id 'blocks', FOREIGN KEY"), InvalidRecord, 1),
            ("UPDATE blocks SET n_items = 0", InvalidRecord, 1),
            ("UPDATE blocks SET block_id = 1", KeyTaken, 1),
            ("UPDATE calls SET run_id = 'nobody'", MissingRow, 2),
            ("UPDATE calls SET call_id = 'a'", KeyTaken, 8),
        ]
        for refused, kind, expected in cases:
            attempts = []

            def work(connection: Connection, _: KnownBlocks, again: bool) -> Mapping[bytes, int]:
                attempts.append(again)  # noqa: B023
                if isinstance(refused, Exception):  # noqa: B023
                    raise refused  # noqa: B023
                connection.execute(text(refused))  # noqa: B023
                return {}

            with pytest.raises(kind):
                store._blocks.write_with(store._db, work)
            assert attempts == [False, *[True] * (expected - 1)], refused

    def test_writers_of_one_chain_at_once(self, store: Store) -> None:
        """Two processes, the same growing conversation under other ids; and one that deletes meanwhile."""
        stores = [store, open_store(store.url), open_store(store.url)]
        words = [f"w{n}" for n in range(12)]

        def write(mine: Store, name: str) -> None:
            for n in range(12):
                gone = asked(f"{name}x{n}", f"gone-{name}{n}", words)
                mine.append_calls([asked(f"{name}{n}", f"run-{name}", words[: n + 1]), gone])
                if name == "c":
                    mine.delete_runs([f"gone-{name}{n}"], busy="force")

        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(write, *pair) for pair in zip(stores, "abc", strict=True)]:
                done.result()
        for name in "abc":
            kept = {call.call_id: call for call in store.trace(f"run-{name}").calls}
            assert all(
                kept[f"{name}{n}"].request["messages"] == [said(word) for word in words[: n + 1]] for n in range(12)
            )
        assert store.check() == []
        for other in stores[1:]:
            other.close()

    def test_a_block_that_was_changed_or_lost_is_found(self, store: Store) -> None:
        """By the check, by the doctor, and by whoever reads: no prompt is made up."""
        store.append_calls([asked("a", "ra", ["x", "y"]), asked("b", "rb", ["p", "q"])])
        change = "UPDATE blocks SET content = :other WHERE block_id ="
        change += " (SELECT text_head FROM call_payloads WHERE seq = 1)"
        sql(store, change, other=b'{"role":"user"},{}')
        assert [(fault.what, fault.count) for fault in store.check()] == [
            ("prompts that are not what their hash says", 1)
        ]
        sql(store, change, other=b"Hnot deflated")
        assert {fault.what for fault in store.check()} == {
            "prompts that are not what their hash says",
            "prompts that cannot be put together as they are counted",
        }
        with pytest.raises(TraceStoreError, match="cannot be put together"):
            store.trace("ra")
        assert store.trace("rb").calls[0].request["messages"][1] == said("q")

    def test_a_prompt_of_another_length_than_counted_is_never_given_out(self, store: Store) -> None:
        """Law 4, across the rows that no single constraint sees."""
        store.append_calls([asked("a", "ra", ["x", "y"]), asked("b", "rb", ["x", "y", "z"])])
        sql(
            store,
            "UPDATE call_payloads SET ids_head = (SELECT ids_head FROM call_payloads WHERE seq = 2) WHERE seq = 1",
        )
        with pytest.raises(TraceStoreError, match="261 token ids are counted, 389 are there"):
            store.get_call("a")

    def test_a_block_that_nothing_names_is_told(self, store: Store) -> None:
        """As a program without our sweep would leave it."""
        store.append_calls([asked("a", "ra", ["x", "y"])])
        sql(store, "DELETE FROM call_payloads")
        found = {fault.what: fault.count for fault in store.check()}
        assert found == {"calls without their payload": 1, "prompts that nothing names": 2}

    def test_the_words_of_a_trained_run_are_gone_too(self, store: Store) -> None:
        """Of a call that is kept for the books, nothing is kept that was said."""
        version = live_version(store).version_id
        runs = add_group(store)
        for run_id in runs:
            store.append_calls([asked(f"c-{run_id}", run_id, ["x", "secret"], version=version)])
            store.add_rewards([make_reward(f"w-{run_id}", run_id)])
            store.end_run(run_id, status="closed", ended_by="explicit")
        train(store)
        assert store.delete_runs(runs).stubs == tuple(runs)
        assert mentions(store, "secret") == 0 and stored_units(store) == (0, 0)
        assert store.check() == []

    def test_the_parent_of_a_call_is_the_longest_beginning_of_its_prompt(self, store: Store) -> None:
        """Of the same run before others, of token ids before messages; never a later one, nor of another project."""
        turns = [asked(f"t{n}", "r", ["sys", *[f"m{k}" for k in range(n)]], tail=0) for n in range(4)]
        store.append_calls([asked("foreign", None, ["sys", "m0", "m1"], tail=0, project="other")])
        for call in turns:
            store.append_calls([call])
        store.append_calls([asked("elsewhere", "s", ["sys", "m0", "m1", "m2"], tail=0)])
        assert store.parent_call("t0") is None and store.parent_call("foreign") is None
        assert store.parent_call("t3") == ChainParent(call_id="t2", by="ids", shared=3 * UNIT)
        assert store.parent_call("elsewhere") == ChainParent(call_id="t3", by="ids", shared=4 * UNIT)
        store.append_calls([asked("again", "r", ["sys", "m0", "m1", "m2"], tail=0)])
        assert store.parent_call("again") == ChainParent(call_id="t3", by="ids", shared=4 * UNIT)

    def test_what_is_left_over_of_the_earlier_prompt_must_be_there_too(self, store: Store) -> None:
        """A prompt that ends within a unit is a beginning only where its last ids are."""
        base = (5,) * UNIT
        for name, more in (("a", (1, 2)), ("b", (1, 3)), ("c", (1, 2, 9, 9)), ("d", (70_000,))):
            store.append_calls([make_call(name, "r", prompt_ids=base + more)])
        assert store.parent_call("c") == ChainParent(call_id="a", by="ids", shared=UNIT + 2)
        assert store.parent_call("b") is None and store.parent_call("d") is None
        store.append_calls([make_call("root", "r", prompt_ids=base), make_call("e", "r", prompt_ids=(*base, 1, 4))])
        assert store.parent_call("e") == ChainParent(call_id="root", by="ids", shared=UNIT)

    def test_without_token_ids_the_messages_tell(self, store: Store) -> None:
        """As of somebody else's engine; a deleted call tells nothing."""
        for name, words in (("a", ["w", "x"]), ("b", ["w", "x", "y"]), ("c", ["w", "x", "z"])):
            request = {"messages": [said(word) for word in words]}
            store.append_calls([make_call(name, "r", prompt_ids=None, request=request)])
        assert store.parent_call("b") == store.parent_call("c") == ChainParent(call_id="a", by="text", shared=2)
        store.append_calls([make_call("small", "r", prompt_ids=None)])
        assert store.parent_call("small") is None
        store.delete_runs(["r"], busy="force")
        with pytest.raises(NotFound):
            store.parent_call("b")
