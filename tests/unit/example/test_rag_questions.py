"""The split: disjoint by normalised question, the same everywhere (hash pinned), only retrievable questions."""

import hashlib
import json
import random

import pytest

from examples.rag_qa.questions import SPLIT_SIZES, Question, answerable, read_questions, split
from examples.rag_qa.reward import normalise
from examples.rag_qa.search import PASSAGE_WORDS, Search, split_passages


def invented(n: int) -> list[Question]:
    return [Question(text=f"Who is number {i}?", answers=(f"answer {i}",), source="nq.dev") for i in range(n)]


def test_the_split_is_disjoint_by_normalised_question_and_loses_none() -> None:
    # The same question in other words' clothes must not land on both sides.
    twins = [Question(text=f"who is the NUMBER {i}", answers=("other",), source="trivia.dev") for i in range(1000)]
    parts = split(invented(1000) + twins)
    keys = {name: {q.key for q in part} for name, part in parts.items()}
    assert {name: len(part) for name, part in parts.items()} == {**SPLIT_SIZES, "train": 1000 - 512 - 256}
    assert keys["train"] | keys["dev"] | keys["heldout"] == {q.key for q in invented(1000)}
    assert sum(map(len, keys.values())) == 1000
    assert all(q.source == "nq.dev" for part in parts.values() for q in part)  # the first of equals stays


def test_the_split_is_pinned_and_independent_of_the_order_of_the_files() -> None:
    questions = invented(1000)
    random.Random(3).shuffle(questions)
    lines = [json.dumps([name, *(q.text for q in part)]) for name, part in sorted(split(questions).items())]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "c2b0249c2e788f1399253b28be8a0bc2b7db9dd57a5bb21e68a2f5be10bd2ea7"


def test_topics_files_are_read_with_their_three_ways_of_quoting() -> None:
    text = (
        "who sings it\t['Linda Davis']\n"
        'Which sport?\t"[\'Boxing\', ""Gentleman\'s sport""]"\n'
        "\n"
        "odd\u2028separator\t['x']\n"  # a line separator inside a question does not end it
    )
    read = list(read_questions(text, "nq.dev"))
    assert [q.text for q in read] == ["who sings it", "Which sport?", "odd\u2028separator"]
    assert read[1].answers == ("Boxing", "Gentleman's sport")
    assert read[1].task() == {
        "id": "nq.dev-" + hashlib.sha256(b"which sport").hexdigest()[:16],
        "input": {"question": "Which sport?"},
        "reference": {"answers": ("Boxing", "Gentleman's sport")},
    }


@pytest.fixture(scope="module")
def search() -> Search:
    return Search(
        [
            "Canada: Its capital is Ottawa, on the river.",
            "Belize: A country of Central America.",
            "Boxing: A sport of two people in a ring.",
            "River: Water that flows.",
        ]
    )


def test_only_questions_whose_answer_is_retrieved_are_kept(search: Search) -> None:
    def ask(text: str, *answers: str) -> Question | None:
        return answerable(Question(text=text, answers=answers, source="nq.dev"), search)

    kept = ask("What is the capital of Canada?", "Toronto", "Ottawa", "ca")
    assert kept is not None
    assert kept.answers == ("Toronto", "Ottawa")  # "ca" is too short to be found other than by chance
    assert ask("What is the capital of Canada?", "Toronto") is None
    assert ask("Is Ottawa the capital of Canada?", "Ottawa") is None  # the question gives it away


def test_search_ranks_and_returns_nothing_where_no_word_is_shared(search: Search) -> None:
    assert search.top("capital Canada river", k=2) == [
        "Canada: Its capital is Ottawa, on the river.",
        "River: Water that flows.",
    ]
    assert search.top("zebra") == []
    assert search.top("the of") == []


def test_passages_keep_to_their_words_and_lose_none() -> None:
    text = "One two three. " * 30 + "word " * 100
    passages = split_passages("A Title", text.strip())
    assert max(len(p.split()) for p in passages) <= PASSAGE_WORDS
    assert all(p.startswith("A Title: ") for p in passages)
    assert " ".join(p.removeprefix("A Title: ") for p in passages) == " ".join(text.split())


def test_normalised_keys_ignore_articles() -> None:
    assert normalise("Who is the king?") == normalise("who is king")
