"""A part of the configuration file, and where each key stands. Refuses unknown keys. Called by `config`."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

import msgspec

_MOST_NAMED = 30

AtLeastZero = Annotated[float, msgspec.Meta(ge=0.0)]
Positive = Annotated[float, msgspec.Meta(gt=0.0)]
Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the file. Unknown keys are refused."""


def explained(message: str, root: type[Section]) -> str:
    """Return msgspec's message; where it names an unknown key, with the place of that key or with the near misses."""
    if "unknown field `" not in message:
        return message
    field = message.split("unknown field `", 1)[1].split("`", 1)[0]
    places = sorted({f"under `{place}`" if place else "at the top" for key, place in _keys(root) if key == field})
    if places:
        return f"{message}; it stands {' or '.join(places[:3])}"
    return message + near_misses(field, {key for key, _ in _keys(root)})


def near_misses(word: str, known: Any) -> str:
    """Return the end of an error message: the known words that look like `word`, else all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3)
    if close:
        return f"; did you mean {', '.join(close)}?"
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f" (known: {', '.join(names[:_MOST_NAMED]) or 'none'}{more})"


def _keys(section: type[Section], place: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, the dotted place of its section) for every key of the file; NAME stands for a key of the user's."""
    for field in msgspec.structs.fields(section):
        yield field.encode_name, place
        inner = f"{place}.{field.encode_name}" if place else field.encode_name
        for kind in (field.type, *get_args(field.type)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from _keys(kind, f"{inner}.NAME" if get_origin(field.type) is Mapping else inner)
