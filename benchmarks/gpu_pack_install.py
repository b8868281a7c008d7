"""Installs a pack that gpu_pack.py made, without a network: `python install.py`, in the environment that shall have it.

Nothing but Python's own library is used. Every piece is checked before anything is installed.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def refuse(why: str, what_to_do: str) -> None:
    print(f"error: {why}. {what_to_do}", file=sys.stderr)
    sys.exit(2)


def joined(manifest: dict, target: Path) -> None:
    """Write the archive from its pieces."""
    again = "Copy it again."
    with target.open("wb") as whole:
        for name, digest in manifest["pieces"].items():
            path = HERE / name
            if not path.is_file():
                refuse(f"{path}: this piece is missing ({len(manifest['pieces'])} belong to the pack)", again)
            content = path.read_bytes()
            if hashlib.sha256(content).hexdigest() != digest:
                refuse(f"{path}: this piece is damaged: {len(content)} bytes with another digest", again)
            whole.write(content)


def main() -> None:
    try:
        manifest = json.loads((HERE / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        refuse(f"{HERE / 'manifest.json'}: cannot be read: {error}", "Copy the whole folder again.")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if manifest["python"] != here:
        wanted = manifest["python"]
        refuse(
            f"this pack is for Python {wanted}, this is {here}", f"Run it with python{wanted}, or make one for {here}."
        )
    with tempfile.TemporaryDirectory() as name:
        archive, wheels = Path(name) / "pack.tar", Path(name) / "wheels"
        joined(manifest, archive)
        with tarfile.open(archive) as opened:
            opened.extractall(wheels, filter="data")
        archive.unlink()
        pip = [sys.executable, "-m", "pip", "install", "--no-index", f"--find-links={wheels}"]
        # What needs torch comes without what it asks for: torch is there, in a build of this machine's choice.
        for options, names in (([], manifest["install"]), (["--no-deps"], manifest["install_alone"])):
            done = subprocess.run([*pip, *options, *names], capture_output=True, text=True) if names else None
            if done is not None and done.returncode:
                said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
                why = said[-1].removeprefix("ERROR: ")
                refuse(f"a wheel is missing in the pack: {why}", "Make it again with gpu_pack.py for this machine.")
    print(f"installed: {', '.join([*manifest['install'], *manifest['install_alone']])}")
    for line in manifest["lacks"]:
        print(line)


if __name__ == "__main__":
    main()
