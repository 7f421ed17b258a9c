"""What every backend must do with API keys."""

import base64
import hmac
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from sqlalchemy import text as sql

from tracegrad.tracestore.errors import InvalidRecord, NotFound
from tracegrad.tracestore.keys import hash_key
from tracegrad.tracestore.records import KEY_SCOPES, ApiKey
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import Clock


class KeyContract:
    """Keys are shown once, stored hashed, found by their hash, and revoked for good."""

    def test_a_key_is_found_by_its_hash_with_all_it_was_given(self, store: Store, clock: Clock) -> None:
        """The scopes come in their own order; another text finds nothing."""
        text, key = store.create_key(
            scopes=("reward", "call", "call"), project="p", name="planner in production", run_id="r", role="planner"
        )
        assert (key.scopes, key.project, key.run_id, key.role) == (("call", "reward"), "p", "r", "planner")
        assert (key.created_at, key.revoked_at) == (clock.now, None)
        assert store.find_key(hash_key(text)) == key
        assert store.find_key(hash_key(text + "x")) is None
        assert store.find_key(text) is None
        assert [key.may(scope) for scope in KEY_SCOPES] == [True, True, False, False, False]
        assert all(store.create_key(scopes=("admin",))[1].may(scope) for scope in KEY_SCOPES)

    def test_no_two_keys_are_alike_and_each_holds_256_random_bits(self, store: Store) -> None:
        """Also where they are made at the same moment."""
        with ThreadPoolExecutor(8) as pool:
            made = list(pool.map(lambda _: store.create_key(scopes=("call",)), range(24)))
        texts = {text for text, _ in made}
        assert len(texts) == len({key.key_id for _, key in made}) == 24
        for text in texts:
            assert text.startswith("tg-")
            assert len(base64.urlsafe_b64decode(text.removeprefix("tg-") + "=")) == 32
        assert {key.key_id for key in store.list_keys()} == {key.key_id for _, key in made}

    def test_neither_row_nor_record_holds_the_key(self, store: Store) -> None:
        """What is stored is the hash; what is returned has not even that."""
        text, key = store.create_key(scopes=("read",), name="n")
        with store._db.read() as connection:
            (row,) = connection.execute(sql("SELECT * FROM api_keys"))
        assert hash_key(text) in row
        assert not any(text in str(value) or text.removeprefix("tg-") in str(value) for value in row)
        assert hash_key(text) not in str(asdict(key))

    def test_a_revoked_key_is_known_and_stays_revoked(self, store: Store, clock: Clock) -> None:
        """Revoking twice keeps the first time, and touches no other key."""
        text, key = store.create_key(scopes=("call",))
        other_text, other = store.create_key(scopes=("call",))
        clock.advance(10)
        revoked = store.revoke_key(key.key_id)
        assert revoked.revoked_at == clock.now
        clock.advance(10)
        assert store.revoke_key(key.key_id) == revoked
        assert store.find_key(hash_key(text)) == revoked
        assert store.find_key(hash_key(other_text)) == other
        assert store.list_keys() == [revoked, other]
        with pytest.raises(NotFound, match="keys list"):
            store.revoke_key("key_of_nobody")

    def test_a_key_without_a_scope_is_refused(self, store: Store) -> None:
        """So is a scope that does not exist, and nothing is stored then."""
        for scopes, says in (((), "it has none"), (("call", "fly"), "fly is none")):
            with pytest.raises(InvalidRecord, match=says):
                store.create_key(scopes=scopes)  # type: ignore[arg-type]
        assert store.list_keys() == []

    def test_the_comparison_in_constant_time_decides(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the index found is no key before `hmac.compare_digest` has said so."""
        text, key = store.create_key(scopes=("call",))
        asked: list[tuple[bytes, bytes]] = []

        def compare(one: bytes, other: bytes) -> bool:
            asked.append((one, other))
            return False

        monkeypatch.setattr(hmac, "compare_digest", compare)
        assert store.find_key(hash_key(text)) is None
        assert asked == [(hash_key(text).encode(), hash_key(text).encode())]
        monkeypatch.undo()
        found = store.find_key(hash_key(text))
        assert isinstance(found, ApiKey) and found.key_id == key.key_id
