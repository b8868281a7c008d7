"""A viewer's server in the test's own process, as a browser meets it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mtdp_runtime.view.session import Session

TOKEN = "a-token"


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
