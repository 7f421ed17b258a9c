"""The demo's numbers: pairing, the brevity control, and what is left out, with the arithmetic."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.rag_qa import demo_report
from examples.rag_qa.demo_memory import tree_memory_bytes
from examples.rag_qa.demo_processes import DemoError, run, tail
from examples.rag_qa.demo_report import compare, cut, read_answers, read_golds, read_lines


def row(task: str, answer: str, f1: float, *, status: str = "closed") -> dict[str, object]:
    output = None if status == "failed" else json.dumps({"question": "?", "answer": answer})
    return {"task_id": task, "status": status, "scores": {"f1": f1} if status == "closed" else {}, "output": output}


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text(json.dumps({"report": {}, "rows": rows}))
    return path


def test_the_control_cuts_the_untrained_answers_to_the_trained_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_report, "MIN_PAIRS", 2)
    golds = {"a": ["Paris"], "b": ["ice hockey"], "c": ["x"]}
    before = read_answers(
        write(tmp_path / "before", [row("a", "Paris is the capital", 2 / 5), row("b", "It is ice hockey", 2 / 3)])
    )
    after = read_answers(
        write(
            tmp_path / "after", [row("a", "Paris", 1.0), row("b", "ice hockey", 1.0), row("c", "", 0, status="failed")]
        )
    )
    found = compare(before, after, golds)
    # Trained words: (1 + 2) / 2 = 1.5, cut at 2: "Paris is" -> 2*1/(2+1); "It is" -> 0.
    assert found.mean_words == 1.5
    assert found.control == pytest.approx((2 / 3 + 0) / 2)
    assert (found.before, found.after.mean, found.n) == (pytest.approx((2 / 5 + 2 / 3) / 2), 1.0, 2)
    assert found.diff.mean == pytest.approx(1.0 - (2 / 5 + 2 / 3) / 2)
    assert found.control_diff.mean == pytest.approx(1.0 - 1 / 3)
    assert found.diff.low <= found.diff.mean <= found.diff.high


def test_too_few_pairs_are_no_result(tmp_path: Path) -> None:
    rows = read_answers(write(tmp_path / "some", [row(str(i), "x", 0.0) for i in range(199)]))
    with pytest.raises(DemoError, match="199"):
        compare(rows, rows, {str(i): ["x"] for i in range(199)})


def test_cutting_keeps_whole_words() -> None:
    assert cut("The Mid-Atlantic\nRidge is long", 3) == "The Mid-Atlantic Ridge"
    assert cut("short", 3) == "short"


def test_golds_and_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    line = {"id": "t", "input": {"question": "a\u2028b"}, "reference": {"answers": ["x"]}}
    tasks.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_golds(tasks) == {"t": ["x"]}
    (tmp_path / "mixed").write_text('warning: something\n{"seconds": 2}\n')
    assert read_lines(tmp_path / "mixed") == [{"seconds": 2}]
    assert read_lines(tmp_path / "none") == []


def test_a_failing_command_is_an_error_that_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="the evaluation"):
        run(["no-such-command"], "the evaluation", tmp_path / "logs" / "eval.log")
    assert (tmp_path / "logs" / "eval.log").exists()
    assert tail(tmp_path / "nothing.log") == ""


def test_memory_is_that_of_the_process_and_its_children() -> None:
    """A child that holds 64 MB adds at least that, and takes it away when it ends."""
    program = "import sys; held = bytearray(b'x') * (64 << 20); print('held', flush=True); sys.stdin.read()"
    alone = tree_memory_bytes()
    if alone is None:
        pytest.skip("no /proc here")
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert child.stdin is not None
        both = tree_memory_bytes()
        child.stdin.close()
    assert both is not None
    assert both - alone > 60 << 20
    assert (tree_memory_bytes(child.pid) or 0) == 0
