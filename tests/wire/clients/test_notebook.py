"""A Jupyter notebook under `tracegrad run`: its kernel is a child of a child, and its cells are like any program."""

import json
import shutil
from pathlib import Path
from typing import Any

import other_clients
from client_programs import Served, check_graph, finished, under_tracegrad, words

CELLS = (
    "from graph_app import graph, model\nimport asyncio",
    "(await graph.ainvoke({'question': 'Oslo'}))['found']",
    "print(model.invoke('outside of any graph').content)",
    "towns = ('Rome', 'Bonn')\nstates = await asyncio.gather(*(graph.ainvoke({'question': t}) for t in towns))",
    "[state['plan'] for state in states]",
)


def _notebook() -> dict[str, Any]:
    cells = [
        {"cell_type": "code", "id": f"c{n}", "source": text, "metadata": {}, "outputs": [], "execution_count": None}
        for n, text in enumerate(CELLS)
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": cells}


def _shown(cell: dict[str, Any]) -> list[str]:
    return ["".join(output.get("text") or output["data"]["text/plain"]) for output in cell["outputs"]]


def test_the_cells_of_a_notebook(served: Served, tmp_path: Path) -> None:
    shutil.copy(other_clients.CLIENTS / "graph_app.py", tmp_path)
    (tmp_path / "towns.ipynb").write_text(json.dumps(_notebook()))
    jupyter = str(Path(other_clients.python()).parent / "jupyter")
    command = [jupyter, "nbconvert", "--execute", "--to", "notebook", "--inplace", "towns.ipynb"]
    finished(under_tracegrad(served, "--purpose", "train", "--", *command), cwd=tmp_path, IPYTHONDIR=str(tmp_path))
    executed = json.loads((tmp_path / "towns.ipynb").read_text())
    assert [_shown(cell) for cell in executed["cells"]] == [
        [], ["'it is rain in x'"], ["0: outside of any graph\n"], [], ["['0: plan Rome', '0: plan Bonn']"],
    ]  # fmt: skip
    traces = {words(trace.calls[0]).split()[1]: trace for trace in served.newest(3)}
    assert set(traces) == {"Oslo", "Rome", "Bonn"}
    for town, trace in traces.items():
        assert trace.run.purpose == "train"
        check_graph(trace, town)
