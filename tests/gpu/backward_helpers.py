"""Problems of the backward pass, their gradients by the kernels, and the bounds they are held to.

Each of dq, dk and dv is held to three times the error that plain JAX makes in the same dtype, both
against float32. The yardsticks are compiled once for a head dim and take lengths and mask as data.
"""
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

from __future__ import annotations

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
from helpers import normal, oracle, plain
from kernel_helpers import attend, see_causal

MASKS = {
    "full": {},
    "top_left": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
}


def see_of(mask, t, s):
    if mask == "full":
        return None
    return see_causal(t, s, s - t if mask == "bottom_right" else 0)


def problem(*, batch=2, t, s, n=2, k=1, h, dtype=jnp.bfloat16):
    """((query, key, value), cotangents of out and lse), NumPy: slices of these compile nothing."""
    draw = lambda *shape: np.asarray(normal(shape)).astype(np.dtype(dtype))
    args = draw(batch, t, n, h), draw(batch, s, k, h), draw(batch, s, k, h)
    return args, (draw(batch, t, n, h), np.asarray(normal((batch, t, n))))


def cut(whole, t, s):
    """The problem of the first t queries and s keys."""
    (q, k, v), (dout, dlse) = whole
    return (q[:, :t], k[:, :s], v[:, :s]), (dout[:, :t], dlse[:, :t])


def gradients(args, cts, **options):
    """(dq, dk, dv) by the kernels."""
    return jax.vjp(functools.partial(attend, **options), *args)[1](cts)


@functools.cache
def compiled(**options):
    """`gradients` with these options, one program a shape."""
    return jax.jit(functools.partial(gradients, **options))


def run_all(problems, options):
    """Each problem's gradients with its options, in one compilation."""

    @jax.jit
    def program(problems):
        return [gradients(*p, **o) for p, o in zip(problems, options)]

    return program(problems)


@jax.jit
def _yardsticks(args, cts, see, scale):
    alive = jnp.swapaxes(see.any(-1), -1, -2)  # [B or 1, T, 1]: plain JAX averages over dead rows

    def masked(q, k, v):
        out, lse = plain(q, k, v, see, scale=scale)
        return jnp.where(alive[..., None], out, 0), jnp.where(alive, lse, 0)

    wide, wide_cts = jax.tree.map(lambda x: x.astype(jnp.float32), (args, cts))
    exact = jax.vjp(lambda *a: oracle(*a, mask=see, scale=scale), *wide)[1](wide_cts)
    return exact, jax.vjp(masked, *args)[1](cts)


def yardsticks(args, cts, see=None, scale=None):
    """(exact, plain JAX's) gradients. `see` is bool [B or 1, 1, T, S]; None: everything."""
    (b, t, _, h), s = args[0].shape, args[1].shape[1]
    see = np.ones((1, 1, t, s), bool) if see is None else np.asarray(see).reshape(-1, 1, t, s)
    see = np.broadcast_to(see, (b, 1, t, s))
    return _yardsticks(args, cts, see, np.float32(1 / np.sqrt(h) if scale is None else scale))


def padded_yardsticks(args, cts, see, longest):
    """The same by the program for `longest` queries and keys, whatever t and s."""
    t, s = args[0].shape[1], args[1].shape[1]
    see = np.ones((1, 1, t, s), bool) if see is None else np.asarray(see).reshape(-1, 1, t, s)
    see = np.pad(see, ((0, 0), (0, 0), (0, longest - t), (0, longest - s)))
    grow = lambda x: np.pad(x, [(0, longest - n if i == 1 else 0) for i, n in enumerate(x.shape)])
    both = yardsticks(tuple(map(grow, args)), tuple(map(grow, cts)), see)
    return tuple(tuple(np.asarray(x)[:, :n] for x, n in zip(g, (t, s, s))) for g in both)


def check(got, exact, yardstick, factor=3, epsilon=0.0, what=""):
    """Each gradient within `factor` times plain JAX's error, plus `epsilon` of its largest value.

    Gradients come in all sizes, so they are compared in units of the largest.
    """
    for name, x, right, theirs in zip(("dq", "dk", "dv"), got, exact, yardstick):
        x, right, theirs = (np.asarray(y, np.float32) for y in (x, right, theirs))
        unit = np.abs(right).max(initial=0.0) or np.float32(1)
        try:
            helpers.assert_within_reference_error(
                x / unit, theirs / unit, right / unit, factor, max(epsilon, helpers.EPSILON)
            )
        except AssertionError as error:
            raise AssertionError(f"{what} {name} {x.shape}: {error}") from error


def half_ulp(dtype):
    """Where plain JAX is exact by luck (few keys, one probability of 1), rounding ours remains."""
    return float(jnp.finfo(dtype).eps) / 2
