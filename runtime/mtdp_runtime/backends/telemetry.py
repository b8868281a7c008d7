"""OpenVINO without its reports: imported as it is, it tells its maker over the network that it was.

Its package `openvino_telemetry` sends an event at the import (a child process asks google-analytics.com) and writes an
identifier to ~/intel. What computes needs neither, and takes the package's absence for granted.

ONNX Runtime reports, too, some seconds after its first session, and leaves an identifier in ~/.cache. It keeps still
where ORT_DISABLE_TELEMETRY is set, which importing any package of this project does.
"""

from __future__ import annotations

import importlib
import sys
import threading
from typing import Any, Final

_REPORTS: Final = "openvino_telemetry"
_CONVERTER: Final = "openvino.tools.ovc"

_one_at_a_time = threading.Lock()  # a second thread would find a module that is half imported


def forbid_reports() -> None:
    """Make `openvino_telemetry` one that cannot be imported in this process, unless somebody has imported it already.

    None in `sys.modules` makes an import fail as if there were no such module (Python's reference, "The import
    system"); OpenVINO and NNCF then go without.
    """
    sys.modules.setdefault(_REPORTS, None)  # type: ignore[arg-type]


def import_openvino() -> Any:
    """Return the module `openvino`, imported without its reports, and without the converter of models.

    The converter, which nothing here uses, takes longer to import than all the rest of it.

    Raises:
        ImportError: it is not installed.
    """
    with _one_at_a_time:
        if "openvino" not in sys.modules:
            forbid_reports()
            hide = _CONVERTER not in sys.modules
            if hide:
                sys.modules[_CONVERTER] = None  # type: ignore[assignment]
            try:
                importlib.import_module("openvino")
            finally:
                if hide:
                    del sys.modules[_CONVERTER]  # whoever wants it may have it
        return sys.modules["openvino"]
