"""mtdp-doctor --preflight: what a run would meet, before it waits in a queue for hours."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.commands import exit_codes
from mtdp_runtime.commands.console import hint, note, result, result_json, trouble
from mtdp_runtime.machine import usable_cores
from mtdp_runtime.units import duration, size

_SPARE: Final = 1.1  # reports and the structure of the files come to the rows
_STALL_S: Final = 600.0


def preflight(named: Sequence[Path], out: Path, models: Sequence[Path], as_json: bool, *, tokens: bool = False) -> int:
    """Open and plan every slide, load the engine, and look at the output folder; return the exit code.

    A slide takes about as long as its tissue takes to find. One that crashes or hangs a decoder would fail alone.
    `tokens`: the run would store patch tokens, too.

    Raises:
        UsageError, BundleError, BackendError: nothing could start.
    """
    from mtdp_runtime.cohort.watchdog import supervise

    would_fail: list[dict[str, Any]] = []
    worker = supervise(_STALL_S, lambda line: _say_failure(line, as_json))

    from mtdp_runtime.cohort.dry_run import plan_job
    from mtdp_runtime.cohort.job import Job, load_bundles, shared_settings
    from mtdp_runtime.cohort.requests import list_slides
    from mtdp_runtime.cohort.run import look_first
    from mtdp_runtime.errors import BackendError
    from mtdp_runtime.extraction.outcome import log_line
    from mtdp_runtime.files import writable_folder

    bundles = load_bundles(list(models), tokens=tokens)
    settings = shared_settings(bundles, tokens=tokens)
    slides = tuple(list_slides(named, say=note, must_exist=not worker.started))
    job = Job(slides=slides, out=out, bundles=bundles, settings=settings, threads=usable_cores())
    look_first(job, worker, writes=False, say=note)
    writable_folder(out)

    def no_engine(why: str) -> None:
        raise BackendError(why, hint="mtdp-doctor says which engines there are.")

    lines: list[dict[str, Any]] = list(worker.settled.values())
    for outcome, _, costs in plan_job(job, worker, no_estimate=no_engine):
        line = log_line(outcome) | costs
        lines.append(line)
        if outcome.status == "failed":
            would_fail.append(line)
            _say_failure(line, as_json)
    needed, seconds = (sum(line.get(name, 0) for line in lines) for name in ("bytes", "estimated_s"))
    failed, free = sum(line["status"] == "failed" for line in lines), shutil.disk_usage(out).free
    if as_json:
        facts = {"slides": len(lines), "would_fail": would_fail, "tiles": sum(line.get("tiles", 0) for line in lines)}
        facts["bytes"] = needed
        if tokens:
            facts["tokens_bytes"] = sum(line.get("tokens_bytes", 0) for line in lines)
        result_json(facts | {"free_bytes": free, "estimated_s": seconds}, indent=1)
    else:
        result(
            f"{len(lines)} slides: {len(lines) - failed} can be done, {failed} would fail; about "
            f"{duration(seconds)} on this machine, {size(needed)} of {size(free)} that are free in {out}"
        )
    if needed * _SPARE > free:
        trouble("problem: ", f"{out}: the features need {size(needed)}, and {size(free)} are free")
        hint(f"Free space, choose another folder, or {'leave --tokens out' if tokens else 'store float16'}.")
        return exit_codes.FAILED
    return exit_codes.of_run(failed, 0)


def _say_failure(line: dict[str, Any], as_json: bool) -> None:
    if not as_json:
        trouble("would fail: ", line["message"])
        hint(line.get("hint", ""), "  ")
