"""The package as others meet it: from C++, from a wheel in another environment, and beside an MLX that does not fit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import mlx.core as mx
import pytest

import mlxsae

ROOT = Path(__file__).resolve().parents[1]


def run(*command, **options):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


def test_another_app_embeds_the_kernels(tmp_path):
    """find_package(mlxsae) from the installed package, configured, built and run."""
    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
    if not cmake or not shutil.which("c++"):
        pytest.skip("needs cmake and a C++ compiler")
    if tuple(map(int, re.search(r"(\d+)\.(\d+)", run(cmake, "--version")).groups())) < (3, 27):
        pytest.skip("needs cmake 3.27")
    run(
        cmake,
        "-S",
        ROOT / "tests" / "cpp",
        "-B",
        tmp_path,
        f"-Dmlxsae_DIR={mlxsae.cmake_dir()}",
        f"-DPython_EXECUTABLE={sys.executable}",
    )
    run(cmake, "--build", tmp_path)
    assert re.fullmatch(
        rf"mlxsae {re.escape(mlxsae.__version__)} error \S+ gradient \S+ kernel \(\w+\)\n",
        run(tmp_path / "consumer"),
    )
    if not mx.metal.is_available() and not mx.cuda.is_available():
        # What happens where a GPU refuses a kernel: eval_gpu gives the definition's result, and kernel_for says why.
        lines = run(tmp_path / "refused").splitlines()
        assert len(lines) == 9
        assert all(" same fallback (" in line for line in lines)


def test_import_stays_light():
    """`import mlxsae` loads neither mlx-lm nor anything that only an extra needs."""
    out = python(
        "import mlxsae, sys; print(sorted({'mlx_lm', 'transformers', 'datasets', 'torch', 'numba'} & set(sys.modules)))"
    )
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_stub_is_what_the_module_is(tmp_path):
    """python/mlxsae/_ext.pyi is generated: python -m nanobind.stubgen -m mlxsae._ext -O python/mlxsae"""
    pytest.importorskip("nanobind", reason="nanobind generates the stub")
    run(sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "mlxsae._ext", "-O", tmp_path)
    assert (tmp_path / "_ext.pyi").read_text() == (ROOT / "python" / "mlxsae" / "_ext.pyi").read_text()


@pytest.mark.parametrize(
    ("prelude", "message"),
    [
        (
            "import mlx.core as mx; mx.__version__ = '0.32.3'",
            "built against mlx 0.32.4, but mlx 0.32.3 is installed",
        ),
        ("import sys; sys.modules['mlx.core'] = None", "needs mlx 0.32.4, which does not import"),
        (
            "import sys; sys.modules['mlxsae._ext'] = None",
            "compiled module does not load with the installed mlx",
        ),
        (
            "import sys, types; m = types.ModuleType('mlxsae._ext'); m.built_mlx_version = '0.32.2'; "
            "sys.modules['mlxsae._ext'] = m",
            "built against mlx 0.32.2, but mlx 0.32.4",
        ),
        (
            "import sys, types; m = types.ModuleType('mlxsae._ext'); m.built_mlx_version = '0.32.4'\n"
            "def probe(a): raise TypeError('incompatible function arguments')\n"
            "m.probe = probe; sys.modules['mlxsae._ext'] = m",
            "does not recognise mlx.core.array",
        ),
        (
            "import sys, importlib.metadata as m; sys.modules['mlx.core'] = None; sys.platform = 'linux'; "
            "m.distributions = lambda: []",
            'pip install "mlxsae[cpu]"',
        ),
    ],
)
def test_what_does_not_fit_is_said_at_import(prelude, message):
    out = python(
        prelude
        + "\ntry:\n    import mlxsae\nexcept ImportError as e:\n    print(e)\nelse:\n    print('imported')"
    )
    assert message in out.stdout, out.stdout + out.stderr
    assert "nstall" in out.stdout, "it says what to do"


def test_configuring_with_another_nanobind_stops_with_a_sentence(tmp_path):
    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts"))
    if not cmake:
        pytest.skip("needs the environment's cmake")
    import mlx
    import nanobind

    fake = tmp_path / "nanobind"
    (fake / "src").mkdir(parents=True)
    for name in ("include", "cmake"):
        (fake / name).symlink_to(Path(nanobind.__file__).parent / name)
    (fake / "src" / "nb_internals.h").write_text("#  define NB_INTERNALS_VERSION 9999\n")
    script = tmp_path / "check.cmake"
    script.write_text(
        f'set(NB_DIR "{fake}")\nset(MLX_WHEEL_DIR "{next(iter(mlx.__path__))}")\nset(MLX_VERSION 0.32.4)\n'
        f'include("{ROOT}/cmake/CheckNanobindKey.cmake")\n'
    )
    out = subprocess.run([cmake, "-P", script], capture_output=True, text=True)
    assert out.returncode != 0
    assert 'pip install "nanobind==3.1.0"' in " ".join(out.stderr.split())
    script.write_text(script.read_text().replace(str(fake), str(Path(nanobind.__file__).parent)))
    assert "the same as MLX's" in run(cmake, "-P", script)
    script.write_text(f'set(MLX_WHEEL_DIR "{tmp_path}")\ninclude("{ROOT}/cmake/CheckNanobindKey.cmake")\n')
    out = subprocess.run([cmake, "-P", script], capture_output=True, text=True)
    assert out.returncode != 0
    assert 'Install it: pip install "mlx[cpu]==0.32.4"' in " ".join(out.stderr.split())


@pytest.mark.slow
def test_wheel_works_in_another_environment(tmp_path):
    """Built in isolation, installed into a fresh environment, imported from elsewhere: the rpaths hold."""
    quickly = {"CXXFLAGS": "-O0 -g0"}  # what is compiled matters here, not how well
    run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT),
        *("--config-settings", "cmake.build-type=Debug"),
        *("--config-settings", f"build-dir={tmp_path / 'build'}"),
        env=os.environ | quickly,
    )
    (wheel,) = tmp_path.glob("mlxsae-*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "env")
    py = tmp_path / "env" / "bin" / "python"
    run(py, "-m", "pip", "install", "-q", f"{wheel}[cpu]")
    code = (
        "import mlxsae, mlx.core as mx; c = mlxsae.ops.topk_encode(mx.ones((2, 4)), mx.ones((8, 4)), k=2); "
        "print(c.indices.tolist(), mlxsae.cmake_dir().is_dir())"
    )
    assert run(py, "-c", code, cwd=tmp_path) == "[[0, 1], [0, 1]] True\n"
