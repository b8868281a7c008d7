"""A viewer's server in the test's own process, and its page as a browser shows it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from chromium import Page
from mtdp_runtime.view.session import Session

TOKEN = "a-token"
ALL_DRAWN = (
    "mtdpView.layers.all.every((l) => !l.shown || l.data) && mtdpView.stage.osd.world.getItemAt(0).getFullyLoaded()"
)


@contextmanager
def served(session: Session) -> Iterator[str]:
    """Serve a session from a thread, and give its address."""
    import uvicorn

    from mtdp_runtime.view.server import make_app

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(session), log_level="warning", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/{session.token}/"
    server.should_exit = True
    thread.join(10)


def ready(page: Page) -> None:
    page.wait("document.body.dataset.state === 'open'")
    drawn(page)


def drawn(page: Page) -> None:
    """Wait until all that is shown is loaded and drawn."""
    page.wait(ALL_DRAWN)
    page.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def place_on_screen(page: Page, x0: float, y0: float) -> list[float]:
    """Where a level-0 pixel is on the page."""
    return page.run(
        f"(() => {{ const [a, b, c, d, e, f] = mtdpView.stage.transform();"
        " const box = document.getElementById('slide').getBoundingClientRect();"
        f" return [box.x + a * {x0} + c * {y0} + e, box.y + b * {x0} + d * {y0} + f]; }})()"
    )
