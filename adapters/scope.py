"""Which run the code that executes now belongs to: the one ContextVar of tracegrad.

Set by whoever opens a run (`wrap`, the launcher's graph patch, the rollout driver) around each step of a graph,
never around a consumer's code. Read by the hook when an HTTP request leaves. What holds for the whole process
(`TRACEGRAD_*` in the environment, set by `tracegrad run`) is read by `scope_from_environ`, and nowhere else.
Threads and tasks that copy their context (LangChain's executors, asyncio) inherit the scope;
`thread_scopes` carries it into raw ones.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from tracegrad.adapters.caller import Caller
from tracegrad.adapters.errors import NoProxyNamed

ENV_PROXY = "TRACEGRAD_PROXY"
ENV_RUN = "TRACEGRAD_RUN"
ENV_ROLE = "TRACEGRAD_ROLE"
ENV_PURPOSE = "TRACEGRAD_PURPOSE"
ENV_API_KEY = "TRACEGRAD_API_KEY"
_KEY_PREFIX = "tg-"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunScope:
    """Every field may be unknown. `role` overrides the role that the graph would give; `proxy` is its root URL.

    `caller` is the node whose model runs here, where a callback said so (see `chain_callers`); `starter` the node that
    started this thread (see `thread_scopes`); `api_key` the key for the proxy.
    """

    run_id: str | None = None
    role: str | None = None
    proxy: str | None = None
    caller: Caller | None = None
    starter: Caller | None = None
    api_key: str | None = field(default=None, repr=False)


_current: ContextVar[RunScope | None] = ContextVar("tracegrad_run_scope", default=None)


def current_scope() -> RunScope | None:
    """Return the scope that was entered here, or None."""
    return _current.get()


@contextmanager
def entered(scope: RunScope | None) -> Iterator[None]:
    """Make `scope` the current one for the body (None: no scope at all).

    The body must not yield to foreign code: a generator enters it anew for each step, so that its consumer
    never runs inside. It must leave in the context in which it entered (one task or one thread).
    """
    token = _current.set(scope)
    try:
        yield
    finally:
        _current.reset(token)


def note_caller(caller: Caller | None) -> None:
    """Note, for the rest of this context, that the model that runs here was called by `caller`."""
    scope = _current.get() or RunScope()
    if scope.caller != caller:
        noted = replace(scope, caller=caller)
        _current.set(None if noted == RunScope() else noted)


def resolved_scope(process: RunScope) -> RunScope:
    """Return the current scope with the process's own values where it says nothing."""
    scope = _current.get()
    if scope is None:
        return process
    return RunScope(
        run_id=scope.run_id or process.run_id,
        role=scope.role or process.role,
        proxy=scope.proxy or process.proxy,
        caller=scope.caller,
        starter=scope.starter,
        api_key=scope.api_key or process.api_key,
    )


def scope_from_environ(environ: Mapping[str, str]) -> RunScope:
    """Read what `tracegrad run` or a rollout said about the whole process; empty values count as unset."""
    return RunScope(
        run_id=environ.get(ENV_RUN) or None,
        role=environ.get(ENV_ROLE) or None,
        proxy=environ.get(ENV_PROXY) or None,
        api_key=key_named(environ),
    )


def key_named(environ: Mapping[str, str]) -> str | None:
    """Return the proxy's API key: TRACEGRAD_API_KEY, else OPENAI_API_KEY where that is a key of ours, else None."""
    ours = environ.get("OPENAI_API_KEY", "")
    return environ.get(ENV_API_KEY) or (ours if ours.startswith(_KEY_PREFIX) else None)


def proxy_named(proxy: str | None, environ: Mapping[str, str]) -> str:
    """Return the proxy's root URL from an argument or the environment, without a trailing slash or `/v1`.

    Raises:
        NoProxyNamed: neither says it.
    """
    named = proxy or environ.get(ENV_PROXY)
    if not named:
        raise NoProxyNamed(f"which proxy? pass proxy='http://127.0.0.1:8080' or set {ENV_PROXY}")
    return named.rstrip("/").removesuffix("/v1")
