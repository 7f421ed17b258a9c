"""The example's tasks: real questions whose gold answer can be retrieved, split once into train, dev and held-out.

A question of Natural Questions or TriviaQA (dev and test sets) is kept when a gold answer of at least three letters
stands in the two passages that BM25 finds for the question itself, and not in the question. The split goes by a seeded
hash of the question's normalised words, so neither the order of the files nor Python's random matters. `heldout` is
scored before and after and used for nothing else; `dev` is what the recipe was chosen on; the rest is `train`.

    python -m examples.rag_qa.questions --out DIR      writes DIR/{train,dev,heldout}.jsonl
"""

import argparse
import ast
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.rag_qa.fetch import QUESTION_SETS, cache_root
from examples.rag_qa.reward import mentions, normalise
from examples.rag_qa.search import Search, wikipedia

SPLIT_SEED = "rag-qa-1"
SPLIT_SIZES = {"heldout": 512, "dev": 256}
MIN_ANSWER_LETTERS = 3
PINNED_SHA256 = {
    "heldout": "53b040883077fb41c079e62a548287a6b30d892604606a6072759241da5b1328",
    "dev": "5050159e20f6c8ae619dc816e00f75f1017e69dcd0f4fb2fdef467d071b8d1e1",
    "train": "cb42e56b7da0cae4df2ba041c85afa9e6b0d127fa40463ea48697b44751a697a",
}
"""The files as they were when the recipe was settled. Another BM25 may break a tie the other way: it is said."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with every accepted answer; `source` is the file it came from."""

    text: str
    answers: tuple[str, ...]
    source: str

    @property
    def key(self) -> str:
        """The normalised words: what makes two questions the same."""
        return normalise(self.text)

    def task(self) -> dict[str, object]:
        """Return the line of a task file."""
        digest = hashlib.sha256(self.key.encode()).hexdigest()[:16]
        return {
            "id": f"{self.source}-{digest}",
            "input": {"question": self.text},
            "reference": {"answers": self.answers},
        }


def read_questions(text: str, source: str) -> Iterator[Question]:
    """Read a topics file: question, tab, the answers as a Python list (itself quoted where it holds quotes)."""
    for line in text.split("\n"):
        if not line.strip():
            continue
        question, _, raw = line.rstrip("\r").partition("\t")
        raw = raw.strip()
        if raw.startswith('"') and raw.endswith('"'):
            raw = raw[1:-1].replace('""', '"')
        yield Question(text=question.strip(), answers=tuple(ast.literal_eval(raw)), source=source)


def answerable(question: Question, search: Search) -> Question | None:
    """Return `question` with the answers that count, or None where no passage found for it holds one of them."""
    asked = f" {question.key} "
    answers = tuple(
        a for a in question.answers if len(normalise(a)) >= MIN_ANSWER_LETTERS and f" {normalise(a)} " not in asked
    )
    if not answers or not mentions(search.top(question.text, k=2), answers):
        return None
    return Question(text=question.text, answers=answers, source=question.source)


def split(questions: Sequence[Question]) -> dict[str, list[Question]]:
    """Split by hash order, each question once (the first of equal ones stays): disjoint by normalised question."""
    unique: dict[str, Question] = {}
    for question in questions:
        unique.setdefault(question.key, question)
    ordered = [unique[key] for key in sorted(unique, key=_place)]
    parts: dict[str, list[Question]] = {}
    start = 0
    for name, size in SPLIT_SIZES.items():
        parts[name] = ordered[start : start + size]
        start += size
    parts["train"] = ordered[start:]
    return parts


def write_tasks(out: Path, cache: Path, say: Callable[[str], None] = print) -> dict[str, Path]:
    """Write the task files under `out` unless they are there; return their paths by name. About half a minute."""
    paths = {name: out / f"{name}.jsonl" for name in (*SPLIT_SIZES, "train")}
    if all(path.exists() for path in paths.values()):
        return paths
    out.mkdir(parents=True, exist_ok=True)
    search = wikipedia()
    kept: list[Question] = []
    for name in QUESTION_SETS:
        text = (cache / "questions" / f"{name}.txt").read_text(encoding="utf-8")
        read = list(read_questions(text, name))
        found = [q for question in read if (q := answerable(question, search)) is not None]
        say(f"      {name}: {len(read):,} questions, {len(found):,} answerable from two passages")
        kept += found
    for name, questions in split(kept).items():
        lines = "".join(json.dumps(q.task(), ensure_ascii=False) + "\n" for q in questions)
        partial = paths[name].with_suffix(".partial")
        partial.write_text(lines, encoding="utf-8")
        partial.rename(paths[name])
        same = hashlib.sha256(lines.encode()).hexdigest() == PINNED_SHA256[name]
        say(f"      {name}: {len(questions):,} tasks" + ("" if same else " (not the pinned file: another BM25?)"))
    return paths


def _place(key: str) -> str:
    return hashlib.sha256(f"{SPLIT_SEED}:{key}".encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the example's task files.")
    parser.add_argument("--out", type=Path, default=cache_root() / "tasks", help="folder (default: %(default)s)")
    write_tasks(parser.parse_args().out, cache_root())


if __name__ == "__main__":
    main()
