"""MLX on Linux runs on a real BLAS once mlxsae is imported. That is global state: each case is a process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux wheels of MLX carry a reference BLAS"
)

PRELUDE = """
import time, warnings
import numpy as np

def seconds(f, repeats=8):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times)

def check_product(n=300):
    rng = np.random.default_rng(n)
    a, b = rng.standard_normal((n, 129)), rng.standard_normal((129, n + 7))
    got = mx.matmul(mx.array(a, mx.float32), mx.array(b, mx.float32), stream=mx.cpu)
    assert np.abs(np.array(got) - a @ b).max() < 1e-4
"""
MLX_LAST = "import mlxsae\nimport mlx.core as mx\n"
MLX_FIRST = "import mlx.core as mx\nimport mlxsae\n"
# The first use of a routine goes through the linker's lazy stub, a later one through the address it found.
MLX_FIRST_AND_USED = """
import mlx.core as mx
mx.set_default_device(mx.cpu)
mx.eval(mx.ones((9, 9)) @ mx.ones((9, 9)))
import mlxsae
"""


def run(body: str, start: str = MLX_LAST, **environment: str | None) -> str:
    """Run `body` after the imports of `start`; a variable given as None is unset. Return what it prints."""
    wanted = {"MLXSAE_BLAS": None, "OPENBLAS_NUM_THREADS": None, "OMP_NUM_THREADS": None} | environment
    env = {key: value for key, value in os.environ.items() if key not in wanted}
    env |= {key: value for key, value in wanted.items() if value is not None}
    code = PRELUDE + start + textwrap.dedent(body)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@linux_only
@pytest.mark.parametrize("start", [MLX_LAST, MLX_FIRST, MLX_FIRST_AND_USED], ids=["last", "first", "used"])
def test_import_puts_a_real_blas_under_mlx_in_both_orders(start: str) -> None:
    run(
        """
        mx.set_default_device(mx.cpu)
        status = mlxsae.blas.status()
        assert status.active and "openblas" in status.library and "OpenBLAS" in status.config, status
        assert {"cblas_sgemm", "cblas_dgemm", "cblas_cgemm", "sgesdd_"} <= set(status.symbols)
        assert status.core and status.core in status.config
        assert status.threads >= 1 and status.threads == mlxsae.blas.get_num_threads()
        check_product()

        a = mx.random.normal((512, 512))
        mx.eval(a)
        product = lambda: mx.eval(a @ a)
        fast = seconds(product, 20)
        off = mlxsae.blas.disable()
        assert not off.active and off.symbols == () and "disable" in off.reason, off
        assert "openblas" not in off.library
        check_product()
        slow = seconds(product, 3)
        assert slow > 5 * fast, (slow, fast)

        assert mlxsae.blas.enable() == status == mlxsae.blas.enable()
        check_product()
        assert slow > 5 * seconds(product, 20)
        """,
        start,
    )


@linux_only
@pytest.mark.parametrize("threads", [1, 3])
def test_products_equal_float64(threads: int) -> None:
    """Every layout that MLX hands to BLAS, around each size where a product is cut or goes to gemv."""
    run(
        f"""
        mx.set_default_device(mx.cpu)
        mlxsae.blas.set_num_threads({threads})
        rng = np.random.default_rng(0)
        sizes = [1, 2, 3, 4, 31, 32, 33, 48, 400]
        shapes = [tuple(int(x) for x in rng.choice(sizes, 3)) for _ in range(60)]
        shapes += [(1, 3000, 1500), (2, 2000, 700), (3, 1000, 1100), (3000, 1, 900), (1, 1, 5000)]
        shapes += [(517, 1, 33), (500, 600, 300), (65, 2049, 129), (1025, 33, 257), (1000, 1000, 64)]
        for m, n, k in shapes:
            a, b, c, wide = (rng.standard_normal(s, np.float32) for s in ((m, k), (k, n), (m, n), (m, 2 * k)))
            for dtype, unit in ((mx.float32, 2.0**-24), (mx.float64, 2.0**-53)):
                A, B, C, W = (mx.array(x).astype(dtype) for x in (a, b, c, wide))
                At, Bt = (mx.array(x.T.copy()).astype(dtype).T for x in (a, b))
                mx.eval(A, B, C, W, At, Bt)
                cases = [(A @ B, a), (At @ B, a), (A @ Bt, a), (At @ Bt, a)]
                cases += [(W[:, ::2] @ B, wide[:, ::2]), (W[:, :k] @ Bt, wide[:, :k])]
                if dtype == mx.float32:
                    cases += [(mx.addmm(C, A, Bt, 0.5, -2.0), None), (mx.addmm(C, At, B, 0.5, -2.0), None)]
                for i, (product, left) in enumerate(cases):
                    # MLX hands out freed memory again: what beta = 0 must not read is full of NaN.
                    mx.eval(mx.full((m, n), float("nan"), dtype))
                    got = np.array(product).astype(np.float64)
                    exact = np.float64(a if left is None else left)
                    want, size = exact @ np.float64(b), np.abs(exact) @ np.abs(np.float64(b))
                    if left is None:
                        want, size = 0.5 * want - 2.0 * c, size + 2 * np.abs(c)
                    bound = 2 * (np.sqrt(k) + 4) * unit * size
                    assert (np.abs(got - want) <= bound).all(), (m, n, k, dtype, i)
        """
    )


@linux_only
def test_batched_empty_and_complex_products() -> None:
    run(
        """
        mx.set_default_device(mx.cpu)
        rng = np.random.default_rng(0)
        batches = [((6, 40, 64), (6, 64, 50)), ((2, 3, 1, 700), (700, 900)), ((8, 256, 16), (8, 16, 256))]
        batches += [((4, 1, 300, 200), (5, 200, 310)), ((0, 5), (5, 3)), ((4, 0), (0, 3))]
        for shape_a, shape_b in batches:
            a, b = rng.standard_normal(shape_a, np.float32), rng.standard_normal(shape_b, np.float32)
            swapped = mx.array(np.swapaxes(b, -1, -2).copy()).swapaxes(-1, -2)
            for right in (mx.array(b), swapped):
                got = np.array(mx.array(a) @ right)
                assert np.allclose(got, np.float64(a) @ np.float64(b), atol=2e-4), (shape_a, shape_b)
        for m, n, k in [(1, 1, 1), (1, 900, 300), (33, 47, 129), (400, 300, 500), (700, 1, 600)]:
            a, b = ((rng.standard_normal(s) + 1j * rng.standard_normal(s)) for s in ((m, k), (k, n)))
            got = np.array(mx.array(a.astype(np.complex64)) @ mx.array(b.astype(np.complex64)))
            assert got.dtype == np.complex64 and np.abs(got - a @ b).max() < 1e-3, (m, n, k)
        """
    )


@linux_only
def test_decompositions_agree_with_numpy() -> None:
    run(
        """
        mx.set_default_device(mx.cpu)
        assert {"sgeqrf_", "spotrf_", "ssyevd_", "sgetrf_"} <= set(mlxsae.blas.status().symbols)
        a = np.random.default_rng(0).standard_normal((90, 60), np.float32)
        singular = np.array(mx.linalg.svd(mx.array(a))[1])
        assert np.allclose(singular, np.linalg.svd(np.float64(a))[1], rtol=1e-4)
        q, r = mx.linalg.qr(mx.array(a))
        assert np.allclose(np.array(q @ r), a, atol=1e-4)
        assert np.allclose(np.array(q.T @ q), np.eye(60), atol=1e-4)
        spd = a.T @ a + np.eye(60, dtype=np.float32)
        assert np.allclose(np.array(mx.linalg.eigvalsh(mx.array(spd))), np.linalg.eigvalsh(spd), rtol=1e-4)
        factor = np.array(mx.linalg.cholesky(mx.array(spd)))
        assert np.allclose(factor @ factor.T, spd, atol=1e-3)
        assert np.allclose(np.array(mx.linalg.inv(mx.array(spd))) @ spd, np.eye(60), atol=1e-3)
        """
    )


@linux_only
def test_switched_off_by_the_environment() -> None:
    said = run(
        """
        status = mlxsae.blas.status()
        assert not status.active and status.symbols == () and "MLXSAE_BLAS=off" in status.reason, status
        check_product()
        wheel = mlxsae.blas.library_path()
        assert wheel.is_file()
        assert mlxsae.blas.enable(wheel).active  # an explicit request wins
        check_product()
        """,
        MLXSAE_BLAS="off",
    )
    assert "RuntimeWarning" not in said


@linux_only
def test_library_named_by_the_environment(tmp_path: Path) -> None:
    wheel = Path(run("print(mlxsae.blas.library_path())").strip())
    copy = str(shutil.copy(wheel, tmp_path / "my blas.so"))
    run(
        f"""
        status = mlxsae.blas.status()
        assert status.active and status.library == {copy!r} == str(mlxsae.blas.library_path()), status
        check_product()
        """,
        MLXSAE_BLAS=copy,
    )


@linux_only
@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("/nowhere/libopenblas.so", "cannot be loaded"),
        ("not a library", "cannot be loaded"),
        ("libm.so.6", "no cblas_sgemm"),
    ],
)
def test_a_library_that_does_not_serve_is_a_warning(tmp_path: Path, named: str, why: str) -> None:
    if named == "not a library":
        (tmp_path / named).write_text("text")
        named = str(tmp_path / named)
    said = run(
        """
        assert not mlxsae.blas.status().active and mlxsae.blas.status().symbols == ()
        check_product()
        """,
        MLXSAE_BLAS=named,
    )
    assert "RuntimeWarning" in said
    assert why in said
    assert named in said


@linux_only
def test_netlib_itself_is_refused() -> None:
    said = run(
        """
        netlib = mlxsae.blas.disable().library
        assert not mlxsae.blas.enable(netlib).active
        """
    )
    assert "RuntimeWarning" in said
    assert "is a reference BLAS itself" in said


@linux_only
def test_missing_package_is_a_warning_that_says_what_to_install() -> None:
    hidden = "import sys; sys.modules['scipy_openblas32'] = None\n" + MLX_LAST
    said = run(
        """
        status = mlxsae.blas.status()
        assert not status.active and status.symbols == () and "not installed" in status.reason, status
        assert mlxsae.blas.library_path() is None
        check_product()
        """,
        hidden,
    )
    assert "RuntimeWarning" in said
    assert "pip install scipy-openblas32" in said


@linux_only
def test_number_of_threads() -> None:
    run(
        """
        import os
        assert 1 <= mlxsae.blas.get_num_threads() <= len(os.sched_getaffinity(0))
        mlxsae.blas.set_num_threads(1)
        assert mlxsae.blas.get_num_threads() == 1
        check_product()
        """
    )
    run(
        """
        assert mlxsae.blas.get_num_threads() == mlxsae.blas.status().threads == 1
        check_product()
        def message(kind, f, *args):
            try:
                f(*args)
            except kind as error:
                return str(error)
            raise AssertionError("nothing was raised")
        assert "n must be at least 1 but got 0" in message(ValueError, mlxsae.blas.set_num_threads, 0)
        mlxsae.blas.disable()
        assert mlxsae.blas.get_num_threads() is None
        assert "must run on OpenBLAS" in message(RuntimeError, mlxsae.blas.set_num_threads, 2)
        """,
        OPENBLAS_NUM_THREADS="1",
    )


@linux_only
def test_one_shape_gives_the_same_bits_every_time() -> None:
    run(
        """
        a, b = mx.random.normal((700, 600)), mx.random.normal((600, 900))
        first = np.array(mx.matmul(a, b, stream=mx.cpu))
        for _ in range(10):
            assert np.array_equal(np.array(mx.matmul(a, b, stream=mx.cpu)), first)
        """
    )


@linux_only
def test_switching_while_other_threads_multiply() -> None:
    run(
        """
        import threading
        rng = np.random.default_rng(0)
        a, b = rng.standard_normal((150, 170), np.float32), rng.standard_normal((170, 190), np.float32)
        want, errors, stop = np.float64(a) @ b, [], threading.Event()
        def work():
            stream = mx.new_stream(mx.cpu)
            while not stop.is_set():
                got = np.array(mx.matmul(mx.array(a), mx.array(b), stream=stream))
                errors.append(np.abs(got - want).max())
        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        for i in range(40):
            assert not mlxsae.blas.disable().active
            assert mlxsae.blas.enable().active
            mlxsae.blas.set_num_threads(1 + i % 3)
            time.sleep(0.01)
        stop.set()
        for worker in workers:
            worker.join()
        assert len(errors) > 30 and max(errors) < 1e-3, (len(errors), max(errors))
        """
    )


@linux_only
def test_a_real_blas_that_is_there_already_is_left_alone(tmp_path: Path) -> None:
    if (compiler := shutil.which("cc") or shutil.which("g++")) is None:
        pytest.skip("no compiler to make a library for LD_PRELOAD")
    source, other = tmp_path / "other.c", str(tmp_path / "libother.so")
    source.write_text('extern "C" { void cblas_sgemm() {} void cblas_dgemm() {} void cblas_cgemm() {} }')
    subprocess.run([compiler, "-x", "c++", "-shared", "-fPIC", "-o", other, source], check=True)
    said = run(
        f"""
        status = mlxsae.blas.status()
        assert status.active and status.library == {other!r} and status.symbols == (), status
        assert "left alone" in status.reason and status.threads is None
        assert mlxsae.blas.enable(mlxsae.blas.library_path()).symbols  # unless one is asked for by name
        check_product()
        assert mlxsae.blas.disable().library == {other!r}
        """,
        LD_PRELOAD=other,
    )
    assert "RuntimeWarning" not in said


@linux_only
def test_a_sealed_page_is_opened_for_the_store_only() -> None:
    """Today's wheels leave these pointers writable; other builds let the linker seal them (-z now)."""
    run(
        """
        import ctypes, mmap
        page = mmap.mmap(-1, mmap.PAGESIZE)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        def rights():
            for line in open("/proc/self/maps"):
                span, rights = line.split()[:2]
                first, last = (int(x, 16) for x in span.split("-"))
                if first <= address < last:
                    return rights[:3]
        mlxsae.blas._protect(address, mmap.PROT_READ)
        assert rights() == "r--"
        mlxsae.blas._store(address + 16, 0x1234567890)
        assert rights() == "r--" and page[16:24] == (0x1234567890).to_bytes(8, "little")
        mlxsae.blas._protect(address, mmap.PROT_READ | mmap.PROT_WRITE)
        mlxsae.blas._store(address, 7)
        assert rights() == "rw-" and page[:8] == (7).to_bytes(8, "little")
        """
    )


