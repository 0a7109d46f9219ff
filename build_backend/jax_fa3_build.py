"""The build backend: scikit-build-core, with build requirements that follow the machine.

A `[build-system] requires` list is static, so with it a CPU-only install, or one on a machine that
has a CUDA toolkit, would download a compiler for nothing. PEP 517 lets a backend answer instead:

* `JAX_FA3_CPU_ONLY=1`: nothing of CUDA is downloaded or built; the wheel is pure Python.
* an nvcc in `$CUDACXX`, `$CUDA_HOME/bin` or on the path: that compiler is used.
* otherwise: the compiler comes from the package index, as wheels.

CMakeLists.txt looks for the compiler in the same order. The lists are in pyproject.toml, under
[tool.jax-fa3-build].
"""

from __future__ import annotations

import os
import pathlib
import shutil
import tomllib

from scikit_build_core import build as _scikit
from scikit_build_core.build import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_PYPROJECT = pathlib.Path(__file__).resolve().parent.parent / "pyproject.toml"


def cpu_only() -> bool:
    """Whether the environment asks for pure Python; a boolean as scikit-build-core reads it."""
    value = os.environ.get("JAX_FA3_CPU_ONLY", "")
    return value.strip().lower() not in {"", "0", "f", "false", "n", "no", "off"}


def find_nvcc() -> str | None:
    """The CUDA compiler that CMake will find on this machine, or None."""
    named = os.environ.get("CUDACXX")
    if named:
        return named  # CMake takes it too, and says so when it does not work
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (found := shutil.which("nvcc", path=os.path.join(home, "bin"))):
        return found
    return shutil.which("nvcc")


def _ours() -> list[str]:
    if cpu_only():
        return []
    table = tomllib.loads(_PYPROJECT.read_text())["tool"]["jax-fa3-build"]
    return table["extension-requires"] + ([] if find_nvcc() else table["compiler-requires"])


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return _scikit.get_requires_for_build_wheel(config_settings) + _ours()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return _scikit.get_requires_for_build_editable(config_settings) + _ours()
