"""mtdp-view: slides and their features on a page of this machine's browser."""

from __future__ import annotations

import getpass
import os
import secrets
import socket
import webbrowser
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from mtdp_runtime.commands import exit_codes, options
from mtdp_runtime.commands.app import GroupedCommand, Quiet, Verbose, Version, new_app
from mtdp_runtime.commands.console import StoppedBySignal, note, result, result_json, run_app, say
from mtdp_runtime.errors import UsageError
from mtdp_runtime.urls import refuse_url

if TYPE_CHECKING:
    from mtdp_runtime.view.session import Session, Shown

_LAID: Final = "What is laid over the slide"
_PAGE: Final = "Where the page is"

Targets = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="SLIDE|OUT",
        help="Slides, folders of slides, or folders that mtdp-extract wrote: these name their slides themselves.",
    ),
]
Features = Annotated[
    Path | None,
    typer.Option(
        metavar="OUT",
        help="Features of the slides that are named: the folder that mtdp-extract wrote, or a file of it.",
        rich_help_panel=_LAID,
    ),
]
Annotations = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="GEOJSON",
        help="Annotations, as QuPath writes them. Of several slides each takes the files that carry its name.",
        rich_help_panel=_LAID,
    ),
]
Scores = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Numbers of your own for the tiles: CSV or Parquet with the columns x,y (level-0 pixels) and any of "
        "numbers, and slide where it is of several; or HDF5 with a number for each row of the features. Of several "
        "slides each takes the files that carry its name.",
        rich_help_panel=_LAID,
    ),
]
Report = Annotated[
    bool,
    typer.Option(
        "--report",
        help="Show nothing: write OUT/report/index.html anew, the page of all its slides.",
        rich_help_panel=_PAGE,
    ),
]
Port = Annotated[
    int,
    typer.Option(help="Port of 127.0.0.1; 0: any that is free.", metavar="N", min=0, max=65535, rich_help_panel=_PAGE),
]
NoBrowser = Annotated[bool, typer.Option("--no-browser", help="Only print the address.", rich_help_panel=_PAGE)]

app = new_app()


@app.command(cls=GroupedCommand, epilog=exit_codes.HELP)
def view(
    targets: Targets = None,
    *,
    features: Features = None,
    scores: Scores = None,
    annotations: Annotations = None,
    slide_mpp: options.SlideMpp = None,
    port: Port = 0,
    no_browser: NoBrowser = False,
    report: Report = False,
    as_json: options.OneJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    version: Version = False,
) -> None:
    """Look at slides, their tissue, tiles, features and your own scores, in the browser of this machine.

    The page can be opened by whoever has its address, on this machine alone. Ctrl+C ends it.
    """
    if not targets:
        raise UsageError(
            "nothing to look at was named", hint="mtdp-view SLIDE, or mtdp-view OUT for a folder of features."
        )
    if report:
        raise typer.Exit(_write_reports(targets, as_json))
    _must_be_installed()
    for path in [*targets, features, *(scores or []), *(annotations or [])]:
        refuse_url(path)
    for path in [features, *(scores or []), *(annotations or [])]:
        if path is not None and not path.exists():
            raise UsageError(f"{path}: does not exist", hint="Check the path.")
    shown = _shown(targets, features, slide_mpp)
    from mtdp_runtime.view.session import Session

    session = Session(tuple(shown), secrets.token_urlsafe(16), tuple(scores or ()), tuple(annotations or ()))
    with suppress(StoppedBySignal):
        _serve(session, port, browser=not no_browser, as_json=as_json)
    if not as_json:
        say("closed")


def _write_reports(folders: Sequence[Path], as_json: bool) -> int:
    from mtdp_runtime.report.run import write_run_page

    pages = [str(write_run_page(folder)) for folder in folders]
    if as_json:
        result_json({"reports": pages})
    for page in () if as_json else pages:
        result(page)
    return exit_codes.DONE


def _must_be_installed() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"mtdp-view needs {error.name}, which is not installed", hint="pip install 'mtdp[view]'"
        ) from error


def _shown(targets: Sequence[Path], features: Path | None, slide_mpp: float | None) -> list[Shown]:
    """Return what is named, each once.

    Raises:
        UsageError: nothing is there.
    """
    from mtdp_runtime.cohort.requests import list_slides
    from mtdp_runtime.view.named import shown_of, with_features
    from mtdp_runtime.view.session import Shown

    found: list[Shown] = []
    for path in targets:
        of_features = shown_of(path) if features is None else []
        found += of_features
        try:
            slides = [] if path.suffix == ".h5" and of_features else list_slides([path], slide_mpp, say=note)
        except UsageError:  # features whose slides lie elsewhere are reason enough to look
            if not of_features:
                raise
            continue
        have = {one.name.rsplit("/", 1)[-1] for one in of_features}
        found += [
            with_features(Shown(one.name, one.path, mpp=one.mpp, given_by=one.given_by), features)
            for one in slides
            if one.name not in have
        ]
    return list(dict.fromkeys(found))


def _serve(session: Session, port: int, browser: bool, as_json: bool) -> None:
    """Serve until a signal comes.

    Raises:
        UsageError: the port is taken.
    """
    import uvicorn

    from mtdp_runtime.view.server import make_app

    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()  # a browser that is faster than the server waits
    except OSError as error:
        raise UsageError(f"--port {port}: {error.strerror}", hint="Leave it out to take any that is free.") from error
    taken = listener.getsockname()[1]
    address = f"http://127.0.0.1:{taken}/{session.token}/"
    tunnel = _tunnel(taken)
    if as_json:
        result_json({"address": address, "slides": len(session.shown), "tunnel": tunnel})
    else:
        say(f"{len(session.shown)} slide{'s' if len(session.shown) > 1 else ''}; Ctrl+C ends the viewer")
        if tunnel:
            say(f"on your own machine, run: {tunnel}")
            say("then open there:")
        result(address)
    if browser and not tunnel and (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(address)
    settings = uvicorn.Config(
        make_app(session), log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=1
    )
    uvicorn.Server(settings).run(sockets=[listener])


def _tunnel(port: int) -> str:
    """Return the line that brings the page over ssh; empty where nobody is logged in by it."""
    connection = os.environ.get("SSH_CONNECTION", "").split()
    if len(connection) != 4:
        return ""
    host, ssh_port = connection[2:]
    with_port = "" if ssh_port == "22" else f" -p {ssh_port}"
    return f"ssh -N -L {port}:127.0.0.1:{port}{with_port} {getpass.getuser()}@{host}"


def main() -> None:
    """Entry point of `mtdp-view`."""
    run_app(app, "mtdp-view")
