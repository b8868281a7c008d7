"""`python -m mtdp_runtime` is `mtdp-extract`, for where the scripts of an environment are not on the path."""

from __future__ import annotations

from mtdp_runtime.commands.extract import main

main()
