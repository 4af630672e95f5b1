"""The tool itself: signatures, bindings and their errors, the cache, the front end's refusals, the other processor."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import msl
import numpy as np
import pytest
from msl import toolchain

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
TEXT = (
    HEAD
    + """
struct Options { uint n; float scale; };
template <typename T>
[[kernel]] void scale(const device T* x [[buffer(0)]], device T* y [[buffer(2)]], constant Options& options [[buffer(1)]],
    threadgroup float4* scratch [[threadgroup(0)]], uint i [[thread_position_in_grid]]) {
  if (i < options.n) y[i] = T(float(x[i]) * options.scale);
}
template [[host_name("scale_float")]] [[kernel]] decltype(scale<float>) scale<float>;
template [[host_name("scale_" "bfloat")]] [[kernel]] decltype(scale<bfloat>) scale<bfloat>;
[[kernel, max_total_threads_per_threadgroup(64)]]
void plain(device int4* o, constant ulong& big, constant bool& flag) { o[0] = int4(int(big), flag, 0, 0); }
"""
)


@pytest.fixture(scope="module")
def lib(compiler):
    return msl.load(TEXT, compiler=compiler)


def test_signatures_tell_what_the_compiler_sees(lib):
    assert sorted(lib.kernels) == ["plain", "scale_bfloat", "scale_float"]
    k = lib.kernels["scale_bfloat"]
    assert {i: (a.name, a.space, a.constant, a.element, a.bytes) for i, a in k.buffers.items()} == {
        0: ("x", "device", True, "bfloat16", 2),
        2: ("y", "device", False, "bfloat16", 2),
        1: ("options", "constant", True, "struct", 8),
    }
    assert {i: (a.name, a.element, a.bytes) for i, a in k.threadgroup.items()} == {
        0: ("scratch", "float32", 16)
    }
    assert k.builtins == {"i": "thread_position_in_grid"}
    assert lib.kernels["scale_float"].buffers[0].element == "float32"
    assert [(a.index, a.element, a.bytes) for a in lib.kernels["plain"].arguments] == [
        (0, "int32", 16),
        (1, "uint64", 8),
        (2, "bool", 1),
    ]


def test_bindings(lib):
    x, y = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    options = np.array([(8, 0.5)], [("n", "u4"), ("scale", "f4")])
    common = {"grid": (8,), "threadgroup": (8,), "threadgroup_memory": {"scratch": 16}}
    lib.launch("scale_float", {0: x, 2: y, "options": options}, **common)
    assert np.array_equal(y, x / 2)
    b = msl.bfloat16.pack(x)
    lib.launch("scale_bfloat", {0: b, 2: b, "options": options}, **common)
    assert np.array_equal(msl.bfloat16.unpack(b), x / 2)
    o = np.zeros(4, np.int32)
    lib.launch("plain", {"o": o, "big": 2**31 - 1, "flag": True}, grid=(1,), threadgroup=(1,))
    assert o.tolist() == [2**31 - 1, 1, 0, 0]

    frozen = np.zeros(8, np.float32)
    frozen.flags.writeable = False
    good = {0: x, 2: y, 1: options}
    refused = {
        r"kernel must be one of \['plain', ": ("nothing", good, {}),
        r"buffer 1 \(constant Options&options\) is not given": ("scale_float", {0: x, 2: y}, {}),
        r"has no buffer 'z'; it has 0: x, 1: options, 2: y": ("scale_float", good | {"z": x}, {}),
        r"buffer 0 is given twice": ("scale_float", good | {"x": x}, {}),
        r"buffer 0 .* must be of type float32 but got float64": (
            "scale_float",
            good | {0: x.astype(np.float64)},
            {},
        ),
        r"must be of type bfloat16 \(as uint16, see msl.bfloat16\) but got float32": (
            "scale_bfloat",
            good,
            {},
        ),
        r"buffer 2 .* must be writable": ("scale_float", good | {2: frozen}, {}),
        r"buffer 2 .* must be C-contiguous": ("scale_float", good | {2: np.zeros(16, np.float32)[::2]}, {}),
        r"must hold 8 bytes but got 4": ("scale_float", good | {1: bytes(4)}, {}),
        r"needs an array, a NumPy scalar or bytes but got list": ("scale_float", good | {0: [1.0]}, {}),
        r"multiple of 16 bytes but got 20": ("scale_float", good, {"threadgroup_memory": {0: 20}}),
        r"exactly one of grid and groups": ("scale_float", good, {"groups": (1,)}),
        r"at most 1024 threads but got \(32, 33, 1\)": ("scale_float", good, {"threadgroup": (32, 33)}),
        r"grid must be one to three positive numbers but got \(0,\)": ("scale_float", good, {"grid": (0,)}),
    }
    for message, (name, buffers, options) in refused.items():
        with pytest.raises(msl.LaunchError, match=message):
            lib.launch(name, buffers, **(common | options))
    with pytest.raises(
        msl.LaunchError, match=r"plain: a threadgroup has at most 64 threads but got \(65, 1, 1\)"
    ):
        lib.launch("plain", {"o": o, "big": 1, "flag": True}, grid=(65,), threadgroup=(65,))
    with pytest.raises(msl.LaunchError, match="cannot hold -1"):
        lib.launch("plain", {"o": o, "big": -1, "flag": True}, grid=(1,), threadgroup=(1,))


def test_a_kernel_error_leaves_the_arrays_as_the_kernel_left_them(any_compiler):
    text = HEAD + "kernel void k(device int* o, uint i [[thread_position_in_grid]]) { o[2 * i] = 1; }"
    lib, o = msl.load(text, mode="checked"), np.zeros(4, np.int32)
    with pytest.raises(msl.OutOfBounds) as caught:
        lib.launch("k", {"o": o}, grid=(4,), threadgroup=(4,))
    assert o.tolist() == [1, 0, 1, 0]
    assert (caught.value.file, caught.value.line) == ("inline.metal", 3)
    lib.launch("k", {"o": np.zeros(7, np.int32)}, grid=(4,), threadgroup=(4,))  # the library is still good


def test_files_headers_defines_and_a_choice_of_kernels(any_compiler, tmp_path):
    (tmp_path / "inc").mkdir()
    (tmp_path / "inc/part.h").write_text("#pragma once\ninline float twice(float x) { return x * FACTOR; }\n")
    (tmp_path / "k.metal").write_text('#include <metal_stdlib>\n#include "part.h"\n' + "\n".join(
        f"kernel void {n}(device float* o) {{ o[0] = twice(o[0]); }}" for n in ("one", "two")
    ))  # fmt: skip
    lib = msl.load(
        tmp_path / "k.metal", include=[tmp_path / "inc"], defines={"FACTOR": "3.0"}, kernels=["two"]
    )
    assert list(lib.kernels) == ["two"]
    o = np.ones(1, np.float32)
    lib.launch("two", {"o": o}, grid=(1,), threadgroup=(1,))
    assert o[0] == 3
    again = msl.load(
        tmp_path / "k.metal", include=[tmp_path / "inc"], defines={"FACTOR": "3.0"}, kernels=["two"]
    )
    assert again is lib
    with pytest.raises(msl.LaunchError, match=r"kernels must be of \['one', 'two'\] but got \['three'\]"):
        msl.load(tmp_path / "k.metal", include=[tmp_path / "inc"], defines={"FACTOR": 3}, kernels=["three"])
    with pytest.raises(msl.CompileError, match=r"part\.h:2:\d+: error"):
        msl.load(tmp_path / "k.metal", include=[tmp_path / "inc"])
    with pytest.raises(ValueError, match="mode must be one of"):
        msl.load(tmp_path / "k.metal", mode="quick")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "kernel void k(device int* o, texture2d<float> t [[texture(0)]]) {}",
            r"inline\.metal:3: .*\[\[texture\]\] is not one",
        ),
        ("kernel void k(uint n) {}", "parameter 'uint n' of kernel k needs an attribute"),
        ("kernel void k(device int* o [[buffer(31)]]) {}", "Metal has buffers 0 to 30"),
        (
            "kernel void k(device int* o) { threadgroup float s = 1.0; }",
            "a threadgroup variable takes no initialiser",
        ),
        ("kernel int k(device int* o) { return 1; }", "'kernel' must stand before `void name"),
        ("kernel void k(device int* o) { o[0] = (1; }", r"inline\.metal:3: unbalanced"),
        (
            "constant int c [[function_constant(0)]]; constant int c [[function_constant(1)]];",
            "'c' is declared twice",
        ),
    ],
)
def test_the_front_end_refuses_with_a_place(any_compiler, text, message):
    with pytest.raises(msl.FrontEndError, match=message):
        msl.load(HEAD + text)


def test_missing_tools_are_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(msl.ToolMissing, match=r"needs clang\+\+ of version 18 or newer"):
        toolchain.clang.__wrapped__(18)
    monkeypatch.delenv("MSL_CXX", raising=False)
    toolchain.clang.cache_clear()
    with pytest.raises(msl.ToolMissing):
        toolchain.default_compiler.__wrapped__()


def test_the_readme_tells_the_truth(any_compiler, tmp_path, monkeypatch):
    readme = (Path(msl.__file__).parent / "README.md").read_text()
    kernel = re.search(r"```metal\n(.*?)```", readme, re.S)[1]
    example = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    monkeypatch.chdir(tmp_path)
    Path("rowsum.metal").write_text(kernel)
    exec(example, {})
    assert msl.lint("rowsum.metal") == []
    broken = kernel.replace("  threadgroup_barrier(mem_flags::mem_threadgroup);", "")
    Path("rowsum.metal").write_text(broken)
    with pytest.raises(msl.Uninitialised) as caught:
        exec(example, {})
    assert str(caught.value) in readme.replace("of\nthreadgroup", "of threadgroup")
    with pytest.raises(msl.DataRace) as caught:
        exec(example.replace("threadgroup=(128,)", "threadgroup=(128,), schedule=1"), {})
    assert [line for _, line in caught.value.places] == [13, 11]


ARM = "aarch64-linux-gnu-g++"
DRIVER = r"""
#include <dlfcn.h>
#include <stdio.h>
#include "launch.h"
extern "C" const msl::Kernel msl_kernels[];
extern "C" char* msl_make_stacks();
extern "C" int msl_run(void (*)(), const msl::Launch*, msl::Outcome*);
int main() {
  static float out[96];
  static msl::Launch launch;
  static msl::Outcome outcome;
  launch.buffers[0] = {out, sizeof out, 4, 1, 0, 0};
  launch.grid = {96, 1, 1};
  launch.group = {64, 1, 1};
  launch.schedule = 1;
  launch.seconds = 60;
  launch.stacks = msl_make_stacks();
  int failed = msl_run(msl_kernels[0].run, &launch, &outcome);
  for (int i = 0; i < 96; ++i) failed += out[i] != (i < 64 ? 63 - i : 32 + 95 - i - 32) + 2016.0f - (i < 64 ? 0 : 1520);
  printf("%d %s %s\n", failed, outcome.kind, outcome.message);
  return failed != 0;
}
"""


@pytest.mark.skipif(not shutil.which(ARM), reason=f"{ARM} is not installed")
@pytest.mark.parametrize("mode", ["fast", "checked"])
def test_the_machine_runs_on_aarch64(tmp_path, mode):
    """The context switch and the checker on the other processor, compiled for it and run under emulation."""
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    text = (
        HEAD
        + """
