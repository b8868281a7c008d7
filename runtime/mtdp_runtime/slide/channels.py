"""Whether channels that lie apart are the red, green and blue of one picture, and one of grey is a picture at all.

Converters from RGB (raw2ometiff, bioformats2raw, libvips) write them so, and so does every fluorescence microscope.
What names the channels decides: red, green and blue, against stains, wavelengths and other colours. Where nothing does,
the picture does: seen by transmitted light, glass and pale tissue are bright in all three, and fluorescence is dark.
So it is with one channel of grey.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from mtdp_runtime.slide.probe import UnknownKind

NO_NAMES: Final = "3 channels without names"
GREY: Final = "one channel of grey"
BRIGHT: Final = 128  # grey levels that the brighter part of a picture by transmitted light reaches in each channel
_BRIGHTER_PART: Final = 90  # percentile
_NAMES: Final = ({"r", "red"}, {"g", "green"}, {"b", "blue"})
_NO_NAME: Final = re.compile(r"(channel|ch|c)?[\s:_#-]*\d*(:\d+)*|tl brightfield|brightfield", re.IGNORECASE)
_RGB: Final = ("ff0000", "00ff00", "0000ff")
# OME-XML 2016-06, attributes of Channel that only light of one wavelength has
_OF_FLUORESCENCE: Final = ("Fluor", "EmissionWavelength", "ExcitationWavelength")


@dataclass(frozen=True, slots=True)
class Channel:
    """What a file says of one."""

    name: str = ""
    colour: str = ""  # six hexadecimal digits, RGB
    light: str = ""  # what says that it is fluorescence


def named_rgb(channels: Sequence[Channel]) -> bool:
    """Say whether three channels are said to be red, green and blue; False where nothing is said of them.

    Raises:
        UnknownKind: they are said to be something else.
    """
    names = [re.sub(r"^(channel|ch)[\s:_-]+", "", channel.name.strip().lower()) for channel in channels]
    if len(channels) == 3 and all(name in known for name, known in zip(names, _NAMES, strict=True)):
        return True
    said = [channel.light or channel.name for channel in channels if channel.light or not _says_nothing(channel.name)]
    if said:
        raise UnknownKind(f"{len(channels)} channels ({', '.join(said)}), not RGB")
    colours = [channel.colour.lower() for channel in channels if channel.colour]
    if len(channels) == 3 and len(colours) == 3 and tuple(colours) != _RGB and set(colours) != {"ffffff"}:
        raise UnknownKind(f"3 channels shown in the colours {', '.join(colours)}, not RGB")
    return False


def check_bright(pictures: Iterable[NDArray[np.uint8]], what: str) -> None:
    """Look at samples of a picture, each uint8[H, W, 3], of which nothing says how it was seen; `what` names it.

    Raises:
        UnknownKind: it is dark, as fluorescence is.
    """
    values = [picture.reshape(-1, 3)[:: max(1, picture.shape[0] * picture.shape[1] // 65536)] for picture in pictures]
    if values and min(np.percentile(np.concatenate(values), _BRIGHTER_PART, axis=0)) < BRIGHT:
        raise UnknownKind(f"{what}, dark as of fluorescence, not RGB")


def channels_of_ome(xml: str) -> tuple[Channel, ...]:
    """Return the channels of an OME-XML's first image; () where it cannot be read."""
    try:
        root = ElementTree.fromstring(xml)  # noqa: S314 - expat refuses entities without end; tifffile reads it so, too
    except ElementTree.ParseError:
        return ()
    pixels = next((one for one in root.iter() if one.tag.rpartition("}")[2] == "Pixels"), None)
    if pixels is None:
        return ()
    return tuple(_channel(one.attrib) for one in pixels if one.tag.rpartition("}")[2] == "Channel")


def _channel(attributes: Mapping[str, str]) -> Channel:
    light = next((f"{name} {attributes[name]}" for name in _OF_FLUORESCENCE if attributes.get(name)), "")
    for name in ("ContrastMethod", "IlluminationType"):
        if "fluorescence" in attributes.get(name, "").lower():
            light = attributes[name]
    try:
        colour = f"{(int(attributes.get('Color', '')) >> 8) & 0xFFFFFF:06x}"  # a signed integer, RGBA
    except ValueError:
        colour = ""
    return Channel(attributes.get("Name", ""), colour, light)


def _says_nothing(name: str) -> bool:
    return _NO_NAME.fullmatch(name.strip()) is not None
