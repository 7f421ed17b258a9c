"""The hook: says on each HTTP request to our proxy which run, role and span it belongs to.

Patches `Client.send` and `AsyncClient.send` of httpx and httpx2 (openai >= 3 uses httpx2), now or when the app imports
them; subclasses, such as those of the openai SDK, inherit it. Only requests under the proxy's own URL get headers, and
a redirect to anywhere else loses them again. Headers that the app set itself, and what the URL says
(`/run/{run}/role/{role}/v1`), win; `x-tracegrad-source: hook` is sent where every header is ours. A failure of
attribution never fails the request: it is logged once per kind and said in `x-tracegrad-hook-error`. Imports neither
httpx nor LangChain. Called by `attach` and `langgraph.wrap`.
"""

import functools
import json
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from tracegrad.adapters import chain_callers
from tracegrad.adapters.caller import Caller, read_caller
from tracegrad.adapters.import_hook import on_import
from tracegrad.adapters.scope import RunScope, resolved_scope, scope_from_environ
from tracegrad.adapters.thread_scopes import EXECUTOR_MODULE, carry_into_executors, carry_into_threads

RUN_HEADER = "x-tracegrad-run"
ROLE_HEADER = "x-tracegrad-role"
SPAN_HEADER = "x-tracegrad-span"
SOURCE_HEADER = "x-tracegrad-source"
ERROR_HEADER = "x-tracegrad-hook-error"
KEY_HEADER = "x-api-key"
_NAMES = (RUN_HEADER, ROLE_HEADER, SPAN_HEADER)
_MAX_NAME_CHARS = 256

_HTTP_LIBRARIES = ("httpx", "httpx2")
_POSTED_TREES = "/langsmith/"
"""LangSmith's client posts the trees of many runs at once, from wherever it is flushed."""
_MARK = "__tracegrad_hook__"
_ADDED = "tracegrad_added"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_DEFAULT_PORTS = {"http": 80, "https": 443}
_PLAIN = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != "%")
_log = logging.getLogger("tracegrad.hook")


def install(process: RunScope | None = None) -> None:
    """Patch httpx and httpx2, whichever the app imports. Idempotent; the newest `process` scope counts.

    `process` is what holds where no scope is entered: by default what the environment says.
    """
    process = process if process is not None else scope_from_environ(os.environ)
    hook = Hook(process)
    for name in _HTTP_LIBRARIES:
        on_import(name, functools.partial(_patch_library, hook=hook))
    carry_into_threads()
    on_import(EXECUTOR_MODULE, carry_into_executors)
    on_import(chain_callers.CONTEXT_MODULE, functools.partial(_register_callbacks, process=process))


def _register_callbacks(module: ModuleType, *, process: RunScope) -> None:
    from tracegrad.adapters import graph_writes, span_notes  # an app without LangChain does without its imports

    chain_callers.register(module)
    span_notes.register(module, process)
    on_import(graph_writes.RUNNER_MODULE, functools.partial(graph_writes.watch, told=span_notes.wrote))


class Hook:
    """Marks requests. Thread-safe: nothing but the set of failures already logged ever changes."""

    def __init__(self, process: RunScope) -> None:
        self.process = process
        self._logged: set[str] = set()

    def mark(self, request: Any) -> None:
        """Add attribution headers to an httpx or httpx2 `Request` that goes to the proxy; never raises."""
        ours = False
        try:
            for name in request.extensions.pop(_ADDED, ()):  # the app sends a request again, maybe in another run
                request.headers.pop(name, None)
            scope = resolved_scope(self.process)
            path = path_under(str(request.url), scope.proxy) if scope.proxy is not None else None
            if path is not None and not path.startswith(_POSTED_TREES):
                ours = True
                _show_key(request, scope)
                _mark(request, path, scope)
        except Exception as error:  # noqa: BLE001 - attribution must never break the app's request
            kind = type(error).__name__
            if kind not in self._logged:
                self._logged.add(kind)
                _log.warning("a model call is not attributed: %s: %s", kind, error, exc_info=True)
            if ours:
                request.headers[ERROR_HEADER] = kind


