"""The kernel under test, and a dense yardstick in NumPy for sweeps over many shapes.

Compiling plain JAX for hundreds of shapes would take longer than the whole suite may; NumPy needs
no compilation. `helpers.plain` (real JAX) is the yardstick where one shape is looked at closely.
"""
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

from __future__ import annotations

import functools
import os
import pathlib
import re
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3

attend = functools.partial(
    jax_fa3.dot_product_attention, implementation="fa3", return_residual=True
)

DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}
HEAD_DIMS = (64, 128, 256)


def run_with_dump(code: str, folder: pathlib.Path, *arguments, flags="", timeout=120) -> None:
    """Runs Python code whose XLA dumps into `folder` and puts calls into command buffers.

    Its sys.argv[1:] are the folder above the package's and `arguments`.
    """
    package = pathlib.Path(jax_fa3.__file__).parent.parent
    dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_gpu_graph_min_graph_size=1"
    done = subprocess.run(
        [sys.executable, "-c", code, str(package), *map(str, arguments)],
        env={**os.environ, "XLA_FLAGS": f"{dump} {flags}"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def thunks_of(folder, name):
    """The thunks that XLA runs for the jitted function `name`, from its dump.

    Returns: ([(kind, whether in a command buffer), ...], the dump).
    """
    dumps = {p.name.rpartition(".jit_" + name + ".")[2]: p for p in folder.iterdir()}
    first, last = "thunk_sequence.txt", "thunk_sequence_after_thunk_passes.txt"
    assert first in dumps, f"XLA dumped no thunks of {name}; there are {sorted(dumps)}"
    # There is no second dump where the passes, which make command buffers, changed nothing.
    text = dumps.get(last, dumps[first]).read_text(errors="replace")
    # A thunk is a line such as "001: kCustomCall"; a buffer's own are indented further than it.
    thunks, buffer = [], None
    for indent, kind in re.findall(r"(?m)^( *)(?:\d+: *)?k(\w+)", text):
        if buffer is not None and len(indent) <= buffer:
            buffer = None
        thunks.append((kind, buffer is not None))
        if kind == "CommandBuffer" and buffer is None:
            buffer = len(indent)
    return thunks, text


def captured_step(folder: pathlib.Path) -> dict[str, str]:
    """XLA's dump, file name to text, of a jitted function `step` whose calls it captured."""
    thunks, text = thunks_of(folder, "step")
    calls = [inside for kind, inside in thunks if kind == "CustomCall"]
    assert calls, f"no call:\n{text[:3000]}"
    assert all(calls), f"a call is outside of every command buffer:\n{text[:3000]}"
    return {p.name: p.read_text(errors="replace") for p in folder.rglob("*") if p.is_file()}


def see_causal(t: int, s: int, diagonal) -> np.ndarray:
    """bool [..., 1, T, S]: query t sees keys s <= t + diagonal; `diagonal` is a scalar or [B]."""
    position = np.arange(t, dtype=np.int64)[:, None] + np.asarray(diagonal)[..., None, None]
    return (np.arange(s)[None, :] <= position)[..., None, :, :]


def dense(query, key, value, see=None, scale=None):
    """(exact out, exact lse, yardstick out) in NumPy.

    The exact values are float32. The yardstick rounds as plain JAX in the inputs' dtype does:
    probabilities and output in that dtype, everything else float32.
    """
    dtype = np.asarray(query).dtype
    q, k, v = (np.asarray(x).astype(np.float32) for x in (query, key, value))
    n, h = q.shape[-2:]
    heads_k = k.shape[-2]
    k, v = (np.repeat(x, n // heads_k, axis=-2) for x in (k, v))
    scale = np.float32(1 / np.sqrt(h) if scale is None else scale)
    x = np.einsum("...tnh,...snh->...nts", q, k, optimize=True) * scale
    if see is not None:
        x = np.where(see, x, -np.inf)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        top = np.max(x, axis=-1, keepdims=True, initial=-np.inf)
        p = np.exp(x - np.where(np.isneginf(top), 0, top))
        total = p.sum(-1, keepdims=True)
        probs = p / np.where(total == 0, 1, total)
        lse = (np.log(total) + np.where(np.isneginf(top), 0, top))[..., 0]
    values = lambda probs: np.einsum("...nts,...snd->...tnd", probs, v, optimize=True)
    rounded = probs.astype(dtype).astype(np.float32)
    yardstick = values(rounded).astype(dtype).astype(np.float32)
    return values(probs), np.swapaxes(lse, -1, -2), yardstick


# lse is float32 through and through; exp2 is the hardware's, good to 2 ulps.
LSE_TOLERANCE = 5e-5


def check(got, query, key, value, see=None, scale=None, what=""):
    """out within twice the yardstick's error, lse within LSE_TOLERANCE, infinities alike."""
    out, lse = (np.asarray(x) for x in got)
    exact, exact_lse, yardstick = dense(query, key, value, see, scale)
    try:
        assert out.dtype == np.asarray(query).dtype
        assert lse.dtype == np.float32
        # Where the yardstick is exact by chance (one key), half an ulp of the output remains.
        half_ulp = float(jnp.finfo(out.dtype).eps) / 2
        helpers.assert_within_reference_error(out, yardstick, exact, 2, epsilon=half_ulp)
        dead = np.isneginf(exact_lse)
        np.testing.assert_array_equal(np.isneginf(lse), dead)
        np.testing.assert_allclose(
            lse[~dead], exact_lse[~dead], rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE
        )
        assert (out[dead] == 0).all(), "a fully masked row is not zero"
    except AssertionError as error:
        shapes = [tuple(np.shape(x)) for x in (query, key, value)]
        raise AssertionError(f"{what} {shapes} {out.dtype}: {error}") from error


def run_all(calls):
    """[attend(*args, **options) for args, options in calls] in one compilation."""
    arguments = [args for args, _ in calls]
    options = [options for _, options in calls]
    return jax.jit(lambda arguments: [attend(*a, **o) for a, o in zip(arguments, options)])(
        arguments
    )
