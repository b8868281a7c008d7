"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "ruff", "check", "."],
        ["-m", "ruff", "format", "--check", "."],
        ["-m", "mypy"],
        ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
    ],
    ids=["ruff", "format", "mypy", "imports"],
)
def test_the_checks_pass(command: list[str]) -> None:
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


PACKAGES = ("mtdp", "export/mtdp_export", "runtime/mtdp_runtime")
MOST_LINES = 80


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The lines of a function, without its docstring: documentation is not length."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def too_long(source: str) -> list[str]:
    functions = (
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return [function.name for function in functions if lines_of_code(function) > MOST_LINES]


def test_no_function_is_long() -> None:
    found = {
        f"{path.relative_to(ROOT)}: {name}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for name in too_long(path.read_text(encoding="utf-8"))
    }
    assert not found


def test_a_long_function_is_found_and_its_docstring_not_counted() -> None:
    body, docs = "    x = 1\n" * 79, "    more\n" * 40
    whole = f'def f():\n    """Do.\n{docs}    """\n{body}'
    assert too_long(whole) == []
    assert too_long(whole + "    x = 1\n") == ["f"]
    method = "        x = 1\n" * 80
    assert too_long(f"class A:\n    async def g(self):\n{method}") == ["g"]
