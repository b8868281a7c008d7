"""A kind that is never decoded is the slide's fault; damage is a segment's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtdp_runtime.slide.probe import PROBES, UnknownKind, probe

WHOLE, DAMAGED, UNKNOWN = "whole", "damaged", "unknown"


def ask(segments: list[str], sizes_bytes: list[int] | None = None) -> list[int]:
    asked: list[int] = []

    def decode(number: int) -> None:
        asked.append(number)
        if segments[number] == DAMAGED:
            raise ValueError("damaged")
        if segments[number] == UNKNOWN:
            raise UnknownKind("JPEG of 12 bits")

    probe(sizes_bytes or [1] * len(segments), decode)
    return asked


@given(st.lists(st.sampled_from([DAMAGED, UNKNOWN]), max_size=40))
def test_a_level_of_no_whole_segment_is_refused_where_a_kind_is_named(segments: list[str]) -> None:
    seen = [UNKNOWN] * len(segments)
    if UNKNOWN not in segments:
        assert len(ask(segments)) <= PROBES
    elif seen:
        with pytest.raises(UnknownKind):
            ask(seen)


@given(st.lists(st.sampled_from([DAMAGED, UNKNOWN]), max_size=PROBES - 1))
def test_one_whole_segment_settles_it(before: list[str]) -> None:
    assert ask([*before, WHOLE]) == list(range(len(before) + 1))


def test_it_looks_beyond_the_first_and_not_at_what_has_no_bytes() -> None:
    segments = [DAMAGED] * 90 + [WHOLE] * 10
    assert ask(segments)[-1] == 99
    assert ask([DAMAGED] * 5 + [WHOLE], [0, 0, 0, 0, 0, 7]) == [5]
    assert ask([]) == []
