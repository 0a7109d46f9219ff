"""The forward kernel's values over shapes, masks, head groups and scales."""
# Options and arrays reach typed functions through ** and *.
# pyright: reportArgumentType=false, reportCallIssue=false

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, qkv
from kernel_helpers import DTYPES, HEAD_DIMS, attend, check, dense, run_all, see_causal
from shapes import PLANNED_BY_THE_DIAGONAL, TILES, edge_lengths


def every_length():
    """0, the smallest, odd ones, and both sides of every tile edge once and twice over."""
    small = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33)
    edges = {x for tile in TILES for x in edge_lengths(tile)}
    return sorted(set(small) | edges)


def length_pairs(h):
    """(T, S) pairs in which each length occurs once as T and once as S."""
    lengths = every_length()
    partners = np.random.default_rng(h).permutation(lengths).tolist()
    return [*zip(lengths, partners), (0, 0), (1, 1)]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("h", HEAD_DIMS)
@pytest.mark.parametrize("mask", ["full", "top_left", "bottom_right"])
def test_every_length_beside_a_tile_edge(mask, h, dtype):
    """T and S from 0, T != S, GQA with two heads a key head; the batch row matters too."""
    options = {} if mask == "full" else {"is_causal": True, "causal_alignment": mask}
    pairs = length_pairs(h)
    # Each dtype takes half of the pairs with every mask: all pairs meet every mask.
    pairs = pairs[dtype == jnp.float16 :: 2]
    calls = [(qkv(t=t, s=s, n=2, k=1, h=h, dtype=dtype), options) for t, s in pairs]
    for (args, _), (t, s), got in zip(calls, pairs, run_all(calls)):
        diagonal = s - t if mask == "bottom_right" else 0
        check(got, *args, see=None if mask == "full" else see_causal(t, s, diagonal), what=mask)


@pytest.mark.parametrize("shape", PLANNED_BY_THE_DIAGONAL, ids=str)
def test_a_diagonal_that_changes_the_plan(shape):
    """The configuration, and with it the workspace, depend on how much a causal mask leaves."""
    b, t, s, n, k, h = shape
    args = qkv(batch=(b,), t=t, s=s, n=n, k=k, h=h, dtype=jnp.bfloat16)
    for alignment, diagonal in (("top_left", 0), ("bottom_right", s - t)):
        f = jax.jit(functools.partial(attend, is_causal=True, causal_alignment=alignment))
        check(f(*args), *args, see=see_causal(t, s, diagonal), what=alignment)


HEADS = [(1, 1), (4, 4), (6, 2), (8, 1), (12, 4), (71, 1)]


@pytest.mark.parametrize("h", HEAD_DIMS)
def test_mha_gqa_and_mqa(h):
    """Query head n reads key head n // (N // K); 71 over 1 is Falcon 7B's."""
    calls = [
        (qkv(t=70, s=90, n=n, k=k, h=h, dtype=jnp.bfloat16), {"is_causal": causal})
        for n, k in HEADS
        for causal in (False, True)
    ]
    for (args, options), got in zip(calls, run_all(calls)):
        check(got, *args, see=see_causal(70, 90, 0) if options["is_causal"] else None)


@pytest.mark.parametrize("h", HEAD_DIMS)
@pytest.mark.parametrize(("t", "s"), [(130, 200), (200, 65), (1, 300)])
def test_scalar_query_offset(h, t, s):
    """Also negative, past the end and beyond what int32 sums hold; one compilation for all."""
    args = qkv(t=t, s=s, n=2, k=1, h=h, dtype=jnp.bfloat16)
    f = jax.jit(lambda offset: attend(*args, is_causal=True, query_offset=offset))
    offsets = [0, 1, -1, 63, 64, s - t, s - t + 1, -t, 1 - t, -t - 1, s - 1, s, s + 1]
    for offset in [*offsets, 10**6, -(10**6), 2**31 - 1, -(2**31)]:
        check(f(jnp.int32(offset)), *args, see=see_causal(t, s, offset), what=f"offset {offset}")


