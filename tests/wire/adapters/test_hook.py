"""The hook on httpx and httpx2: only our proxy, explicit wins, a failure breaks nothing and is visible."""

import asyncio
import logging
import subprocess
import sys
from typing import Any

import httpx
import httpx2
import pytest

from tracegrad.adapters import hook
from tracegrad.adapters.hook import install, path_under
from tracegrad.adapters.scope import RunScope, current_scope, entered

LIBRARIES = pytest.mark.parametrize("library", [httpx, httpx2], ids=["httpx", "httpx2"])
BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(autouse=True)
def _installed() -> None:
    install(RunScope())


def _post(library: Any, url: str, *, is_async: bool = False, **kwargs: Any) -> Any:
    if not is_async:
        with library.Client(**kwargs) as client:
            return client.post(url + "/chat/completions", json=BODY)

    async def main() -> Any:
        async with library.AsyncClient(**kwargs) as client:
            return await client.post(url + "/chat/completions", json=BODY)

    return asyncio.run(main())


@LIBRARIES
@pytest.mark.parametrize("is_async", [False, True])
def test_requests_to_the_proxy_say_the_scope(proxy: Any, library: Any, is_async: bool) -> None:
    with entered(RunScope(run_id="r1", role="плановик 100%", proxy=proxy.root)):
        _post(library, proxy.v1, is_async=is_async)
    (call,) = proxy.calls
    assert (call.run_id, call.role, call.source, call.span) == ("r1", "плановик 100%", "hook", None)
    assert current_scope() is None


@LIBRARIES
def test_nothing_is_said_to_another_host_or_outside_a_scope(proxy: Any, elsewhere: Any, library: Any) -> None:
    with entered(RunScope(run_id="r1", role="a", proxy=proxy.root)):
        _post(library, elsewhere.v1)
    _post(library, proxy.v1)
    (one,), (two,) = elsewhere.calls, proxy.calls
    assert not [name for call in (one, two) for name in call.headers if name.startswith("x-tracegrad")]


@LIBRARIES
@pytest.mark.parametrize("is_async", [False, True])
def test_a_redirect_to_another_host_loses_our_headers(proxy: Any, elsewhere: Any, library: Any, is_async: bool) -> None:
    proxy.redirect_to = elsewhere.root
    with entered(RunScope(run_id="r1", role="a", proxy=proxy.root)):
        _post(library, proxy.v1, is_async=is_async, follow_redirects=True, headers={"x-app": "kept"})
    (call,) = elsewhere.calls
    assert call.headers["x-app"] == "kept"
    assert not [name for name in call.headers if name.startswith("x-tracegrad")]


def test_what_the_app_says_itself_wins(proxy: Any) -> None:
    with entered(RunScope(run_id="r1", role="a", proxy=proxy.root)):
        _post(httpx, proxy.v1, headers={"x-tracegrad-run": "mine"})
        _post(httpx, proxy.root + "/run/r%20x/role/critic/v1")
        _post(httpx, proxy.root + "/role/critic/v1")
    header, path, role_only = proxy.calls
    assert (header.run_id, header.role, header.source) == ("mine", "a", None)
    assert (path.run_id, path.role, path.source) == (None, None, None)
    assert (role_only.run_id, role_only.role, role_only.source) == ("r1", None, "hook")


def test_a_request_sent_again_in_another_run_says_the_other_run(proxy: Any) -> None:
    with httpx.Client() as client:
        request = client.build_request("POST", proxy.v1 + "/chat/completions", json=BODY)
        for run_id in ("r1", "r2"):
            with entered(RunScope(run_id=run_id, proxy=proxy.root)):
                client.send(request)
        client.send(request)
    assert [call.run_id for call in proxy.calls] == ["r1", "r2", None]


@LIBRARIES
def test_a_failure_is_visible_and_breaks_nothing(
    proxy: Any, elsewhere: Any, library: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise LookupError("config without metadata")

    monkeypatch.setattr(hook, "read_caller", broken)
    # The failure must be logged once by each hook; the one installed here is new to it.
    monkeypatch.setattr(library.Client.send.__tracegrad_hook__, "_logged", set())
    with caplog.at_level(logging.WARNING, "tracegrad.hook"), entered(RunScope(run_id="r1", proxy=proxy.root)):
        answers = [_post(library, proxy.v1) for _ in range(2)]
        _post(library, elsewhere.v1)
    assert [answer.status_code for answer in answers] == [200, 200]
    assert [call.headers["x-tracegrad-hook-error"] for call in proxy.calls] == ["LookupError", "LookupError"]
    assert len(caplog.records) == 1
    assert "x-tracegrad-hook-error" not in elsewhere.calls[0].headers


def test_a_name_that_the_proxy_would_refuse_is_an_error_of_the_hook_not_of_the_app(proxy: Any) -> None:
    with entered(RunScope(run_id="r1", role="x" * 300, proxy=proxy.root)):
        assert _post(httpx, proxy.v1).status_code == 200
    assert proxy.calls[0].headers["x-tracegrad-hook-error"] == "ValueError"


def test_installing_twice_patches_once_and_the_newest_process_scope_counts(proxy: Any) -> None:
    before = httpx.Client.send
    install(RunScope(run_id="process", proxy=proxy.root))
    assert httpx.Client.send is before
    _post(httpx, proxy.v1)
    install(RunScope())
    _post(httpx, proxy.v1)
    assert [call.run_id for call in proxy.calls] == ["process", None]


@pytest.mark.parametrize(
    ("url", "root", "path"),
    [
        ("http://127.0.0.1:8080/v1/models", "http://127.0.0.1:8080", "/v1/models"),
        ("http://localhost:8080/v1", "http://127.0.0.1:8080/", "/v1"),
        ("http://127.0.0.1:8080/v1", "http://127.0.0.1:80801", None),
        ("http://127.0.0.1:8081/v1", "http://127.0.0.1:8080", None),
        ("http://127.0.0.1.evil.example:8080/v1", "http://127.0.0.1:8080", None),
        ("http://127.0.0.1:8080@evil.example/v1", "http://127.0.0.1:8080", None),
        ("https://proxy.example/v1", "http://proxy.example", None),
        ("https://proxy.example/v1", "https://PROXY.example:443", "/v1"),
        ("https://proxy.example/tracegradish/v1", "https://proxy.example/tracegrad", None),
        ("https://proxy.example/tracegrad/v1", "https://proxy.example/tracegrad", "/v1"),
    ],
)
def test_under_the_proxy_means_same_origin_and_whole_path_segments(url: str, root: str, path: str | None) -> None:
    try:
        assert path_under(url, root) == path
    except ValueError:  # a port that is none
        assert path is None


def test_libraries_imported_later_are_patched_and_keep_their_loader() -> None:
    code = """
import sys
from tracegrad.adapters.hook import install
from tracegrad.adapters.scope import RunScope
install(RunScope()); install(RunScope())
assert not {"httpx", "httpx2"} & set(sys.modules)
import httpx, httpx2, inspect
for library in (httpx, httpx2):
    assert type(library.__loader__).__name__ == type(library.__spec__.loader).__name__ == "SourceFileLoader"
    for cls in (library.Client, library.AsyncClient):
        assert hasattr(cls.send, "__tracegrad_hook__") and not hasattr(cls.send.__wrapped__, "__tracegrad_hook__")
    assert inspect.getsource(library)
waiting = {finder.name for finder in sys.meta_path if "tracegrad" in type(finder).__module__}
assert waiting == {"concurrent.futures.thread", "langchain_core.tracers.context"}, waiting
"""
    subprocess.run([sys.executable, "-c", code], check=True)