def _mark(request: Any, path: str, scope: RunScope) -> None:
    headers = request.headers
    said = _said_by_path(path) | {name: unquote(headers[name]) for name in _NAMES if name in headers}
    caller = read_caller()
    if caller.node is None:
        caller = scope.caller or scope.starter or caller
    run_id = said.get(RUN_HEADER, scope.run_id)
    found = {RUN_HEADER: run_id, ROLE_HEADER: scope.role or caller.role, SPAN_HEADER: _span_text(caller, run_id)}
    added = {name: _quoted(name, value) for name, value in found.items() if value and name not in said}
    if not added:
        return
    if not any(name in headers for name in _NAMES):
        added[SOURCE_HEADER] = "hook"
    headers.update(added)
    request.extensions[_ADDED] = (*request.extensions.get(_ADDED, ()), *added)


def _show_key(request: Any, scope: RunScope) -> None:
    """Let the request in where the app itself sends no key of ours (it may need OPENAI_API_KEY for another service)."""
    if scope.api_key and KEY_HEADER not in request.headers:
        request.headers[KEY_HEADER] = scope.api_key
        request.extensions[_ADDED] = (KEY_HEADER,)


def path_under(url: str, root: str) -> str | None:
    """Return what follows the proxy's `root` in `url`, or None where `url` is not under it.

    Scheme, host and port must be equal (the names of the loopback interface are one host), and the path must
    continue at a slash: `/tracegradish` is not under `/tracegrad`.
    """
    mine, proxy = urlsplit(url), urlsplit(root)
    if _origin(mine) != _origin(proxy):
        return None
    prefix = proxy.path.rstrip("/")
    if not mine.path.startswith(prefix) or mine.path[len(prefix) : len(prefix) + 1] not in ("/", ""):
        return None
    return mine.path[len(prefix) :]


def _origin(parts: Any) -> tuple[str, str, int | None]:
    host = (parts.hostname or "").lower()
    scheme = parts.scheme.lower()
    return scheme, "loopback" if host in _LOOPBACK else host, parts.port or _DEFAULT_PORTS.get(scheme)


def _said_by_path(path: str) -> dict[str, str]:
    """`/run/r1/role/planner/v1/...` -> what its prefix says, by the header that would say it."""
    segments = path.split("/")[1:]
    said: dict[str, str] = {}
    for key, header in (("run", RUN_HEADER), ("role", ROLE_HEADER)):
        if len(segments) >= 3 and segments[0] == key:
            said[header] = unquote(segments[1])
            segments = segments[2:]
    return said


def _span_text(caller: Caller, run_id: str | None) -> str | None:
    """A span is a place inside a run: without one there is none."""
    span = caller.span(run_id) if run_id else None
    return json.dumps(span, separators=(",", ":")) if span is not None else None


def _quoted(name: str, value: str) -> str:
    """Percent-encode for a header; the proxy refuses longer or unprintable names, so they are an error here."""
    if name != SPAN_HEADER and (len(value) > _MAX_NAME_CHARS or not value.isprintable()):
        raise ValueError(f"{name} would be {value[:40]!r}: it must be at most {_MAX_NAME_CHARS} printable characters")
    return quote(value, safe=_PLAIN)


def _patch_library(module: ModuleType, *, hook: Hook) -> None:
    for cls in (module.Client, module.AsyncClient):
        earlier: Hook | None = getattr(cls.send, _MARK, None)
        if earlier is not None:
            earlier.process = hook.process
            continue
        cls.send = _sync_send(cls.send, hook) if cls is module.Client else _async_send(cls.send, hook)
        cls._redirect_headers = _redirect_headers(cls._redirect_headers, hook)


def _sync_send(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    @functools.wraps(original)
    def send(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        hook.mark(request)
        return original(self, request, *args, **kwargs)

    setattr(send, _MARK, hook)
    return send


def _async_send(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    @functools.wraps(original)
    async def send(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        hook.mark(request)
        return await original(self, request, *args, **kwargs)

    setattr(send, _MARK, hook)
    return send


def _redirect_headers(original: Callable[..., Any], hook: Hook) -> Callable[..., Any]:
    """The client copies the headers of a redirected request; ours stay behind when it leaves the proxy."""

    @functools.wraps(original)
    def redirect_headers(self: Any, request: Any, url: Any, method: str) -> Any:
        headers = original(self, request, url, method)
        proxy = resolved_scope(hook.process).proxy
        if proxy is None or path_under(str(url), proxy) is None:
            for name in (*request.extensions.get(_ADDED, ()), ERROR_HEADER):
                headers.pop(name, None)
        return headers

    return redirect_headers
