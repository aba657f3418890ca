"""``umbel``: the verbs, and what happens when one fails.

Nothing heavy is imported here or at the top of a verb's module, so that ``umbel --help`` is quick.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import click
import typer

import umbel
from umbel.cli import (
    audit,
    bench,
    dashboard,
    demo_network,
    epsilon,
    flower,
    output,
    parts,
    plot,
    runs,
    server,
    simulate,
    site,
    submit,
    tune,
)
from umbel.core.errors import UmbelError

app = typer.Typer(
    name="umbel",
    help="Federated and private learning: one run file, from a laptop to real sites.",
    add_completion=False,
    suggest_commands=False,  # click suggests them by itself
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _name, _verb, _panel in (
    ("simulate", simulate.simulate, "Run"),
    ("check", simulate.check, "Run"),
    ("tune", tune.tune, "Run"),
    ("flower", flower.flower, "Run"),
    ("runs", runs.runs, "Look at runs"),
    ("show", runs.show, "Look at runs"),
    ("compare", runs.compare, "Look at runs"),
    ("plot", plot.plot, "Look at runs"),
    ("export", runs.export, "Look at runs"),
    ("epsilon", epsilon.epsilon, "About Umbel"),
    ("list", parts.list_parts, "About Umbel"),
    ("version", parts.version, "About Umbel"),
):
    app.command(_name, rich_help_panel=_panel)(_verb)
for _name, _order in (
    ("submit", submit.submit),
    ("pause", submit.pause),
    ("resume", submit.resume),
    ("stop", submit.stop),
):
    app.command(_name, rich_help_panel="Deploy")(_order)
app.command("demo-network", rich_help_panel="Deploy")(demo_network.demo_network)
app.command("dashboard", rich_help_panel="Look at runs")(dashboard.dashboard)
app.add_typer(server.app, name="server", rich_help_panel="Deploy")
app.add_typer(site.app, name="site", rich_help_panel="Deploy")
app.add_typer(audit.app, name="audit", rich_help_panel="Look at runs")
app.command("bench", rich_help_panel="About Umbel", context_settings=bench.CONTEXT)(bench.bench)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Federated and private learning: one run file, from a laptop to real sites."""
    if version:
        print(f"umbel {umbel.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """The entry point of the ``umbel`` command."""
    # Whoever ends a run, a person or a machine that shuts down, leaves it resumable.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit code.

    0 success, 2 bad input, 3 refused by a privacy budget or a policy, 1 otherwise. Whatever goes
    wrong, ``--format json`` has one JSON object on stdout; a defect's traceback goes to stderr.
    """
    as_json = wants_json(arguments)
    try:
        command = typer.main.get_command(app)
        code = command.main(list(arguments), prog_name="umbel", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except UmbelError as error:
        return output.fail(as_json, error.message, error.where, error.fix, error.exit_code)
    except click.ClickException as error:
        place = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else ""
        message = error.format_message()
        message = message[:1].lower() + message[1:].rstrip(".")
        fix = f"see {place or 'umbel'} --help"
        return output.fail(as_json, message, place or "umbel", fix, 2)
    except (KeyboardInterrupt, click.Abort):
        return output.fail(as_json, "interrupted", "umbel", "start it again", 1)
    except BrokenPipeError:
        # Whoever read stdout has left (`umbel runs | head`); Python must not flush into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.filename is None:
            return _defect(as_json, error)
        fix = "look whether it is there and may be read or written"
        return output.fail(as_json, error.strerror or str(error), str(error.filename), fix, 2)
    except Exception as error:
        return _defect(as_json, error)


def _defect(as_json: bool, error: Exception) -> int:
    traceback.print_exception(error)
    fix = "this is a defect of Umbel: please report the traceback"
    return output.fail(as_json, f"{type(error).__name__}: {error}", "umbel", fix, 1)


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for JSON; without a parser, since parsing may have failed."""
    pairs = itertools.pairwise(arguments)
    return "--format=json" in arguments or ("--format", "json") in pairs