kernel void k(device float* o, uint i [[thread_position_in_grid]], uint t [[thread_index_in_threadgroup]], uint n [[threads_per_threadgroup]]) {
  threadgroup float s[64], part[2];
  s[t] = t; float a = simd_sum(float(t)); if (t % 32 == 0) part[t / 32] = a;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[i] = s[n - 1 - t] + part[0] + (n > 32 ? part[1] : 0.0);
}"""
    )
    program = toolchain_program(text)
    flags = ["-std=c++17", "-O1", "-w", "-fno-exceptions", f"-I{toolchain.RUNTIME}"]
    observed = ["-DMSL_OBSERVED"] if mode == "checked" else []
    sources = ["machine.cpp", "tsan.cpp", "check.cpp"] if observed else ["machine.cpp"]
    (tmp_path / "kernel.cpp").write_text(program)
    (tmp_path / "main.cpp").write_text(DRIVER)
    sanitize = ["-fsanitize=thread"] if observed else []
    subprocess.run([ARM, *flags, *sanitize, "-c", "kernel.cpp", "-o", "kernel.o"], cwd=tmp_path, check=True)
    runtime = [str(toolchain.RUNTIME / s) for s in sources]
    subprocess.run(
        [ARM, *flags, *observed, "-static", "main.cpp", "kernel.o", *runtime, "-o", "run"],
        cwd=tmp_path,
        check=True,
    )
    if not emulator:
        pytest.skip("compiled; qemu-aarch64 to run it is not installed")
    ran = subprocess.run([emulator, "./run"], cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.split()) == (0, ["0"])


def toolchain_program(text: str) -> str:
    from msl.frontend import rewrite
    from msl.library import expand, launch_table

    program = rewrite(expand(text))
    return '#include "metal.h"\n' + program.text + launch_table(program)
