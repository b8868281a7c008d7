"""Files that mean harm: models, names, metadata. And no network, ever."""

from __future__ import annotations

import ast
import doctest
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import denied
from denied import run_without
from mtdp_runtime.bundle import load_bundle
from mtdp_runtime.bundle.golden import load_golden
from mtdp_runtime.bundle.onnx_check import check_model_file
from mtdp_runtime.commands import console
from mtdp_runtime.commands.console import print_error
from mtdp_runtime.errors import BundleInvalid, SlideUnreadable
from mtdp_runtime.printable import printable
from mtdp_runtime.report import slide as report

ROOT = Path(__file__).resolve().parents[2]


# ONNX Runtime 1.32 reports about 9 s after its first session, and leaves an identifier in ~/.cache; OpenVINO does both
# when it is imported. So a process must live longer than that to show what it does.
_STAYS_S = 30
_USES = {
    "extraction": "from mtdp_runtime.backends import load\nfrom mtdp_runtime import load_bundle\n"
    "for name in ('openvino', 'onnxruntime'): load(name, load_bundle(BUNDLE), 'fp32', 2, 1)",
    "export": "from mtdp_export.verify import verify_bundle\nverify_bundle(BUNDLE, ('onnxruntime', 'openvino'))",
    "the doctor": "from mtdp_runtime.backends import probe_all\nprobe_all()",
    "training": "import numpy as np, mtdp, onnxruntime\n"
    "onnxruntime.InferenceSession(BUNDLE / 'model.fp32.onnx', providers=['CPUExecutionProvider'])",
}


@pytest.fixture(scope="module", autouse=True)
def living_on(
    request: pytest.FixtureRequest, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, subprocess.Popen[str]]]]:
    """By use: the home of a process that stays for a while. They start with the first test of this file, and wait
    beside the others; the test that looks at them is the last one."""
    running: dict[str, tuple[Path, subprocess.Popen[str]]] = {}
    if any(item.name == "test_no_engine_reports_its_use_while_a_process_lives_on" for item in request.session.items):
        program = denied._deny(denied.SOCKET, 0, (denied.AF_INET, denied.AF_INET6), denied._KILL)
        cleared = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
        cleared.pop("XDG_CACHE_HOME", None)
        for use, code in _USES.items():
            folder = tmp_path_factory.mktemp("use")
            (folder / "home").mkdir()
            before = f"import time\nfrom pathlib import Path\nBUNDLE = Path({str(tiny_bundle)!r})\n"
            process = subprocess.Popen(
                [sys.executable, "-c", f"{before}{code}\ntime.sleep({_STAYS_S})"],
                preexec_fn=lambda: denied._install(program),
                env={**cleared, "HOME": str(folder / "home"), "MTDP_CACHE": str(folder / "cache")},
                stderr=subprocess.PIPE,
                text=True,
            )
            running[use] = (folder / "home", process)
    yield running
    for _, process in running.values():
        with process:  # which closes its stream
            process.kill()


