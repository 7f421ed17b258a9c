"""What commands that work on a store itself share: the options that name it, opening it, and how far they are.

Refuses to make a store that is not there, unless the command is told to. Called by the
commands `store`, `export`, `import`, `keys`, `runs`, `show`, `reward` and `doctor`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tracegrad.tracestore.config import DEFAULT_FILE, Config, load_config
from tracegrad.tracestore.errors import TraceStoreError
from tracegrad.tracestore.store import Store, open_store


def which_store(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that name the store."""
    options = [
        click.option(
            "--config", "path", type=click.Path(dir_okay=False, path_type=Path), help="Default: tracegrad.yaml."
        ),
        click.option("--store", "url", help="The store's SQLAlchemy URL, instead of a configuration."),
        click.option("--json", "as_json", is_flag=True, help="The result as JSON."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def read_config(path: Path | None, url: str | None = None) -> Config:
    """Return the configuration that the options name, or the tracegrad.yaml here; with a URL, nothing but that.

    Raises:
        click.UsageError: nothing names a store.
        ConfigError: the configuration cannot be used.
    """
    if url is not None:
        return Config(store=url)
    if path is None and not DEFAULT_FILE.exists():
        raise click.UsageError("which store? give --config FILE or --store URL (there is no tracegrad.yaml here)")
    return load_config(path or DEFAULT_FILE)


def open_existing(path: Path | None, url: str | None) -> Store:
    """Open the store that the options name, without making one.

    Raises:
        click.ClickException: no store is named, or it is not there.
    """
    try:
        return open_store(read_config(path, url).store, create=False)
    except TraceStoreError as error:
        raise click.ClickException(str(error)) from error


@contextmanager
def opened_store(path: Path | None, url: str | None, *, create: bool = False) -> Iterator[Store]:
    """Open the store that the options name, for the body of a command that lets the store's errors pass."""
    opened = open_store(read_config(path, url).store, create=create)
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """A line on a terminal that says how far it is; nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total, text: None
        return
    columns = (BarColumn(bar_width=24), TextColumn("{task.completed:,}"), TextColumn("{task.fields[text]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as shown:
        task = shown.add_task("", total=None, text="")
        yield lambda done, total, text: shown.update(task, completed=done, total=total or None, text=text)
