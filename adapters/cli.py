"""`tracegrad`: the command whose subcommands are entry points, each imported only when it runs.

`HELPS` holds the one-line helps, so that `tracegrad --help` imports none of them; a test keeps it in step with the
entry points and with the commands' own docstrings. Errors of tracegrad's own are one line on stderr and exit code 1
(or the error's `exit_code`), Ctrl-C is 130; anything else is a bug and shows its traceback. Called by the `tracegrad`
script.
"""

from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

import click

GROUP = "tracegrad.commands"
HELPS = {
    "up": "Run store, engine, proxy and trainer together, supervised, until Ctrl-C.",
    "proxy": "Serve an OpenAI-compatible endpoint that records every call.",
    "engine": "Start the engines (vLLM) of the configuration and keep them up, on the newest live weights.",
    "train": "Train models from recorded, rewarded runs and publish each step's weights.",
    "run": "Run a program with its model calls going through the proxy.",
    "rollout": "Drive a graph over a task file, in groups, for training.",
    "eval": "Score a graph over a task file, as its users get it: no sampling override, never trained on.",
    "gate": "Evaluate what is to be published, over held-out tasks, until Ctrl-C.",
    "status": "Say what is up, what is live, what waits, and what is wrong (then with exit status 1).",
    "runs": "List the newest runs.",
    "show": "Show one run, call or version: what ran inside what, tokens, rewards, which calls made which weights.",
    "reward": "Give stored runs new rewards: the closed ones, or each RUN.",
    "doctor": "Say what is wrong with what was recorded and trained, the worst first (then with exit status 1).",
    "queue": "Say what is ready to be trained, what waits and for what, and what never will be, with the reasons.",
    "keys": "Make, list and revoke API keys of the proxy.",
    "export": "Write runs to a folder of Parquet files that HF datasets loads in one line.",
    "import": "Put an exported folder into a store, byte for byte.",
    "store": "Care for the trace store: delete, prune, vacuum, check, back up.",
    "versions": "List the policy versions with their publishes: state, times, probe, and what the gate decided.",
    "rollback": "Publish the older VERSION again and abandon the newer ones.",
    "pin": "Hold serving at VERSION, whatever is trained meanwhile; --off publishes the newest again.",
}
_EXTRAS = {
    "train": {"torch", "transformers", "ray", "peft", "accelerate", "safetensors", "numpy", "tensorboard"},
    "examples": {"langgraph", "langchain_core", "langchain_openai", "bm25s", "gguf", "matplotlib"},
    "postgres": {"psycopg"},
    "parquet": {"pyarrow"},
}


class LazyGroup(click.Group):
    """Knows its subcommands by entry point; loads one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the installed subcommands in the order of `HELPS`, others after them."""
        known = list(HELPS)
        return sorted(_commands(), key=lambda name: (known.index(name) if name in HELPS else len(known), name))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a subcommand; None for an unknown name.

        Raises:
            click.ClickException: it needs a package that is not installed.
        """
        entry = _commands().get(cmd_name)
        if entry is None:
            return None
        try:
            command: click.Command = entry.load()
        except ModuleNotFoundError as error:
            raise _missing(error, cmd_name) from error
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of subcommands from `HELPS`, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, HELPS.get(name, "")) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand; turn what tracegrad raises into one line and an exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(130)
        except ModuleNotFoundError as error:
            raise _missing(error, ctx.invoked_subcommand or "") from error
        except Exception as error:
            if not type(error).__module__.startswith("tracegrad."):
                raise
            click.echo(f"tracegrad: {error}", err=True)
            ctx.exit(getattr(error, "exit_code", 1))


@click.group(cls=LazyGroup, name="tracegrad", context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("tracegrad"), prog_name="tracegrad")
def main() -> None:
    """Any LangGraph app that already works gets better from its own traffic, without being changed."""


def _commands() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _missing(error: ModuleNotFoundError, command: str) -> Exception:
    """Say which extra to install; what no extra holds is not ours to explain."""
    needed = (error.name or "").split(".")[0]
    for extra, modules in _EXTRAS.items():
        if needed in modules:
            return click.ClickException(f"{command} needs {needed}: pip install 'tracegrad[{extra}]'")
    return error


if __name__ == "__main__":
    main()
