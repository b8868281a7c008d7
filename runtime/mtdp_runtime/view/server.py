"""The viewer's server: one page, its pictures and its numbers, read-only, for whoever knows the token.

It answers requests for 127.0.0.1 and localhost alone: a page of another site that has its name point here is refused.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import anyio.to_thread
import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mtdp_runtime.errors import RuntimeFailure, SlideGone
from mtdp_runtime.machine import usable_cores
from mtdp_runtime.slide.identity import hint_of
from mtdp_runtime.store.layout import TileStatus
from mtdp_runtime.store.reader import open_features
from mtdp_runtime.tiling.outlines import rings
from mtdp_runtime.version import __version__
from mtdp_runtime.view.deep_zoom import PictureCache, jpeg, read_picture, read_square
from mtdp_runtime.view.describe import describe
from mtdp_runtime.view.laid import Laid, LaidScores, read_annotations
from mtdp_runtime.view.layers import colours_of, palettes, values_of
from mtdp_runtime.view.session import Session, Shelf, Shown
from mtdp_runtime.view.similar import Similar

STATIC: Final = Path(__file__).parent / "static"
_HOSTS: Final = ["127.0.0.1", "localhost"]  # over an ssh tunnel, too, whatever the port
_CACHE_BYTES: Final = 64 << 20
_OSD_STYLE: Final = "'sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE='"  # OpenSeadragon adds three lines of CSS
_HEADERS: Final = {
    "content-security-policy": f"default-src 'none'; script-src 'self'; style-src 'self' {_OSD_STYLE}; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
}
_MOST_THREADS: Final = 4
_GONE: Final = 410
_UNREADABLE: Final = 422


class Viewer:
    """The requests of one session; each method answers one kind."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.shelf = Shelf()
        self._laid = Laid(session)
        self._similar = Similar(session)
        self._pictures = PictureCache(_CACHE_BYTES)

    def page(self, request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    def what_is_shown(self, request: Request) -> Response:
        """Answer with the list of slides, and what is the same for all."""
        slides = [{"name": shown.name} for shown in self.session.shown]
        return JSONResponse({"slides": slides, "version": __version__, "palettes": palettes()})

    def slide(self, request: Request) -> Response:
        return JSONResponse(describe(self._shown(request), self.shelf, self._laid))

    def picture(self, request: Request) -> Response:
        """Answer with a picture of the pyramid, by level, column and row."""
        shown = self._shown(request)
        level, column, row = (request.path_params[name] for name in ("level", "column", "row"))
        with self.shelf.lent(shown) as slide:
            tag = _tag(hint_of(slide.info.path), level, column, row)
            return self._answer(request, shown, tag, lambda: jpeg(read_picture(slide, level, column, row)))

    def tissue(self, request: Request) -> Response:
        """Answer with the outlines of tissue: pieces of rings of level-0 x, y."""
        with open_features(self._features(request)) as file:
            return JSONResponse([] if file.tissue is None else list(rings(file.tissue)))

    def tile(self, request: Request) -> Response:
        """Answer with the picture of a row's tile, as the model saw it."""
        shown, row = self._shown(request), request.path_params["row"]
        with open_features(self._features(request)) as file:
            if row >= len(file):
                raise HTTPException(404, f"no row {row}: the file has {len(file)}")
            x0, y0 = file.coords[row].tolist()
            side_px, scale = (
                int(file.tile_attrs["patch_size"]),
                float(file.attrs.get("scale", file.tile_side / file.tile_attrs["patch_size"])),
            )
        with self.shelf.lent(shown) as slide:
            tag = _tag(hint_of(slide.info.path), x0, y0, side_px, scale)
            return self._answer(request, shown, tag, lambda: jpeg(read_square(slide, x0, y0, side_px, scale)))

    def tiles(self, request: Request) -> Response:
        """Answer with int32[N, 2], level-0 x, y of each tile of a layer."""
        whose = request.path_params["whose"]
        if whose != "features":
            laid = self._scores(request, whose)
            if laid.coords is None:
                raise HTTPException(404, f"{whose} has no tiles of its own")
            return _numbers(laid.coords.astype(np.int32))
        with open_features(self._features(request)) as file:
            return _numbers(file.coords.astype(np.int32))

    def status(self, request: Request) -> Response:
        """Answer with uint8[N]: 1 where a tile could not be read."""
        with open_features(self._features(request)) as file:
            return _numbers((file.status != TileStatus.GOOD).astype(np.uint8))

    def values(self, request: Request) -> Response:
        """Answer with float32[N], a column of a layer."""
        layer, column = request.path_params["layer"], request.path_params["column"]
        if layer.startswith("scores:"):
            values = self._scores(request, layer).values
            if column >= values.shape[1]:
                raise HTTPException(404, f"{layer} has {values.shape[1]} columns")
            return _numbers(values[:, column])
        with open_features(self._features(request)) as file:
            return _numbers(values_of(file, layer, column))

    def colours(self, request: Request) -> Response:
        """Answer with uint8[N, 3], the features as colours."""
        with open_features(self._features(request)) as file:
            return _numbers(colours_of(file))

    def annotations(self, request: Request) -> Response:
        """Answer with a GeoJSON file."""
        number = request.path_params["file"]
        files = self.session.annotations
        if number >= len(files) or files[number] not in self.session.belonging(files, self._shown(request)):
            raise HTTPException(404, f"no annotations {number}")
        return Response(read_annotations(files[number]), media_type="application/geo+json")

    def similar(self, request: Request) -> Response:
        """Answer with the tiles that are most like that of a row."""
        return JSONResponse(self._similar.answer(self._features(request), request.path_params["row"]))

    def similarity(self, request: Request) -> Response:
        """Answer with float32[N], how like each tile is to that of a row."""
        query, rows = self._similar.of_slide(self._features(request), request.path_params["row"])
        return _numbers(rows.cosines(query))

    def _scores(self, request: Request, layer: str) -> LaidScores:
        found, _ = self._laid.scores_of(self._shown(request))
        one = next((laid for laid in found if laid.layer.id == layer), None)
        if one is None:
            raise HTTPException(404, f"no layer {layer}")
        return one

    def _answer(self, request: Request, shown: Shown, tag: str, make: Callable[[], bytes]) -> Response:
        headers = {"etag": tag, "cache-control": "private, max-age=60"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(self._pictures.get((shown, tag), make), media_type="image/jpeg", headers=headers)

    def _shown(self, request: Request) -> Shown:
        number: int = request.path_params["number"]
        if number >= len(self.session.shown):
            raise HTTPException(404, f"no slide {number}")
        return self.session.shown[number]

    def _features(self, request: Request) -> Path:
        features = self._shown(request).features
        if features is None:
            raise HTTPException(404, "no features of this slide")
        return features


def make_app(session: Session) -> Starlette:
    """Return the server of a session; everything it serves is below /<token>/."""
    viewer = Viewer(session)
    slide = "/api/slides/{number:int}"
    routes = [
        Route("/", viewer.page),
        Route("/api/session", viewer.what_is_shown),
        Route(slide, viewer.slide),
        Route(f"{slide}/tissue", viewer.tissue),
        Route(f"{slide}/tiles/{{whose}}", viewer.tiles),
        Route(f"{slide}/status", viewer.status),
        Route(f"{slide}/values/{{layer}}/{{column:int}}", viewer.values),
        Route(f"{slide}/colours", viewer.colours),
        Route(f"{slide}/annotations/{{file:int}}", viewer.annotations),
        Route(f"{slide}/similar/{{row:int}}", viewer.similar),
        Route(f"{slide}/similarity/{{row:int}}", viewer.similarity),
        Route("/slides/{number:int}_files/{level:int}/{column:int}_{row:int}.jpeg", viewer.picture),
        Route("/slides/{number:int}_tiles/{row:int}.jpeg", viewer.tile),
        Mount("/static", StaticFiles(directory=STATIC)),
    ]
    return Starlette(
        lifespan=partial(_life, viewer),
        routes=[Mount("/{token}", routes=routes)],
        middleware=[
            Middleware(_Headers),
            Middleware(TrustedHostMiddleware, allowed_hosts=_HOSTS, www_redirect=False),
            Middleware(_Token, token=session.token),
        ],
        exception_handlers={
            HTTPException: _said,
            RuntimeFailure: _failure,
            LookupError: _nothing_there,
            OSError: _unreadable,
        },
    )


@asynccontextmanager
async def _life(viewer: Viewer, app: Starlette) -> AsyncIterator[None]:
    # Each thread that reads keeps memory of its own, up to 100 MB: few of them.
    anyio.to_thread.current_default_thread_limiter().total_tokens = min(_MOST_THREADS, max(2, usable_cores()))
    yield
    viewer.shelf.close()


class _Token:
    """Refuse whoever does not know the token, before anything is looked up."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = scope["path"].split("/")[1]
            if not secrets.compare_digest(given.encode(), self._token.encode()):
                refusal = JSONResponse({"text": "Open the address that mtdp-view printed, whole."}, 403)
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


class _Headers:
    """Add to each answer what keeps a browser from loading or telling anything elsewhere."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            await send(message)

        await self._app(scope, receive, with_headers)


def _tag(*parts: object) -> str:
    digest = hashlib.blake2b(repr((__version__, parts)).encode(), digest_size=12)
    return f'"{digest.hexdigest()}"'


def _numbers(values: NDArray[Any]) -> Response:
    return Response(np.ascontiguousarray(values).tobytes(), media_type="application/octet-stream")


def _said(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"text": error.detail, "hint": ""}, error.status_code)


def _failure(request: Request, error: Exception) -> Response:
    assert isinstance(error, RuntimeFailure)
    return JSONResponse(
        {"text": str(error), "hint": error.hint}, _GONE if isinstance(error, SlideGone) else _UNREADABLE
    )


def _unreadable(request: Request, error: Exception) -> Response:
    """Answer for a feature file that is damaged inside: HDF5 says so when a part of it is read."""
    return JSONResponse({"text": f"a file cannot be read: {error}", "hint": "mtdp-extract --verify OUT."}, _UNREADABLE)


def _nothing_there(request: Request, error: Exception) -> Response:
    return JSONResponse({"text": str(error), "hint": ""}, 404)
