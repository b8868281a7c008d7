"""Where `mtdp-export` begins: signals are heard before anything heavy is imported."""

from __future__ import annotations

from mtdp_runtime.commands.entry import prepare


def main() -> None:
    """Entry point of `mtdp-export`."""
    prepare()
    from mtdp_export.cli import main

    main()
