"""What happens inside a program started by `tracegrad run`: the hook, and a run per outermost graph invocation.

Reads the TRACEGRAD_* environment once, at the start of the process. Imports nothing of the app's: httpx, httpx2 and
LangGraph are patched when the app imports them. Does nothing where no proxy is named. Called by
`inject/sitecustomize.py`.
"""

from collections.abc import Mapping
from types import ModuleType

from tracegrad.adapters.hook import install
from tracegrad.adapters.import_hook import on_import
from tracegrad.adapters.scope import ENV_PURPOSE, RunScope, scope_from_environ


def attach(environ: Mapping[str, str]) -> None:
    """Attach this process to the proxy that `environ` names.

    With TRACEGRAD_RUN set one run spans the process, and graph invocations open none.
    """
    process = scope_from_environ(environ)
    if process.proxy is None:
        return
    install(process)
    if process.run_id is None:
        purpose = environ.get(ENV_PURPOSE) or "live"
        on_import("langgraph.pregel.main", lambda module: _open_runs(module, process, purpose))


def _open_runs(module: ModuleType, process: RunScope, purpose: str) -> None:
    from tracegrad.adapters.client import ProxyClient
    from tracegrad.adapters.graph_runs import GraphRuns, patch_pregel

    if purpose not in ("live", "train") or process.proxy is None:
        raise ValueError(f"{ENV_PURPOSE}={purpose!r}: it must be live or train")
    runs = GraphRuns(
        client=ProxyClient(process.proxy), process=process, purpose="train" if purpose == "train" else "live"
    )
    patch_pregel(module, runs=runs)
