"""The compiled extension: imported, checked and registered with XLA once, or the reason why not."""

from __future__ import annotations

import functools
import pathlib
import re
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.ffi

FWD_TARGET = "jax_fa3_fwd_v1"
BWD_TARGET = "jax_fa3_bwd_v1"

# The extension carries a CUDA 13 runtime, which needs driver 580 (cudaDriverGetVersion: 13000).
MIN_DRIVER = 13000


class Problem(NamedTuple):
    """The arguments by which the extension knows a call, in its order."""

    dtype: str
    batch: int
    seqlen_q: int
    seqlen_k: int
    heads_q: int
    heads_k: int
    head_dim: int
    is_causal: bool


def problem_of(query: Any, key: Any, batch: int, is_causal: bool) -> Problem:
    """Of query [..., T, N, H] and key [..., S, K, H], arrays or their types, in `batch` rows."""
    (t, n, h), (s, heads_k) = query.shape[-3:], key.shape[-3:-1]
    return Problem(query.dtype.name, batch, t, s, n, heads_k, h, is_causal)


def ffi_api_found() -> tuple[int, int] | None:
    """(major, minor) of the XLA FFI of the installed jaxlib, from the headers that it ships."""
    header = pathlib.Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h"
    try:
        text = header.read_text()
    except OSError:
        return None
    found = [
        re.search(rf"#define\s+XLA_FFI_API_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR")
    ]
    return (int(found[0][1]), int(found[1][1])) if found[0] and found[1] else None


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """(the extension, "") once its targets are registered, or (None, the reason)."""
    try:
        from jax_fa3 import _jax_fa3 as extension
    except ModuleNotFoundError:
        return None, (
            "the extension jax_fa3._jax_fa3 is not installed (this is a CPU-only build of jax_fa3 "
            "or a source checkout: `pip install .` with no JAX_FA3_CPU_ONLY builds it)"
        )
    except ImportError as error:
        return None, f"the extension jax_fa3._jax_fa3 does not import: {error}"
    built, found = tuple(extension.ffi_api_version()), ffi_api_found()
    # A handler compiled with newer headers must not be registered: XLA's refusal disables the whole
    # CUDA backend, not only this handler.
    if found is not None and (built[0] != found[0] or built > found):
        return None, (
            f"the extension was built for XLA FFI {built[0]}.{built[1]} and the installed jaxlib "
            f"has {found[0]}.{found[1]}: install a newer jaxlib or rebuild jax_fa3"
        )
    for target, handler in extension.registrations().items():
        jax.ffi.register_ffi_target(target, handler, platform="CUDA", api_version=1)
    return extension, ""


def extension() -> ModuleType | None:
    """The extension with its targets registered; None when it is missing or unusable."""
    return _load()[0]


def register() -> None:
    """Registers the targets now. Called on import, so that an exported program finds them."""
    _load()


def visible_gpus() -> list[Any]:
    """The CUDA devices of this process; starts JAX's backends when they have not started."""
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:  # no such backend, or JAX_PLATFORMS leaves it out
        return []


def why_not() -> list[str]:
    """Why a program lowered here for CUDA could not use the kernels; empty when it can.

    A machine with neither driver nor GPU can: it lowers for another machine.
    """
    module, problem = _load()
    if module is None:
        return [problem]
    reasons = []
    driver = module.driver_version()
    if 0 < driver < MIN_DRIVER:
        reasons.append(
            f"the CUDA driver is too old: it supports CUDA {driver // 1000}.{driver % 1000 // 10}, "
            "the kernels need 13.0 (driver 580)"
        )
    others = {
        f"{gpu.device_kind} ({gpu.compute_capability})"
        for gpu in visible_gpus()
        if gpu.compute_capability != "9.0"
    }
    if others:
        visible = ", ".join(sorted(others))
        reasons.append(f"the kernels need compute capability 9.0 (Hopper); visible: {visible}")
    return reasons
