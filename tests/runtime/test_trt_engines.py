"""Which engine is used: one that fits and is whole, or a new one; never a damaged one or another GPU's."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtdp_runtime.backends.tensorrt.build import (
    BuildOptions,
    Built,
    _keep_timing_cache,
    attach_timing_cache,
    build_engine,
)
from mtdp_runtime.backends.tensorrt.engine_source import EngineCache, SerializedEngine, obtain
from mtdp_runtime.backends.tensorrt.library import says_out_of_memory
from mtdp_runtime.bundle import Bundle, file_ref, load_bundle, write_manifest
from mtdp_runtime.bundle.engine_key import EngineKey, Wanted, misfit
from mtdp_runtime.bundle.manifest import Engine, FileRef, Manifest
from mtdp_runtime.errors import BackendError, BundleInvalid, DeviceOutOfMemory, EngineRejected
from mtdp_runtime.files import private_folder, read_with_digest, save_with_digest

WANTED = Wanted("tensorrt-rtx", "1.7.1", "a" * 64, "fp16", 64, 16, "RTX 4090", "8.9")
AOT = replace(WANTED.own_key(), gpu="", capabilities=("8.0+",), batch=(1, 16, 64))


class TestKey:
    def test_an_engine_built_here_for_this_fits(self) -> None:
        assert misfit(WANTED.own_key(), WANTED) == ""
        assert misfit(AOT, WANTED) == ""

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"library": "tensorrt"}, "built for library tensorrt, here it is tensorrt-rtx"),
            ({"version": "1.8.0"}, "built with tensorrt-rtx 1.8.0, here is 1.7.1"),
            ({"model_sha256": "b" * 64}, "built for model bbbbbbbbbbbb..., here it is aaaaaaaaaaaa..."),
            ({"precision": "fp32"}, "built for precision fp32, here it is fp16"),
            ({"tile_px": 224}, "built for tile_px 224, here it is 64"),
            ({"batch": (32, 32, 64)}, "built for batches of 32 to 64, 16 is wanted"),
            ({"batch": (1, 4, 8)}, "built for batches of 1 to 8, 16 is wanted"),
            ({"capabilities": ("8.6", "12.0")}, "built for compute capability 8.6, 12.0, RTX 4090 has 8.9"),
            ({"capabilities": ("12.0+",)}, "built for compute capability 12.0+, RTX 4090 has 8.9"),
            ({"gpu": "RTX 6000 Ada"}, "built for RTX 6000 Ada, this is RTX 4090"),
            ({"system": "windows-amd64"}, "built for system windows-amd64"),
            ({"recipe": 2}, "built for recipe 2, here it is 1"),
        ],
    )
    def test_each_field_can_forbid_it(self, change: dict[str, object], why: str) -> None:
        assert why in misfit(replace(AOT, **change), WANTED)  # type: ignore[arg-type]

    def test_compatible_engines_go_where_they_say(self) -> None:
        key = replace(AOT, library="tensorrt", version="11.0.2", gpu="A100", capabilities=("8.0",))
        wanted = replace(WANTED, library="tensorrt", version="11.4.0")
        assert "built with tensorrt 11.0.2" in misfit(key, wanted)
        key = replace(key, version_compatible=True)
        assert "built for compute capability 8.0" in misfit(key, wanted)
        assert misfit(replace(key, hardware="ampere-plus"), wanted) == ""
        assert misfit(replace(key, hardware="ampere-plus"), replace(wanted, capability="7.5")) != ""
        assert misfit(replace(key, hardware="same-compute-capability"), replace(wanted, capability="8.0")) == ""
        for other in ("10.9.0", "12.0.0", "11.0.1"):  # an earlier release, another major version
            assert "built with" in misfit(replace(key, hardware="ampere-plus"), replace(wanted, version=other))

    @given(
        st.tuples(st.integers(1, 9), st.integers(1, 99), st.integers(1, 512)),
        st.lists(st.sampled_from(["7.5", "8.0+", "12.1"]), unique=True),
        st.text(max_size=9),
    )
    def test_json_keeps_it(self, batch: tuple[int, int, int], capabilities: list[str], gpu: str) -> None:
        key = replace(AOT, batch=batch, capabilities=tuple(capabilities), gpu=gpu)
        assert EngineKey.from_json(json.loads(json.dumps(key.to_json()))) == key

    @pytest.mark.parametrize("name", [field.name for field in fields(EngineKey)])
    def test_json_of_another_shape_is_refused(self, name: str) -> None:
        document = AOT.to_json()
        without = {k: v for k, v in document.items() if k != name}
        for wrong in ({**document, name: None}, *([without] if name != "recipe" else [])):
            with pytest.raises(ValueError):
                EngineKey.from_json(wrong)

    def test_fields_of_later_versions_are_ignored_and_the_first_keys_have_no_recipe(self) -> None:
        document = {**AOT.to_json(), "tiling": {"level": 3}}
        assert EngineKey.from_json(document) == AOT
        del document["recipe"]
        assert EngineKey.from_json(document).recipe == 1

    def test_two_keys_never_share_a_file(self) -> None:
        keys = [AOT, WANTED.own_key(), replace(AOT, version="1.7.2"), replace(AOT, capabilities=("8.9",))]
        assert len({key.stem for key in keys}) == len(keys)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """A bundle with one engine, whose content only the fakes below understand."""
    folder = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, folder)
    (folder / "engines").mkdir()
    (folder / "engines" / "x.engine").write_bytes(b"of the bundle")
    manifest = load_bundle(folder).manifest
    ref = file_ref(folder, "engines/x.engine")
    write_manifest(folder, replace(manifest, engines=(Engine(ref, AOT),)))
    return load_bundle(folder, trust_engines=True)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def build() -> Built:
    return Built(b"built", "the log\n")


def must_not_build() -> Built:
    raise AssertionError("an engine was built where there is one")


def refuses(*contents: bytes) -> Callable[[SerializedEngine], bytes]:
    """A library that rejects these engines."""

    def open_plan(plan: SerializedEngine) -> bytes:
        if plan.engine in contents:
            raise EngineRejected("it cannot be deserialised")
        return plan.engine

    return open_plan


class TestObtain:
    def test_a_trusted_engine_of_the_bundle_comes_first(self, bundle: Bundle, cache: Path) -> None:
        engine, notes = obtain(bundle, WANTED, cache, must_not_build, refuses())
        assert (engine, notes) == (b"of the bundle", ["the bundle's engines/x.engine"])

    def test_without_trust_its_code_is_not_loaded(self, bundle: Bundle, cache: Path) -> None:
        engine, notes = obtain(replace(bundle, trust_engines=False), WANTED, cache, build, refuses())
        assert engine == b"built"
        assert notes[0].endswith("is not used: engines are code; --trust-engines loads it")

    def test_a_bundle_from_another_gpu_is_built_for_this_one(self, bundle: Bundle, cache: Path) -> None:
        turing = replace(WANTED, gpu="RTX 2080", capability="7.5")
        engine, notes = obtain(bundle, turing, cache, build, refuses())
        assert engine == b"built"
        assert "built for compute capability 8.0+, RTX 2080 has 7.5" in notes[0]
        assert notes[1] == "engine built now for RTX 2080, batch 16"

    def test_a_damaged_engine_of_the_bundle_never_reaches_the_library(self, bundle: Bundle, cache: Path) -> None:
        (bundle.path / "engines" / "x.engine").write_bytes(b"of the bundlf")
        engine, notes = obtain(bundle, WANTED, cache, build, refuses())
        assert engine == b"built"
        assert "sha256" in notes[0]

    def test_an_engine_that_the_library_refuses_is_replaced(self, bundle: Bundle, cache: Path) -> None:
        engine, notes = obtain(bundle, WANTED, cache, build, refuses(b"of the bundle"))
        assert engine == b"built"
        assert notes[0].endswith("is not used: it cannot be deserialised")

    def test_what_was_built_is_kept(self, tiny_bundle: Path, cache: Path) -> None:
        bundle = load_bundle(tiny_bundle)
        obtain(bundle, WANTED, cache, build, refuses())
        engine, notes = obtain(bundle, WANTED, cache, must_not_build, refuses())
        assert (engine, notes) == (b"built", [])
        names = sorted(path.suffix for path in cache.iterdir())
        assert names == [".engine", ".json", ".log"]
        assert next(cache.glob("*.log")).read_text() == "the log\n"

    @pytest.mark.parametrize("suffix", [".engine", ".json"])
    @pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
    def test_a_damaged_cache_is_built_anew(self, tiny_bundle: Path, cache: Path, suffix: str, damage: str) -> None:
        bundle = load_bundle(tiny_bundle)
        obtain(bundle, WANTED, cache, build, refuses())
        file = next(cache.glob(f"*{suffix}"))
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        if damage == "gone":
            file.unlink()
        else:
            file.write_bytes(content if damage == "flipped" else content[:-1])
        rebuilt: list[int] = []
        engine, _ = obtain(bundle, WANTED, cache, lambda: (rebuilt.append(1), build())[1], refuses())
        assert (engine, rebuilt) == (b"built", [1])
        assert obtain(bundle, WANTED, cache, must_not_build, refuses())[1] == []

    @pytest.mark.parametrize(
        "change",
        [{"version": "1.8.0"}, {"gpu": "RTX 5090", "capability": "12.0"}, {"precision": "fp32"}, {"batch": 8}],
    )
    def test_a_stale_cache_is_not_trusted(self, tiny_bundle: Path, cache: Path, change: dict[str, object]) -> None:
        bundle = load_bundle(tiny_bundle)
        obtain(bundle, WANTED, cache, lambda: Built(b"old", ""), refuses())
        engine, _ = obtain(bundle, replace(WANTED, **change), cache, build, refuses())  # type: ignore[arg-type]
        assert engine == b"built"
        old = EngineCache(cache).find(WANTED.own_key())[0]
        assert old == (b"" if "version" in change else b"old")  # what an upgrade made useless goes

    def test_a_cached_engine_under_another_name_is_not_taken(self, tiny_bundle: Path, cache: Path) -> None:
        """As when somebody copies an engine of another GPU to where ours would lie."""
        other = replace(WANTED, gpu="RTX 5090", capability="12.0").own_key()
        EngineCache(private_folder(cache)).store(other, Built(b"other", ""))
        for suffix in (".engine", ".json"):
            shutil.copy(cache / f"{other.stem}{suffix}", cache / f"{WANTED.own_key().stem}{suffix}")
        engine, notes = obtain(load_bundle(tiny_bundle), WANTED, cache, build, refuses())
        assert engine == b"built"
        assert "its key is another one's" in notes[0]

    def test_on_a_full_disk_the_engine_runs_and_nothing_half_written_stays(
        self, tiny_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(path: Path, target: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "replace", full)
        engine, notes = obtain(load_bundle(tiny_bundle), WANTED, cache, build, refuses())
        assert engine == b"built"
        assert notes[-1] == f"the engine is not kept: {cache}: No space left on device"
        assert not list(cache.iterdir())

    def test_who_waits_for_a_build_is_told_before_it(
        self, bundle: Bundle, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        told: list[str] = []

        def building() -> Built:
            told.append(capsys.readouterr().err)
            return build()

        obtain(bundle, WANTED, cache, must_not_build, refuses())
        assert capsys.readouterr().err == ""
        obtain(replace(bundle, trust_engines=False), WANTED, cache, building, refuses())
        assert told == ["building an engine for RTX 4090, batch 16, once; this takes minutes\n"]

    def test_the_name_of_a_gpu_commands_no_terminal(
        self, tiny_bundle: Path, cache: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        wanted = replace(WANTED, gpu="RTX\x1b[2J\n4090")
        obtain(load_bundle(tiny_bundle), wanted, cache, build, refuses())
        assert "for RTX\\x1b[2J\\n4090, batch 16" in capsys.readouterr().err

    def test_an_engine_of_an_earlier_recipe_goes_with_its_files(self, tiny_bundle: Path, cache: Path) -> None:
        old = replace(WANTED.own_key(), recipe=0)
        EngineCache(private_folder(cache)).store(old, Built(b"old", ""))
        assert obtain(load_bundle(tiny_bundle), WANTED, cache, build, refuses())[0] == b"built"
        assert not list(cache.glob(f"{old.stem}*"))

    def test_an_engine_that_is_refused_though_just_built_is_an_error(self, tiny_bundle: Path, cache: Path) -> None:
        with pytest.raises(EngineRejected):
            obtain(load_bundle(tiny_bundle), WANTED, cache, build, refuses(b"built"))
        assert not list(cache.iterdir())

    def test_a_lack_of_memory_throws_no_engine_away(self, tiny_bundle: Path, cache: Path) -> None:
        bundle = load_bundle(tiny_bundle)
        obtain(bundle, WANTED, cache, build, refuses())

        def no_room(plan: SerializedEngine) -> bytes:
            raise DeviceOutOfMemory("full")

        with pytest.raises(DeviceOutOfMemory):
            obtain(bundle, WANTED, cache, must_not_build, no_room)
        assert obtain(bundle, WANTED, cache, must_not_build, refuses())[0] == b"built"

    def test_a_folder_that_others_can_write_is_refused(self, tiny_bundle: Path, cache: Path) -> None:
        cache.mkdir()
        cache.chmod(0o777)
        with pytest.raises(BackendError, match="not yours alone, and engines are code") as caught:
            obtain(load_bundle(tiny_bundle), WANTED, cache, must_not_build, refuses())
        assert f"chmod 700 {cache}" in caught.value.hint

    def test_the_folder_is_checked_and_made_for_an_engine_of_the_bundle_too(self, bundle: Bundle, cache: Path) -> None:
        """Kernels that the library compiles for it are kept there, and they are code as well."""
        obtain(bundle, WANTED, cache, must_not_build, refuses())
        assert cache.is_dir()
        cache.chmod(0o777)
        with pytest.raises(BackendError, match="not yours alone"):
            obtain(bundle, WANTED, cache, must_not_build, refuses())


class TestBundle:
    def test_engines_are_part_of_the_manifest(self, bundle: Bundle) -> None:
        assert Manifest.from_json(json.loads(json.dumps(bundle.manifest.to_json()))) == bundle.manifest
        assert bundle.manifest.engines[0].key == AOT

    def test_a_bundle_without_engines_says_nothing_of_them(self, tiny_bundle: Path) -> None:
        assert "engines" not in load_bundle(tiny_bundle).manifest.to_json()["mtdp"]

    @pytest.mark.parametrize(
        "name", ["x.engine", "../x.engine", "engines/../x", "engines/a/b", "/engines/x", "engines/"]
    )
    def test_an_engine_outside_its_folder_is_refused(self, bundle: Bundle, name: str) -> None:
        wrong = replace(bundle.manifest, engines=(Engine(FileRef(name, "a" * 64, 1), AOT),))
        with pytest.raises(BundleInvalid, match="in engines/"):
            Manifest.from_json(json.loads(json.dumps(wrong.to_json())))

    def test_a_key_that_is_none_is_refused(self, bundle: Bundle) -> None:
        document = json.loads(json.dumps(bundle.manifest.to_json()))
        document["mtdp"]["engines"][0]["key"]["batch"] = [1, 2]
        with pytest.raises(BundleInvalid, match="key: batch: three positive integers"):
            Manifest.from_json(document)


class FakeConfig:
    """The part of a builder's config that takes a timing cache; it knows the caches of its own GPU."""

    def __init__(self) -> None:
        self.attached: bytes | None = None

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache and not cache.startswith(b"this GPU"):
            return False
        self.attached = cache
        return True


