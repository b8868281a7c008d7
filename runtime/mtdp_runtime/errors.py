"""Everything that the runtime refuses to do, and why.

    RuntimeFailure
    ├── UsageError                 the command line or the arguments are wrong (exit code 2)
    │   ├── DuplicateSlideNames
    │   └── OutputUnwritable
    ├── BundleError                the model cannot be trusted or understood
    │   ├── BundleNotFound
    │   ├── BundleInvalid
    │   └── BundleDigestMismatch
    ├── BackendError               no engine can run the model here
    │   ├── BackendUnavailable
    │   ├── EngineRejected
    │   └── DeviceOutOfMemory
    ├── StoreError                 an output file cannot be used
    │   ├── FingerprintMismatch
    │   └── ClaimLost
    ├── ListenerFailed             a function that the caller gave raised
    └── SlideError                 one slide failed; the others go on (exit code 1)
        ├── SlideUnreadable
        │   └── SlideGone
        ├── SlideScaleUnknown
        ├── SlideTooCoarse
        ├── SlideTooLarge
        ├── NothingFinite
        ├── StorageFailed
        └── TileUnreadable

`str(error)` is one line with the offending value; `error.hint` is the next thing to do.
"""

from __future__ import annotations


class RuntimeFailure(Exception):
    """Base of all errors that this package raises on purpose."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(RuntimeFailure):
    """The command or the arguments are wrong; nothing was started."""


class DuplicateSlideNames(UsageError):
    """Two slides of one run would write the same output file."""


class OutputUnwritable(UsageError):
    """The output folder cannot be written."""


class BundleError(RuntimeFailure):
    """The model bundle cannot be used."""


class BundleNotFound(BundleError):
    """There is no bundle at the given place."""


class BundleInvalid(BundleError):
    """bundle.json does not say what it must."""


class BundleDigestMismatch(BundleError):
    """A file of the bundle is not the file that was exported."""


class BackendError(RuntimeFailure):
    """An inference engine failed."""


class BackendUnavailable(BackendError):
    """The inference engine that was asked for does not run here."""


class EngineRejected(BackendError):
    """A serialized engine is damaged, or of another GPU or library; another one must be built."""


class DeviceOutOfMemory(BackendError):
    """The GPU has too little memory free for this batch."""


class StoreError(RuntimeFailure):
    """A feature file cannot be read or written."""


class FingerprintMismatch(StoreError):
    """A feature file was made from another slide, model, grid or precision."""


class ClaimLost(StoreError):
    """Another process took the slide over, because this one was asleep for too long."""


class ListenerFailed(RuntimeFailure):
    """A function that the caller gave raised; `__cause__` is what it raised."""


class SlideError(RuntimeFailure):
    """One slide cannot be processed."""


class SlideUnreadable(SlideError):
    """The file is not a slide that can be opened."""


class SlideGone(SlideUnreadable):
    """The file that was a slide is not there any more."""


class SlideScaleUnknown(SlideError):
    """The slide does not say how many micrometres a pixel covers."""


class SlideTooCoarse(SlideError):
    """The slide's finest level is coarser than the resolution asked for."""


class SlideTooLarge(SlideError):
    """The slide states a size that no slide has, or the stride asks for more tiles than can be planned."""


class NothingFinite(SlideError):
    """The model gives no finite numbers for any tile: that says nothing of the slide."""


class StorageFailed(SlideError):
    """The system gives none of a slide's bytes, again and again: that says nothing of the slide."""


class TileUnreadable(SlideError):
    """A rectangle of the slide cannot be decoded."""
