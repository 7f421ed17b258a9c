"""One table of words: whatever the trainer, conservation or the proxy can say has its sentence."""

import ast
from pathlib import Path

from tracegrad.adapters.proxy.capture import ECHO, SEVERAL_PROMPTS
from tracegrad.adapters.proxy.recorder import REASONING_HIDDEN
from tracegrad.adapters.proxy.redaction import REDACTED
from tracegrad.tracestore import reasons
from tracegrad.tracestore.reasons import DELETED, QUARANTINES, REASONS, sentences, words_of

ROOT = Path(__file__).resolve().parents[3]


def tree(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def imported_reasons(path: str) -> set[str]:
    """The words that a module takes from the table."""
    names = {
        alias.name
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ImportFrom) and node.module == "tracegrad.tracestore.reasons"
        for alias in node.names
        if alias.name.isupper()
    }
    return {getattr(reasons, name) for name in names}


def test_every_reason_of_the_trainer_has_its_sentence() -> None:
    """It gives constants of the table only: a literal in its place would be a word that nobody explains."""
    given = (imported_reasons("trainer/samples.py") | imported_reasons("tracestore/rules.py")) - {reasons.QUARANTINED}
    assert len(given) == 20
    assert given <= REASONS.keys()
    returned = [
        node.value
        for path in ("trainer/samples.py", "tracestore/rules.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Return) and node.value is not None
    ]
    assert [ast.unparse(value) for value in returned if isinstance(value, ast.Constant) and value.value] == []


def test_every_reason_of_conservation_has_its_sentence() -> None:
    given = imported_reasons("tracestore/standing.py") - {reasons.QUARANTINED, DELETED}
    assert len(given) == 27
    assert given <= REASONS.keys()
    said = [
        node.args[0]
        for node in ast.walk(tree("tracestore/standing.py"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "literal"
    ]
    words = [one for one in said if not (isinstance(one, ast.Constant) and isinstance(one.value, int))]
    assert words and all(isinstance(word, ast.Name) for word in words)


def test_every_quarantine_of_the_proxy_has_its_sentence() -> None:
    """Those that the recorder finds stand there as (reason, details), as `flaw`, or by name."""
    found = {ECHO, SEVERAL_PROMPTS, REASONING_HIDDEN, REDACTED}
    for path in sorted((ROOT / "adapters" / "proxy").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Assign | ast.Return) or node.value is None:
                continue
            target = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else "return"
            value = node.value
            if isinstance(value, ast.Tuple) and (
                target == "(reason, detail)" or (target == "return" and path.stem == "recorder")
            ):
                value = value.elts[0]
            elif not target.endswith("flaw"):
                continue
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found.add(value.value)
    assert len(found) == 16
    assert found | {DELETED} == QUARANTINES.keys(), "`removal` puts calls aside as well"


def test_a_sentence_says_how_much_what_and_what_to_do() -> None:
    told = sentences({"greedy": 12, "quarantined: usage mismatch": 30, "eval": 30, "quarantined: brand new": 1})
    assert [one.split(";")[0] for one in told] == [
        "eval: 30 tokens of evaluation runs",
        "quarantined: usage mismatch: 30 tokens of calls whose token counts are not those that the engine says it used",
        "greedy: 12 tokens of calls at temperature 0, which are no samples",
        "quarantined: brand new: 1 tokens of calls put aside for a reason that this version does not know",
    ]
    assert words_of("nobody's word").means.startswith("put aside")
    every = [*REASONS.values(), *QUARANTINES.values()]
    assert all(words.means and words.do and not words.do.endswith(".") for words in every)
