"""A folder of Parquet files that HF `datasets` loads in one line, and that goes back into a store byte for byte.

One file a table; calls have their choices nested in them, token ids as list<int32>, logprobs as list<float32>, what is
JSON as its text. Where tails were cut off, `kept_counts` and `kept_ids` say what was left for each token. A dataset
card names the files, so that `load_dataset(FOLDER)` gives the calls and `load_dataset(FOLDER, "rewards")` another
table. Both ways stream: memory is bounded by a page, which is a row group (see `interchange.PAGE_BYTES`). Refuses a
folder that is not empty, and files of another making or schema. Needs pyarrow, which is imported here only when it is
used. Called by the commands `export` and `import`.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import BigInteger, Boolean, Double, Integer, String, Text

from tracegrad.tracestore.codec import Float32s, JsonText, decode_json, encode_json
from tracegrad.tracestore.errors import ConfigError, Conflict, InvalidRecord, NotFound, StoreUnavailable
from tracegrad.tracestore.interchange import CARRIED, Chosen, Row
from tracegrad.tracestore.parquet_whole import check_whole
from tracegrad.tracestore.payload_schema import call_payloads, choice_payloads
from tracegrad.tracestore.schema import HEAD, choices
from tracegrad.tracestore.store import Store

if TYPE_CHECKING:
    import pyarrow as pa

Heard = Callable[[str, int], None]
_MARK = b"tracegrad"
_ROWS_AT_ONCE = 500
_KEPT = ("kept_counts", "kept_ids")
_CHOICE = ("choice_index", "token_ids", "logprobs", "finish_reason", "flags", "message", "version_spans", *_KEPT)
_CARD = """---
configs:
{configs}
---
Traces of tracegrad, schema {head}. `load_dataset("this folder")` gives the calls, `load_dataset("this folder", "runs")`
another table; `tracegrad import` puts all of them into a store. Columns of JSON hold its text.
"""


def export_to(store: Store, folder: Path, chosen: Chosen, heard: Heard = lambda table, rows: None) -> dict[str, int]:
    """Write the chosen runs with all that training and study need; return the rows by table.

    Raises:
        ConfigError: pyarrow is not installed.
        Conflict: the folder is there and not empty, or what was exported names what was deleted meanwhile.
        NotFound: a run that was asked for by id is not stored.
        StoreUnavailable: a file cannot be written.
    """
    _arrow()
    for run_id in chosen.run_ids:
        store.get_run(run_id)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise Conflict(f"{folder} is there and not empty: name a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = {name: _write(store, folder, name, chosen, heard) for name in reversed(CARRIED)}
        check_whole(folder)
        (folder / "README.md").write_text(_card())  # last: a folder without it is not finished
    except OSError as error:
        raise StoreUnavailable(f"cannot write to {folder}: {error}; is there room?") from error
    return {name: rows[name] for name in CARRIED}


def import_from(store: Store, folder: Path, heard: Heard = lambda table, rows: None) -> dict[str, int]:
    """Read an exported folder into a store; return how many rows were new, by table. It may be repeated.

    Raises:
        ConfigError: pyarrow is not installed.
        NotFound: a file is missing.
        InvalidRecord: a file is not ours, of another schema, or broken.
        Conflict: something is in the store already and says otherwise.
    """
    arrow = _arrow()
    files = {name: folder / f"{name}.parquet" for name in CARRIED}
    missing = [path.name for path in (*files.values(), folder / "README.md") if not path.is_file()]
    if missing:
        raise NotFound(f"{folder} is no whole export: it has no {missing[0]}; `tracegrad export` makes one")
    new = dict.fromkeys(CARRIED, 0)
    try:
        for name, path in files.items():
            _check_ours(path, name)
            for rows in _read(path, name):
                new[name] += store.take_in(name, rows)
                heard(name, new[name])
    except arrow.ArrowException as error:
        raise InvalidRecord(f"{path} cannot be read: {error}") from error
    return new


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("Parquet needs pyarrow: pip install pyarrow") from error
    return pyarrow


def _card() -> str:
    lines = []
    for name in ("calls", *(name for name in CARRIED if name != "calls")):
        lines += [f"- config_name: {name}", f"  data_files: {name}.parquet"]
        lines += ["  default: true"] if name == "calls" else []
    return _CARD.format(configs="\n".join(lines), head=HEAD)


def _schema(name: str) -> "pa.Schema":
    pa = _arrow()
    fields = [pa.field(one, _type(CARRIED[name].table.c[one].type)) for one in CARRIED[name].columns]
    if name == "calls":
        content = {**{c.name: c for c in choices.c}, **{c.name: c for c in choice_payloads.c}}
        lists = dict.fromkeys(("token_ids", *_KEPT), pa.list_(pa.int32())) | {"flags": pa.list_(pa.string())}
        choice = [pa.field(one, lists[one] if one in lists else _type(content[one].type)) for one in _CHOICE]
        fields.append(pa.field("prompt_ids", pa.list_(pa.int32())))
        fields += [pa.field(one, _type(call_payloads.c[one].type)) for one in ("request", "requested", "effective")]
        fields.append(pa.field("choices", pa.list_(pa.struct(choice))))
    return pa.schema(fields, {_MARK: json.dumps({"table": name, "schema": HEAD}).encode()})


def _type(stored: Any) -> "pa.DataType":
    pa = _arrow()
    kinds = (
        (Float32s, pa.list_(pa.float32())),
        (JsonText, pa.string()),
        (Boolean, pa.bool_()),
        (BigInteger, pa.int64()),
        (Integer, pa.int32()),
        (Double, pa.float64()),
        ((String, Text), pa.string()),
    )
    return next(kind for known, kind in kinds if isinstance(stored, known))


def _write(store: Store, folder: Path, name: str, chosen: Chosen, heard: Heard) -> int:
    pa = _arrow()
    schema, count = _schema(name), 0
    with pa.parquet.ParquetWriter(folder / f"{name}.parquet", schema, compression="zstd") as writer:
        for rows in store.pages(name, chosen):
            writer.write_batch(pa.RecordBatch.from_arrays([_array(field, rows) for field in schema], schema=schema))
            count += len(rows)
            heard(name, count)
    return count


def _array(field: "pa.Field", rows: Sequence[Row]) -> "pa.Array":
    pa = _arrow()
    values = [row[field.name] for row in rows]
    if not pa.types.is_list(field.type):
        return pa.array(values, type=field.type)
    if field.name == "flags":
        return pa.array([decode_json(value) for value in values], type=field.type)
    if field.name != "choices":
        joined = b"".join(value or b"" for value in values)
        numbers = pa.Array.from_buffers(field.type.value_type, len(joined) // 4, [None, pa.py_buffer(joined)])
        return _lists(field, [None if value is None else len(value) // 4 for value in values], numbers)
    flat = [choice for value in values for choice in value]
    parts = [_array(part, flat) for part in field.type.value_type]
    struct = pa.StructArray.from_arrays(parts, fields=list(field.type.value_type))
    return _lists(field, [len(value) for value in values], struct)


def _lists(field: "pa.Field", lengths: Sequence[int | None], values: "pa.Array") -> "pa.Array":
    pa = _arrow()
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + (length or 0))
    unknown = pa.array([length is None for length in lengths], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values, type=field.type, mask=unknown)


def _check_ours(path: Path, name: str) -> None:
    pa = _arrow()
    found = pa.parquet.read_schema(path)
    mark = json.loads((found.metadata or {}).get(_MARK, b"{}"))
    if mark.get("table") != name:
        raise InvalidRecord(f"{path} was not made by `tracegrad export`: only its own files can be imported")
    if not found.equals(_schema(name)):
        raise InvalidRecord(
            f"{path} is of schema {mark.get('schema')}, this code reads {HEAD}: export again with this version"
        )


def _batches(file: "pa.parquet.ParquetFile") -> Iterator["pa.RecordBatch"]:
    """Yield batches none of which reaches over two pages of the export: those are what memory is bounded by."""
    for page in range(file.num_row_groups):
        yield from file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[page])


def _read(path: Path, name: str) -> Iterator[list[Row]]:
    pa = _arrow()
    with pa.parquet.ParquetFile(path) as file:
        for batch in _batches(file):
            columns = {field.name: _values(field, batch.column(field.name)) for field in _schema(name)}
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            for row in rows if name == "calls" else ():
                row["n_prompt"] = None if row["prompt_ids"] is None else len(row["prompt_ids"]) // 4
                for choice in row["choices"]:
                    choice["n_tokens"] = len(choice["token_ids"]) // 4
            yield rows


def _values(field: "pa.Field", found: "pa.Array") -> list[Any]:
    """The inverse of `_array`."""
    pa = _arrow()
    if not pa.types.is_list(field.type):
        return list(found.to_pylist())
    if field.name == "flags":
        return [encode_json(flags) for flags in found.to_pylist()]
    offsets, known = found.offsets.to_pylist(), found.is_valid().to_pylist()
    ends = list(pairwise(offsets))
    if field.name == "choices":
        parts = found.values
        columns = {part.name: _values(part, parts.field(part.name)) for part in field.type.value_type}
        flat = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [flat[start:end] for start, end in ends]
    if found.values.null_count:
        raise InvalidRecord(f"{field.name} has a token without a value: the file is not as it was exported")
    buffer = found.values.buffers()[1]
    first = found.values.offset
    raw = b"" if buffer is None else memoryview(buffer)
    return [
        bytes(raw[4 * (first + start) : 4 * (first + end)]) if valid else None
        for (start, end), valid in zip(ends, known, strict=True)
    ]
