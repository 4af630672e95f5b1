"""Fused encode and selection against the product alone, and against plain MLX.

The certified way, S1 and S2: three quarters are the bfloat16 product, the rest the candidates' rows of x and of the weights.
Rescoring the likeliest k at once spares two of three estimates (66 and 186 thousand candidates are left, 48 and 116
thousand can reach the k-th); merely estimating these first was no gain, as the weights pass once more. Fetching the next
rows during rescoring gave 3 to 6 %.

AVX2 (Zen 3, d_in 1,024): rows of weights lie 4,096 bytes apart and fall on the same sets of an 8-way cache, so that a tile
of 4 features by 24 tokens beats one of 6 by 16 (86 to 81 GFLOP/s a core alone, 1.2 times in the encode). No gain: packing the
weights, prefetching them to the second level only, depths of 256 that keep a panel in the first level (0.87), blocks of 24 to
96 tokens. Integers of 16 bits (vpmaddwd) do 142 GFLOP/s a core in tiles of 4, 5 or 6 by 16 and 3 by 24, bytes would need three
instructions for the work of four, at a bound some thirty times as wide. They leave 37 candidates of a token at S1 (65
with bfloat16), 32.4 of them are computed again in their order.

Bytes (Zen 4, VNNI; by turns in one process). Predicted 0.64 of the time of integers of 16 bits, measured 0.68 (S1 62 to 91 ms,
S2 240 to 343). Their tile is at its arithmetic bound, 40 of the 62 ms; deciding in 16 bits what they pass takes 8 (440 pairs of
a token, 139 with the bound that it has in the end), at 130 cycles a pair of 2 KiB that come from the second level.
Cutting the lists after k / 2 new entries instead of 2 k + 16: 0.97 (S1), 0.99 (S2). Exactly as many tokens at once as are left
instead of 4 or 8: 0.97. Of no effect: tasks of 128 or 512 tokens (1.01 and 1.02; S2 1.03 and 0.99), a bound projected from the
share of the features seen (1.00, 0.99). Integers of 16 bits beside bfloat16, both by AVX-512: 0.96 (S1, S2).

An even walk over the features in place of a sample that was multiplied twice, with a bound projected from the share that was seen,
lists cut after k / 4 new entries: 330 pairs of a token pass (455 before); S1 0.96, S2 0.94, by integers of 16 bits on AVX2 0.94. Making a
shadow of bytes with less arithmetic, the next row fetched meanwhile: 0.73 of its time, 0.97 of a float32 encode. Tried on Zen 4 and
left: fetching the tokens' rows ahead while deciding (1.2 of its time), deciding by two products of bytes, the second for the half
that the first leaves (three ways to write it; 1.0 at S1 and S2, 1.3 with tasks of 512 tokens), sixteen chains at once in rescoring, which waits for
rows from the third-level cache (1.0).

Zen 5 (bytes at 524 GMAC/s a core, twice float32's 130 by four; by turns in one process). The tile's sums run at 93 % of that; of its
time a sixth went into what follows them, most of it wrong guesses whether one of sixteen tokens passes. Without a branch: 0.94 (S1 and S2).
Integers for a 64th of the features before bytes instead of a 32nd: 0.985. A pair is decided in 137 cycles, 32 lines from the second
level. Of no use: eight pairs at once of whichever features (1.00; with the next eight fetched ahead 1.05), tasks of 128 or 192 tokens (1.01), sixteen chains at
once in rescoring (0.99), the bound at 3.5 deviations over what is expected instead of twice that and eight (0.99), pointers that stores cannot
alias (1.00). On captured activations (step 400, 386 of a token's pairs pass by bytes) scaling each coordinate by a power of two leaves as many:
they have no coordinates far larger than others (0.4 to 1.4 by their spread). Blocks of twelve features, two tiles that meet a panel of
tokens one after the other: float32 at S2, whose tokens as bytes are as large as the second level, 0.95 to 0.97, elsewhere 1.0 (four tiles 0.95).

A shadow that an encode makes for itself costs 9 of 71 ms at S1, most of it reading the weights once more for every task: tasks of
512 tokens instead of 256 at S2, 0.92. To the float32 kernel (``made`` to 1): S1 0.44, S2 0.47, S0 0.73, (1024, 128, 16384, 32)
0.53, (1024, 256, 8192, 32) 0.65, (128, 1024, 16384, 32) 0.75, (1024, 1024, 16384, 256) 0.89; but (1024, 768, 2048, 32) 0.94,
(1024, 256, 4096, 64) 1.09, (1024, 64, 4096, 32) 1.14, (1024, 1024, 16384, 512) 1.27, so not there. Integers, AVX2 on the same
machine: S1 0.86, S2 0.93, S0 0.93, (1024, 256, 8192, 32) 0.97.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from benchmarks.conftest import Timer
from benchmarks.shapes import Shape, Weights
from mlxsae import ops


def group(shape: Shape) -> str:
    return f"topk_encode {tuple(shape)}"


@pytest.fixture(scope="module")
def arrays(start: Weights) -> tuple[mx.array, mx.array]:
    w, b = mx.array(start.w_enc), mx.array(start.b_enc)
    mx.eval(w, b)
    return w, b


def rate(timed: Timer, shape: Shape) -> None:
    timed.note(gflops=shape.gemm_flop / timed.median / 1e9)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def bench_ours(timed: Timer, shape: Shape, arrays: tuple[mx.array, mx.array], dtype: mx.Dtype) -> None:
    w, b = (a.astype(dtype) for a in arrays)
    mx.eval(w, b)
    timed(lambda x: ops.topk_encode(x.astype(dtype), w, b, k=shape.k), group=group(shape))
    rate(timed, shape)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.int16, mx.int8], ids=["bfloat16", "int16", "int8"])
def bench_certified(timed: Timer, shape: Shape, arrays: tuple[mx.array, mx.array], dtype: mx.Dtype) -> None:
    """By a shadow of each type, with the bits of float32; in its time where the processor has no product for one."""
    shadow = ops.encoder_shadow(arrays[0], dtype=dtype)
    mx.eval(shadow)
    timed(lambda x: ops.topk_encode(x, *arrays, k=shape.k, shadow=shadow), group=group(shape))
    rate(timed, shape)


def bench_ours_with_auxk(timed: Timer, shape: Shape, arrays: tuple[mx.array, mx.array]) -> None:
    """A second selection of d_in / 2 among a twentieth of the features."""
    dead = mx.arange(shape.d_sae) % 20 == 7
    timed(
        lambda x: ops.topk_encode_masked(x, *arrays, mask=dead, k=shape.k, k_aux=shape.d_in // 2),
        group=group(shape),
    )
    rate(timed, shape)


def bench_plain_mlx(timed: Timer, shape: Shape, arrays: tuple[mx.array, mx.array]) -> None:
    w, b = arrays

    def plain(x: mx.array) -> tuple[mx.array, mx.array]:
        z = mx.addmm(b, x, w.T)
        indices = mx.argpartition(z, kth=-shape.k, axis=-1)[:, -shape.k :]
        return mx.maximum(mx.take_along_axis(z, indices, axis=-1), 0), indices

    timed(plain, group=group(shape))


def bench_floor_mlx_matmul(timed: Timer, shape: Shape, arrays: tuple[mx.array, mx.array]) -> None:
    """The product alone on mlxsae's BLAS."""
    timed(lambda x: x @ arrays[0].T, group=group(shape))
    rate(timed, shape)


def bench_floor_numpy_matmul(timed: Timer, shape: Shape, start: Weights) -> None:
    """The product alone on NumPy's OpenBLAS, into memory that stays."""
    out = np.ones((shape.n, shape.d_sae), np.float32)
    timed(lambda x: np.matmul(x, start.w_enc.T, out=out), group=group(shape), as_mlx=False)
    rate(timed, shape)
