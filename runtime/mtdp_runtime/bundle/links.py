"""A model whose weights lie behind a link, for engines that read no file which a link leads out of the model's folder.

The hub's cache is made of links: `snapshots/COMMIT/model.onnx.data` leads to `blobs/DIGEST`. OpenVINO and others refuse
that, since a model could name any file of the machine so. The bundle's files were checked by their digests by then.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mtdp_runtime.bundle.manifest import DATA_SUFFIX
from mtdp_runtime.errors import BackendError


@contextmanager
def without_links(model: Path) -> Iterator[Path]:
    """Yield a path of the model under which its weights lie beside it; itself where no link is between them.

    Else a folder beside the weights holds a copy of the graph, which is small, and a hard link of the weights, until
    the model was read. What was mapped of them stays mapped.

    Raises:
        BackendError: no such folder can be made.
    """
    data = model.with_name(model.name + DATA_SUFFIX)
    if not data.is_symlink():
        yield model
        return
    real = data.resolve()
    try:
        folder = Path(tempfile.mkdtemp(prefix=".mtdp-", dir=real.parent))
    except OSError as error:
        raise _refused(model, error) from error
    try:
        try:
            shutil.copyfile(model, folder / model.name)
            os.link(real, folder / data.name)
        except OSError as error:
            raise _refused(model, error) from error
        yield folder / model.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _refused(model: Path, error: OSError) -> BackendError:
    return BackendError(
        f"{model}: its weights lie behind a link, which this engine does not follow, and a place beside them could not "
        f"be made ({error.strerror})",
        f"Copy the bundle (cp -rL {model.parent} FOLDER) and give that folder, or try --backend onnxruntime.",
    )
