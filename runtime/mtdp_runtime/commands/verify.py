"""mtdp-extract --verify: a line for each finished file."""

from __future__ import annotations

from pathlib import Path

from mtdp_runtime.commands.console import result, result_json, say
from mtdp_runtime.store.verify import Verdict, verify_folder


def say_verdicts(out: Path, as_json: bool) -> int:
    """Verify a folder and print a line for each file; return how many are wrong.

    Raises:
        UsageError: there is nothing to verify.
    """
    verdicts = []
    for verdict in verify_folder(out):
        verdicts.append(verdict)
        if as_json:
            result_json(_as_object(verdict))
        elif verdict.status == "wrong":
            result(_line(verdict))
        else:
            say(_line(verdict))
    wrong = sum(verdict.status == "wrong" for verdict in verdicts)
    if not as_json:
        result(f"{len(verdicts) - wrong} of {len(verdicts)} files hold" + (f", {wrong} do not" if wrong else ""))
        if wrong:
            result("  delete a file that does not hold and run the command again that made it")
    return wrong


def _line(verdict: Verdict) -> str:
    if verdict.status == "wrong":
        return f"WRONG  {verdict.path}: {'; '.join(verdict.problems)}"
    also = f"; {', '.join(verdict.derived)}" if verdict.derived else ""
    if verdict.status == "no-checksums":
        return f"open   {verdict.path}: {verdict.tiles} tiles, complete; of a version that kept no checksums{also}"
    return f"ok     {verdict.path}: {verdict.tiles} tiles{also}"


def _as_object(verdict: Verdict) -> dict[str, object]:
    return {
        "file": str(verdict.path),
        "status": verdict.status,
        "tiles": verdict.tiles,
        "derived": list(verdict.derived),
        "problems": list(verdict.problems),
    }
