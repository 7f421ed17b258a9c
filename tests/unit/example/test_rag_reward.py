"""The example's scores, with the arithmetic: SQuAD normalisation, token F1, exact match, format, recall."""

from types import SimpleNamespace

import pytest

from examples.rag_qa.reward import best_f1, exact_match, mentions, normalise, reward, token_f1, well_formed


def test_normalisation_folds_case_punctuation_articles_and_space() -> None:
    assert normalise("  The Mid-Atlantic\tRidge, an ocean ridge. ") == "midatlantic ridge ocean ridge"
    assert normalise("A.D. 1066") == "ad 1066"


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("Paris", "Paris", 1.0),
        # 1 shared of 4 given and 1 wanted: P = 1/4, R = 1, F1 = 2 * 1 / (4 + 1)
        ("It is in Paris", "Paris", 0.4),
        # "the" goes; given {palace, of, westminster}, wanted {westminster, palace}: 2 * 2 / (3 + 2)
        ("The Palace of Westminster", "Westminster Palace", 0.8),
        # a multiset: one "new" counts once. 2 * 2 / (4 + 3)
        ("new new new york", "New York City", 4 / 7),
        ("London", "Paris", 0.0),
        ("", "Paris", 0.0),
        ("the", "", 1.0),  # both empty once the article is gone
    ],
)
def test_token_f1(answer: str, gold: str, expected: float) -> None:
    assert token_f1(answer, gold) == pytest.approx(expected, abs=1e-12)


def test_the_best_of_the_gold_answers_counts() -> None:
    assert best_f1("Orange River", ["Vaal", "Orange", "The Orange river"]) == 1.0
    assert best_f1("Orange", ["Vaal", "Orange River"]) == pytest.approx(2 / 3)
    assert best_f1("Orange", []) == 0.0


def test_exact_match_is_after_normalisation_only() -> None:
    assert exact_match("the HIPPOPOTAMUS!", ["Hippo", "Hippopotamus"]) == 1.0
    assert exact_match("a hippopotamus called Bob", ["Hippopotamus"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("ice hockey", 1.0), ("one two three four five six seven eight", 1.0), ("", 0.0), ("ice\nhockey", 0.0)],
)
def test_format(answer: str, expected: float) -> None:
    assert well_formed(answer) == expected
    assert well_formed("one two three four five six seven eight nine") == 0.0


def test_a_gold_answer_must_stand_word_for_word() -> None:
    assert mentions(["Rivers: It flows to the Ohio."], ["the Ohio"])
    assert not mentions(["Rivers: Ohioans live there."], ["Ohio"])
    assert not mentions(["Anything"], ["the"])  # empty after normalisation: stands nowhere


def test_each_role_is_paid_for_its_own_work_and_the_run_is_reported() -> None:
    task = SimpleNamespace(reference={"answers": ["Ottawa"]})
    output = {"answer": "It is Ottawa.", "passages": "Canada: Its capital is Ottawa.\n\nOttawa: A city."}
    # given {it, is, ottawa}, wanted {ottawa}: 2 * 1 / (3 + 1)
    assert reward(task, output) == [
        {"name": "f1", "value": 0.5},
        {"name": "em", "value": 0.0},
        {"name": "format", "value": 1.0},
        {"name": "answer_f1", "value": 0.5, "role": "answerer"},
        {"name": "recall", "value": 1.0, "role": "rewriter"},
    ]


def test_a_run_without_an_answer_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(KeyError):
        reward(SimpleNamespace(reference={"answers": ["Ottawa"]}), {"passages": ""})