@linux_only
def test_tiled_gemm_follows_cblas() -> None:
    """Both orders, each transposition, rows longer than the matrix is wide, alpha, beta, C full of NaN."""
    run(
        """
        import ctypes, itertools, os
        tiles = ctypes.CDLL("libmlxsae.so", mode=os.RTLD_NOLOAD)
        rng = np.random.default_rng(0)
        row, column, plain, transposed = 101, 102, 111, 112
        mlxsae.blas.set_num_threads(4)
        kinds = (("sgemm", np.float32, ctypes.c_float, 1e-3), ("dgemm", np.float64, ctypes.c_double, 1e-11))

        def stored(x, order, trans, extra):  # as CBLAS wants it: in rows (or columns) longer by `extra`
            x = x if trans == plain else x.T
            x = x if order == row else x.T
            memory = np.full((x.shape[0], x.shape[1] + extra), np.nan, x.dtype)
            memory[:, : x.shape[1]] = x
            return memory, ctypes.c_void_p(memory.ctypes.data), memory.shape[1]

        shapes = [(1, 1, 1), (1, 700, 800), (800, 1, 700), (2, 800, 700), (3, 5, 4), (170, 180, 190)]
        for case in itertools.product(
            shapes, (row, column), (plain, transposed), (plain, transposed), (0, 3), (0.0, 1.5), kinds
        ):
            (m, n, k), order, ta, tb, extra, beta, (name, dtype, real, tolerance) = case
            a, b, c = (rng.standard_normal(s).astype(dtype) for s in ((m, k), (k, n), (m, n)))
            if beta == 0.0:
                c[:] = np.nan
            (A, pa, lda), (B, pb, ldb) = stored(a, order, ta, extra), stored(b, order, tb, extra)
            C, pc, ldc = stored(c, order, plain, extra)
            gemm = getattr(tiles, "mlxsae_cblas_" + name)
            gemm(order, ta, tb, m, n, k, real(0.5), pa, lda, pb, ldb, real(beta), pc, ldc)
            inside = C[:, : C.shape[1] - extra]
            want = 0.5 * (a.astype(np.float64) @ b) + (beta * c if beta else 0.0)
            assert np.allclose(inside if order == row else inside.T, want, atol=tolerance), case
            assert extra == 0 or np.isnan(C[:, -extra:]).all(), ("wrote beside the matrix", case)
        """
    )


