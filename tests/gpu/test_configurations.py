"""Every configuration of the forward by its name, where its own tiles, rings and waves end.

The plan chooses by size, so small problems through the front door never reach most of them.
"""
# Options and arrays reach typed functions through ** and *.
# pyright: reportArgumentType=false, reportCallIssue=false

import itertools

import direct
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bounds import check_against_float32, check_against_numpy
from direct import configurations
from helpers import assert_same_bits, fresh_rng
from kernel_helpers import DTYPES, HEAD_DIMS, check, see_causal

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
head_dims = pytest.mark.parametrize("h", HEAD_DIMS)
masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def draw(b, t, s, n, k, h, dtype):
    """query, key, value in NumPy: a test of many shapes would compile for each on the device."""
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, h)
    return tuple(fresh_rng().standard_normal(x, np.float32).astype(dtype) for x in shapes)


def tiles_of(name, h, dtype, causal):
    """(query rows a CTA, keys a stage) of a configuration."""
    any_size = jax.ShapeDtypeStruct((1, 64, 1, h), dtype)
    return direct.tile(name, any_size, any_size, causal)


@dtypes
@head_dims
@masks
def test_both_sides_of_a_configurations_own_edges(causal, h, dtype):
    """Lengths of one tile, one warpgroup's rows, one stage, a ring and a few, each off by one."""
    for name in configurations(dtype, h, causal):
        rows, keys = tiles_of(name, h, dtype, causal)
        ts = [1, 63, 64, 65, rows - 1, rows, rows + 1, 2 * rows + 1]
        ss = [1, 15, keys - 1, keys, keys + 1, 2 * keys, 3 * keys + 1, 5 * keys - 1, 6 * keys + 1]
        pairs = itertools.zip_longest(ts, ss, fillvalue=rows // 2 + 3)
        calls = [
            (name, draw(2, t, s, 2, 1, h, dtype), diagonal)
            for t, s in pairs
            for diagonal in ((0, s - t) if causal else (None,))
        ]
        for (_, args, diagonal), got in zip(calls, direct.run_all(calls)):
            t, s = args[0].shape[1], args[1].shape[1]
            see = see_causal(t, s, diagonal) if causal else None
            check(got[:2], *args, see=see, what=f"{name} diagonal {diagonal}")


@dtypes
@head_dims
@masks
def test_many_tiles_a_cta_with_none_one_and_more_key_blocks(causal, h, dtype):
    """The rings run on from tile to tile: a phase that is off by one shows in the next tile.

    Causal each batch row sees from none of the keys to all. Their warpgroups end at blocks of their
    own, so that some let blocks pass which others still read.
    """
    b, t, n = 100, 257, 2  # 400 tiles of 192 or 256 rows, 600 of 128
    for s in (1, 64, 193):
        args = tuple(map(jnp.asarray, draw(b, t, s, n, 1, h, dtype)))
        offset = jnp.asarray(fresh_rng().integers(-t - 5, s + 5, b), jnp.int32) if causal else None
        for name in configurations(dtype, h, causal):
            got = direct.run(name, *args, query_offset=offset)
            try:
                check_against_float32(got, args, offset)
            except AssertionError as error:
                raise AssertionError(f"{name}, {s} keys: {error}") from error


# Few tiles and many keys: the plan cuts every tile along the keys where a configuration can.
FEW = {"b": 1, "t": 100, "n": 2, "k": 1}


@dtypes
@head_dims
@pytest.mark.parametrize("s", [200, 1000, 4113, 16384])
def test_tiles_that_are_cut_along_the_keys(s, h, dtype):
    """Pieces with all kinds of scores, joined: an empty weight, a dominant one, none finite."""
    q, k, v = draw(**FEW, s=s, h=h, dtype=dtype)
    q[..., 0] = np.sqrt(h)
    third = slice(s // 3, 2 * s // 3)

    def keys(where=None, score=0.0, others=0.0):
        """Channel 0 is the score, the other channels are random."""
        changed = k.copy()
        changed[..., 0] = others
        if where is not None:
            changed[:, where, :, 0] = score
        return changed

    cases = {
        "plain": keys(),
        "one piece weighs nothing": keys(third, -500),
        "one piece weighs all": keys(third, 500),
        "the first key outweighs the rest": keys(0, 500),
        "the last key outweighs the rest": keys(-1, 500),
        # Scores of minus infinity are keys that are not there, however low the others are.
        "one piece is not there": keys(third, -np.inf),
        "one piece is not there, the others low": keys(third, -np.inf, others=-500),
    }
    names = configurations(dtype, h, causal=False)
    plans = [direct.plan(name, q, k, False) for name in names]
    assert s < 4000 or any("cut into" in plan for plan in plans), plans
    for name in names:
        for what, key in cases.items():
            there = np.isfinite(key[0, :, 0, 0].astype(np.float32))
            kept = key[:, there], v[:, there]
            try:
                check_against_numpy(direct.run(name, q, key, v), (q, *kept))
            except AssertionError as error:
                raise AssertionError(f"{name}, {what}: {error}") from error
        # NaN in one key reaches all rows; in one row, no other.
        assert np.isnan(direct.run(name, q, keys(s // 2, np.nan), v).out).all(), name
        lonely = q.copy()
        lonely[0, 70, 1] = np.nan
        rows = np.isnan(direct.run(name, lonely, k, v).out).any(-1)
        assert np.argwhere(rows).tolist() == [[0, 70, 1]], name


@head_dims
def test_cut_tiles_repeat_bit_for_bit(h):
    """Whoever finishes last joins the pieces, always in the order of the keys."""
    q, k, v = draw(**FEW, s=4113, h=h, dtype=jnp.bfloat16)
    for name in configurations(jnp.bfloat16, h, causal=False):
        for factor in (1, 30):
            args = q * factor, k, v
            first = direct.run(name, *args)
            for _ in range(50):
                again = direct.run(name, *args)
                assert_same_bits(again[:2], first[:2], name)
                assert again.redone == first.redone


@dtypes
@head_dims
@masks
def test_all_configurations_agree(causal, h, dtype):
    """Sizes that are a multiple of nothing; each within the bound of the same values."""
    args = tuple(map(jnp.asarray, draw(2, 1111, 1777, 6, 2, h, dtype)))
    for name in ["", *configurations(dtype, h, causal)]:
        for diagonal in (0, 666) if causal else (None,):
            check_against_float32(direct.run(name, *args, diagonal=diagonal), args, diagonal)
