"""`mtdp-extract --tokens`: the tokens of each tile's patches lie beside its features; unasked for, they cost nothing.

The model here gives, as tokens, the values of a convolution's map: those of a patch depend on its pixels alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import fake_gpu
import warm
from fake_cuda import FakeCudart
from mtdp_runtime import extract, load_bundle
from mtdp_runtime.backends import Backend, backend_class
from mtdp_runtime.backends.proof import Replayed, lacks, replay
from mtdp_runtime.bundle.manifest import Autocast, Tokens
from mtdp_runtime.cohort.estimate import output_bytes, tokens_bytes
from mtdp_runtime.commands.doctor import main as doctor
from mtdp_runtime.errors import BackendError, UsageError
from mtdp_runtime.settings import ExtractSettings
from mtdp_runtime.slide.open import open_slide
from mtdp_runtime.store import writer
from mtdp_runtime.store.layout import Layout, TileStatus, lay_out
from mtdp_runtime.store.reader import open_features
from mtdp_runtime.store.verify import verify_file, verify_folder
from mtdp_runtime.store.writer import partial_path
from support import FEATURES_DIM, TILE_PX, in_this_process, read_square, write_tiny_bundle
from support import extract as command

SAME: dict[str, Any] = {"backend": "onnxruntime", "precision": "fp32", "batch": 8, "threads": 2}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("tokens") / "tiny", tokens=1.0)


def tokens_of(bundle: Path, tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(bundle / "model.fp32.onnx", providers=["CPUExecutionProvider"])
    (tokens,) = session.run(["tokens"], {"tiles": tiles})
    return np.asarray(tokens)


def rows_of(path: Path) -> dict[str, bytes]:
    with h5py.File(path) as file:
        return {name: file[name][:].tobytes() for name in file}


def made_of(path: Path) -> dict[str, Any]:
    with h5py.File(path) as file:
        return dict(json.loads(file.attrs["made_of"]))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_row_holds_the_tokens_of_its_tile_as_the_model_gives_them(
    bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, backend: str
) -> None:
    (outcome,) = extract(make_slide(), tmp_path / "out", model=bundle, tokens=True, **SAME | {"backend": backend})
    assert (outcome.status, outcome.warning) == ("done", "")
    with open_features(tmp_path / "out/slide.h5") as file, open_slide(tmp_path / "slide.tiff") as slide:
        assert file.tokens is not None
        assert (file.tokens.dtype, file.tokens.shape) == (np.float16, (len(file), 64, FEATURES_DIM))
        assert file.token_grid == (8, 8)
        assert file.tokens.chunks[1:] == (64, FEATURES_DIM), "a chunk holds whole tiles"
        for row in (0, 7, 8, len(file) - 1):
            tile = read_square(slide, *file.coords[row].tolist(), TILE_PX, 1.0)
            wanted = tokens_of(bundle, tile[None])[0]
            assert wanted.max() > 1
            np.testing.assert_allclose(file.tokens[row].astype(np.float32), wanted, rtol=2e-3, atol=1e-2)
    assert verify_file(tmp_path / "out/slide.h5").status == "ok"


def test_patches_are_in_rows_from_the_top_left(bundle: Path) -> None:
    """A tile that is black but for one patch has one token that is not zero: here in row 1, column 6."""
    tile = np.zeros((1, TILE_PX, TILE_PX, 3), np.uint8)
    tile[0, 8:16, 48:56] = 255
    with loaded(bundle, "onnxruntime", tokens=True) as engine:
        tokens = engine.result(engine.submit(np.repeat(tile, 8, axis=0)))["tokens"][0]
    rows, columns = load_bundle(bundle).manifest.tokens.grid  # type: ignore[union-attr]
    assert np.argwhere(tokens.reshape(rows, columns, -1).any(axis=-1)).tolist() == [[1, 6]]


def loaded(bundle: Path, backend: str, *, tokens: bool) -> Backend:
    return backend_class(backend).load(replace(load_bundle(bundle), tokens=tokens), "fp32", 8, 2)


class TestWhereNobodyAsks:
    @pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
    def test_the_same_bytes_are_stored_as_of_a_model_without_tokens(
        self, bundle: Path, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, backend: str
    ) -> None:
        for name, model in (("with", bundle), ("without", tiny_bundle)):
            extract(make_slide(), tmp_path / name, model=model, **SAME | {"backend": backend})
        files = tmp_path / "with/slide.h5", tmp_path / "without/slide.h5"
        assert rows_of(files[0]) == rows_of(files[1])
        assert "tokens" not in rows_of(files[0])
        with_tokens, without = map(made_of, files)
        assert with_tokens | {"model": ""} == without | {"model": ""}
        assert "tokens" not in without, "files of versions without them would be other files"

    @pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
    def test_an_engine_does_not_hand_them_out(self, bundle: Path, backend: str) -> None:
        tiles = np.zeros((8, TILE_PX, TILE_PX, 3), np.uint8)
        for asked in (False, True, False):  # whatever was compiled before
            with loaded(bundle, backend, tokens=asked) as engine:
                assert ("tokens" in engine.result(engine.submit(tiles))) is asked
                if backend == "openvino":  # nor computes them
                    assert len(engine._requests[0].results) == 1 + asked  # type: ignore[attr-defined]


class TestAStop:
    @staticmethod
    def stop(slide: Path, done: int, tiles: int) -> None:
        if done >= 40:
            raise KeyboardInterrupt

    @pytest.mark.parametrize("on_bad_tile", ["nan", "drop"])
    def test_ends_as_if_there_had_been_none(
        self,
        bundle: Path,
        make_slide: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        on_bad_tile: str,
    ) -> None:
        monkeypatch.setattr(writer, "_SYNC_EVERY_S", -1)
        slide, out, options = make_slide(), tmp_path / "out", {"model": bundle, "tokens": True, **SAME}
        options["on_bad_tile"] = on_bad_tile
        extract(slide, tmp_path / "whole", **options)
        with pytest.raises(KeyboardInterrupt):
            extract(slide, out, on_progress=self.stop, **options)
        partial = partial_path(out / "slide.h5")
        with h5py.File(tmp_path / "whole/slide.h5") as file:
            tokens_bytes = file["tokens"].id.get_storage_size()
        assert partial.stat().st_blocks * 512 >= tokens_bytes, "the space of all rows is taken before the first"
        (outcome,) = extract(slide, out, **options)
        assert outcome.tiles_before >= 40
        assert rows_of(out / "slide.h5") == rows_of(tmp_path / "whole/slide.h5")

    def test_a_damaged_token_of_a_partial_file_is_computed_again(
        self, bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(writer, "_SYNC_EVERY_S", -1)
        slide, out, options = make_slide(), tmp_path / "out", {"model": bundle, "tokens": True, **SAME}
        extract(slide, tmp_path / "whole", **options)
        with pytest.raises(KeyboardInterrupt):
            extract(slide, out, on_progress=self.stop, **options)
        with h5py.File(tmp_path / "whole/slide.h5") as file:
            offset = file["tokens"].id.get_chunk_info(0).byte_offset
        flip(partial_path(out / "slide.h5"), offset + 20)
        (outcome,) = extract(slide, out, **options)
        assert outcome.tiles_before == 0
        assert rows_of(out / "slide.h5") == rows_of(tmp_path / "whole/slide.h5")


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_one_wrong_byte_is_found_and_mended_by_a_run(
    bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide, out = make_slide(), tmp_path / "out"
    extract(slide, out, model=bundle, tokens=True, **SAME)
    before, path = rows_of(out / "slide.h5"), out / "slide.h5"
    with h5py.File(path) as file:
        offset = file["tokens"].id.get_chunk_info(0).byte_offset
    flip(path, offset + 20)
    (verdict,) = verify_folder(out)
    assert (verdict.status, verdict.problems) == ("wrong", ("not what was computed: tokens",))
    path.unlink()  # as its hint says
    extract(slide, out, model=bundle, tokens=True, **SAME)
    assert rows_of(path) == before
    assert [verdict.status for verdict in verify_folder(out)] == ["ok"]


class TestSpace:
    def test_a_dry_run_says_what_the_tokens_take(
        self, bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        arguments = (make_slide(), "--out", tmp_path / "out", "--model", bundle, "--tokens", "--backend", "onnxruntime")
        said = command(*arguments, "--mpp", 0.5, "--mpp", 1.0, "--dry-run", "--json")
        assert said.returncode == 0, said.stderr
        line = json.loads(said.stdout)
        assert command(*arguments, "--dry-run").stdout.count(" of tokens") == 1
        extract(arguments[0], tmp_path / "out", model=bundle, mpp=[0.5, 1.0], tokens=True, **SAME)
        stored = []
        for mpp in ("0.5", "1"):
            with h5py.File(tmp_path / f"out/mpp{mpp}/slide.h5") as file:
                stored.append(file["tokens"].id.get_storage_size())
        assert line["tokens_bytes"] == sum(stored)
        assert [scale["tokens_bytes"] for scale in line["scales"]] == stored
        assert not (tmp_path / "out/mpp0.5/slide.h5").stat().st_size < stored[0]

    def test_a_preflight_counts_them_as_a_dry_run_does(
        self, bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        asked = (make_slide(), "--out", tmp_path, "--model", bundle, "--tokens", "--json")
        planned = json.loads(command(*asked, "--dry-run").stdout)
        said = warm.run("from mtdp_runtime.commands.doctor import main; main()", *asked, "--preflight")
        assert (said.returncode, said.stderr) == (0, "")
        looked = json.loads(said.stdout)
        assert looked["bytes"] == planned["bytes"] > looked["tokens_bytes"] == planned["tokens_bytes"] > 0

    def test_are_counted_by_a_preflight_alone(self) -> None:
        code, _, err = in_this_process(doctor, "--tokens")
        assert (code, err.splitlines()[0]) == (2, "error: --tokens is an option of --preflight")

    @settings(max_examples=25, deadline=None)
    @given(rows=st.integers(100, 4000), count=st.sampled_from([49, 196, 256, 1369]), dim=st.sampled_from([384, 1536]))
    def test_it_is_the_size_of_the_file(self, bundle: Path, rows: int, count: int, dim: int) -> None:
        asked = ExtractSettings(0.5, TILE_PX, tokens=True)
        manifest = replace(load_bundle(bundle).manifest, tokens=Tokens(count, dim, (1, count)))
        layout = Layout(
            np.zeros((rows, 2), np.int64),
            np.ones(rows, np.float32),
            {"features": FEATURES_DIM},
            {"name": "s"},
            {"model": "m"},
            {},
            "",
            tokens=(count, dim),
        )
        image, places = lay_out(layout)
        said = output_bytes(rows, manifest, asked)
        assert abs(said - image.size_bytes) <= 0.01 * image.size_bytes + 70_000  # what HDF5 keeps for itself, once
        assert tokens_bytes(rows, manifest, asked) == sum(length for _, length in places["tokens"].ranges())
        assert tokens_bytes(rows, manifest, replace(asked, tokens=False)) == 0


class TestWhatFloat16DoesNotHold:
    def model(self, bundle: Path, folder: Path, slide: Path, part: float) -> Path:
        """The model whose largest token, on the slide's own tiles, is so many times 65504."""
        extract(slide, folder / "plain", model=bundle, tokens=True, **SAME)
        with h5py.File(folder / "plain/slide.h5") as file:
            largest = file["tokens"][:].astype(np.float32).max(axis=(1, 2))
        return write_tiny_bundle(folder / "large", tokens=65504 * part / float(np.sort(largest)[-3]))

    def test_makes_the_row_one_that_is_not_finite_and_is_said(
        self, bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        slide = make_slide()
        large = self.model(bundle, tmp_path, slide, 1.001)
        (outcome,) = extract(slide, tmp_path / "out", model=large, tokens=True, **SAME)
        assert (outcome.status, outcome.bad_tiles) == ("done", 3)
        assert "3 tiles have a patch token that float16, in which they are stored, does not hold" in outcome.warning
        with open_features(tmp_path / "out/slide.h5") as file:
            lost = file.status == TileStatus.NOT_FINITE
            assert (lost.sum(), (~file.good).sum()) == (3, 3)
            assert file.tokens is not None
            assert np.isnan(file.tokens[:][lost]).all()
            assert np.isnan(file.features[:][lost]).all()
            assert np.isfinite(file.tokens[:][~lost]).all()
        (outcome,) = extract(slide, tmp_path / "features", model=large, **SAME)
        assert (outcome.status, outcome.bad_tiles, outcome.warning) == ("done", 0, "")

    def test_of_all_tiles_fails_the_slide(self, bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
        slide = make_slide()
        large = self.model(bundle, tmp_path, slide, 1000.0)
        (outcome,) = extract(slide, tmp_path / "out", model=large, tokens=True, **SAME)
        assert outcome.status == "failed"
        assert "beyond 65504" in outcome.message
        assert outcome.hint == "Run it without --tokens."
        assert not list((tmp_path / "out").glob("*.h5"))


def test_given_tiles_keep_their_order_and_scales_their_own_files(
    bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    slide = make_slide(levels=2, lossy=True)
    extract(slide, tmp_path / "grid", model=bundle, tokens=True, mpp=[0.5, 1.0], **SAME)
    listed = tmp_path / "tiles.csv"
    listed.write_text("x,y\n512,320\n256,0\n512,64\n")
    extract(slide, tmp_path / "listed", model=bundle, tokens=True, coords=listed, **SAME)
    with (
        open_features(tmp_path / "grid/mpp0.5/slide.h5") as grid,
        open_features(tmp_path / "grid/mpp1/slide.h5") as coarse,
        open_features(tmp_path / "listed/slide.h5") as given_,
    ):
        assert given_.coords.tolist() == [[512, 320], [256, 0], [512, 64]]
        assert grid.tokens is not None
        assert given_.tokens is not None
        assert coarse.tokens is not None
        assert len(coarse.tokens) == len(coarse) < len(grid)
        for row, place in enumerate(given_.coords.tolist()):
            same = grid.coords.tolist().index(place)
            np.testing.assert_allclose(given_.tokens[row], grid.tokens[same], rtol=1e-2, atol=1e-2)


class TestRefusals:
    def test_a_model_without_tokens(self, tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
        said = command(make_slide(), "--out", tmp_path / "out", "--model", tiny_bundle, "--tokens")
        assert said.returncode == 2
        assert said.stderr.splitlines() == [
            "error: --tokens: tiny gives no patch tokens",
            "hint: Leave it out, or export the model anew: mtdp-export --tokens (transformers have them).",
        ]
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["pt", "npy", "csv", "geojson", "zarr", "h5ad", "parquet"])
    def test_a_format_without_a_place_for_them(
        self, bundle: Path, make_slide: Callable[..., Path], tmp_path: Path, name: str
    ) -> None:
        with pytest.raises(
            UsageError, match=f"--tokens and --format {name}: only the HDF5 file has a place"
        ) as refusal:
            extract(make_slide(), tmp_path / "out", model=bundle, tokens=True, formats=["h5", name], **SAME)
        assert "without --tokens" in refusal.value.hint

    def test_another_file_is_not_taken_for_one_with_tokens(
        self, bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
    ) -> None:
        slide = make_slide()
        extract(slide, tmp_path, model=bundle, **SAME)
        (outcome,) = extract(slide, tmp_path, model=bundle, tokens=True, **SAME)
        assert outcome.status == "failed"
        assert "tokens is None there, True now" in outcome.message
        with open_features(tmp_path / "slide.h5") as file:
            assert (file.tokens, file.token_grid) == (None, None)


class TestTheProof:
    """What an engine must repeat before `auto` takes it: the golden tokens, too, where they are asked for."""

    @pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
    def test_looks_at_the_tokens_that_are_asked_for(self, bundle: Path, backend: str) -> None:
        asked, without = replace(load_bundle(bundle), tokens=True), load_bundle(bundle)
        with loaded(bundle, backend, tokens=True) as engine:
            right = replay(engine, asked)
            wrong = replay(Doubled(engine), asked)
            unasked = replay(Doubled(engine), without)
        assert lacks(right, asked, "fp32") == ""
        assert right.tokens_cosine > 0.9999999
        assert "has tokens that are 1 too long or too short" in lacks(wrong, asked, "fp32")
        assert lacks(unasked, without, "fp32") == ""

    def test_judges_them_by_their_own_distance_of_autocast(self, bundle: Path) -> None:
        stated = load_bundle(bundle)
        far = replace(stated, manifest=replace(stated.manifest, autocast=(Autocast("bf16", 1.0, 1.0, 1.0, 0.9995),)))
        with loaded(bundle, "onnxruntime", tokens=True) as engine:
            found = replace(replay(engine, replace(far, tokens=True)), tokens_cosine=0.9994)
        assert lacks(found, far, "bf16") == ""
        assert lacks(found, stated, "bf16").startswith("has a cosine of 0.999400 to its golden tokens")
        assert lacks(replace(found, tokens_cosine=float("nan")), far, "bf16")
        assert lacks(replace(found, tokens_cosine=0.9993), far, "bf16")


class TestOnAGpu:
    """Acted out in host memory: who asks for what, and by which bars what comes back is judged."""

    @pytest.fixture(autouse=True)
    def _gpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCudart:
        monkeypatch.setenv("MTDP_CACHE", str(tmp_path / "cache"))
        return fake_gpu.install(monkeypatch)

    @pytest.mark.parametrize("backend", ["tensorrt-rtx", "onnxruntime-cuda"])
    def test_tokens_leave_it_only_where_they_are_asked_for(self, bundle: Path, backend: str) -> None:
        tiles = np.random.default_rng(0).integers(0, 256, (8, TILE_PX, TILE_PX, 3), np.uint8)
        with loaded(bundle, backend, tokens=False) as engine:
            without = dict(engine.result(engine.submit(tiles)))
        with loaded(bundle, backend, tokens=True) as engine:
            outputs = engine.result(engine.submit(tiles))
        assert (list(without), sorted(outputs)) == (["features"], ["features", "tokens"])
        np.testing.assert_array_equal(without["features"], outputs["features"])
        np.testing.assert_allclose(outputs["tokens"], tokens_of(bundle, tiles), rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("backend", ["tensorrt-rtx", "onnxruntime-cuda"])
    def test_a_variant_is_judged_by_the_bundles_own_autocast(
        self, bundle: Path, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An engine at 0.9995 is too far for fp16's own bar, and near enough where autocast is no nearer."""
        stated = load_bundle(bundle)
        found = Replayed(0.9995)
        monkeypatch.setattr("mtdp_runtime.backends.proof.replay", lambda engine, bundle: found)
        plain = stated.manifest.variants[0]
        half = replace(stated, manifest=replace(stated.manifest, variants=(replace(plain, precision="fp16"),)))
        with pytest.raises(BackendError, match=r"0\.999500 to its golden features here, 0\.9999 is required"):
            backend_class(backend).load(half, "fp16", 8, 1)
        far = replace(half, manifest=replace(half.manifest, autocast=(Autocast("fp16", 0.9995, 1.0, 1.0),)))
        with backend_class(backend).load(far, "fp16", 8, 1) as engine:
            assert engine.precision == "fp16"


class Doubled:
    """An engine whose tokens are twice what they should be: a cosine does not see it."""

    def __init__(self, engine: Backend) -> None:
        self.batch, self.submit, self._engine = engine.batch, engine.submit, engine

    def result(self, ticket: int) -> dict[str, NDArray[np.float32]]:
        outputs = dict(self._engine.result(ticket))
        outputs["tokens"] = 2 * outputs["tokens"]
        return outputs
