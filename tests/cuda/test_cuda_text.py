"""The CUDA text of the kernels runs on the CPU, launch for launch what a GPU gets, and passes the tests of the Metal text.

The translation (cmake/msl_to_cuda.py) and the library under it (csrc/cuda/msl.cuh) are what is tested: the plans, the data and the
oracle are those of tests/metal, with the CUDA text in the place of the Metal text.
"""

from __future__ import annotations

import shutil

import cuda_text
import pytest
import run_plan
import test_encode_kernels as encode
import test_sparse_kernels as sparse

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ on the path")


@pytest.fixture(autouse=True)
def cuda_in_the_place_of_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_plan, "library", lambda name, mode: cuda_text.on_cpu(name))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("types", [("float", "bfloat"), ("half", "float"), ("bfloat", "half")])
@pytest.mark.parametrize(("n", "d", "d_sae", "k"), [(9, 33, 48, 48), (8, 48, 1000, 32)])
def test_sparse_products(
    n: int, d: int, d_sae: int, k: int, types: tuple[str, str], compressed: bool
) -> None:
    sparse.test_products_equal_the_oracle(n, d, d_sae, k, *types, compressed)


def test_residual_shadow_and_bookkeeping() -> None:
    for shape, compressed in (((5, 32, 40, 3), False), ((9, 100, 33, 7), True)):
        sparse.test_decode_residual(shape, compressed)
    for type in sparse.TYPES:
        sparse.test_tokens_since_fired(type, True)
    for d in (31, 64):
        sparse.test_encoder_shadow(d)


@pytest.mark.parametrize("shape", sparse.UPDATE_SHAPES)
@pytest.mark.parametrize(
    ("terms", "project", "clip", "compressed"), [(1, True, 0.0, False), (2, False, 0.5, True)]
)
def test_feature_update(shape: tuple, terms: int, project: bool, clip: float, compressed: bool) -> None:
    sparse.test_feature_update_equals_the_oracle(shape, terms, project, clip, compressed, True)


def test_feature_update_of_rows_beyond_the_registers() -> None:
    sparse.test_feature_update_of_rows_beyond_the_registers(2102, 2102, 0.0)


@pytest.mark.parametrize("shape", [(33, 31, 48, 70, 5), (6, 520, 1000, 40, 3)])
def test_moments_in_bfloat16(shape: tuple) -> None:
    sparse.test_moments_in_bfloat16_are_those_of_float32_stochastically_rounded(shape)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_adam_variants(bfloat16: bool) -> None:
    for shape in ((6, 31, 48, 70, 5), (2, 30, 2051, 7, 2)):
        sparse.test_rows_of_features_without_entries_stay(shape, True, False, bfloat16)
    for d in (32, 300):
        sparse.test_rows_that_are_behind_catch_up(d, True, False, bfloat16)


def test_the_sort() -> None:
    sparse.test_entries_are_sorted_by_feature_and_row(2100, 300, False)
    sparse.test_hot_and_empty_features()


@pytest.mark.parametrize("type", sparse.TYPES)
@pytest.mark.parametrize("n", [3, 10])
def test_encoders_have_the_bits_of_the_cpu(type: str, n: int) -> None:
    encode.test_every_encoder_gives_the_float32_result(type, 48, n)


@pytest.mark.parametrize("n", [2, 9])
def test_wide_rows_in_small_chunks(n: int) -> None:
    encode.test_wide_rows_in_small_chunks(n)


def test_parts_and_ties() -> None:
    encode.test_rows_in_parts()
    encode.test_ties_go_to_the_lowest_row_then_feature_across_chunks()


def test_screening() -> None:
    encode.test_the_shadow_screens_in_bfloat16()
    encode.test_a_named_tf32_product_decides_as_it_is()
    encode.test_a_product_that_rounds_its_operands_gives_the_same_bits()


@pytest.mark.parametrize("name", encode.hostile(2, 10))
def test_hostile_operands(name: str) -> None:
    encode.test_hostile_operands(name, 9)
