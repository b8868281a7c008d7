"""What all tests share: the real data, or a skip that says what is missing."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings

# Its classes hold tests that others inherit: their `assert` says what was compared, too.
pytest.register_assert_rewrite("contracts")

# Test processes run side by side; threads of each that wait for each other would double the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests start hundreds of processes: what one of them has compiled is kept for the others.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Laws are checked for truth, not for time: a shared machine may pause for long.
settings.register_profile("mtdp", deadline=None)
settings.load_profile("mtdp")

ROOT = Path(__file__).resolve().parent.parent


def pytest_configure(config: pytest.Config) -> None:
    """What matplotlib keeps goes to a temporary folder, which workers share: one of them looks for fonts."""
    if "MPLCONFIGDIR" not in os.environ:
        folder = TemporaryDirectory(prefix="mtdp-matplotlib-")
        os.environ["MPLCONFIGDIR"] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers take the files in this order. The last ones are short (tests/runtime), so no worker waits for another."""
    items.sort(key=lambda item: item.path.name != "test_house.py")


def pytest_collection_finish() -> None:
    """Nothing that is imported by now is ever garbage: a collector that looked at it would take half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a run remembers goes to a temporary folder, in the processes that tests start, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its files: sockets need a short path."""
    with TemporaryDirectory(prefix="mtdp-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session", autouse=True)
def _servers_end() -> Iterator[None]:
    """Servers of warm processes, started by whoever needs one, end with the tests."""
    import warm

    yield
    warm.stop()


@pytest.fixture(autouse=True)
def _own_signals() -> Iterator[None]:
    """A command that a test runs in its own process sets handlers, and processes started later would inherit them."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real slides and images: MTDP_DATA, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("MTDP_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "slides").is_dir():
        message = f"needs the real test data in {folder} (set MTDP_DATA)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def slides_dir(data_dir: Path) -> Path:
    return data_dir / "slides"