def external(tensor: TensorProto) -> TensorProto:
    """Say that a tensor's numbers lie in another file."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../etc/passwd"
    return tensor


def tensor() -> TensorProto:
    return numpy_helper.from_array(np.zeros(4, np.float32), "w")


def model(*nodes: onnx.NodeProto, initializers: tuple[TensorProto, ...] = (), **options: Any) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    graph = helper.make_graph(list(nodes), "g", [value], [value], list(initializers))
    return helper.make_model(graph, **options)


def in_a_branch() -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["y"], value=external(tensor()))
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    branch = helper.make_graph([constant], "branch", [], [out])
    return model(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))


def in_a_function() -> onnx.ModelProto:
    constant = helper.make_node("Constant", [], ["y"], value=external(tensor()))
    opset = [helper.make_opsetid("", 20)]
    return model(functions=[helper.make_function("ai.onnx", "F", [], ["y"], [constant], opset)])


def sparse() -> onnx.ModelProto:
    whole = model()
    whole.graph.sparse_initializer.add().values.CopyFrom(external(tensor()))
    return whole


REACHING_OUT = {
    "an initializer": lambda: model(initializers=(external(tensor()),)),
    "a constant": lambda: model(helper.make_node("Constant", [], ["y"], value=external(tensor()))),
    "a list of tensors": lambda: model(helper.make_node("F", [], ["y"], many=[tensor(), external(tensor())])),
    "a branch": in_a_branch,
    "a function": in_a_function,
    "a sparse tensor": sparse,
}


@pytest.mark.parametrize("where", REACHING_OUT)
def test_a_model_whose_tensors_lie_in_other_files_is_refused(tmp_path: Path, where: str) -> None:
    (tmp_path / "m.onnx").write_bytes(REACHING_OUT[where]().SerializeToString())
    with pytest.raises(BundleInvalid, match="lies in another file"):
        check_model_file(tmp_path / "m.onnx")


@pytest.mark.parametrize("made", [
    lambda: model(helper.make_node("Evil", ["x"], ["y"], domain="com.example")),
    lambda: model(opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.example", 1)]),
])  # fmt: skip
def test_a_model_with_operators_that_need_code_is_refused(tmp_path: Path, made: Callable[[], onnx.ModelProto]) -> None:
    (tmp_path / "m.onnx").write_bytes(made().SerializeToString())
    with pytest.raises(BundleInvalid, match=r"'com\.example' need code"):
        check_model_file(tmp_path / "m.onnx")


@pytest.mark.parametrize("operator", ["EPContext", "Snpe", "PythonOp", "NewInTheNextRelease"])
@pytest.mark.parametrize("where", ["the graph", "a branch"])
def test_operators_of_onnx_runtime_pass_by_name_and_not_by_domain(tmp_path: Path, operator: str, where: str) -> None:
    """Some of them mean "load this": a device's compiled code, a Python function."""
    node = helper.make_node(operator, ["x"], ["y"], domain="com.microsoft")
    if where == "a branch":
        branch = helper.make_graph([node], "branch", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])])
        node = helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch)
    (tmp_path / "m.onnx").write_bytes(model(node).SerializeToString())
    with pytest.raises(BundleInvalid, match=rf"com\.microsoft\.{operator} may load code"):
        check_model_file(tmp_path / "m.onnx")
    fused = model(
        helper.make_node("FastGelu", ["x"], ["y"], domain="com.microsoft"), helper.make_node(operator, [], [])
    )
    (tmp_path / "m.onnx").write_bytes(fused.SerializeToString())
    check_model_file(tmp_path / "m.onnx")  # ONNX's own domain has no such operators: an engine refuses the name


def test_a_node_that_names_its_operator_twice_is_judged_by_both(tmp_path: Path) -> None:
    """Parsers take the last of a field that stands there twice; which one an engine's does is not ours to guess."""
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft")
    evil = model(node).SerializeToString()
    named = b"\x22\x09EPContext"  # field 4 of the node: its operator
    assert evil.count(named) == 1
    harmless = helper.make_node("FastGelu", ["x"], ["y"], domain="com.microsoft")
    path = tmp_path / "m.onnx"
    for order in ((node, harmless), (harmless, node)):
        both = onnx.NodeProto.FromString(order[0].SerializeToString())
        content = model(both).SerializeToString()
        raw = order[0].SerializeToString() + order[1].SerializeToString()
        graph = onnx.GraphProto.FromString(model().graph.SerializeToString())
        body = b"\x0a" + bytes([len(raw)]) + raw + graph.SerializeToString()
        whole = onnx.ModelProto.FromString(content)
        whole.ClearField("graph")
        path.write_bytes(whole.SerializeToString() + b"\x3a" + bytes([len(body)]) + body)
        with pytest.raises(BundleInvalid, match="EPContext may load code"):
            check_model_file(path)


def test_an_honest_model_passes_and_each_cut_of_it_ends_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    content = model(helper.make_node("Relu", ["x"], ["y"]), initializers=(tensor(),)).SerializeToString()
    path.write_bytes(content)
    check_model_file(path)
    refused = 0
    for end in range(len(content)):
        path.write_bytes(content[:end])
        try:
            check_model_file(path)
        except BundleInvalid:
            refused += 1
    assert refused > len(content) // 2
    rng = np.random.default_rng(0)
    for _ in range(300):
        path.write_bytes(rng.bytes(int(rng.integers(1, 200))))
        with pytest.raises(BundleInvalid):
            check_model_file(path)


