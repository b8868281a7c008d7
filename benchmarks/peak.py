"""What bf16 can give at most on this CPU: the rate of its instruction and of large products, and the tiles/s of each.

    python benchmarks/peak.py [--arch timm:vit_base_patch16_224] [--threads 2] [--rounds 5]

The instruction is AVX-512's VDPBF16PS, run on registers alone, compiled by `cc`: nothing that computes with it is
faster. The products are torch's, of square matrices. The network's own multiplications are counted by torch; what else
it does (softmax, GELU, norms, reading weights) would come on top.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mtdp_export.source import open_source
from mtdp_runtime.machine import cpuinfo

SOURCE = r"""
#include <immintrin.h>
#define EACH(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)
#define BEGIN(i) __m512 sum##i = _mm512_set1_ps(i);
#define STEP(i) __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(sum##i) : "v"(a), "v"(b));
#define END(i) out += _mm512_reduce_add_ps(sum##i);
float run(long rounds) {
  __m512 a = _mm512_set1_ps(1), b = _mm512_set1_ps(0);
  float out = 0;
  EACH(BEGIN)
  for (long r = 0; r < rounds; r++) { EACH(STEP) }
  EACH(END)
  return out;
}
"""
FLOP_OF_A_ROUND = 12 * 16 * 2 * 2  # 12 instructions, 16 sums each, of 2 products: multiplied, and added
SIDES = (1024, 2048, 4096)


def instruction_flop_per_s(threads: int, rounds: int) -> float:
    """Return the median rate of VDPBF16PS, all threads together."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.c", Path(folder) / "peak.so"
        source.write_text(SOURCE)
        flags = ("-O3", "-funroll-loops", "-mavx512f", "-mavx512bf16", "-shared", "-fPIC")
        subprocess.run(["cc", *flags, str(source), "-o", str(library)], check=True)
        run = ctypes.CDLL(str(library)).run
    run.argtypes, run.restype = [ctypes.c_long], ctypes.c_float
    count = 20_000_000

    def all_threads() -> None:
        running = [threading.Thread(target=run, args=(count,)) for _ in range(threads)]
        for one in running:
            one.start()
        for one in running:
            one.join()

    return threads * count * FLOP_OF_A_ROUND / median_s(all_threads, rounds)


def product_flop_per_s(side: int, rounds: int) -> float:
    """Return the median rate of torch's product of two square bf16 matrices."""
    a, b = (torch.randn(side, side).bfloat16() for _ in range(2))
    return 2 * side**3 / median_s(lambda: torch.mm(a, b), rounds)


def median_s(call: Callable[[], object], rounds: int) -> float:
    """Return the median time of a call, after one that does not count."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="timm:vit_base_patch16_224")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    source = open_source(options.arch, "random", None, False)
    tile_px = source.preprocessing.image_px
    plainly = sdpa_kernel(SDPBackend.MATH)  # fused attention is not counted on a CPU
    with torch.inference_mode(), plainly, FlopCounterMode(display=False) as counted:
        source.network.eval().backbone(torch.zeros(1, 3, tile_px, tile_px))
    flop = counted.get_total_flops()
    print(f"{options.arch}: {flop / 1e9:.1f} GFLOP a tile; {options.threads} threads")
    rates = {f"torch, {side} x {side}": product_flop_per_s(side, options.rounds) for side in SIDES}
    if "avx512_bf16" in cpuinfo().split():
        rates["VDPBF16PS"] = instruction_flop_per_s(options.threads, options.rounds)
    for name, rate in rates.items():
        print(f"{name}: {rate / 1e9:.0f} GFLOP/s, at most {rate / flop:.1f} tiles/s")


if __name__ == "__main__":
    main()
