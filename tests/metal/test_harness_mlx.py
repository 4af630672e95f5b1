"""MLX's own kernels, from the headers in its wheel, run right on the harness. The CPU wheel carries the same headers as macOS's."""

from __future__ import annotations

import struct
from pathlib import Path

import mlx.core as mx
import msl
import numpy as np
import pytest
from msl import toolchain
from msl.frontend import rewrite
from msl.library import expand

INCLUDE = Path(mx.__file__).parent / "include"
KERNELS = INCLUDE / "mlx/backend/metal/kernels"
HEAD = "#include <metal_stdlib>\n#include <metal_simdgroup>\nusing namespace metal;\n"

pytestmark = pytest.mark.skipif(not KERNELS.is_dir(), reason="MLX's Metal headers are not in its wheel")


def source(*headers: str) -> str:
    return HEAD + "".join(f'#include "mlx/backend/metal/kernels/{h}"\n' for h in headers)


def load(headers: list[str], kernels: dict[str, str], compiler: str) -> msl.Library:
    text = source("utils.h", *headers)
    text += "".join(
        f'template [[host_name("{n}")]] [[kernel]] decltype({e}) {e};\n' for n, e in kernels.items()
    )
    return msl.load(text, include=[INCLUDE], mode="checked", compiler=compiler)


TYPES = {
    "float": (lambda a: a.astype(np.float32), lambda a: a, 2e-6),
    "half": (lambda a: a.astype(np.float16), lambda a: a.astype(np.float32), 2e-3),
    "bfloat16_t": (msl.bfloat16.pack, msl.bfloat16.unpack, 1.6e-2),
}


def test_softmax(compiler):
    single = {t: f"softmax_single_row<{t}, float, 4>" for t in TYPES}
    lib = load(["softmax.h"], single | {"looped": "softmax_looped<float, float, 4>"}, compiler)
    rng = np.random.default_rng(0)
    for name, threads, width, kind in [(t, 256, 1000, t) for t in TYPES] + [("looped", 1024, 4500, "float")]:
        to, back, tolerance = TYPES[kind]
        x = to(rng.standard_normal((3, width)).astype(np.float32))
        out = np.zeros_like(x)
        lib.launch(name, {0: x, 1: out, 2: width}, groups=(3,), threadgroup=(threads,), schedule=1)
        e = np.exp(back(x).astype(np.float64))
        np.testing.assert_allclose(back(out), e / e.sum(1, keepdims=True), rtol=tolerance)


def test_sort(compiler):
    lib = load(["sort.h"], {"argsort": "block_sort<float, uint, true, 128, 8>"}, compiler)
    x = np.random.default_rng(1).standard_normal((3, 1000)).astype(np.float32)
    x[1] = np.round(x[1])
    out = np.zeros(x.shape, np.uint32)
    strides = {
        "in_stride_sorted_axis": 1,
        "out_stride_sorted_axis": 1,
        "in_stride_segment_axis": 1000,
        "out_stride_segment_axis": 1000,
    }
    buffers = {"inp": x, "out": out, "size_sorted_axis": 1000} | strides
    lib.launch("argsort", buffers, groups=(1, 3), threadgroup=(128, 1), schedule=2)
    assert np.array_equal(out, np.argsort(x, 1, kind="stable"))


def test_scan(any_compiler):
    if not toolchain.is_clang(any_compiler):
        pytest.skip("GCC refuses the in-class specialisations of MLX's binary_ops.h")
    kernel = {"scan": "contiguous_scan<float, float, CumSum<float>, 4, true, false>"}
    lib = load(["binary_ops.h", "scan.h"], kernel, any_compiler)
    x = np.random.default_rng(2).standard_normal((3, 3000)).astype(np.float32)
    out = np.zeros_like(x)
    # scan.h reads partial sums of simdgroups that wrote none, and does not use them.
    lib.launch(
        "scan",
        {0: x, 1: out, 2: 3000},
        groups=(1, 3),
        threadgroup=(256, 1),
        schedule=1,
        allow_uninitialised=True,
    )
    np.testing.assert_allclose(out, np.cumsum(x.astype(np.float64), 1), atol=1e-4)
    with pytest.raises(msl.Uninitialised, match=r"scan\.h:\d+"):
        lib.launch("scan", {0: x, 1: out, 2: 3000}, groups=(1, 3), threadgroup=(256, 1))


GEMMS = [("float", 0, 1), ("half", 0, 0), ("bfloat16_t", 1, 0)]


