"""Compile what averages pixels (runtime/mtdp_runtime/slide/average.c) into the wheel, where there is a C compiler.

Without one the wheel is pure Python and gives the same features, to the bit, more slowly. The library is C without
Python, so one wheel serves every version of Python on a platform.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "runtime/mtdp_runtime/slide"
LIBRARY = "libmtdp_average.so"  # slide/compiled.py looks for this name
# No -march: the code chooses by the processor it runs on. Nothing may round otherwise than it is written.
FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fno-fast-math", "-shared", "-fPIC", "-fvisibility=default")


def compile_library(source: Path, library: Path) -> str:
    """Compile with $CC, cc, gcc or clang; return why there is no library, or nothing."""
    named = os.environ.get("CC")
    compilers = [shlex.split(named)] if named else [[name] for name in ("cc", "gcc", "clang")]
    compiler = next((command for command in compilers if shutil.which(command[0])), None)
    if compiler is None:
        return f"no C compiler ({' '.join(command[0] for command in compilers)})"
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    made = library.with_name(f"{library.name}.{os.getpid()}")  # a library that is in use is not written over
    command = [*compiler, *FLAGS, f'-DSOURCE_DIGEST="{digest}"', "-o", str(made), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        made.unlink(missing_ok=True)
        return (done.stderr.strip().splitlines() or [f"{compiler[0]} failed"])[0]
    made.replace(library)
    return ""


class CompiledAveraging(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the library beside its source: into the wheel, or into the tree of an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and name the platform that the wheel is for."""
        folder = Path(self.root) / FOLDER
        self._made = tempfile.TemporaryDirectory()
        library = (folder if version == "editable" else Path(self._made.name)) / LIBRARY
        why = compile_library(folder / "average.c", library)
        if why:
            self.app.display_warning(f"averaging is not compiled, and NumPy does it, more slowly: {why}")
        elif version != "editable":
            build_data["force_include"][str(library)] = f"mtdp_runtime/slide/{LIBRARY}"
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Clear up."""
        self._made.cleanup()
