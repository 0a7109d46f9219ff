"""Error bounds, extreme scores, infinities and NaN."""
# Options and arrays reach typed functions through ** and *.
# pyright: reportArgumentType=false, reportCallIssue=false

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import check_against_float32, yardsticks
from helpers import assert_same_bits, assert_within_reference_error, make_qkv, normal
from kernel_helpers import DTYPES, HEAD_DIMS, attend
from shapes import KERNEL_SHAPES, SHAPES

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)

# One compilation for each of these; every test below that can reuses it.
B, T, S, N, K = 1, 320, 448, 4, 2


@functools.cache
def compiled(h, causal):
    return jax.jit(functools.partial(attend, is_causal=causal))


def within_twice(args, causal=False):
    """The kernel's error against float32 at most twice that of plain JAX in the dtype."""
    got = compiled(args[0].shape[-1], causal)(*args)
    check_against_float32(got, args, 0 if causal else None)
    return got


def small(h, dtype):
    return tuple(normal(shape, dtype) for shape in ((B, T, N, h), (B, S, K, h), (B, S, K, h)))


@dtypes
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("name", KERNEL_SHAPES)
def test_error_is_at_most_twice_that_of_plain_jax(name, causal, dtype):
    """Half an ulp is the least that rounding the output allows, so it is on top."""
    shape = SHAPES[name]
    n = min(shape.heads_q, 8)
    k = max(1, n * shape.heads_k // shape.heads_q)
    shape = shape.cut(batch=1, seqlen_q=1024, seqlen_k=1024, heads_q=n, heads_k=k)
    args = make_qkv(shape, dtype)
    got = compiled(shape.head_dim, causal)(*args)
    exact, yardstick = yardsticks(*args, diagonal=0 if causal else None)
    assert_within_reference_error(got[0], yardstick[0], exact[0], 2)


@dtypes
@pytest.mark.parametrize("h", HEAD_DIMS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("factor", [8, 30])
def test_peaked_scores(factor, causal, h, dtype):
    """A lazy softmax reference overflows here unless it checks itself."""
    q, k, v = small(h, dtype)
    within_twice((q * factor, k, v), causal)


def ramp(h, dtype, height, direction):
    """Scores that climb by `height` over the keys, plus noise of order one."""
    q, k, v = small(h, dtype)
    climb = np.linspace(0, height, S, dtype=np.float32)[::direction]
    # One query channel is sqrt(h) and the matching key channel carries the climb.
    q = q.at[..., 0].set(jnp.asarray(np.sqrt(h), dtype))
    return q, k.at[..., 0].set(jnp.asarray(climb, dtype)[None, :, None]), v


@dtypes
@pytest.mark.parametrize("h", [64, 128])
@pytest.mark.parametrize("direction", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("height", [10, 100, 1000, 10000])
def test_scores_that_climb_along_the_keys(height, direction, h, dtype):
    for causal in (False, True):
        within_twice(ramp(h, dtype, height, direction), causal)


@dtypes
@pytest.mark.parametrize("where", [0, 63, 64, S // 2, S - 65, S - 1])
def test_one_huge_key(where, dtype):
    """All queries agree with it by about 1000 nats, or disagree as much."""
    q, k, v = small(128, dtype)
    q = q.at[..., 0].set(jnp.asarray(np.sqrt(128), dtype))
    for sign in (1, -1):
        for causal in (False, True):
            within_twice((q, k.at[:, where, :, 0].set(sign * 1000), v), causal)


@dtypes
def test_one_row_of_a_tile_is_huge(dtype):
    """Rows share a tile: what one needs must not cost another its bits."""
    q, k, v = small(128, dtype)
    for row in (0, 1, 77, T - 1):
        within_twice((q.at[:, row].mul(200), k, v))


@dtypes
@pytest.mark.parametrize("h", HEAD_DIMS)
def test_constant_rows_average_the_values(h, dtype):
    """Equal scores at -10000, 0 and 10000: uniform weights, lse = score + log S."""
    _, _, v = small(h, dtype)
    for score in (-10000.0, 0.0, 10000.0):
        q = jnp.zeros((B, T, N, h), dtype).at[..., 0].set(100)
        k = jnp.zeros((B, S, K, h), dtype).at[..., 0].set(score / 100)
        out, lse = compiled(h, False)(q, k, v)
        mean = jnp.repeat(v.astype(jnp.float32).mean(1, keepdims=True), N // K, 2)
        np.testing.assert_allclose(
            np.asarray(out, np.float32), np.broadcast_to(mean, out.shape), atol=4e-3
        )
        exact = float(q[0, 0, 0, 0]) * float(k[0, 0, 0, 0]) / np.sqrt(h) + np.log(S)
        np.testing.assert_allclose(lse, exact, rtol=2e-6, atol=2e-5)


def test_float16_values_near_its_largest():
    """Outputs up to 65504 without overflow on the way."""
    q, k, v = small(128, jnp.float16)
    within_twice((q, k, jnp.clip(v * 20000, -65000, 65000)))


# --- Infinities and NaN in the inputs ----------------------------------------------------------


def as_float32_does(args):
    """Where plain float32 jnp gives NaN or infinity, so does the kernel; elsewhere close."""
    got = compiled(args[0].shape[-1], False)(*args)

    @jax.jit
    def dense(q, k, v):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        with jax.default_matmul_precision("highest"):
            k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
            x = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1]).astype(np.float32)
            lse = jnp.swapaxes(jax.nn.logsumexp(x, -1), 1, 2)
            return jnp.einsum("bnts,bsnd->btnd", jax.nn.softmax(x, -1), v), lse

    (out, lse), (exact, exact_lse) = (
        tuple(np.asarray(x, np.float32) for x in pair) for pair in (got, dense(*args))
    )
    np.testing.assert_array_equal(np.isnan(out), np.isnan(exact))
    np.testing.assert_allclose(out, exact, rtol=0.03, atol=0.03)
    # A score of plus infinity: jnp's logsumexp says infinity, the definition NaN. Either is loud.
    loud = np.isnan(exact_lse) | np.isposinf(exact_lse)
    assert (np.isnan(lse) | np.isposinf(lse))[loud].all()
    np.testing.assert_allclose(lse[~loud], exact_lse[~loud], rtol=1e-4, atol=1e-4)


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("h", [64, 128])
def test_infinities_and_nan_in_a_query(value, h, dtype):
    q, k, v = small(h, dtype)
    as_float32_does((q.at[0, 70, 1, 3].set(value), k, v))
    as_float32_does((q.at[0, 70, 1].set(value), k, v))


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("where", [0, 65, S - 1])
def test_infinities_and_nan_in_a_key(value, where, dtype):
    """A score of minus infinity takes no weight; of plus infinity or NaN makes NaN of the row."""
    q, k, v = small(128, dtype)
    as_float32_does((q, k.at[0, where, 1, 3].set(value), v))


@dtypes
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_infinities_and_nan_in_a_value(value, dtype):
    q, k, v = small(128, dtype)
    as_float32_does((q, k, v.at[0, 33, 1, 3].set(value)))


@dtypes
def test_a_score_of_minus_infinity_in_the_first_block_read(dtype):
    """Nothing to take a reference from at first: the rest of the row must still be right."""
    q, k, v = small(128, dtype)
    q = jnp.abs(q)
    for block in (slice(0, 64), slice(S - 64, S), slice(0, S - 1), slice(1, S)):
        as_float32_does((q, k.at[:, block, :, 0].set(-np.inf), v))


@dtypes
@pytest.mark.parametrize("h", HEAD_DIMS)
def test_nan_in_a_row_stays_in_that_row(h, dtype):
    """Every other row stays as good as it was, in the same tile too."""
    q, k, v = small(h, dtype)
    half_ulp = float(jnp.finfo(dtype).eps) / 2
    for causal in (False, True):
        exact, yardstick = yardsticks(q, k, v, 0 if causal else None)
        for row, head in ((0, 0), (70, 1), (T - 1, 3)):
            out, lse = compiled(h, causal)(q.at[0, row, head].set(np.nan), k, v)
            assert jnp.isnan(out[0, row, head]).all()
            assert jnp.isnan(lse[0, row, head])
            others = np.ones((B, T, N), bool)
            others[0, row, head] = False
            good = (np.asarray(x)[others] for x in (out, yardstick[0], exact[0]))
            assert_within_reference_error(*good, 2, epsilon=half_ulp)
            np.testing.assert_allclose(
                np.asarray(lse)[others], np.asarray(exact[1])[others], rtol=1e-4, atol=1e-4
            )


@dtypes
@pytest.mark.parametrize("h", HEAD_DIMS)
@pytest.mark.parametrize(("t", "s"), [(65, 97), (1, 1), (129, 191)])
def test_neighbours_in_memory_are_never_read_into_a_result(t, s, h, dtype):
    """All other batch rows and key heads NaN: what lies past T and S in memory is theirs."""
    shapes = (3, t, 4, h), (3, s, 2, h), (3, s, 2, h)
    q, k, v = (normal(shape, dtype) for shape in shapes)
    for causal in (False, True):
        clean = compiled(h, causal)(q, k, v)
        nan = jnp.asarray(np.nan, dtype)
        lonely_q = jnp.full_like(q, nan).at[1, :, 2:].set(q[1, :, 2:])
        lonely_k, lonely_v = (jnp.full_like(x, nan).at[1, :, 1].set(x[1, :, 1]) for x in (k, v))
        got = compiled(h, causal)(lonely_q, lonely_k, lonely_v)
        for x, wanted in zip(got, clean):
            assert_same_bits(x[1, :, 2:], wanted[1, :, 2:])


@dtypes
@pytest.mark.parametrize("h", HEAD_DIMS)
def test_fully_masked_rows_give_zero_and_minus_infinity(h, dtype):
    """More queries than keys, aligned bottom right: the first T - S see nothing."""
    for t, s in ((200, 70), (65, 1), (130, 129)):
        q, k, v = (normal((2, x, 2, h), dtype) for x in (t, s, s))
        f = functools.partial(attend, is_causal=True, causal_alignment="bottom_right")
        out, lse = jax.jit(f)(q, k, v)
        assert (out[:, : t - s] == 0).all()
        assert jnp.isneginf(lse[:, : t - s]).all()
        helpers.assert_finite((out, lse[:, t - s :]))


@dtypes
def test_nan_in_masked_keys_and_values_of_other_tiles_changes_nothing(dtype):
    """Causal: the first 64 queries end long before key 256."""
    q, k, v = small(128, dtype)
    clean = compiled(128, True)(q, k, v)
    bad = compiled(128, True)(q, k.at[:, 256:].set(np.nan), v.at[:, 256:].set(np.nan))
    for x, wanted in zip(bad, clean):
        assert_same_bits(x[:, :64], wanted[:, :64])
