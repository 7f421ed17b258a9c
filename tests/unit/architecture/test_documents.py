"""What the documents say about commands, options and settings is true, and every command is in them."""

import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click
import msgspec
import pytest

from tracegrad.adapters.cli import HELPS
from tracegrad.tracestore.config import Config, load_config

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/*.md", "docker/*.md", "examples/*/*.md")
    for path in sorted(ROOT.glob(pattern))
    if path.name != "CHANGELOG.md"
]
ENTRIES: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][
    "tracegrad.commands"
]
OF_OTHERS = {
    *("--enable-scale-out", "--enable-lora", "--max-loras", "--lora-target-modules", "--lora-modules"),  # vLLM's
    "--lora-target-modules",  # vLLM's
    *("--return-sampling-mask", "--max-logprobs"),  # vLLM's
    "--trust-request-chat-template",
    "--api-key",
    "--gpus",  # Docker's
    "--profile",
    "--build",
}


@cache
def command(*names: str) -> click.Command:
    """The command `tracegrad NAMES`, without the group's machinery (which knows installed ones only)."""
    module, _, attribute = ENTRIES[names[0]].partition(":")
    found: click.Command = getattr(import_module(module), attribute)
    for name in names[1:]:
        assert isinstance(found, click.Group), names
        found = found.commands[name]
    return found


def options(of: click.Command) -> set[str]:
    given = {option for parameter in of.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return {option for option in given if option.startswith("-")} | {"--help"}


def every_command() -> Iterator[tuple[str, ...]]:
    for name in ENTRIES:
        found = command(name)
        if isinstance(found, click.Group):
            yield from ((name, sub) for sub in found.commands)
        else:
            yield (name,)


def code(text: str) -> Iterator[str]:
    """The lines of code blocks without a language, and what stands between backticks."""
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.M | re.S)
    for _, language, block in fence.findall(text):
        if language in ("", "bash", "sh"):
            yield from block.replace("\\\n", " ").splitlines()
    yield from (" ".join(span.split()) for span in re.findall(r"`([^`]+)`", fence.sub("", text)))


def mentions(path: Path) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """Each command that a document names, with the options it gives it."""
    for line in code(path.read_text()):
        for said in re.findall(r"(?:^|\s)tracegrad ([a-z]+(?: .*)?)", line.split("#")[0]):
            try:
                words = shlex.split(said.replace("[", " ").replace("]", " "))
            except ValueError:
                words = said.split()
            ours = words[: words.index("--")] if "--" in words else words
            yield tuple(words[:2]), [word.split("=")[0] for word in ours if re.match(r"--\w", word)]


def wrong_mentions(path: Path) -> list[str]:
    wrong = []
    for words, given in mentions(path):
        if words[0] not in ENTRIES:
            wrong.append(f"tracegrad {words[0]}")
            continue
        found = command(words[0])
        if isinstance(found, click.Group) and len(words) > 1:
            if words[1] not in found.commands:
                wrong.append(f"tracegrad {' '.join(words)}")
                continue
            found = command(*words)
        wrong += [f"tracegrad {words[0]} {option}" for option in given if option not in options(found)]
    return wrong


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_and_options_that_a_document_names_exist(path: Path) -> None:
    assert wrong_mentions(path) == []


def test_a_document_that_is_wrong_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "wrong.md"
    path.write_text(
        "Say `tracegrad rnus`, or\n`tracegrad store prnue`.\n```\ntracegrad up --confg a.yaml -- x --y  # --z\n"
        "tracegrad runs [--json]\n```\n"
    )
    assert wrong_mentions(path) == ["tracegrad up --confg", "tracegrad rnus", "tracegrad store prnue"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_option_that_stands_alone_is_one_of_some_command(path: Path) -> None:
    known = OF_OTHERS.union(*(options(command(*names)) for names in every_command()))
    alone = {said.split()[0].split("=")[0] for said in code(path.read_text()) if said.startswith("--")}
    assert sorted(alone - known) == []


def test_every_command_is_documented() -> None:
    said = {words for path in DOCUMENTS for words, _ in mentions(path)}
    missing = [" ".join(names) for names in every_command() if not any(words[: len(names)] == names for words in said)]
    assert missing == []
    assert list(ENTRIES) and set(HELPS) == set(ENTRIES)


def settings(kind: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all settings; `*` is a name that the file chooses."""
    for each in (kind, *get_args(kind)):
        if isinstance(each, type) and issubclass(each, msgspec.Struct):
            hints = get_type_hints(each, include_extras=False)
            for field in msgspec.structs.fields(each):
                yield f"{prefix}{field.encode_name}"
                yield from settings(hints[field.name], f"{prefix}{field.encode_name}.")
                yield from settings(hints[field.name], f"{prefix}{field.encode_name}.*.")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_settings_that_a_document_names_exist(path: Path) -> None:
    known = set(settings(Config))
    ends = {".".join(name.split(".")[-depth:]) for name in known for depth in (1, 2, 3)}
    sections = {name.split(".")[0] for name in known} | {"engine"}
    wrong = [
        said
        for said in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?::[^`]*)?`", path.read_text())
        if said.split(".")[0] in sections and said not in known | ends and not said.endswith((".py", ".md", ".yaml"))
    ]
    assert wrong == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_yaml_that_a_document_shows_is_a_configuration(path: Path, tmp_path: Path) -> None:
    rest = {"models:": "models: {main: {checkpoint: /m}}\n", "roles:": 'roles: {"*": main}\n'}
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.M | re.S)):
        file = tmp_path / f"block-{number}.yaml"
        said = {line.split()[0] for line in block.splitlines() if line and line[0].isalpha()}
        file.write_text("".join(text for section, text in rest.items() if section not in said) + block)
        load_config(file)
