"""bundle.json against its published JSON schema, before a bundle takes its name."""

from __future__ import annotations

import json
from pathlib import Path

from mtdp_export.errors import ExportError
from mtdp_runtime.bundle import schema
from mtdp_runtime.bundle.manifest import MANIFEST_NAME


def check_schema(folder: Path) -> None:
    """Validate a bundle.json that was just written.

    Raises:
        ExportError: it is not what the schema promises to other programs, or jsonschema is not installed.
    """
    try:
        import jsonschema
    except ImportError as error:
        raise ExportError(f"bundle.json cannot be validated: {error}", "pip install 'mtdp[export]'") from error
    document = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    problem = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(schema()).iter_errors(document))
    if problem is not None:
        raise ExportError(f"{MANIFEST_NAME}: {problem.json_path}: {problem.message}", "The bundle was not written.")
