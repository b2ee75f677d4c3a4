"""The command line: one program, ``planner``, whose commands are loaded when they are called.

A new command is a line in ``COMMANDS`` and a function whose arguments are typer options (see ``planner.commands``).
Its module may import what it needs: it is loaded for that command alone, and ``planner --help`` reads the table only.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from planner.terminal import exit_code


class Entry(NamedTuple):
    """Where a command's function is, ``module:function``, and its line in ``planner --help``."""

    function: str
    help: str


COMMANDS = {
    "solve": Entry("planner.commands.solve:solve", "Find the best KV-caching plan for a GPU, a model and a workload."),
    "simulate": Entry("planner.commands.simulate:simulate", "Run a saved plan event by event and report what happens."),
    "compare": Entry("planner.commands.compare:compare", "Compare the best plan with published systems."),
    "whatif": Entry("planner.commands.whatif:whatif", "Solve at every point of a grid of machines, models and work."),
    "run": Entry("runtime.cli_run:run", "Generate text as a saved plan says; measured beside predicted."),
    "calibrate": Entry("calibration.cli_calibrate:calibrate", "Measure this machine and fit a profile to it."),
    "validate": Entry("calibration.cli_validate:validate", "Run unseen plans; how far is the profile off?"),
    "report": Entry("planner.commands.report:report", "Write a page that shows a plan: one HTML file, no network."),
    "gpus": Entry("planner.commands.catalogue:gpus", "List the GPUs that --gpu knows by name."),
    "hosts": Entry("planner.commands.catalogue:hosts", "List the hosts that --host knows by name."),
    "models": Entry("planner.commands.catalogue:models", "List the models that --model knows by name."),
}

EPILOG = """\
[bold]Examples[/bold]

  planner solve

  planner solve --gpu l4 --model llama-3-8b --batch 16 --prompt 2000

  planner solve --lossless -o plan.json

  planner simulate plan.json --trace run.json

[bold]Exit codes[/bold]: 0 answered, 2 bad input, 3 no plan fits, 130 interrupted
"""


class LazyGroup(TyperGroup):
    """Shows the commands of the table and loads the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, entry in COMMANDS.items():
            self.add_command(TyperCommand(name, help=entry.help, short_help=entry.help), name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_command(str(name)), rest

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *_: Any, **__: Any) -> Any:
        """Run, then leave the process with the exit code; errors are one line on stderr."""
        given = list(sys.argv[1:] if args is None else args)
        program = f"planner {given[0]}" if given and given[0] in COMMANDS else "planner"

        def answer() -> None:
            with self.make_context(prog_name or "planner", given) as ctx:
                self.invoke(ctx)

        sys.exit(exit_code(answer, program=program))


def load_command(name: str) -> Any:
    """Import the function of command ``name`` and make a command of it; its module's EPILOG goes below its options."""
    module_name, function_name = COMMANDS[name].function.split(":")
    module = import_module(module_name)
    alone = typer.Typer(add_completion=False)
    alone.command(name, epilog=getattr(module, "EPILOG", None))(getattr(module, function_name))
    return get_command(alone)


app = typer.Typer(
    name="planner",
    cls=LazyGroup,
    add_completion=False,
    invoke_without_command=True,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def planner(
    ctx: typer.Context, version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False
) -> None:
    """Plan how to decode with a KV cache that does not fit the GPU: which tokens live where, at which step, how fast.

    "planner COMMAND --help" lists the options of a command, with units and defaults.
    """
    if version:
        from planner.answer import kvplan_version

        typer.echo(f"planner (kvplan) {kvplan_version()}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def main() -> None:
    """Entry point of the ``planner`` program."""
    get_command(app)()
