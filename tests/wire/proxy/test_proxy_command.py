"""`tracegrad proxy` as a process: takes a free port, and stops cleanly. Killed: tests/wire/test_proxy_kill.py."""

import json
import signal
from pathlib import Path
from typing import Any

import httpx
import kill_load
import pytest
from click.testing import CliRunner

from tracegrad.adapters.proxy.command import proxy as command
from tracegrad.tracestore.store import open_store


@pytest.fixture
def config(tmp_path: Path, engine_url: str, store_url: str) -> Path:
    return kill_load.write_config(tmp_path, engine_url, store_url)


def test_it_prints_its_url_serves_and_stops_cleanly_on_interrupt(config: Path, engine_app: Any, store_url: str) -> None:
    process, url = kill_load.start_proxy(config)
    try:
        body = {"messages": [{"role": "user", "content": "hello"}]}
        assert httpx.post(f"{url}/run/r/v1/chat/completions", json=body, timeout=20).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(15) == 0
    finally:
        process.kill()
    store = open_store(store_url)
    assert len(store.trace("r").calls) == 1
    store.close()


def test_without_keys_an_address_that_others_can_reach_needs_to_be_allowed(config: Path) -> None:
    config.write_text(config.read_text()[:-1] + ', "proxy": {"access": {"keys": "off"}}}')
    result = CliRunner().invoke(command, ["--config", str(config), "--host", "0.0.0.0"])
    assert result.exit_code == 1
    assert "API keys are off" in result.output and "--allow-remote" in result.output


def test_show_config_prints_what_was_resolved_and_stops(config: Path) -> None:
    arguments = ["--config", str(config), "--port", "7", "--show-config"]
    shown = json.loads(CliRunner().invoke(command, [*arguments, "--json"]).output)
    assert (shown["proxy"]["port"], shown["proxy"]["host"]) == (7, "127.0.0.1")
    assert "port: 7\n" in CliRunner().invoke(command, arguments).output


def test_a_wrong_configuration_is_an_error_that_says_what(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("proxy: {prot: 1}\n")
    result = CliRunner().invoke(command, ["--config", str(path)])
    assert result.exit_code == 1 and "did you mean port" in result.output


def test_a_taken_port_is_an_error_that_says_so(config: Path, engine_url: str) -> None:
    port = engine_url.rsplit(":", 1)[1]
    result = CliRunner().invoke(command, ["--config", str(config), "--port", port])
    assert result.exit_code == 1 and f"cannot listen on 127.0.0.1:{port}" in result.output
