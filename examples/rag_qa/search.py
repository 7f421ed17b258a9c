"""BM25 over Wikipedia lead summaries, cut into passages of at most 60 words. Who calls it: `app.py`, `questions.py`.

The index is built once per process (about 2 s) and never written: it is as deterministic as the corpus file.
"""

import json
import os
import re
from functools import lru_cache
from pathlib import Path
from threading import Lock

import bm25s

from examples.rag_qa.fetch import CORPUS_FILE, cache_root

PASSAGE_WORDS = 60
_BUILDING = Lock()  # lru_cache alone would let concurrent first calls build several
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(0-9])")


class Search:
    """An in-memory BM25 index; `top` is deterministic and safe to call from several threads."""

    def __init__(self, passages: list[str]) -> None:
        self.passages = passages
        self._index = bm25s.BM25()
        self._index.index(_tokens(passages), show_progress=False)

    def top(self, query: str, k: int = 2) -> list[str]:
        """Return up to `k` passages, best first; fewer when no further passage shares a word with `query`."""
        tokens = _tokens([query])
        if not tokens[0]:
            return []
        rows, scores = self._index.retrieve(tokens, k=k, show_progress=False)
        return [self.passages[row] for row, score in zip(rows[0], scores[0], strict=True) if score > 0]


def split_passages(title: str, text: str, words: int = PASSAGE_WORDS) -> list[str]:
    """Cut `text` at sentence ends into passages of at most `words` words, the title included at the head of each."""
    room = max(words - len(title.split()), words // 2)
    passages: list[str] = []
    current: list[str] = []
    for sentence in _SENTENCE_END.split(text.strip()):
        rest = sentence.split()
        if current and len(current) + len(rest) > room:
            passages.append(f"{title}: {' '.join(current)}")
            current = []
        while len(rest) > room:
            passages.append(f"{title}: {' '.join(rest[:room])}")
            rest = rest[room:]
        current += rest
    if current:
        passages.append(f"{title}: {' '.join(current)}")
    return passages


def wikipedia() -> Search:
    """Return the index over ``$RAG_QA_CORPUS``, or over the file that `fetch.py` put into the cache.

    Raises:
        FileNotFoundError: the corpus has not been fetched.
    """
    with _BUILDING:
        return _build_wikipedia()


@lru_cache(maxsize=1)
def _build_wikipedia() -> Search:
    path = Path(os.environ.get("RAG_QA_CORPUS") or cache_root() / CORPUS_FILE)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: run `python -m examples.rag_qa.fetch` first")
    articles = json.loads(path.read_text(encoding="utf-8"))
    return Search([p for a in articles.values() for p in split_passages(a["title"], a["extract"])])


def _tokens(texts: list[str]) -> list[list[str]]:
    """Split, lower and drop stop words; a plain list, so that no vocabulary is shared between calls."""
    tokens: list[list[str]] = bm25s.tokenize(texts, stopwords="en", return_ids=False, show_progress=False)
    return tokens
