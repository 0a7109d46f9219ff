"""The forward's FFI target called directly: any configuration by name, and what it did again."""

from __future__ import annotations

import functools
import math
import pathlib
import re
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import FWD_TARGET

from jax_fa3 import _native

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "benchmarks"))
# The one place that knows where the counters lie.
import fwd_workspace  # noqa: E402  # pyright: ignore[reportMissingImports]


def extension() -> Any:
    module = _native.extension()
    assert module is not None  # or the test would have been skipped
    return module


def configurations(dtype, h: int, causal: bool) -> list[str]:
    """The kernels for such problems, those that the plan would not choose here among them."""
    found = []
    for name in extension().kernels():
        try:
            extension().describe_plan(np.dtype(dtype).name, 1, 64, 64, 1, 1, h, causal, name)
        except ValueError:
            continue
        found.append(name)
    assert found
    return found


def plan(config: str, query, key, causal: bool) -> str:
    """describe_plan of a call with `config` forced; "" leaves it to the plan."""
    b, t, n, h = query.shape
    s, k = key.shape[1:3]
    return extension().describe_plan(query.dtype.name, b, t, s, n, k, h, causal, config)


def tile(config: str, query, key, causal: bool) -> tuple[int, int]:
    """(query rows a CTA, keys a stage) of a configuration."""
    found = re.search(r"(\d+) queries x (\d+) keys", plan(config, query, key, causal))
    assert found is not None
    return int(found[1]), int(found[2])


def is_lazy(plan_text: str) -> bool:
    return "lazy reference" in plan_text


class Result(NamedTuple):
    out: jax.Array  # [B, T, N, H]
    lse: jax.Array  # [B, T, N]
    redone: int  # groups of 64 query rows that the lazy reference failed; 0 for other rules


def _call(config: str, causal: bool, diagonal: int):
    """(query, key, value, [offset]) -> (out, lse [B, N, T], workspace)."""

    def call(query, key, value, *offset):
        b, t, n, h = query.shape
        s, k = key.shape[1:3]
        sizes = (query.dtype.name, b, t, s, n, k, h, causal, config)
        results = (
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((b, n, t), jnp.float32),
            jax.ShapeDtypeStruct((extension().fwd_workspace_bytes(*sizes),), jnp.uint8),
        )
        attributes = {
            "scale": np.float32(1 / math.sqrt(h)),
            "is_causal": np.bool_(causal),
            "diagonal": np.int64(diagonal),
            "has_query_offset": np.bool_(bool(offset)),
        } | ({"config": config} if config else {})
        return jax.ffi.ffi_call(FWD_TARGET, results)(query, key, value, *offset, **attributes)

    return call


@functools.cache
def _program(config: str, causal: bool, diagonal: int):
    return jax.jit(_call(config, causal, diagonal))


def _result(config: str, query, key, causal: bool, out, lse, workspace) -> Result:
    text = plan(config, query, key, causal)
    redone = fwd_workspace.redone(workspace, text) if is_lazy(text) else 0
    return Result(out, jnp.swapaxes(lse, 1, 2), redone)


def run(config: str, query, key, value, diagonal=None, query_offset=None) -> Result:
    """Attention by the kernel of that name; "" leaves the choice to the plan.

    diagonal: query t sees keys s <= t + diagonal; None: all keys.
    query_offset: int32 [B], in place of `diagonal`.
    """
    causal = diagonal is not None or query_offset is not None
    offset = () if query_offset is None else (query_offset,)
    program = _program(config, causal, 0 if offset else int(diagonal or 0))
    return _result(config, query, key, causal, *program(query, key, value, *offset))


def run_all(calls) -> list[Result]:
    """[run(config, *args, diagonal) for config, args, diagonal in calls] in one compilation."""
    functions = [
        _call(config, diagonal is not None, diagonal or 0) for config, _, diagonal in calls
    ]
    arguments = [args for _, args, _ in calls]
    program = jax.jit(lambda arguments: [f(*a) for f, a in zip(functions, arguments)])
    return [
        _result(config, args[0], args[1], diagonal is not None, *results)
        for (config, args, diagonal), results in zip(calls, program(arguments))
    ]