def test_query_offset_of_each_row():
    t, s, batch = 100, 170, 7
    args = qkv(batch=(batch,), t=t, s=s, n=4, k=2, h=128, dtype=jnp.bfloat16)
    f = jax.jit(lambda offset: attend(*args, is_causal=True, query_offset=offset))
    edges = jnp.asarray([-t - 5, -t, -1, 0, s - t, s, 2**30])
    for offset in (edges, helpers.integers(-t - 3, s + 3, (batch,)), jnp.zeros(batch, int)):
        check(f(offset), *args, see=see_causal(t, s, np.asarray(offset)), what=f"{offset}")


def test_query_offset_reproduces_one_token_decoding():
    """The rows of a causal pass, one query at a time with a growing offset."""
    q, k, v = qkv(batch=(2,), t=67, s=67, n=4, k=2, h=64, dtype=jnp.bfloat16)
    whole, whole_lse = attend(q, k, v, is_causal=True)
    step = jax.jit(lambda q, i: attend(q, k, v, is_causal=True, query_offset=i))
    for i in (0, 1, 31, 63, 64, 65, 66):
        out, lse = step(q[:, i : i + 1], jnp.int32(i))
        np.testing.assert_allclose(lse[:, 0], whole_lse[:, i], rtol=1e-5, atol=1e-5)
        helpers.assert_close(out[:, 0], whole[:, i])


@pytest.mark.parametrize("scale", [-0.125, 0.0, 1e-4, 1.0, -3.0, 30.0])
def test_scale(scale):
    """Any sign, zero and large."""
    calls = [
        (qkv(t=100, s=140, n=2, k=1, h=h, dtype=dtype), {"scale": scale, "is_causal": True})
        for h, dtype in zip(HEAD_DIMS, (jnp.bfloat16, jnp.float16, jnp.bfloat16))
    ]
    for (args, _), got in zip(calls, run_all(calls)):
        # The sign of a negative scale is folded into the query, which rounds nothing.
        check(got, *args, see=see_causal(100, 140, 0), scale=scale, what=f"{scale}")


def test_array_scale():
    args = qkv(t=100, s=140, n=2, k=1, h=128, dtype=jnp.bfloat16)
    f = jax.jit(lambda scale: attend(*args, scale=scale))
    for scale in (0.25, -0.5, 0.0):
        # Powers of two: folding them into the query rounds nothing.
        check(f(jnp.float32(scale)), *args, scale=scale, what=f"array scale {scale}")