@pytest.mark.parametrize(
    ("content", "damaged", "attached", "note"),
    [
        (b"", False, b"", ""),
        (b"this GPU: kernels", False, b"this GPU: kernels", ""),
        (b"this GPU: kernels", True, b"", "it is damaged; begun anew"),
        (b"another GPU: kernels", False, b"", "not of this library or GPU; begun anew"),
    ],
)
def test_a_timing_cache_is_used_or_begun_anew(
    tmp_path: Path, content: bytes, damaged: bool, attached: bytes, note: str
) -> None:
    file = tmp_path / "x.timing"
    if content:
        save_with_digest(file, content)
        if damaged:
            file.write_bytes(file.read_bytes()[:-1])
    config = FakeConfig()
    notes = attach_timing_cache(config, file)
    assert config.attached == attached
    assert "".join(notes).endswith(note)
    assert bool(notes) == bool(note)


class TestBuilder:
    """What the real libraries do only on machines that are broken, or of another version."""

    def fake(self, monkeypatch: pytest.MonkeyPatch, **members: object) -> None:
        trt = SimpleNamespace(ILogger=type("ILogger", (), {}), **members)
        monkeypatch.setattr(
            "mtdp_runtime.backends.tensorrt.build.LIBRARY", {"tensorrt": SimpleNamespace(load=lambda: trt)}
        )

    def test_a_builder_that_cannot_start_cuda_is_an_error_of_ours(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def builder(logger: Any) -> None:
            logger.log(SimpleNamespace(value=1), "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")

        self.fake(monkeypatch, Builder=builder)
        with pytest.raises(BackendError, match="tensorrt cannot start a builder: CUDA initialization failure"):
            build_engine("tensorrt", tmp_path / "m.onnx", 64, BuildOptions((1, 1, 1)))

    @pytest.mark.parametrize(("members", "flags"), [({"STRONGLY_TYPED": 1}, 2), ({}, 0)])
    def test_networks_are_strongly_typed_where_they_could_be_others(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, members: dict[str, int], flags: int
    ) -> None:
        class Stop(Exception):
            pass

        given = []

        def create_network(value: int) -> None:
            given.append(value)
            raise Stop

        flag = SimpleNamespace(**members)
        builder = SimpleNamespace(create_network=create_network)
        self.fake(monkeypatch, Builder=lambda logger: builder, NetworkDefinitionCreationFlag=flag)
        with pytest.raises(Stop):
            build_engine("tensorrt", tmp_path / "m.onnx", 64, BuildOptions((1, 1, 1)))
        assert given == [flags]

    def test_a_timing_cache_that_cannot_be_kept_is_a_note(self, tmp_path: Path) -> None:
        config = SimpleNamespace(get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"kernels"))
        (note,) = _keep_timing_cache(config, tmp_path / "none" / "x.timing")
        assert note.startswith("the timing cache is not kept: ")
        assert _keep_timing_cache(config, tmp_path / "x.timing") == ()
        assert read_with_digest(tmp_path / "x.timing") == (b"kernels", "")

    @pytest.mark.parametrize(
        ("message", "memory"),
        [
            ("Requested amount of GPU memory (17 bytes) could not be allocated", True),
            ("Error Code 2: OutOfMemory (no further information)", True),
            ("CUDA error 2: out of memory", True),
            ("an illegal memory access was encountered", False),
            ("memory map of the engine is malformed", False),
            ("", False),
        ],
    )
    def test_want_of_memory_is_told_from_other_words_of_memory(self, message: str, memory: bool) -> None:
        assert says_out_of_memory(message) == memory


@given(st.binary(max_size=200), st.integers(0, 2**31), st.integers(0, 7))
def test_a_flipped_bit_of_a_kept_file_is_found(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, place: int, bit: int
) -> None:
    file = tmp_path_factory.mktemp("kept") / "x"
    save_with_digest(file, content)
    assert read_with_digest(file) == (content, "")
    damaged = np.frombuffer(file.read_bytes(), np.uint8).copy()
    damaged[place % len(damaged)] ^= np.uint8(1 << bit)
    file.write_bytes(damaged.tobytes())
    assert read_with_digest(file) == (b"", "it is damaged")
