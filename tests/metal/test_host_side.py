"""The Metal side of the library in C++, which Linux does not build, compiles against the headers of MLX's macOS wheel."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from msl import toolchain

ROOT = Path(__file__).resolve().parents[2]

# What metal-cpp needs of the macOS SDK, declared only.
SDK = {
    "TargetConditionals.h": """
        #define TARGET_OS_OSX 1
        #define TARGET_OS_MAC 1
        #define TARGET_OS_IPHONE 0
        #define TARGET_OS_VISION 0""",
    "objc/runtime.h": """
        #define __MAC_26_0 260000
        extern "C" {
        typedef struct objc_class* Class;
        typedef struct objc_object { Class isa; }* id;
        typedef struct objc_object Protocol;
        typedef struct objc_selector* SEL;
        typedef signed char BOOL;
        struct objc_method_description { SEL name; char* types; };
        SEL sel_registerName(const char*);
        void* objc_lookUpClass(const char*);
        void* objc_getProtocol(const char*);
        id objc_msgSend(id, SEL, ...);
        void objc_msgSend_stret(id, SEL, ...);
        double objc_msgSend_fpret(id, SEL, ...);
        }""",
    "objc/message.h": "#include <objc/runtime.h>",
    "mach/mach.h": "typedef int kern_return_t; typedef unsigned task_id_token_t, mach_port_t;",
    "dispatch/dispatch.h": """
        typedef struct dispatch_queue_s* dispatch_queue_t;
        typedef struct dispatch_data_s* dispatch_data_t;
        typedef struct dispatch_source_s* dispatch_source_t;""",
    "CoreFoundation/CoreFoundation.h": "#include <cstdint>\ntypedef double CFTimeInterval; typedef const void* CFTypeRef;",
    "CoreGraphics/CGColorSpace.h": "typedef struct CGColorSpace* CGColorSpaceRef;",
    "CoreGraphics/CGGeometry.h": "struct CGSize { double width, height; }; struct CGPoint { double x, y; }; struct CGRect { double x, y, w, h; };",
    "IOSurface/IOSurfaceRef.h": "typedef struct __IOSurface* IOSurfaceRef;",
    "simd/simd.h": "",
    # On Linux metal-cpp needs math.h first, and clang 19's float.h takes INFINITY away again.
    "float.h": "#include_next <float.h>\n#include <math.h>\n#undef INFINITY\n#define INFINITY __builtin_inff()",
}  # fmt: skip


@pytest.fixture(scope="session")
def macos_headers() -> Path:
    """The headers of the mlx-metal wheel of our MLX's version, kept in the harness's cache."""
    release = version("mlx")
    folder = toolchain.cache_dir() / f"mlx-metal-{release}"
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "--dest",
            str(partial),
        ]
        command += ["--only-binary=:all:", "--platform", "macosx_14_0_arm64", f"mlx-metal=={release}"]
        got = subprocess.run(command, capture_output=True, text=True)
        if got.returncode:
            pytest.skip(
                f"pip cannot get the macOS wheel of MLX {release}: {got.stderr.strip().splitlines()[-1]}"
            )
        (wheel,) = partial.glob("*.whl")
        with zipfile.ZipFile(wheel) as z:
            z.extractall(partial, [n for n in z.namelist() if n.startswith("mlx/include/")])
        wheel.unlink()
        partial.rename(folder)
    return folder / "mlx/include"


def _compile(source: Path, headers: Path, sdk: Path, strict_compiler: str) -> str:
    for name, text in SDK.items():
        (sdk / name).parent.mkdir(parents=True, exist_ok=True)
        (sdk / name).write_text(f"#pragma once\n{text}\n")
    command = [strict_compiler, "-std=c++20", "-fsyntax-only", "-fblocks", "-include", "float.h"]
    for folder in (sdk, headers / "metal_cpp", headers):
        command += ["-isystem", str(folder)]
    command += ["-D_METAL_", "-DACCELERATE_NEW_LAPACK", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    command += [f"-I{ROOT}/csrc", f"-I{ROOT}/csrc/include", str(source)]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.parametrize("source", sorted((ROOT / "csrc/metal").glob("*.cpp")), ids=lambda p: p.name)
def test_compiles_for_macos(source, macos_headers, strict_compiler, tmp_path):
    assert _compile(source, macos_headers, tmp_path, strict_compiler) == ""


def test_a_mistake_would_be_seen(macos_headers, strict_compiler, tmp_path):
    (tmp_path / "bad.cpp").write_text(
        '#include "mlx/backend/metal/device.h"\nvoid f(mlx::core::metal::CommandEncoder& e) { e.set_bytez(1, 0); }\n'
    )
    assert "no member named 'set_bytez'" in _compile(
        tmp_path / "bad.cpp", macos_headers, tmp_path, strict_compiler
    )
