"""The lazy reference and its net: rows whose scores leave the range are done again, no others.

A row's exponentials refer to its maximum over the blocks that are read first, the last keys, and
nothing raises that reference later. So what tests the net is a score that comes late and is high:
among the first keys. Every configuration is tested, also those that the plan keeps for other sizes.
"""
# Options and arrays reach typed functions through ** and *.
# pyright: reportArgumentType=false, reportCallIssue=false

import re

import direct
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import check_against_float32, check_against_numpy, yardsticks
from direct import configurations, fwd_workspace
from helpers import normal
from kernel_helpers import DTYPES, HEAD_DIMS, see_causal

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
head_dims = pytest.mark.parametrize("h", HEAD_DIMS)

# 140 tiles of 192 or 256 rows, 280 of 128: a wave on 132 CTAs or two, and a rest that a full mask
# may cut along the keys. The tiles of the first 132 (batch, head) pairs are never cut.
B, T, S, N, K = 7, 130, 900, 20, 5
WHOLE_PAIRS = 132
ALL_GROUPS = fwd_workspace.groups(B, T, N)
WHOLE_GROUPS = WHOLE_PAIRS * 3  # of 64 rows: 130 are three

# Causal from the bottom right: the blocks at the diagonal are read first, then many whole ones.
masks = pytest.mark.parametrize("diagonal", [None, S - T], ids=["full", "causal"])

# Rows that some tests single out, all among the whole tiles: two of one group, three groups. All
# are the last of their 64 but one, so that causal they see key 63 + S - T = 833.
CHOSEN = [(0, 63, 0), (0, 62, 0), (3, 63, 7), (6, 63, 11)]
CHOSEN_GROUPS = 3


def inputs(h, dtype):
    return tuple(normal(x, dtype) for x in ((B, T, N, h), (B, S, K, h), (B, S, K, h)))


def lazy_results(args, diagonal):
    """(name, result) of each lazy kernel for the inputs; the others' values are checked too."""
    for name in configurations(args[0].dtype, args[0].shape[-1], diagonal is not None):
        result = direct.run(name, *args, diagonal=diagonal)
        yield name, result


def checked(args, diagonal):
    """(name, groups done again) of each lazy kernel, once its values are within the bound."""
    redone = {}
    for name, result in lazy_results(args, diagonal):
        try:
            check_against_float32(result, args, diagonal)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
        if direct.is_lazy(direct.plan(name, *args[:2], diagonal is not None)):
            redone[name] = result.redone
    assert redone, "no kernel for such problems has a lazy reference"
    return redone


def along_one_channel(args, query, key):
    """Scores that grow by query[b, t, n] * key[s]: channel 0 carries nothing else."""
    q, k, v = args
    root = np.sqrt(q.shape[-1])
    q = q.at[..., 0].set(jnp.asarray(query * root, q.dtype))
    return q, k.at[..., 0].set(jnp.asarray(key, q.dtype)[None, :, None]), v


def chosen_rows():
    rows = np.zeros((B, T, N), np.float32)
    rows[tuple(zip(*CHOSEN))] = 1
    return rows


def one_key(where, height):
    key = np.zeros(S, np.float32)
    key[where] = height
    return key


@dtypes
@head_dims
@masks
def test_random_inputs_are_never_done_again(diagonal, h, dtype):
    """Standard normal ones; in bfloat16, whose range is float32's, the query times 8 too."""
    q, k, v = inputs(h, dtype)
    for factor in (1, 8) if dtype == jnp.bfloat16 else (1,):
        assert not any(checked((q * factor, k, v), diagonal).values()), factor


@dtypes
@head_dims
@masks
@pytest.mark.parametrize("where", [5, 200], ids=["first block", "middle block"])
def test_rows_that_one_late_key_outweighs_are_done_again_and_no_others(where, diagonal, h, dtype):
    """Each group of 64 with such a row once; every other row keeps its bits, in that group too."""
    args = inputs(h, dtype)
    clean = along_one_channel(args, chosen_rows() * 0, one_key(where, 300))
    peaked = along_one_channel(args, chosen_rows(), one_key(where, 300))
    assert set(checked(peaked, diagonal).values()) == {CHOSEN_GROUPS}
    others = chosen_rows() == 0
    unpeaked = dict(lazy_results(clean, diagonal))
    for name, result in lazy_results(peaked, diagonal):
        assert unpeaked[name].redone == 0
        for got, wanted in zip(result[:2], unpeaked[name][:2]):
            helpers.assert_same_bits(np.asarray(got)[others], np.asarray(wanted)[others], name)


@dtypes
@head_dims
@masks
def test_a_key_that_is_read_first_needs_no_redo(diagonal, h, dtype):
    """The last key, and causal the last that those rows see, is in the reference."""
    where = S - 1 if diagonal is None else 63 + diagonal
    peaked = along_one_channel(inputs(h, dtype), chosen_rows(), one_key(where, 300))
    assert not any(checked(peaked, diagonal).values())


