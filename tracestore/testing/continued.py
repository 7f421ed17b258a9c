"""What every backend must give back of calls that go on from one another."""

from dataclasses import replace

import pytest

from tracegrad.tracestore.errors import Conflict
from tracegrad.tracestore.overview import DriftCount
from tracegrad.tracestore.records import Continues, EarlierCall
from tracegrad.tracestore.store import Store
from tracegrad.tracestore.testing.rows import make_call


class ContinuedContract:
    """The past of a run, and the drift of its prompts."""

    def test_what_a_call_continues_is_kept(self, store: Store) -> None:
        """Every field; none is none; the same call with another past is another call."""
        origins = {
            "a": None,
            "b": Continues(call_id="a", choice=1, drift="retokenised", token_in=True),
            "c": Continues(call_id="b", choice=None, drift="edited"),
            "d": Continues(call_id="c", choice=0),
        }
        calls = [make_call(name, "r", continues=origin) for name, origin in origins.items()]
        store.append_calls(calls)
        assert {call.call_id: call.continues for call in store.trace("r").calls} == origins
        store.append_calls(calls)
        with pytest.raises(Conflict):
            store.append_calls([replace(calls[1], continues=Continues(call_id="a", choice=1))])

    def test_drift_is_counted_by_cause(self, store: Store) -> None:
        """Of a project, by model; calls that continue nothing do not count."""
        plain, exact = None, Continues(call_id="x", choice=0)
        rewritten = Continues(call_id="x", choice=0, drift="template")
        for number, (origin, model, project) in enumerate(
            [
                (plain, "main", "default"),
                (exact, "main", "default"),
                (rewritten, "main", "default"),
                (replace(rewritten, token_in=True), "main", "default"),
                (rewritten, "main", "default"),
                (exact, "other", "default"),
                (exact, "main", "elsewhere"),
            ]
        ):
            call = make_call(f"c{number}", f"r{number}", continues=origin, model=model, project=project)
            store.append_calls([call])
        counted = {(one.model, one.drift, one.token_in): one.calls for one in store.drift_counts("default")}
        assert counted == {
            ("main", None, False): 1,
            ("main", "template", False): 2,
            ("main", "template", True): 1,
            ("other", None, False): 1,
        }
        assert store.drift_counts("elsewhere") == [DriftCount(model="main", drift=None, token_in=False, calls=1)]

    def test_earlier_calls_are_those_of_the_run_and_the_model(self, store: Store) -> None:
        """Complete chat calls with prompt ids, in the order of their commits, without their logprobs."""
        store.append_calls([make_call("a", "r", tokens=((4, 5), (6,)), prompt_ids=(9, 8), role="planner")])
        store.append_calls(
            [
                make_call("elsewhere", "other"),
                make_call("another-model", "r", model="other"),
                make_call("text", "r", endpoint="completions"),
                make_call("left", "r", status="aborted"),
                make_call("unknown-prompt", "r", prompt_ids=None),
                make_call("doubtful", "r", quarantine="usage mismatch"),
                make_call("b", "r"),
            ]
        )
        found, _ = store.earlier_calls("r", "main")
        assert [call.call_id for call in found] == ["a", "b"]
        (kept,) = [call for call in store.trace("r").calls if call.call_id == "a"]
        assert found[0] == EarlierCall(
            call_id="a",
            role="planner",
            request=kept.request,
            prompt_ids=(9, 8),
            choices=tuple(replace(choice, logprobs=None) for choice in kept.choices),
        )
        assert store.earlier_calls("nobody", "main") == ([], 0)

    def test_earlier_calls_are_read_from_a_mark_on(self, store: Store) -> None:
        """And what the asker knows is not read again."""
        store.append_calls([make_call("a", "r")])
        _, mark = store.earlier_calls("r", "main")
        assert store.earlier_calls("r", "main", after=mark) == ([], mark)
        store.append_calls([make_call("b", "r"), make_call("c", "r")])
        found, later = store.earlier_calls("r", "main", after=mark, known={"b"})
        assert [call.call_id for call in found] == ["c"]
        assert later > mark
