"""The error bounds of the forward: against float32, in units of plain JAX's error in the dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from helpers import assert_within_reference_error, oracle, plain
from kernel_helpers import dense


@jax.jit
def _yardsticks(q, k, v, diagonal):
    position = jnp.arange(q.shape[-3])[:, None] + jnp.reshape(diagonal, (-1, 1, 1))
    see = (jnp.arange(k.shape[-3]) <= position)[:, None]  # [B or 1, 1, T, S]
    exact = oracle(*(x.astype(jnp.float32) for x in (q, k, v)), mask=see)
    out, lse = plain(q, k, v, see)
    dead = ~see[:, 0].any(-1)[..., None]  # [B or 1, T, 1]; plain JAX averages all values there
    return exact, (jnp.where(dead[..., None], 0, out), jnp.where(dead, -jnp.inf, lse))


def yardsticks(q, k, v, diagonal=None):
    """((exact out, lse), (plain out, lse)), by JAX on this device; one compilation a shape.

    `diagonal`: query t sees keys s <= t + diagonal, a number or one a batch row; None: all keys.
    Rows that see no key are 0 and -inf in both.
    """
    return _yardsticks(q, k, v, jnp.asarray(k.shape[-3] if diagonal is None else diagonal))


@jax.jit
def _figures(actual, yardstick, exact):
    """(largest, rms) of the errors of both, the largest exact value, whether all is finite."""
    actual, yardstick, exact = (x.astype(jnp.float32) for x in (actual, yardstick, exact))
    errors = [jnp.abs(x - exact) for x in (actual, yardstick)]
    largest = jnp.stack([e.max(initial=0) for e in errors])
    rms = jnp.stack([jnp.sqrt(jnp.mean(e * e)) for e in errors])
    return largest, rms, jnp.abs(exact).max(initial=0), jnp.isfinite(actual).all()


def within(actual, yardstick, exact, factor=2, epsilon=0.0):
    """assert_within_reference_error, looked at on the device: arrays of any size cost nothing."""
    largest, rms, biggest, finite = (np.asarray(x) for x in _figures(actual, yardstick, exact))
    slack = epsilon * max(1.0, float(biggest))
    good = finite and all(e[0] <= factor * e[1] + slack for e in (largest, rms))
    if not good:  # says what and where
        assert_within_reference_error(actual, yardstick, exact, factor, epsilon)
        raise AssertionError(f"errors {largest} and {rms}, finite {finite}")


def check_against_float32(got, args, diagonal=None, factor=2):
    """out and lse [B, T, N] of a kernel: at most `factor` times plain JAX's error in the dtype.

    Where one key takes everything plain JAX is exact by luck, its probability being 1. What remains
    is half an ulp for rounding ours and half for the output.
    """
    exact, yardstick = yardsticks(*args, diagonal=diagonal)
    within(got[0], yardstick[0], exact[0], factor, float(jnp.finfo(args[0].dtype).eps))
    _check_lse(got[1], exact[1])


def check_against_numpy(got, args, see=None):
    """The same by NumPy, for shapes of which each would be a compilation; see: [..., T, S]."""
    exact, lse, yardstick = dense(*args, see=see)
    epsilon = float(jnp.finfo(args[0].dtype).eps)
    assert_within_reference_error(got[0], yardstick, exact, 2, epsilon=epsilon)
    _check_lse(got[1], lse)


def _check_lse(lse, wanted):
    lse, wanted = np.asarray(lse), np.asarray(wanted)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(lse[~finite], wanted[~finite])
    # Scores of size x carry float32's rounding of x.
    biggest = float(np.abs(wanted[finite]).max(initial=1.0))
    np.testing.assert_allclose(lse[finite], wanted[finite], rtol=0, atol=2e-5 * biggest)
