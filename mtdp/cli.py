"""`mtdp-train`: each command parses, calls one library function, and prints."""

from __future__ import annotations

from typing import Annotated

import typer

from mtdp import cli_catalogue, cli_protocol, cli_train
from mtdp.cli_options import EXIT_CODES, Group, print_version

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup would eat [[task]]
    epilog=EXIT_CODES,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Multi-task pre-training for digital pathology, and transfer to a task of your own (arXiv 2005.02561).",
)


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A group even with one command."""


cli_train.register(app)
cli_protocol.register(app)
cli_catalogue.register(app)


def main() -> None:
    """The entry point of `mtdp-train`."""
    app()
