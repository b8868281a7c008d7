"""The options of the commands: one name, one meaning, one text of help, whichever command has them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final

import typer

from mtdp_runtime.errors import UsageError
from mtdp_runtime.settings import (
    BackendName,
    FeaturesDtype,
    FormatName,
    OnBadTile,
    Pool,
    PrecisionName,
    SchedulerName,
)
from mtdp_runtime.urls import path_or_url

AUTO: Final = "auto"

# The groups of --help, in the order in which they are shown
WORK: Final = "What is worked on"
NUMBERS: Final = "Which numbers come out"
ENGINE: Final = "What computes them"
FILES: Final = "What is written, and when"
MEASURE: Final = "How it is measured"

# What is worked on
Slides = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="SLIDE",
        parser=path_or_url,  # one that may not be read fails alone
        help="Slides, folders of slides, s3://, gs://, az:// and https:// URLs (with --stage), or CSV manifests with "
        "the columns "
        "slide[,mpp][,mask][,name][,coords][,classes]; name is what the output is called.",
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        parser=path_or_url,
        help="Folder for <slide>.h5, report/index.html, report/<slide>.html, run.jsonl and failed.csv; or the URL of "
        "one in a bucket (s3://, gs://, az://).",
        rich_help_panel=WORK,
    ),
]
Model = Annotated[
    Path | None,
    typer.Option(
        help="Model bundle; the packaged one if left out.", metavar="BUNDLE", show_default=False, rich_help_panel=WORK
    ),
]
Models = Annotated[
    list[Path] | None,
    typer.Option(
        help="Model bundle: a folder, or hf:OWNER/NAME@REVISION on the Hugging Face hub (the extra hf); the packaged "
        "one if left out. Repeat it, and each tile is read once for all models; the files go to OUT/<model name>. They "
        "must agree in tile size and scale.",
        metavar="BUNDLE",
        rich_help_panel=WORK,
    ),
]
Mask = Annotated[
    Path | None,
    typer.Option(
        help="Where the tissue is, instead of finding it: QuPath's GeoJSON in level-0 pixels, or an image of the "
        "whole slide whose non-zero pixels are tissue. For many slides: the column mask of a manifest.",
        metavar="GEOJSON|PNG",
        rich_help_panel=WORK,
    ),
]
Coords = Annotated[
    Path | None,
    typer.Option(
        help="Which tiles to compute, instead of a grid over the tissue: a CSV or Parquet file with the columns x,y "
        "(level-0 pixels of each tile's top left), or the HDF5 file of TRIDENT, CLAM or mtdp. All are computed, in "
        "their order. For many slides: a folder of <name>.csv, .parquet or .h5, or the column coords of a manifest.",
        metavar="FILE|FOLDER",
        rich_help_panel=WORK,
    ),
]
Classes = Annotated[
    Path | None,
    typer.Option(
        help="QuPath's annotations (GeoJSON in level-0 pixels): each tile gets the class that covers most of it, "
        "stored as `class` with the features, and in csv and geojson. For many slides: a folder of <name>.geojson, or "
        "the column classes of a manifest.",
        metavar="GEOJSON|FOLDER",
        rich_help_panel=WORK,
    ),
]
Shard = Annotated[
    str | None,
    typer.Option(
        metavar="I/N|slurm",
        help="Only part I (1 to N) of the slides, for N machines; a slide's part depends on its name alone. slurm: the "
        "part of this task of a job array. "
        "Runs without it may share a folder, too: each takes slides that no other run works on.",
        rich_help_panel=WORK,
    ),
]
Demo = Annotated[
    bool,
    typer.Option("--demo", help="Make a synthetic slide in the output folder and run on it.", rich_help_panel=WORK),
]

# Which numbers come out
Mpp = Annotated[
    float | None,
    typer.Option(
        metavar="UM", help="Scale of the tiles in µm per pixel; the model's own if left out.", rich_help_panel=NUMBERS
    ),
]
Scales = Annotated[
    list[float] | None,
    typer.Option(
        metavar="UM",
        help="Scale of the tiles in µm per pixel; the model's own if left out. Repeat it for several: each slide is "
        "opened, and its tissue found, once, and the files of each scale go to OUT/mpp<scale>.",
        rich_help_panel=NUMBERS,
    ),
]
Magnification = Annotated[
    list[float] | None,
    typer.Option(
        metavar="N",
        help="Another way to say --mpp: 10 / magnification, so 20 is 0.5 µm per pixel and 40 is 0.25.",
        rich_help_panel=NUMBERS,
    ),
]
StridePx = Annotated[
    int | None,
    typer.Option(
        metavar="PX", help="Pixels between tiles, at that scale; the tile size if left out.", rich_help_panel=NUMBERS
    ),
]
MinTissue = Annotated[
    float,
    typer.Option(
        metavar="PART",
        help="Part of a tile's area that must be tissue, 0 to 1. 0 takes every tile, glass too.",
        rich_help_panel=NUMBERS,
    ),
]
SlideMpp = Annotated[
    float | None,
    typer.Option(
        metavar="UM",
        help="µm per level-0 pixel, for slides that do not say it or say it wrongly.",
        rich_help_panel=NUMBERS,
    ),
]
BadTile = Annotated[
    OnBadTile,
    typer.Option(
        help="A tile that cannot be read: nan (stored as NaN, with its status), drop, or fail the slide.",
        rich_help_panel=NUMBERS,
    ),
]
Heads = Annotated[
    bool, typer.Option("--heads", help="Also store the model's task probabilities.", rich_help_panel=NUMBERS)
]
Pooling = Annotated[
    Pool,
    typer.Option(
        "--pool",
        help="Also store a vector of the slide, `slide_features`: the mean of its tiles. none stores no such vector.",
        rich_help_panel=NUMBERS,
    ),
]
Tokens = Annotated[
    bool,
    typer.Option(
        "--tokens",
        help="Also store the tokens of each tile's patches, `tokens` float16[N, T, D], of a model that was exported "
        "with mtdp-export --tokens. They are large: 0.1 to 0.8 MB a tile; --dry-run says how much.",
        rich_help_panel=NUMBERS,
    ),
]
Dtype = Annotated[
    FeaturesDtype,
    typer.Option(help="Store features as float32, or as float16 in half the space.", rich_help_panel=NUMBERS),
]

# What computes them
EngineName = Annotated[
    BackendName,
    typer.Option(
        help="The inference engine. auto takes the best that runs here; mtdp-doctor lists them.", rich_help_panel=ENGINE
    ),
]
Precision = Annotated[
    PrecisionName,
    typer.Option(
        help="What the engine computes in. auto takes int8 only where a probe judged it (docs/bundle.md).",
        rich_help_panel=ENGINE,
    ),
]
TrustEngines = Annotated[
    bool,
    typer.Option(
        "--trust-engines",
        help="Load TensorRT engines that the bundle brings. They are code: know who made them.",
        rich_help_panel=ENGINE,
    ),
]
BatchSize = Annotated[
    str,
    typer.Option(
        help="Tiles in a batch. auto: 64 on a GPU, 4 to 16 on a CPU, by its cores.",
        metavar="N|auto",
        rich_help_panel=ENGINE,
    ),
]
Threads = Annotated[
    str,
    typer.Option(
        help="CPU threads. auto: the cores that this process may use.", metavar="N|auto", rich_help_panel=ENGINE
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Work on N slides at once, largest first, each in a process with its own share of the cores. For "
        "machines of many cores, which one slide does not fill.  [default: 1]",
        min=1,
        show_default=False,
        rich_help_panel=ENGINE,
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        metavar="all|I,I",
        help="Use several GPUs, numbered from 0 as CUDA sees them: one worker for each. One GPU if left out.",
        rich_help_panel=ENGINE,
    ),
]
Scheduler = Annotated[
    SchedulerName,
    typer.Option(
        help="What runs the workers: this machine alone, or Ray, also over many machines that see the slides, the "
        "models and OUT under the same paths.",
        rich_help_panel=ENGINE,
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Join the Ray cluster at this address (auto: the one of this machine), with a worker for each GPU, or for "
        "each machine where there is none. Left out, --scheduler ray starts one here, and stops it.",
        rich_help_panel=ENGINE,
    ),
]
Check = Annotated[
    int,
    typer.Option(
        help="Recompute this many random tiles of each slide, also of finished files, with OpenSlide and ONNX Runtime "
        "in fp32; print and record the smallest cosine, and warn where it is below what the precision promises.",
        metavar="N",
        min=0,
        rich_help_panel=ENGINE,
    ),
]

# What is written, and when
Formats = Annotated[
    list[FormatName] | None,
    typer.Option(
        "--format",
        metavar="|".join(FormatName),
        help="Also write pt (CLAM), npy, csv or geojson (WSInfer, QuPath), zarr (SpatialData), h5ad (AnnData) or "
        "parquet, made from the HDF5 file, which is always there; repeat for several.",
        rich_help_panel=FILES,
    ),
]
NoReport = Annotated[bool, typer.Option("--no-report", help="Write no HTML pages.", rich_help_panel=FILES)]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace files of other settings and incomplete ones, and try slides again that failed before. What "
        "is complete and of these settings is left alone: delete it to have it computed again.",
        rich_help_panel=FILES,
    ),
]
RetryFailed = Annotated[
    bool,
    typer.Option(
        "--retry-failed",
        help="Try slides again that failed in an earlier run. Without it a slide that is unchanged, with unchanged "
        "settings, is reported as failed and not tried.",
        rich_help_panel=FILES,
    ),
]
StallLimit = Annotated[
    float,
    typer.Option(
        help="Seconds without anything read or computed after which a slide counts as hung and fails, and a model "
        "that is loaded ends the run. 0: wait for ever.",
        metavar="SECONDS",
        min=0,
        rich_help_panel=FILES,
    ),
]
Stage = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Copy each slide to this folder on a local disk while the one before runs: for slow storage and URLs. "
        "Copies are removed.",
        rich_help_panel=FILES,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Find tissue, count tiles, estimate bytes and time; write nothing.", rich_help_panel=FILES
    ),
]
Preflight = Annotated[
    bool,
    typer.Option(
        "--preflight",
        help="Instead: open every slide, find its tissue, load the model, and compare what the features need with the "
        "free disk space. Exit code 1 where a slide would fail or the space is too little.",
        rich_help_panel=WORK,
    ),
]
Verify = Annotated[
    Path | None,
    typer.Option(
        metavar="OUT",
        help="Extract nothing: read every finished file of this folder whole, compare it with the checksums that "
        "it holds, and what is derived from it with what it was made from. Exit code 1 where one does not hold.",
        rich_help_panel=FILES,
    ),
]
OneJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object per slide on stdout.")]


_MOST_DIGITS: Final = 9  # Python refuses to read thousands of them


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS


def count_or_auto(option: str, text: str) -> int | None:
    """Return the number that an option says; None for `auto`.

    Raises:
        UsageError: it is neither.
    """
    if text == AUTO:
        return None
    if not (_is_whole(text) and int(text) > 0):
        raise UsageError(
            f"{option} {text!r}: must be a whole number from 1 on, or {AUTO}",
            hint=f"For example {option} 8; {AUTO} chooses by this machine.",
        )
    return int(text)


def check_scheduler(scheduler: str, ray_address: str | None, devices: str | None) -> bool:
    """Say whether the workers are on other machines.

    Raises:
        UsageError: the options do not go together.
    """
    if ray_address is not None and scheduler != "ray":
        raise UsageError("--ray-address: the scheduler is not ray", hint="Add --scheduler ray.")
    if devices is not None and scheduler == "ray":
        raise UsageError("--devices: Ray gives each worker its GPU", hint="Leave it out.")
    return ray_address is not None


def crew_of(workers: int | None, devices: str | None, cores: int | None) -> tuple[int, tuple[int, ...]]:
    """Return how many workers there are, and the GPU of each where `--devices` names them.

    Raises:
        UsageError: there are not so many cores or GPUs, or both options are given.
    """
    if devices is None:
        if workers is not None and cores is not None and workers > cores:
            raise UsageError(
                f"--workers {workers}: more than the {cores} threads that there are for them",
                hint="Each worker needs one of --threads, which are the cores that this process may use if left out.",
            )
        return workers or 1, ()
    if workers is not None:
        raise UsageError("--workers and --devices both say how many workers there are", hint="Leave out one of them.")
    from mtdp_runtime.backends.gpus import gpus

    there = [gpu.index for gpu in gpus()]
    chosen = there if devices == "all" else [int(one) for one in devices.split(",") if _is_whole(one)]
    if devices != "all" and (len(chosen) != devices.count(",") + 1 or len(set(chosen)) != len(chosen)):
        raise UsageError(f"--devices {devices!r}: must be all, or numbers such as 0,1", hint="mtdp-doctor lists GPUs.")
    if missing := set(chosen) - set(there):
        raise UsageError(f"--devices {devices}: there is no GPU {min(missing)}", hint=f"There are {there}.")
    return len(chosen), tuple(chosen)


def part_of(shard: str | None) -> tuple[int, int]:
    """Return I and N of `--shard I/N`; 1 and 1 where it is not given.

    Raises:
        UsageError: it is not of that form.
    """
    if shard is None:
        return 1, 1
    if shard == "slurm":
        return _part_of_an_array(os.environ)
    part, _, parts = shard.partition("/")
    if not (_is_whole(part) and _is_whole(parts) and 1 <= int(part) <= int(parts)):
        raise UsageError(
            f"--shard {shard!r}: must be slurm, or I/N: part I of N parts, with I from 1 to N",
            hint="For example --shard 1/4, 2/4, 3/4 and 4/4 on four machines.",
        )
    return int(part), int(parts)


def _part_of_an_array(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return I and N of a task of a Slurm job array, whatever its ids start with.

    Raises:
        UsageError: this is no such task, or its array has steps.
    """
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")
    wrong = [name for name in names if not _is_whole(environment.get(name, ""))]
    if wrong:
        said = [f"{name} is {environment[name]!r}" if name in environment else f"{name} not set" for name in wrong]
        raise UsageError(
            f"--shard slurm: {', '.join(said)}",
            hint="Slurm sets them in the tasks of a job array (sbatch -a 1-8); elsewhere give --shard I/N.",
        )
    task, tasks, first, last = (int(environment[name]) for name in names)
    if not first <= task <= last == first + tasks - 1:  # all of its tasks say so, and none does a part
        raise UsageError(
            f"--shard slurm: task {task} of {tasks} tasks from {first} to {last}: the array has gaps",
            hint="Number the tasks one by one: sbatch -a 1-8. To repeat some, submit the same array again, or give "
            "each --shard I/N.",
        )
    return task - first + 1, tasks


def target_mpp(mpp: Sequence[float] | None, magnification: Sequence[float] | None) -> tuple[float, ...]:
    """Return the scales that were asked for, in µm per pixel; none where none was.

    Raises:
        UsageError: both were given, or one is no scale.
    """
    from mtdp_runtime.cohort.job import scales_of
    from mtdp_runtime.slide.scale import LEAST_MPP, MOST_MPP, is_scale

    if mpp and magnification:
        raise UsageError("--mpp and --magnification say the same twice", hint="Leave out one of them.")
    for one in magnification or ():
        if not (one > 0 and is_scale(10 / one)):
            raise UsageError(
                f"--magnification {one}: must be from {10 / MOST_MPP:g} to {10 / LEAST_MPP:g}",
                hint="For example 20, which is --mpp 0.5, or 40, which is --mpp 0.25.",
            )
    return scales_of(mpp or [10 / one for one in magnification or ()])
