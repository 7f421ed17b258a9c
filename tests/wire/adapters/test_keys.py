"""`tracegrad keys`, and the way of a key from the environment to the proxy."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from tracegrad.adapters.hook import Hook
from tracegrad.adapters.keys_command import keys
from tracegrad.adapters.launch import environment
from tracegrad.adapters.scope import RunScope, key_named, scope_from_environ
from tracegrad.tracestore.errors import NotFound
from tracegrad.tracestore.keys import hash_key
from tracegrad.tracestore.store import open_store


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(keys, list(arguments), catch_exceptions=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tracegrad.yaml"
    path.write_text(
        json.dumps(
            {
                "store": "sqlite:///store.db",
                "project": "shop",
                "models": {"main": {"checkpoint": "x"}},
                "roles": {"planner": "main"},
            }
        )
    )
    return path


def test_a_key_is_made_shown_once_listed_and_revoked(config: Path, tmp_path: Path) -> None:
    made = invoke("create", "--config", str(config), "--scope", "call", "--scope", "read", "--role", "planner")
    assert made.exit_code == 0, made.output
    text = made.stdout.strip()  # alone on standard output: KEY=$(tracegrad keys create ...)
    assert text.startswith("tg-") and text not in made.stderr
    assert "call, read; project shop; role planner" in made.stderr and "TRACEGRAD_API_KEY" in made.stderr
    store = open_store(f"sqlite:///{tmp_path}/store.db")
    key = store.find_key(hash_key(text))
    store.close()
    assert key is not None and (key.scopes, key.project, key.role) == (("call", "read"), "shop", "planner")
    listed = invoke("list", "--config", str(config))
    assert key.key_id in listed.output and text not in listed.output
    revoked = invoke("revoke", key.key_id, "--config", str(config))
    assert "is revoked since" in revoked.output
    (row,) = json.loads(invoke("list", "--config", str(config), "--json").output)
    assert row["key_id"] == key.key_id and row["revoked_at"] is not None and "hash" not in row


def test_json_holds_the_key_and_what_it_may_do(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/other.db"
    made = invoke("create", "--store", url, "--scope", "reward", "--name", "judge", "--run", "r", "--json")
    row = json.loads(made.stdout)
    assert (row["scopes"], row["name"], row["run_id"], row["project"]) == (["reward"], "judge", "r", "default")
    assert row["key"].startswith("tg-")
    assert invoke("list", "--store", url, "--json").output.count(row["key"]) == 0


def test_mistakes_are_named(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = invoke("create", "--config", str(config), "--scope", "call", "--role", "planer")
    assert unknown.exit_code == 2 and "did you mean planner" in unknown.output
    assert invoke("create", "--config", str(config)).exit_code == 2
    assert invoke("create", "--config", str(config), "--scope", "fly").exit_code == 2
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert "which store?" in invoke("list").output


def test_a_key_that_is_not_there_is_a_plain_error(config: Path) -> None:
    assert invoke("create", "--config", str(config), "--scope", "call").exit_code == 0
    with pytest.raises(NotFound, match="keys list"):  # `tracegrad` makes one line of it
        invoke("revoke", "key_x", "--config", str(config))


def test_which_key_the_environment_names() -> None:
    assert key_named({}) is None
    assert key_named({"OPENAI_API_KEY": "sk-theirs"}) is None
    assert key_named({"OPENAI_API_KEY": "tg-1"}) == "tg-1"
    assert key_named({"OPENAI_API_KEY": "tg-1", "TRACEGRAD_API_KEY": "tg-2"}) == "tg-2"
    scope = scope_from_environ({"TRACEGRAD_API_KEY": "tg-2"})
    assert scope.api_key == "tg-2" and "tg-2" not in repr(scope)


def test_a_launched_program_sends_the_key() -> None:
    root = "http://127.0.0.1:8080"
    assert environment({"TRACEGRAD_API_KEY": "tg-1"}, root)["OPENAI_API_KEY"] == "tg-1"
    kept = environment({"TRACEGRAD_API_KEY": "tg-1", "OPENAI_API_KEY": "sk-theirs"}, root)
    assert (kept["OPENAI_API_KEY"], kept["TRACEGRAD_API_KEY"]) == ("sk-theirs", "tg-1")
    assert environment({}, root)["OPENAI_API_KEY"] == "tracegrad"


def test_the_hook_shows_the_key_to_the_proxy_and_to_nobody_else() -> None:
    hook = Hook(RunScope(proxy="http://127.0.0.1:8080", api_key="tg-1"))
    headers = {"authorization": "Bearer sk-theirs"}
    ours = httpx.Request("POST", "http://127.0.0.1:8080/v1/chat/completions", headers=headers)
    for _ in range(2):  # also where the same request is sent again
        hook.mark(ours)
        assert ours.headers["x-api-key"] == "tg-1" and ours.headers["authorization"] == "Bearer sk-theirs"
    own = httpx.Request("POST", "http://127.0.0.1:8080/v1/models", headers={"x-api-key": "tg-own"})
    hook.mark(own)
    assert own.headers["x-api-key"] == "tg-own"
    for elsewhere in ("http://127.0.0.1:8081/v1/models", "https://api.openai.com/v1/models"):
        request = httpx.Request("POST", elsewhere)
        hook.mark(request)
        assert "x-api-key" not in request.headers
    assert "x-tracegrad-source" not in ours.headers  # a key is no attribution


def test_an_unmodified_program_gets_in_and_keeps_its_own_credential(proxy: Any, tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(
        "import openai\n"
        "print(openai.OpenAI().chat.completions.create(model='m', messages=[{'role': 'user', 'content': 'hi'}])"
        ".choices[0].message.content)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRACEGRAD_", "OPENAI_"))}
    clean |= {"TRACEGRAD_API_KEY": "tg-1", "OPENAI_API_KEY": "sk-theirs"}
    command = [sys.executable, "-m", "tracegrad.adapters.cli", "run", "--proxy", proxy.root, "--", sys.executable]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=60, env=clean, check=False)
    assert (done.stdout, done.stderr) == ("echo: hi\n", "")
    (call,) = proxy.calls
    assert (call.headers["x-api-key"], call.headers["authorization"]) == ("tg-1", "Bearer sk-theirs")
