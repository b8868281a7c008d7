"""A folder search finds every kind of file that is read, and takes no part of a slide for a slide."""

from __future__ import annotations

from pathlib import Path

from mtdp_runtime.cohort.requests import list_slides


def names(root: Path) -> list[str]:
    return [request.path.name for request in list_slides([root])]


def test_every_suffix_of_what_is_read_is_found(tmp_path: Path) -> None:
    found = [
        "a.avs", "b.btf", "c.ome.btf", "d.qptiff", "e.png", "f.jpg", "g.jpeg", "h.tf2", "i.tf8", "j.tif", "k.TIFF",
        "l.svs", "m.ndpi", "n.JPG",
    ]  # fmt: skip
    for name in (*found, "o.txt", "p.gif", ".hidden.png"):
        (tmp_path / name).touch()
    assert names(tmp_path) == sorted(found)


def test_pictures_beside_a_slide_of_their_name_are_its_thumbnails(tmp_path: Path) -> None:
    for name in ("a.svs", "a.png", "a.jpg", "b.png"):
        (tmp_path / name).touch()
    assert names(tmp_path) == ["a.svs", "b.png"]


def test_the_pictures_of_a_vms_are_no_slides(tmp_path: Path) -> None:
    for name in ("a.vms", "a_map2.jpg", "a(1,0).jpg"):
        (tmp_path / name).touch()
    assert names(tmp_path) == ["a.vms"]
