"""`tracegrad run -- CMD`: run any program with the environment that points it at the proxy.

The program is not changed: OPENAI_* name the proxy, TRACEGRAD_* say how to attribute, and PYTHONPATH puts
`inject/sitecustomize.py` in front, which attaches each Python process that CMD starts. Refuses to start CMD when
nobody answers at the proxy's address. What no hook reaches (Node, curl, a Python that ignores PYTHONPATH with `-I` or
`-E`, or site with `-S`) is named by the URL alone, where `--one-run` or `--role` say something. Signals are passed on,
and CMD's exit code is ours (128 + n when signal n ended it).
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from urllib.parse import quote, urlsplit

import click

from tracegrad.adapters.client import ProxyClient
from tracegrad.adapters.errors import LaunchError, ProxyError, ProxyUnreachable
from tracegrad.adapters.scope import ENV_PROXY, ENV_PURPOSE, ENV_ROLE, ENV_RUN, key_named
from tracegrad.tracestore.records import Purpose

INJECT = Path(__file__).resolve().parent / "inject"
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_FROM_TERMINAL = ("SIGINT", "SIGQUIT")


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--proxy", help="The proxy's URL. Default: TRACEGRAD_PROXY, else what --config says.")
@click.option(
    "--config",
    "config_path",
    type=click.Path(dir_okay=False),
    help="Take the proxy's address from this file. Default: tracegrad.yaml, where there is one.",
)
@click.option("--purpose", type=click.Choice(["live", "train"]), default="live", show_default=True)
@click.option("--one-run", is_flag=True, help="The whole program is one run, also calls outside of any graph.")
@click.option("--role", help="The role of every call, whatever the graph says.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_context
def run(  # noqa: PLR0917 - click passes them by name
    ctx: click.Context,
    proxy: str | None,
    config_path: str | None,
    purpose: Purpose,
    one_run: bool,
    role: str | None,
    command: tuple[str, ...],
) -> None:
    """Run a program with its model calls going through the proxy.

    \b
    tracegrad run -- python app.py

    Each outermost LangGraph invocation of the program is a run of its own. Calls outside of any graph are recorded
    without a run, unless --one-run is given. So are those of programs that are not in Python.
    """
    client = ProxyClient(proxy_root(proxy, config_path, os.environ))
    _check(client)
    run_id = client.open_run(purpose=purpose).run_id if one_run else None
    environ = environment(os.environ, client.root, purpose=purpose, run_id=run_id, role=role)
    error: str | None = "the program was not started"
    try:
        code = supervise(command, environ)
        error = None if code == 0 else f"exit code {code}"
    finally:
        if run_id is not None:
            client.end_run(run_id, status="failed" if error else "closed", ended_by="explicit", error=error)
    ctx.exit(code)


def proxy_root(proxy: str | None, config_path: str | None, environ: Mapping[str, str]) -> str:
    """Return the proxy's root URL: the option, the environment, the file (or tracegrad.yaml here), the default address.

    Raises:
        ConfigError: the file cannot be used.
    """
    if proxy or (environ.get(ENV_PROXY) and not config_path):
        return proxy or environ[ENV_PROXY]
    from tracegrad.tracestore.config import DEFAULT_FILE, ProxyConfig, load_config

    file = config_path or (DEFAULT_FILE if DEFAULT_FILE.exists() else None)
    address = ProxyConfig() if file is None else load_config(file).proxy
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    return f"http://[{host}]:{address.port}" if ":" in host else f"http://{host}:{address.port}"


def environment(
    environ: Mapping[str, str],
    root: str,
    *,
    purpose: Purpose = "live",
    run_id: str | None = None,
    role: str | None = None,
) -> dict[str, str]:
    """Return `environ` pointed at the proxy `root`, with the hook injected into every Python that inherits it.

    A run or role for the whole program stands in the path of the base URL, for those that inherit no hook.
    OPENAI_API_KEY is kept if set (the hook adds the proxy's key), else it is the proxy's key, if there is one. Where
    the environment names an HTTP proxy (HTTP_PROXY), ours is exempted from it.
    """
    new = dict(environ)
    named = "".join(
        f"/{what}/{quote(name, safe='')}" for what, name in (("run", run_id), ("role", role)) if name is not None
    )
    url = f"{root}{named}/v1"
    new |= {"OPENAI_BASE_URL": url, "OPENAI_API_BASE": url, ENV_PROXY: root, ENV_PURPOSE: purpose}
    new.setdefault("OPENAI_API_KEY", key_named(environ) or "tracegrad")
    for name, value in ((ENV_RUN, run_id), (ENV_ROLE, role)):
        new.pop(name, None)
        if value is not None:
            new[name] = value
    entries = [entry for entry in environ.get("PYTHONPATH", "").split(os.pathsep) if entry and entry != str(INJECT)]
    new["PYTHONPATH"] = os.pathsep.join([str(INJECT), *entries])
    if any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") and value for name, value in environ.items()):
        exempt = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
        new["no_proxy"] = new["NO_PROXY"] = ",".join(filter(None, [exempt, urlsplit(root).hostname]))
    return new


def supervise(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run `command` to its end, passing signals on; return its exit code, 128 + n when signal n ended it.

    Raises:
        LaunchError: it cannot be started (127 not found, 126 not executable).
    """
    try:
        child = subprocess.Popen(list(command), env=dict(environ))
    except FileNotFoundError as error:
        raise LaunchError(f"there is no command {command[0]!r}", exit_code=127) from error
    except OSError as error:
        raise LaunchError(f"cannot start {command[0]!r}: {error.strerror}", exit_code=126) from error
    with _forwarding(child):
        code = child.wait()
    return code if code >= 0 else 128 - code


@contextmanager
def _forwarding(child: "subprocess.Popen[bytes]") -> Iterator[None]:
    """Pass signals on to `child`. A Ctrl-C of our terminal has reached it already, being in the same group."""

    def forward(number: int, frame: FrameType | None) -> None:
        if signal.Signals(number).name in _FROM_TERMINAL and _in_foreground():
            return
        if child.poll() is None:
            child.send_signal(number)

    earlier = {}
    for name in _FORWARDED:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            earlier[number] = signal.signal(number, forward)
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _in_foreground() -> bool:
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _check(client: ProxyClient) -> None:
    try:
        client.health()
    except ProxyUnreachable:
        raise
    except ProxyError as error:
        sys.stderr.write(f"tracegrad: the proxy at {client.root} answers, but is not well: {error}\n")