def test_the_engine_never_sees_such_a_model(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
    """Even where bundle.json was made to agree with it."""
    from mtdp_runtime.bundle import file_ref

    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    hostile = onnx.load(bundle / "model.fp32.onnx")
    external(hostile.graph.initializer[0])
    (bundle / "model.fp32.onnx").write_bytes(hostile.SerializeToString())
    document = json.loads((bundle / "bundle.json").read_text())
    ref = file_ref(bundle, "model.fp32.onnx")
    document["mtdp"]["variants"][0]["file"] = {"file": ref.file, "sha256": ref.sha256, "size_bytes": ref.size_bytes}
    (bundle / "bundle.json").write_text(json.dumps(document))
    loaded = load_bundle(bundle)
    with pytest.raises(BundleInvalid, match="lies in another file"):
        loaded.checked(loaded.variant("fp32").file)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("variants", 0, "file", "file"), "../model.onnx"),
        (("variants", 0, "file", "file"), "a/../model.onnx"),
        (("variants", 0, "file", "file"), "..\\model.onnx"),
        (("variants", 0, "file", "file"), "model.xml"),  # OpenVINO's own format: another front end
        (("variants", 0, "file", "file"), "model\0.onnx"),
        (("golden", "file"), "golden.pkl"),
        (("tile_px",), 10**9),
        (("features_dim",), 10**12),
        (("heads",), [{"name": "../x", "class_names": ["a"]}]),
    ],
)
def test_a_manifest_cannot_name_what_lies_elsewhere_or_exhaust_memory(
    tiny_bundle: Path, tmp_path: Path, path: tuple[Any, ...], value: Any
) -> None:
    document = json.loads((tiny_bundle / "bundle.json").read_text())
    if path == ("tile_px",):
        document["patch_size_pixels"] = value
    target = document["mtdp"]
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    (tmp_path / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(BundleInvalid):
        load_bundle(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\xff", "1" * 10_000])
def test_a_manifest_made_to_break_the_parser_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bundle.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleInvalid):
        load_bundle(tmp_path)


class Opened:
    """Written into a pickle; unpickling it would leave a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_golden_tiles_cannot_run_code_or_unpack_to_more_than_they_are(tmp_path: Path) -> None:
    hostile, trace = tmp_path / "golden.npz", tmp_path / "trace"
    array = np.empty(1, object)
    array[0] = Opened(trace)
    np.savez(hostile, tiles=array, features=array)
    with pytest.raises(BundleInvalid, match="not golden tiles"):
        load_golden(hostile)
    assert not trace.exists()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1 << 50,)})
    with zipfile.ZipFile(hostile, "w") as archive:
        archive.writestr("tiles.npy", header.getvalue())
        archive.writestr("features.npy", header.getvalue())
    with pytest.raises(BundleInvalid, match="not golden tiles"):
        load_golden(hostile)


def test_no_code_of_the_package_loads_pickles() -> None:
    """np.load says allow_pickle=False, torch.load says weights_only=True, and nothing imports pickle."""
    files = [f for room in ("runtime", "export", "mtdp") for f in (ROOT / room).rglob("*.py")]
    assert len(files) > 30
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"dill", "joblib", "cloudpickle", "marshal", "shelve"}, file
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr == "UnpicklingError", f"{file}:{node.lineno}"  # its name alone
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load":
                options = {k.arg: ast.unparse(k.value) for k in node.keywords}
                owner = ast.unparse(node.func.value)
                if owner in ("np", "numpy"):
                    assert options.get("allow_pickle") == "False", f"{file}:{node.lineno}"
                if owner == "torch":
                    assert options.get("weights_only") == "True", f"{file}:{node.lineno}"


class Tags(HTMLParser):
    """Collects what a browser would act on."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        acts = [(name, value) for name, value in attrs if name.startswith("on") or name == "href"]
        assert not set(acts) - {("href", "index.html")}, attrs  # the page of its own folder
        self.sources |= {value[:22] for name, value in attrs if name == "src" and value is not None}


def test_a_report_shows_names_and_metadata_as_text(
    tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path
) -> None:
    from mtdp_runtime.backends.onnxruntime import OnnxRuntime
    from mtdp_runtime.extraction.extract import extract_slide
    from mtdp_runtime.extraction.models import Model, Target
    from mtdp_runtime.settings import ExtractSettings
    from mtdp_runtime.slide.open import open_slide

    evil = "<script>alert(1)<img src=x onerror=alert(2)>&'\""
    slide_path = tmp_path / f"{evil}.tiff"
    make_slide("a.tiff").rename(slide_path)
    features = tmp_path / "a.h5"
    bundle = load_bundle(tiny_bundle)
    with OnnxRuntime.load(bundle, "fp32", 8, 1) as engine, open_slide(slide_path) as slide:
        settings = ExtractSettings(mpp=0.5, stride_px=64)
        _, plan = extract_slide(slide, [Target(features, Model(bundle, engine))], settings, readers=1)
    assert plan is not None
    with h5py.File(features, "r+") as file:
        file.attrs["slide_vendor"] = evil
        file.attrs[evil] = evil
    thumbnail = report.Thumbnail(plan.tissue.image, plan.tissue.scale, plan.tissue.x0, plan.tissue.y0)
    report.write_report(tmp_path / "r.html", features, thumbnail)
    text = (tmp_path / "r.html").read_text()
    seen = Tags()
    seen.feed(text)
    assert not seen.tags & {"script", "iframe", "object", "embed", "link", "form"}
    assert seen.sources == {"data:image/jpeg;base64"}
    assert text.count("&lt;script&gt;alert(1)") >= 4


def test_a_failure_shows_a_name_without_obeying_it(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Colours, a cleared screen, a title, a line of its own, and a name that reads backwards (U+202E)."""
    evil = "a\x1b[2J\x9b31m\x1b]0;title\x07\r\nerror: all is well \u202egvs.b"
    print_error(SlideUnreadable(f"{tmp_path / evil}: no such file", hint=f"Look for {evil}"))
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"]
    assert all(line.isprintable() for line in lines)
    assert doctest.testmod(console).failed == 0
    assert printable("Präparat 7 µm 切片.svs") == "Präparat 7 µm 切片.svs"
    assert json.loads(json.dumps(evil)) == evil
    assert json.dumps(evil).isprintable()  # what --json prints


# Python runs it at its start, in every process that is spawned, too; what is forked keeps the hook.
_WATCH = """
import os, sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        with open(os.environ["MTDP_TEST_CALLS"], "a") as file:
            file.write(f"{event} {arguments}\\n")
sys.addaudithook(watch)
"""


def test_a_run_opens_no_network_connection(tiny_bundle: Path, make_slide: Callable[..., Path], tmp_path: Path) -> None:
    """The kernel kills a process at its first internet socket, whatever library asks for it.

    A library may ask in a child process, whose death nobody notices: so Python itself notes who asks, in all of them.
    And whatever a library leaves in HOME to know the user by again would be seen there.
    """
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(_WATCH)
    (tmp_path / "home").mkdir()
    calls = tmp_path / "calls"
    env = {"PYTHONPATH": str(tmp_path / "watch"), "HOME": str(tmp_path / "home"), "MTDP_TEST_CALLS": str(calls)}
    env |= {"CI": "", "TF_BUILD": "", "JENKINS_URL": ""}  # in which OpenVINO keeps still anyway
    for backend in ("openvino", "onnxruntime"):
        out = tmp_path / backend
        arguments = [make_slide(), "--model", tiny_bundle, "--out", out, "--backend", backend]
        result = run_without("network", arguments, env)
        assert result.returncode == 0, result.stderr
        assert (out / "slide.h5").exists()
    assert not calls.exists(), calls.read_text()
    assert not list((tmp_path / "home").iterdir())


def test_python_would_have_noted_who_asks_for_the_network(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_WATCH)
    code = """
import multiprocessing, urllib.request
child = multiprocessing.Process(target=urllib.request.urlopen, args=("http://127.0.0.1:9",))
child.start()
child.join()
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "MTDP_TEST_CALLS": str(tmp_path / "calls")}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)
    assert "urllib.Request" in (tmp_path / "calls").read_text()


def test_the_kernel_would_have_noticed() -> None:
    import signal

    program = denied._deny(denied.SOCKET, 0, (denied.AF_INET, denied.AF_INET6), denied._KILL)
    code = "import socket; socket.socket(socket.AF_INET)"
    result = subprocess.run([sys.executable, "-c", code], preexec_fn=lambda: denied._install(program), check=False)
    assert result.returncode in (-signal.SIGSYS, 99)


def test_no_engine_reports_its_use_while_a_process_lives_on(
    living_on: dict[str, tuple[Path, subprocess.Popen[str]]],
) -> None:
    assert living_on.keys() == _USES.keys()
    for use, (home, process) in living_on.items():
        stderr = process.communicate()[1]
        if process.returncode == 99:
            pytest.skip("this machine has no seccomp")
        assert process.returncode == 0, (use, process.returncode, stderr)
        assert not [path for path in home.rglob("*") if path.is_file()], use
