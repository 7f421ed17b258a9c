"""API keys: who may talk to a proxy, what they may do, and where their calls belong.

A key is `tg-` and 256 random bits. Only its SHA-256 is stored: a slow password hash would protect guessable secrets;
there is nothing to guess in 256 random bits, and every request pays for the hash. The text is given out once and
cannot be read back. Refuses a key without scopes. Called by `tracegrad keys` and the proxy, through `Store`.
"""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import select, update

from tracegrad.tracestore.errors import InvalidRecord, NotFound
from tracegrad.tracestore.ids import new_id
from tracegrad.tracestore.noun import Noun
from tracegrad.tracestore.records import KEY_SCOPES, ApiKey, KeyScope
from tracegrad.tracestore.schema import api_keys

KEY_PREFIX = "tg-"
_RANDOM_BYTES = 32


def hash_key(text: str) -> str:
    """Return what is stored of a key: the SHA-256 of its text, as hex."""
    return hashlib.sha256(text.encode()).hexdigest()


class Keys(Noun):
    """The part of the store that knows API keys."""

    def create_key(
        self,
        *,
        scopes: Sequence[KeyScope],
        project: str = "default",
        name: str = "",
        run_id: str | None = None,
        role: str | None = None,
    ) -> tuple[str, ApiKey]:
        """Make a key and return (its text, its row). Nobody can learn the text again.

        Raises:
            InvalidRecord: no scope, or one that does not exist.
        """
        unknown = sorted(set(scopes) - set(KEY_SCOPES))
        if unknown or not scopes:
            wrong = f"{', '.join(unknown)} is none" if unknown else "it has none"
            raise InvalidRecord(f"a key needs scopes out of {', '.join(KEY_SCOPES)}: {wrong}")
        text = KEY_PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
        key = ApiKey(
            key_id=new_id("key"),
            name=name,
            project=project,
            scopes=tuple(scope for scope in KEY_SCOPES if scope in scopes),
            run_id=run_id,
            role=role,
        )
        with self._db.write() as connection:
            key = replace(key, created_at=self._db.now())
            connection.execute(
                api_keys.insert().values(
                    key_id=key.key_id,
                    hash=hash_key(text),
                    name=key.name,
                    project=key.project,
                    scopes=key.scopes,
                    run_id=key.run_id,
                    role=key.role,
                    created_at=key.created_at,
                )
            )
        return text, key

    def list_keys(self) -> list[ApiKey]:
        """Return every key, revoked ones included, in the order they were made."""
        with self._db.read() as connection:
            rows = connection.execute(select(api_keys).order_by(api_keys.c.created_at, api_keys.c.key_id))
            return [_key(row) for row in rows]

    def revoke_key(self, key_id: str) -> ApiKey:
        """Revoke a key and return it; a revoked key stays as it was revoked. Raises NotFound."""
        with self._db.write() as connection:
            valid = (api_keys.c.key_id == key_id, api_keys.c.revoked_at.is_(None))
            connection.execute(update(api_keys).where(*valid).values(revoked_at=self._db.now()))
            row = connection.execute(select(api_keys).where(api_keys.c.key_id == key_id)).one_or_none()
        if row is None:
            raise NotFound(f"no key {key_id!r}: `tracegrad keys list` lists what there is")
        return _key(row)

    def find_key(self, key_hash: str) -> ApiKey | None:
        """Return the key with this hash (see `hash_key`), revoked or not; None where there is none.

        The index finds the row, a comparison in constant time decides.
        """
        with self._db.read() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.hash == key_hash)).one_or_none()
        if row is None or not hmac.compare_digest(row.hash.encode(), key_hash.encode()):
            return None
        return _key(row)


def _key(row: Any) -> ApiKey:
    return ApiKey(
        key_id=row.key_id,
        name=row.name,
        project=row.project,
        scopes=tuple(row.scopes),
        run_id=row.run_id,
        role=row.role,
        created_at=row.created_at,
        revoked_at=row.revoked_at,
    )
