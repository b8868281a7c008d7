"""What the three commands share: `-h`, `--version`, `-q`, `-v`, completion, and grouped help."""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer
import typer.core

from mtdp_runtime.commands import console
from mtdp_runtime.version import __version__

_OTHERS: Final = "Help and output"  # the group of options that every command has


class GroupedCommand(typer.core.TyperCommand):
    """A command whose help lists its options by their group, in plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group of options, in the order in which the groups first appear."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            is_argument = param.param_type_name == "argument"
            panel = getattr(param, "rich_help_panel", None) or ("Arguments" if is_argument else _OTHERS)
            groups.setdefault(panel, []).append((_name_of(record), record[1]) if is_argument else record)
        groups[_OTHERS] = groups.pop(_OTHERS, [])
        for panel, records in groups.items():
            with formatter.section(panel):
                formatter.write_dl(records)


def _name_of(record: tuple[str, str]) -> str:
    """Return an argument's name without its type, which stands after it and is no help."""
    return record[0].split(" <")[0]


def new_app() -> typer.Typer:
    """Return an app for one `GroupedCommand`: help is plain text, since markup would eat brackets and load rich."""
    return typer.Typer(
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _set_quiet(value: bool) -> None:
    console.set_voice(quiet=value)


def _set_verbose(value: bool) -> None:
    console.set_voice(verbose=value)


def _print_version(ctx: typer.Context, value: bool) -> None:
    if value:
        console.result(f"{ctx.find_root().info_name} {__version__}")
        raise typer.Exit(0)


Quiet = Annotated[
    bool,
    typer.Option("-q", "--quiet", help="Print only failures, warnings and results.", callback=_set_quiet),
]
Verbose = Annotated[
    bool, typer.Option("-v", "--verbose", help="Also print the reasons of what is chosen.", callback=_set_verbose)
]
Version = Annotated[
    bool,
    typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True),
]