@dtypes
@head_dims
@masks
@pytest.mark.parametrize("height", [10, 100, 1000, 10000])
def test_scores_that_rise_along_the_keys(height, diagonal, h, dtype):
    """By 10 to 10000, towards the last key, which is read first, and towards the first."""
    ones = np.ones((B, T, N), np.float32)
    rise = np.linspace(0, height, S, dtype=np.float32)
    args = inputs(h, dtype)
    assert not any(checked(along_one_channel(args, ones, rise), diagonal).values())
    redone = checked(along_one_channel(args, ones, rise[::-1]), diagonal).values()
    if height >= 1000:
        assert all(WHOLE_GROUPS <= count <= ALL_GROUPS for count in redone), redone
    if height == 10 and dtype == jnp.bfloat16:
        assert not any(redone), redone


@dtypes
@head_dims
@masks
def test_scores_that_start_low(diagonal, h, dtype):
    """The blocks that are read first lie far below the rest, or climb to it: no reference there."""
    ones = np.ones((B, T, N), np.float32)
    args = inputs(h, dtype)
    for blocks in (1, 3):
        for shape in ("step", "ramp"):
            low = np.zeros(S, np.float32)
            count = 64 * blocks + (0 if diagonal is None else T)
            low[-count:] = -1000 if shape == "step" else np.linspace(0, -10000, count)
            redone = checked(along_one_channel(args, ones, low), diagonal).values()
            assert all(WHOLE_GROUPS <= x <= ALL_GROUPS for x in redone), (blocks, shape, redone)


@dtypes
@head_dims
@pytest.mark.parametrize("score", [-10000.0, 0.0, 10000.0])
def test_equal_scores_need_no_redo(score, h, dtype):
    """However far from 0 they are."""
    ones = np.ones((B, T, N), np.float32)
    q, k, v = inputs(h, dtype)
    args = along_one_channel((q * 0, k * 0, v), ones, np.full(S, score))
    for diagonal in (None, S - T):
        assert not any(checked(args, diagonal).values())


@dtypes
@head_dims
@masks
@pytest.mark.parametrize("factor", [30, 200])
def test_peaked_rows_are_done_again(factor, diagonal, h, dtype):
    """Query times 30: some of the rows. Times 200: a row or more of nearly every group."""
    q, k, v = inputs(h, dtype)
    redone = checked((q * factor, k, v), diagonal).values()
    least = 1 if factor == 30 else 0.9 * WHOLE_GROUPS
    assert all(least <= count <= ALL_GROUPS for count in redone), redone


def float16_headroom():
    """Bits below 1 that the kernels keep for float16's probabilities."""
    source = direct.REPOSITORY / "cuda" / "core" / "softmax.cuh"
    found = re.search(r"kHeadroomLog2 =[^;]*\? ([\d.]+)f : 0\.0f;", source.read_text())
    assert found, f"{source} says it in another way"
    return float(found[1])


# The largest rise in nats that needs no redo: the net accepts sums up to 2^120, and float16 ends at
# 2^16. The reference is a maximum of a few standard normal numbers, so the edge itself is a few
# nats wide.
EDGES = {
    "bfloat16": 120 * np.log(2),
    "float16": (16 + float16_headroom()) * np.log(2),
}


@dtypes
@head_dims
@masks
def test_on_both_sides_of_the_edge(diagonal, h, dtype):
    """Just in range, just out of it, and between: right with and without a redo."""
    args = inputs(h, dtype)
    edge = EDGES[np.dtype(dtype).name]
    for rise, wanted in (
        (edge - 8, {0}),
        *((edge + step, {0, 1, 2, 3}) for step in (-3, -2, -1, 0, 1, 2, 3)),
        (edge + 8, {CHOSEN_GROUPS}),
    ):
        peaked = along_one_channel(args, chosen_rows(), one_key(5, rise))
        assert set(checked(peaked, diagonal).values()) <= wanted, rise


@head_dims
@masks
def test_float16_probabilities_far_below_one(h, diagonal):
    """A reference 12 nats above nearly everything: float16's denormals still carry the rest."""
    ones = np.ones((B, T, N), np.float32)
    high = np.zeros(S, np.float32)
    high[-1 if diagonal is None else slice(-T, None)] = 12
    q, k, v = inputs(h, jnp.float16)
    assert not any(checked(along_one_channel((q, k, v), ones, high), diagonal).values())
    # And outputs up to float16's largest.
    assert not any(checked((q, k, jnp.clip(v * 20000, -65000, 65000)), diagonal).values())


@dtypes
@head_dims
@pytest.mark.parametrize("rise", [10, 12, 13, 14, 15, 16, 18])
def test_small_weights_of_many_keys_add_up(rise, h, dtype):
    """16k keys behind a reference that is so much higher: 1 % of the weight, none to be lost.

    In float16 each is a denormal number, or would be 0 with too much headroom. The values' mean is
    1, so that what is lost shows. Causal tiles are never cut: one reference for all.
    """
    s, t = 16384, 64
    q, k, v = (
        helpers.fresh_rng().standard_normal((1, x, n, h), np.float32)
        for x, n in ((t, 2), (s, 1), (s, 1))
    )
    q[..., 0], k[..., 0] = np.sqrt(h), 0
    k[:, -t:, :, 0] = rise
    args = tuple(x.astype(dtype) for x in (q, k, 1 + v / 8))
    for name in configurations(dtype, h, causal=True):
        result = direct.run(name, *args, diagonal=s - t)
        assert result.redone == 0
        try:
            check_against_numpy(result, args, see_causal(t, s, s - t))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@dtypes