@pytest.fixture
def switched_back() -> Iterator[None]:
    """Other tests of this process multiply on OpenBLAS again: without it models are ten times as slow."""
    from mlxsae import blas

    before = blas.status()
    yield
    assert (blas.enable() if before.active else blas.disable()).active == before.active


@pytest.mark.usefixtures("switched_back")
@pytest.mark.parametrize(("system", "active"), [("darwin", True), ("freebsd14", False)])
def test_nothing_is_done_on_other_systems(monkeypatch: pytest.MonkeyPatch, system: str, active: bool) -> None:
    from mlxsae import blas

    monkeypatch.setattr(sys, "platform", system)
    status = blas.enable()
    assert status == blas.disable() == blas.status()
    assert status.active == active
    assert status.symbols == ()
    assert blas.get_num_threads() is None
    assert ("Accelerate" in status.reason) == active
    with pytest.raises(RuntimeError, match="must run on OpenBLAS"):
        blas.set_num_threads(2)


@linux_only
def test_a_forked_child_multiplies_too() -> None:
    """The threads of the parent do not survive fork: the child must not wait for them."""
    run(
        """
        import ctypes, os, signal
        check_product()
        tiles = ctypes.CDLL("libmlxsae.so", mode=os.RTLD_NOLOAD)
        mlxsae.blas.set_num_threads(2)
        a, b, c = (np.random.default_rng(i).standard_normal((400, 400)) for i in range(3))
        def product():  # MLX's own streams do not survive a fork: call what MLX would call
            A, B, C = (ctypes.c_void_p(x.ctypes.data) for x in (a, b, c))
            one, zero = ctypes.c_double(1), ctypes.c_double(0)
            tiles.mlxsae_cblas_dgemm(101, 111, 111, 400, 400, 400, one, A, 400, B, 400, zero, C, 400)
            return np.allclose(c, a @ b)
        assert product()
        if (child := os.fork()) == 0:
            signal.alarm(60)
            os._exit(0 if product() and mlxsae.blas.status().active else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert product()
        """
    )
