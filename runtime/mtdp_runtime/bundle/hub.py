"""A bundle that lies in a repository of the Hugging Face hub: `hf:OWNER/NAME@REVISION`.

Only such a name opens a connection, and only huggingface_hub (the extra `hf`) does: into its own cache, from which it
answers without a network where the revision is a commit whose files are there, or where there is no network. A tag or a
branch is resolved to its commit, which the feature file names. `bundle.json` has the digest of every file, and
`Bundle.checked` compares them as for any folder. Nothing else of the repository is fetched, and no engine, which is
code, unless it is trusted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final

from mtdp_runtime.bundle import Bundle, load_bundle
from mtdp_runtime.bundle.manifest import MANIFEST_NAME, Manifest
from mtdp_runtime.errors import BundleNotFound, UsageError
from mtdp_runtime.settings import HUB

_NAME: Final = re.compile(r"hf:(?P<repository>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)", re.ASCII)
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
Fetch = Callable[[str], Path]  # a file of the repository -> where it lies


def is_on_the_hub(model: Path | str) -> bool:
    """Say whether a model is named by its repository; a folder of such a name is `./hf:...`."""
    return str(model).startswith(HUB)


def bundle_of(model: Path | str, trust_engines: bool = False) -> Bundle:
    """Return the bundle of a folder, or of a repository of the hub.

    Raises:
        UsageError: the name of a repository is none, or huggingface_hub is not installed.
        BundleNotFound, BundleInvalid: it is not there, or no bundle.
    """
    if not is_on_the_hub(model):
        return load_bundle(model, trust_engines)
    named = _NAME.fullmatch(str(model))
    if named is None:
        raise UsageError(
            f"{model}: not hf:OWNER/NAME@REVISION",
            hint="The revision pins what is computed: the commit's 40 digits are best, a tag is taken, too.",
        )
    return _fetched(str(model), named["repository"], named["revision"], trust_engines)


def _fetched(name: str, repository: str, revision: str, trust_engines: bool) -> Bundle:
    folder = _fetcher(name, repository, revision)(MANIFEST_NAME).parent
    if not _COMMIT.fullmatch(folder.name):
        raise BundleNotFound(f"{name}: the hub named no commit", hint="Name the commit's 40 digits after the @.")
    bundle = load_bundle(folder, trust_engines)
    fetch = _fetcher(name, repository, folder.name)  # the others are of the same commit, whatever happens meanwhile
    for file in _files_of(bundle.manifest, trust_engines):
        fetch(file)
    return Bundle(folder, bundle.manifest, bundle.digest, trust_engines, f"{HUB}{repository}@{folder.name}")


def _files_of(manifest: Manifest, trust_engines: bool) -> list[str]:
    refs = [manifest.golden, *(variant.file for variant in manifest.variants)]
    refs += [variant.data for variant in manifest.variants if variant.data is not None]
    if trust_engines:
        refs += [engine.file for engine in manifest.engines]
    return [ref.file for ref in refs]


def _fetcher(name: str, repository: str, revision: str) -> Fetch:
    for quiet in ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):  # read when it is imported
        os.environ.setdefault(quiet, "1")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise UsageError(f"{name} needs huggingface_hub", hint="pip install 'mtdp[hf]'") from error

    def fetch(file: str) -> Path:
        try:
            return Path(hf_hub_download(repository, file, revision=revision))
        except GatedRepoError as error:
            what, hint = "its owner must let you in first", "Ask on its page, then: hf auth login."
            raise BundleNotFound(f"{name}: {what}", hint) from error
        except RepositoryNotFoundError as error:
            what = "no such repository, or it is private"
            raise BundleNotFound(f"{name}: {what}", "Check the name; for a private one: hf auth login.") from error
        except RevisionNotFoundError as error:
            raise BundleNotFound(f"{name}: no such revision", "Its page lists commits and tags.") from error
        except LocalEntryNotFoundError as error:
            what = f"{file} is not in the cache, and the hub cannot be reached"
            hint = "Run it once with a network, or copy the bundle here and give its folder."
            raise BundleNotFound(f"{name}: {what}", hint) from error
        except EntryNotFoundError as error:
            hint = "Push the whole folder that mtdp-export wrote."
            raise BundleNotFound(f"{name}: not a model bundle (no {file} in it)", hint) from error
        except Exception as error:  # of its transports, which change
            said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise BundleNotFound(f"{name}: {file} cannot be fetched: {said}", "Try again, or copy it here.") from error

    return fetch