def test_lse_is_natural_float32_and_by_token():
    q, k, v = qkv(batch=(3,), t=65, s=129, n=4, k=2, h=128, dtype=jnp.bfloat16)
    _, lse = attend(q, k, v)
    assert lse.shape == (3, 65, 4)
    assert lse.dtype == jnp.float32
    scores = np.einsum("th,sh->ts", *(np.asarray(x, np.float64) for x in (q[1, :, 3], k[1, :, 1])))
    wanted = np.log(np.exp(scores / np.sqrt(128)).sum(-1))
    np.testing.assert_allclose(lse[1, :, 3], wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("batch", [(), (2, 3), (1, 2, 1, 2)])
def test_any_number_of_batch_dimensions(batch):
    args = qkv(batch=batch, t=70, s=66, n=2, k=1, h=64, dtype=jnp.bfloat16)
    check(jax.jit(attend)(*args), *args)


@pytest.mark.parametrize("sizes", [{"t": 0}, {"s": 0}, {"batch": (0,)}, {"t": 0, "s": 0}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_empty_problems(sizes, causal):
    args = qkv(**{"t": 70, "s": 66, "h": 128, "dtype": jnp.bfloat16, **sizes})
    out, lse = jax.jit(functools.partial(attend, is_causal=causal))(*args)
    assert (out == 0).all()
    assert jnp.isneginf(lse).all()
    assert out.shape == args[0].shape


def test_more_than_65535_pairs_of_batch_and_head():
    """Past what one dimension of a grid other than x holds."""
    b, t, s, n, k, h = 4111, 3, 5, 16, 4, 64
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, h)
    args = [jax.random.normal(x, y, jnp.bfloat16) for x, y in zip(keys, shapes)]
    got = jax.jit(functools.partial(attend, is_causal=True))(*args)
    for rows in (slice(0, 40), slice(4090, 4111), slice(2040, 2060)):
        part = [np.asarray(x[rows]) for x in args]
        check([x[rows] for x in got], *part, see=see_causal(t, s, 0), what=f"rows {rows}")
    # Every row through a checksum against plain JAX.
    exact = jax.jit(lambda *a: helpers.oracle(*a, is_causal=True))(*args)
    assert float(jnp.abs(got[0].astype(jnp.float32) - exact[0]).max()) < 0.05
    assert float(jnp.abs(got[1] - exact[1]).max()) < 1e-3


@pytest.mark.big
@pytest.mark.parametrize("side", ["query", "key"])
def test_more_than_two_to_the_31_elements_in_one_array(side):
    """Offsets past int32: 131200 tokens x 128 heads x 128 = 2.15e9 elements, 4.3 GB an array."""
    long, short, heads, h = 131200, 70, 128, 128
    assert long * heads * h > 2**31
    t, s = (long, short) if side == "query" else (short, long)
    n, k = (heads, 1) if side == "query" else (heads, heads)

    @functools.partial(jax.jit, static_argnums=1)
    def numbers(key, shape):
        # A cheap generator: temporaries of 2^31 normal numbers would not fit comfortably.
        words = jax.random.bits(key, (*shape[:-1], shape[-1] // 4), jnp.uint32)
        bytes_ = jax.lax.bitcast_convert_type(words, jnp.int8).reshape(shape)
        return (bytes_.astype(jnp.bfloat16)) * jnp.bfloat16(1 / 64)

    keys = jax.random.split(jax.random.key(1), 3)
    q, key, v = (numbers(*x) for x in zip(keys, ((1, t, n, h), (1, s, k, h), (1, s, k, h))))
    out, lse = jax.jit(attend)(q, key, v)
    for head in (0, 77, 127):
        # Rows at the start, around element 2^31 and at the end.
        rows = [*range(20), *range(2**31 // (heads * h) - 10, 2**31 // (heads * h) + 10), -1]
        rows = [r for r in rows if r < t]
        kv = head if k > 1 else 0
        part, *got = (np.asarray(x[:, :, head : head + 1])[:, rows] for x in (q, out, lse))
        check(got, part, *(np.asarray(x[:, :, kv : kv + 1]) for x in (key, v)))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_numpy_yardstick_agrees_with_jax_nn(dtype):
    args = qkv(t=60, s=50, n=4, k=2, h=64, dtype=dtype)
    with jax.numpy_dtype_promotion("standard"):
        theirs = jax.nn.dot_product_attention(*args, is_causal=True)
    *_, yardstick = dense(*args, see=see_causal(60, 50, 0))
    helpers.assert_close(theirs, jnp.asarray(yardstick), dtype)


def test_a_value_of_ones_gives_ones_and_of_one_hot_keys_gives_the_probabilities():
    """Finds a permuted or dropped key where random numbers would blur it."""
    q, k, _ = qkv(t=64, s=128, n=2, k=1, h=128, dtype=jnp.bfloat16)
    out, _ = attend(q, k, jnp.ones_like(k))
    helpers.assert_close(out, jnp.ones_like(out))
    eye = jnp.broadcast_to(jnp.eye(128, dtype=jnp.bfloat16)[None, :, None], k.shape)
    probs, _ = attend(q, k, eye)
    x = jnp.einsum("btnh,bsnh->btns", *(y.astype(jnp.float32) for y in (q, k.repeat(2, 2))))
    helpers.assert_close(probs, jax.nn.softmax(x / np.sqrt(128)).astype(jnp.bfloat16), scale=0.2)


def test_normal_draws_are_fresh():
    """Two calls never see the same numbers, or half of these tests would test less."""
    assert not np.array_equal(normal((8,)), normal((8,)))