@head_dims
@masks
def test_nan_in_a_query_costs_one_group(diagonal, h, dtype):
    """A NaN goes through the redo, comes out as NaN, and stays in its row."""
    q, k, v = inputs(h, dtype)
    exact, _ = yardsticks(q, k, v, diagonal)
    for name, result in lazy_results((q.at[0, 63, 0, 3].set(np.nan), k, v), diagonal):
        nan = np.asarray(jnp.isnan(result.out).any(-1))
        assert np.argwhere(nan).tolist() == [[0, 63, 0]], name
        assert np.argwhere(np.isnan(result.lse)).tolist() == [[0, 63, 0]], name
        if direct.is_lazy(direct.plan(name, q, k, diagonal is not None)):
            assert result.redone == 1, name
        others = jnp.where(jnp.isnan(result.out), 0, result.out.astype(jnp.float32) - exact[0])
        assert float(jnp.abs(others).max()) < 0.05, name


@dtypes
@head_dims
@masks
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
def test_infinities_in_a_key_cost_the_groups_that_they_reach(value, diagonal, h, dtype):
    """A score of plus infinity or NaN makes NaN of its row; of minus infinity takes no weight."""
    q, k, v = inputs(h, dtype)
    k = k.at[0, 33, 1, 3].set(value)
    heads = slice(N // K, 2 * N // K)  # that read key head 1
    component = np.asarray(q[0, :, heads, 3], np.float32)
    with np.errstate(invalid="ignore"):
        loud = ~np.isneginf(component * value)  # [T, 4]
    # A group's rows behind the last query are zeros, and zero times infinity is NaN.
    whole = loud[: T // 64 * 64].reshape(-1, 64, N // K)
    groups = whole.any(1).sum() + N // K * (T % 64 > 0)
    for name, result in lazy_results((q, k, v), diagonal):
        nan = np.asarray(jnp.isnan(result.out).all(-1))
        np.testing.assert_array_equal(nan[0, :, heads], loud, name)
        assert nan.sum() == loud.sum(), name
        assert not bool((jnp.isnan(result.out).any(-1) ^ nan).any()), name
        if direct.is_lazy(direct.plan(name, q, k, diagonal is not None)):
            assert result.redone == groups, name
    quiet, _ = yardsticks(q, k.at[0, 33, 1].set(0), v, diagonal)
    assert bool(jnp.isfinite(quiet[0]).all())  # the rest of the inputs is harmless


@dtypes
@head_dims
@masks
def test_infinities_in_a_value_cost_the_groups_that_read_it(diagonal, h, dtype):
    """The sums are in range, the output is not: one column of every row of the head."""
    q, k, v = inputs(h, dtype)
    for value in (np.nan, np.inf):
        bad = v.at[0, 33, 1, 3].set(value)
        for name, result in lazy_results((q, k, bad), diagonal):
            finite = np.asarray(jnp.isfinite(result.out))
            wanted = np.ones(finite.shape, bool)
            wanted[0, :, N // K : 2 * N // K, 3] = False
            np.testing.assert_array_equal(finite, wanted, name)
            if direct.is_lazy(direct.plan(name, q, k, diagonal is not None)):
                assert result.redone == 3 * N // K, name


@dtypes
@head_dims
@pytest.mark.parametrize("diagonal", [-130, -66, -1, 62, 63, 64, 79, 127, 128, 159, 191, 255, 319])
def test_masked_blocks_that_begin_right_behind_a_rows_last_key(diagonal, h, dtype):
    """Diagonals on a block's edge: the first row's reference must still be a score of its own.

    And rows that see nothing at all, in one tile with rows that are done again.
    """
    q, k, v = inputs(h, dtype)
    checked((q * 30, k, v), diagonal)
    ones = np.ones((B, T, N), np.float32)
    rise = np.linspace(0, -2000, S, dtype=np.float32)
    checked(along_one_channel((q, k, v), ones, rise), diagonal)


@dtypes
@head_dims
@masks
def test_peaked_rows_are_as_accurate_as_plain_jax(diagonal, h, dtype):
    """Query times 8, few keys matter: rms error at most 1.2 times plain JAX's in the dtype."""
    q, k, v = inputs(h, dtype)
    args = q * 8, k, v
    exact, plain = yardsticks(*args, diagonal)

    @jax.jit
    def rms(out):
        return jnp.sqrt(jnp.mean((out.astype(jnp.float32) - exact[0]) ** 2))

    for name, result in lazy_results(args, diagonal):
        ratio = float(rms(result.out)) / float(rms(plain[0]))
        assert ratio <= 1.2, f"{name}: {ratio:.3f} times plain JAX's error"
