"""A slide that lies behind a URL, as a path: its name is safe to store and to show, whatever secrets the URL holds."""

from __future__ import annotations

import os
import re
from pathlib import Path, PosixPath
from typing import Any, Final
from urllib.parse import urlsplit

from mtdp_runtime.errors import UsageError

_WEB: Final = ("http", "https")
# One slash, too: that is what a URL becomes where it was taken for a path.
_URL: Final = re.compile(r"(?P<scheme>s3|gs|az|https?):/{1,2}(?=[^/\s])(?P<rest>.*)", re.DOTALL)
_INSIDE: Final = re.compile(r"\b(s3|gs|az|https?):/{1,2}[^\s\"']+")


class SlideUrl(PosixPath):
    """A URL without user, password, query and fragment; `given` is what the user wrote, for the transfer alone."""

    _given: str

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    @property
    def given(self) -> str:
        return getattr(self, "_given", str(self))

    @property
    def scheme(self) -> str:
        return str(self).partition(":")[0]

    @property
    def is_folder(self) -> bool:
        return self.given.endswith("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return found_url, (str(self), self.given)


def found_url(safe: str, given: str) -> SlideUrl:
    """Return a URL that was one, or what a server lists, which may have a name that nobody may write.

    `given` is kept to the letter; a path has no two slashes in a row.
    """
    url = SlideUrl(safe)
    url._given = given
    return url


def is_url(named: str | Path) -> bool:
    """Say whether this names what is fetched; a folder of such a name is `./s3:`."""
    return isinstance(named, SlideUrl) or _URL.match(os.fspath(named)) is not None


def path_or_url(named: str | Path) -> Path:
    """Return what a user named.

    Raises:
        UsageError: the URL of a bucket has what only one of the web has. The message has no secret.
    """
    if isinstance(named, SlideUrl):
        return named
    found = _URL.match(os.fspath(named))
    if found is None:
        return Path(named)
    given = f"{found['scheme']}://{found['rest']}"
    safe = _safe(given)
    if found["scheme"] not in _WEB and safe != given:
        raise UsageError(
            f"{safe}: a bucket's URL takes no user, password or query",
            hint="Credentials come from the environment; an object's name may not hold @ before a /, or ?.",
        )
    return found_url(safe, given)


def refuse_url(named: str | Path | None, what: str = "") -> None:
    """Make sure that what is read in place lies on a disk; `what` is the option that named it.

    Raises:
        UsageError: it lies behind a URL. The message has no secret.
    """
    if named is not None and is_url(named):
        raise UsageError(
            f"{what} {without_secrets(str(named))}: only slides of mtdp-extract are fetched".strip(),
            hint="Copy it to a disk.",
        )


def without_secrets(text: str) -> str:
    """Return a text whose URLs have neither user, password, query nor a fragment of the web."""
    return _safe(text) if is_url(text) else _INSIDE.sub(lambda found: _safe(found[0]), text)


def _safe(url: str) -> str:
    scheme, _, rest = url.partition(":")
    try:
        parts = urlsplit(f"{scheme}://{rest.lstrip('/')}", allow_fragments=scheme in _WEB)  # a bucket's have none
    except ValueError:  # brackets that are no address
        return f"{scheme}://"
    return f"{scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
