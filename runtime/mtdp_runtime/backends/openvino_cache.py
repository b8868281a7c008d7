"""Models as OpenVINO compiled them, kept on this machine: to read one takes less than half the time of compiling it.

A compiled model steers code, so it is kept as engines are: in a folder of the user's alone, with its digest. Where
anything is wrong with it, the model is compiled anew; a run never fails for its sake.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from mtdp_runtime.backends.proof_cache import place
from mtdp_runtime.bundle.links import without_links
from mtdp_runtime.bundle.manifest import DATA_SUFFIX
from mtdp_runtime.errors import BackendError
from mtdp_runtime.files import private_folder, read_with_digest, save_with_digest

# A larger model would take its size in memory twice, to save seconds of what is then a long run.
_MOST_BYTES: Final = 128 << 20
_MOST_KEPT: Final = 8  # the oldest make room
_PRECISION: Final = "INFERENCE_PRECISION_HINT"

_early: list[threading.Thread] = []  # what reads early, until it is waited for
_read_early: dict[Path, Any] = {}


def read_early(find: Callable[[], tuple[Any, Path, Mapping[str, str | int]]]) -> None:
    """Read a model that was kept, in a thread, while the rest of the program is imported; `compiled` takes it then.

    Args:
        find: returns OpenVINO's `Core`, `place_of` the model, and OpenVINO's properties. Whatever it raises, and
            whatever is wrong with what was kept, is met again by who loads the model, in its own time.
    """

    def work() -> None:
        with contextlib.suppress(Exception):
            core, path, config = find()
            kept = _read(core, path, config) if path.exists() else None
            if kept is not None:
                _read_early[path] = kept

    thread = threading.Thread(target=work, name="mtdp-reads-early")
    _early.append(thread)
    thread.start()


def compiled(
    core: Any,
    file: Path,
    sha256: str,
    shape: Sequence[int],
    config: Mapping[str, str | int],
    cpu: str,
    left_out: Sequence[str] = (),
) -> Any:
    """Return an ONNX file's model compiled for the CPU: the one that was kept, or a new one, which is kept.

    Args:
        core: OpenVINO's `Core`.
        file: the model; it was checked.
        sha256: of the file.
        shape: of its input.
        config: OpenVINO's properties.
        cpu: the machine in words: another CPU, another compiled model.
        left_out: outputs that are not computed.

    Raises:
        RuntimeError: OpenVINO refuses the model.
    """
    apart = file.with_name(file.name + DATA_SUFFIX)
    small = file.stat().st_size <= _MOST_BYTES and not apart.exists()
    path = place_of(sha256, shape, config, cpu, left_out)
    while _early:
        _early.pop().join()
    early = _read_early.pop(path, None)
    _read_early.clear()
    if small:
        kept = _read(core, path, config) if early is None else early
        if kept is not None:
            return kept
    with without_links(file) as found:
        model = core.read_model(found)
        for output in [one for one in model.outputs if one.get_names() & set(left_out)]:
            model.remove_result(output.get_node())
        model.reshape(list(shape))
        made = core.compile_model(model, "CPU", dict(config))
    if small:
        # What cannot be kept is compiled again next time.
        with contextlib.suppress(BackendError, OSError, RuntimeError):
            private_folder(path.parent)
            save_with_digest(path, made.export_model().getvalue())
            for old in sorted(path.parent.glob("*.blob"), key=lambda blob: blob.stat().st_mtime)[:-_MOST_KEPT]:
                old.unlink(missing_ok=True)
    return made


def place_of(
    sha256: str, shape: Sequence[int], config: Mapping[str, str | int], cpu: str, left_out: Sequence[str] = ()
) -> Path:
    """Return where a model is kept; see `compiled`."""
    options = [f"{name}={value}" for name, value in config.items()]
    facts: list[str | int] = [version("openvino"), sha256, *shape, *options, cpu]
    facts += [f"without {name}" for name in left_out]
    return place("compiled", facts, "blob")


def _read(core: Any, path: Path, config: Mapping[str, str | int]) -> Any | None:
    """Return what was kept; None where there is nothing to rely on."""
    try:
        private_folder(path.parent)  # what others may write is not run
        content, _ = read_with_digest(path)
        if not content:
            return None
        kept = core.import_model(io.BytesIO(content), "CPU", dict(config))
        # It must compute in what was asked for, whatever an importing library makes of the hint.
        same = kept.get_property(_PRECISION).get_type_name() == config[_PRECISION]
    except (BackendError, RuntimeError):
        return None
    return kept if same else None