def test_steel_gemm(compiler):
    b = {0: "false", 1: "true"}
    kernels = {t: f"gemm<{t}, 32, 32, 16, 2, 2, {b[ta]}, {b[tb]}, float>" for t, ta, tb in GEMMS}
    lib = load(["steel/gemm/gemm.h", "steel/gemm/kernels/steel_gemm_fused.h"], kernels, compiler)
    rng, (m, n, k) = np.random.default_rng(3), (70, 50, 40)
    flags = {
        "has_batch": False,
        "use_out_source": False,
        "do_axpby": False,
        "align_M": False,
        "align_N": False,
        "align_K": False,
    }
    for kind, ta, tb in GEMMS:
        to, back, _ = TYPES[kind]
        left, right = (to(rng.standard_normal(s).astype(np.float32)) for s in ((m, k), (k, n)))
        out = to(np.zeros((m, n), np.float32))
        a, c = (np.ascontiguousarray(v.T if t else v) for v, t in ((left, ta), (right, tb)))
        tiles = (-(-n // 32), -(-m // 32))
        params = struct.pack("8i3q3i4x", m, n, k, a.shape[1], c.shape[1], n, *tiles, 0, 0, 0, 0, k // 16, 0)
        # The kernel reads alpha and beta even where the function constants say that there is no such buffer.
        buffers = {
            "A": a,
            "B": c,
            "D": out,
            "params": params,
            "addmm_params": bytes(32),
            6: np.ones(1, np.int32),
            7: np.zeros(2, np.int64),
        }
        lib.launch(kind, buffers, groups=tiles, threadgroup=(32, 2, 2), constants=flags, schedule=1)
        exact = back(left).astype(np.float64) @ back(right).astype(np.float64)
        error = np.abs(back(out) - exact).max() / np.abs(exact).max()
        assert error < {"float": 1e-6, "half": 1e-3, "bfloat16_t": 8e-3}[kind]


# What an MLX header expects to be included before it, and which headers cannot share one program.
BEFORE = {
    "reduction/reduce_all.h": ["reduce_utils.h"],
    "reduction/reduce_col.h": ["reduce_utils.h"],
    "reduction/reduce_init.h": ["reduce_utils.h"],
    "reduction/reduce_row.h": ["reduce_utils.h"],
    "reduction/ops.h": ["atomic.h"],
    "reduce.h": ["reduce_utils.h"],
    "cross_entropy.h": ["reduce_utils.h"],
    "unary.h": ["unary_ops.h"],
    "binary.h": ["binary_ops.h"],
    "binary_two.h": ["binary_ops.h"],
    "ternary.h": ["ternary_ops.h"],
    "scan.h": ["binary_ops.h"],
    "searchsorted.h": ["sort.h"],
    "indexing/scatter.h": ["reduce_utils.h", "indexing/indexing.h"],
    "indexing/gather.h": ["indexing/indexing.h"],
    "indexing/masked_scatter.h": ["indexing/indexing.h"],
    "indexing/scatter_axis.h": ["atomic.h"],
    "quantized.h": ["steel/gemm/gemm.h", "quantized_utils.h"],
    "fp_quantized.h": ["steel/gemm/gemm.h", "quantized_utils.h"],
    "fft/readwrite.h": ["fft/radix.h"],
    "steel/conv/loaders/loader_general.h": ["steel/conv/conv.h"],
    "steel/attn/kernels/steel_attention.h": ["steel/attn/attn.h"],
}
APART = [
    ["fft/readwrite.h", "gemv_masked.h", "indexing/masked_scatter.h", "quantized.h"],
    ["steel/attn/attn.h", "steel/attn/kernels/steel_attention.h", "steel/attn/loader.h", "steel/attn/mma.h", "steel/attn/transforms.h"],
    ["steel/gemm/kernels/steel_gemm_fused.h"],
    ["steel/gemm/kernels/steel_gemm_gather.h"],
    ["steel/gemm/kernels/steel_gemm_segmented.h"],
]  # fmt: skip


def _in_order(headers: list[str]) -> list[str]:
    order = ["utils.h", "steel/defines.h", "steel/utils.h"]
    for h in headers:
        before = list(BEFORE.get(h, []))
        before += ["steel/gemm/gemm.h"] if "/kernels/steel_" in h and "attn" not in h else []
        before += ["steel/conv/conv.h"] if h.startswith("steel/conv/kernels/") else []
        order += [x for x in [*before, h] if x not in order]
    return order


def test_all_headers_without_tensor_operations_are_accepted(any_compiler):
    """84 of the 98: those named nax need the tensor cores of M5, which the harness does not have."""
    if not toolchain.is_clang(any_compiler):
        pytest.skip("GCC refuses the in-class specialisations of MLX's binary_ops.h")
    every = sorted(str(h.relative_to(KERNELS)) for h in KERNELS.rglob("*.h"))
    wanted = [h for h in every if "nax" not in h]
    assert (len(every), len(wanted)) == (98, 84)
    together = [h for h in wanted if not any(h in group for group in APART)]
    for group in [together, *APART]:
        order = _in_order(group)
        assert set(group) <= set(order)
        program = rewrite(expand(source(*order), include=[INCLUDE]))
        check = [
            any_compiler,
            "-std=c++17",
            "-fsyntax-only",
            "-w",
            f"-I{toolchain.RUNTIME}",
            "-x",
            "c++",
            "-",
        ]
        toolchain.run(check, '#include "metal.h"\n' + program.text)


def test_the_linter_finds_nothing_in_mlx(any_compiler):
    text = source("utils.h", "softmax.h", "sort.h", "gemv.h", "steel/gemm/gemm.h", "steel/attn/attn.h")
    assert msl.lint(text, include=[INCLUDE]) == []
