"""Task files: ids from content, every bad line named, order kept."""

import hashlib
import json
from pathlib import Path

import pytest

from tracegrad.adapters.rollout_errors import TaskFileError
from tracegrad.adapters.tasks import content_id, load_tasks, parse_tasks


def test_an_id_is_the_hash_of_the_canonical_input() -> None:
    lines = ['{"input": {"b": 1, "a": "é"}}', '{"id": "q7", "input": {"a": 2}, "reference": {"answers": ["x"]}}']
    first, second = parse_tasks("\n".join(lines) + "\n\n")
    assert first.task_id == "task_" + hashlib.sha256('{"a":"é","b":1}'.encode()).hexdigest()[:32]
    assert first.task_id == content_id({"a": "é", "b": 1})
    assert (second.task_id, second.input, second.reference) == ("q7", {"a": 2}, {"answers": ["x"]})


def test_every_bad_line_is_named_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(
        "\n".join(
            [
                '{"input": {"q": 1}}',
                '{"input": {"q": 2}',
                "",
                '{"question": "who"}',
                "[1]",
                '{"input": {"q": 1}, "reference": {"other": 1}}',
                '{"input": {"q": NaN}}',
                '{"id": 7, "input": {}}',
                '{"input": {}, "reference": [1]}',
            ]
        )
    )
    with pytest.raises(TaskFileError) as error:
        load_tasks(path)
    message = str(error.value)
    assert f"{path} has 7 bad lines" in message
    for part in [
        "line 2: not JSON",
        "line 4: unknown keys question",
        "line 5: a list, not an object",
        f"line 6: the same task as line 1 (id {content_id({'q': 1})})",
        "line 7: NaN is not JSON",
        "line 8: `id` must be a string",
        "line 9: `reference` is not an object: write {",
    ]:
        assert part in message


def test_a_line_separator_inside_a_string_does_not_cut_the_line() -> None:
    text = json.dumps({"input": {"q": "a\u2028b"}}, ensure_ascii=False)
    assert parse_tasks(text)[0].input == {"q": "a\u2028b"}


def test_missing_and_empty_files_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TaskFileError, match="cannot read"):
        load_tasks(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(TaskFileError, match="one JSON object a line"):
        load_tasks(tmp_path / "empty.jsonl")
