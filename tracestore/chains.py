"""What prompts are made of: units, the hash up to the end of each, and blocks of several of them.

A chain of token ids has units of IDS_A_UNIT ids from its beginning (what is left over is the call's own tail); a chain
of text has one item of a JSON list a unit. The hash of a unit is over the hash before it and its content, and before
the first stands the kind and the project: equal hashes are equal prefixes of one project, and never of two.
A request is cut at its large values: lists of objects (messages, tools) become chains, other values one unit each;
what is small stays where it is. Refuses to cut a text that would not come back byte for byte. No database here.
Called by `blocks`, `payloads` and migration 0010.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import msgspec

from tracegrad.tracestore.codec import json_bytes, narrow_int32, packed, unpacked, widen_int32

IDS_A_UNIT = 128
_UNIT_BYTES = 4 * IDS_A_UNIT
HASH_BYTES = 16
TEXT = 0
"""The coding of a block of text; that of a block of token ids is its bytes an id (2, 3 or 4)."""
_LEAST_VALUE = 256
"""Bytes of a value of a request that is worth a row of its own."""
_GROW = ("messages", "input")
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])


class Chain(NamedTuple):
    """Units of one kind with the hash up to the end of each. Invariant: at least one, as many hashes as units."""

    project: str
    is_text: bool
    units: Sequence[bytes]
    hashes: Sequence[bytes]

    def before(self, index: int) -> bytes:
        """The hash before a unit."""
        return self.hashes[index - 1] if index else root_hash(self.project, is_text=self.is_text)


@lru_cache(maxsize=256)
def root_hash(project: str, *, is_text: bool) -> bytes:
    """What stands before the first unit."""
    return blake2b(f"{'text' if is_text else 'ids'}\0{project}".encode(), digest_size=HASH_BYTES).digest()


def hashes_after(before: bytes, units: Iterable[bytes]) -> list[bytes]:
    """The hash up to the end of each unit."""
    found = []
    for unit in units:
        before = blake2b(before + unit, digest_size=HASH_BYTES).digest()
        found.append(before)
    return found


def chain_of(project: str, units: Sequence[bytes], *, is_text: bool) -> Chain:
    """Hash the units."""
    return Chain(project, is_text, units, hashes_after(root_hash(project, is_text=is_text), units))


def units_of_ids(int32: bytes) -> tuple[list[bytes], bytes]:
    """Cut token ids (int32) into whole units and the tail."""
    whole = len(int32) // _UNIT_BYTES * _UNIT_BYTES
    return [int32[at : at + _UNIT_BYTES] for at in range(0, whole, _UNIT_BYTES)], int32[whole:]


def first_word(unit_hash: bytes) -> int:
    """Four bytes of a hash as an int32: enough to look for a block that begins with the unit."""
    return int.from_bytes(unit_hash[:4], "big", signed=True)


def content_of(units: Sequence[bytes], *, is_text: bool) -> tuple[int, bytes]:
    """Return the coding and the content of a block of these units."""
    return (TEXT, packed(b",".join(units))) if is_text else narrow_int32(b"".join(units))


def plain_of(coding: int, content: bytes) -> bytes:
    """Return token ids as int32, text as the items with commas between them. Raises ValueError for a broken block."""
    return unpacked(content) if coding == TEXT else widen_int32(coding, content)


def units_of_block(coding: int, content: bytes) -> list[bytes]:
    """Inverse of `content_of`. Raises ValueError for a broken block."""
    plain = plain_of(coding, content)
    if coding != TEXT:
        return units_of_ids(plain)[0]
    try:
        return [bytes(item) for item in _ITEMS.decode(b"[%b]" % plain)]
    except msgspec.MsgspecError as error:
        raise ValueError(f"text that is no list of JSON: {error}") from error


class Cut(NamedTuple):
    """A request without its large values: JSON with ``null`` or ``[]`` for them, their places, and them as units.

    `places` are numbers of fields, one unit each; ``*`` behind the last one: a list, whose items are the other units.
    """

    rest: bytes
    places: str | None = None
    units: Sequence[bytes] = ()

    @property
    def whole(self) -> bytes:
        """The request as it was."""
        return self.rest if self.places is None else paste(self.rest, self.places, b",".join(self.units))


def cut_request(request: Mapping[str, Any]) -> Cut:
    """Take the large values out of a request. Raises InvalidRecord for what JSON cannot hold."""
    if not all(type(key) is str for key in request):
        return cut(json_bytes(request))
    items = {key: [json_bytes(one) for one in request[key]] for key in _GROW if isinstance(request.get(key), list)}
    return _cut(
        {key: b"[%b]" % b",".join(items[key]) if key in items else json_bytes(value) for key, value in request.items()},
        items,
    )


def cut(whole: bytes) -> Cut:
    """As `cut_request`, for JSON that anybody may have written: what would not come back as it is is not cut."""
    try:
        made = _cut({key: bytes(value) for key, value in _FIELDS.decode(whole).items()})
    except msgspec.MsgspecError:
        return Cut(whole)
    return made if made.whole == whole else Cut(whole)


def _cut(fields: dict[str, bytes], items: Mapping[str, Sequence[bytes]] | None = None) -> Cut:
    """What grows from call to call comes last, so that the calls of a conversation begin alike.

    `items` are those of the lists that are known already.
    """
    known = items or {}
    large = {place: key for place, (key, value) in enumerate(fields.items()) if len(value) >= _LEAST_VALUE}
    grows = [place for place, key in large.items() if key in _GROW and fields[key].startswith(b"[{")][:1]
    alone = [place for place in large if place not in grows]
    units = [fields[large[place]] for place in alone]
    for key in (large[place] for place in grows):
        units += known[key] if key in known else [bytes(item) for item in _ITEMS.decode(fields[key])]
    for place, key in large.items():
        fields[key] = b"[]" if place in grows else b"null"
    places = [*map(str, alone), *(f"{place}*" for place in grows)]
    return Cut(_written(fields), ",".join(places) or None, units)


def paste(rest: bytes, places: str, joined: bytes) -> bytes:
    """Put the values back in their places. `joined` are the units with commas between them."""
    fields = {key: bytes(value) for key, value in _FIELDS.decode(rest).items()}
    keys = list(fields)
    alone = places.split(",")
    grows = alone.pop() if alone[-1].endswith("*") else None
    if alone:
        units = [bytes(item) for item in _ITEMS.decode(b"[%b]" % joined)]
        for place, unit in zip(alone, units, strict=False):
            fields[keys[int(place)]] = unit
        joined = b",".join(units[len(alone) :])
    if grows is not None:
        fields[keys[int(grows[:-1])]] = b"[%b]" % joined
    return _written(fields)


def _written(fields: Mapping[str, bytes]) -> bytes:
    return b"{%b}" % b",".join([b"%b:%b" % (msgspec.json.encode(key), value) for key, value in fields.items()])
