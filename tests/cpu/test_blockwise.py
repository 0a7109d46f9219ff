"""The blockwise xla path on its own: values, derivatives, memory and the list of visited tiles.

Most tests cut small problems into tiles of 16 queries and 24 keys, so that every result crosses
tiles; lengths in the data are no multiples of those.
"""

import functools

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import fresh_rng, normal
from jax.test_util import check_grads

import jax_fa3
from jax_fa3 import _blockwise, reference
from jax_fa3._spec import DIFFERENTIABLE, AttentionSpec, Operands

NAN = float("nan")
WIDEST = 2**31 - 1

# Sums of up to a few hundred terms of order one, in another order than the reference's.
TOLERANCE = {np.dtype("float32"): 1e-5, np.dtype("float64"): 1e-13}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(_blockwise, "_block_sizes", lambda heads, seqlen_q: (16, 24))


def make_spec(dtype=jnp.float32, **options):
    plain = {
        "scale": 0.5,
        "is_causal": False,
        "causal_alignment": "top_left",
        "window": (None, None),
        "logits_soft_cap": None,
        "deterministic_backward": False,
        "out_dtype": np.dtype(dtype),
    }
    return AttentionSpec(**{**plain, **options})


def make_operands(batch=(2,), t=35, s=50, n=4, k=2, h=8, d=6, dtype=jnp.float32, **fields):
    q, k, v = helpers.qkv(batch=batch, t=t, s=s, n=n, k=k, h=h, d=d, dtype=dtype)
    return Operands(q, k, v, **fields)


def draw_call(rng, dtype=jnp.float32):
    """A random call: any option may be there, alone or with any other."""

    def one_of(*options):
        return options[rng.integers(len(options))]

    def maybe(probability, make):
        return make() if rng.random() < probability else None

    def integers(low, high, *shape):
        return jnp.asarray(rng.integers(low, high, shape, endpoint=True), jnp.int32)

    def floats(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    batch = one_of((), (2,), (2, 3))
    t, s = (int(rng.integers(1, largest)) for largest in (50, 60))
    k, group, h, d = one_of(1, 2), one_of(1, 3), one_of(4, 8), one_of(4, 5, 8)
    n = k * group
    dense = (*(one_of(1, size) for size in batch), one_of(1, n), one_of(1, t), one_of(1, s))
    positions = rng.random() < 0.15
    alignment = one_of("top_left", "bottom_right")
    segments = not positions and rng.random() < 0.3
    offset = None
    if not positions and alignment == "top_left" and rng.random() < 0.4:
        offset = one_of(integers(-t, s, *batch), integers(-WIDEST - 1, WIDEST, *batch))
    operands = Operands(
        floats(*batch, t, n, h),
        floats(*batch, s, k, h),
        floats(*batch, s, k, d),
        bias=maybe(0.4, lambda: floats(*dense)),
        mask=maybe(0.3, lambda: jnp.asarray(rng.random(dense) < 0.7)),
        query_offset=offset,
        query_seq_lengths=maybe(0.3, lambda: integers(0, t, *batch)),
        key_value_seq_lengths=maybe(0.3, lambda: integers(0, s, *batch)),
        query_segment_ids=integers(0, 2, *batch, t) if segments else None,
        key_value_segment_ids=integers(0, 2, *batch, s) if segments else None,
        query_positions=integers(0, t, *batch, t) if positions else None,
        key_positions=integers(0, s, *batch, s) if positions else None,
        sinks=maybe(0.3, lambda: floats(n)),
    )
    distance = functools.partial(one_of, None, 0, 3, 20, WIDEST)
    spec = make_spec(
        dtype,
        scale=float(rng.uniform(0.1, 1)),
        is_causal=bool(rng.random() < 0.5),
        causal_alignment=alignment,
        window=(distance(), distance()) if rng.random() < 0.5 else (None, None),
        logits_soft_cap=one_of(None, None, 2.0),
    )
    return spec, operands


def differentiable(operands):
    found = {name: getattr(operands, name) for name in DIFFERENTIABLE}
    return {name: x for name, x in found.items() if x is not None}


def output_shapes(operands):
    *batch, t, n, _ = operands.query.shape
    return (*batch, t, n, operands.value.shape[-1]), (*batch, n, t)


def make_cotangents(operands, dtype=None):
    out, lse = output_shapes(operands)
    dtype = operands.query.dtype if dtype is None else dtype
    return normal(out, dtype), normal(lse, helpers.wide(operands.query.dtype))


def value_and_gradients(attend, spec, operands, cotangents):
    """((out, lse), gradients by name) from `attend`, in one compilation."""

    @jax.jit
    def both(arrays, operands, cotangents):
        value, pullback = jax.vjp(lambda a: attend(spec, operands._replace(**a)), arrays)
        return value, pullback(cotangents)[0]

    return both(differentiable(operands), operands, cotangents)


def assert_agree(actual, expected, tolerance=None):
    """Infinities alike, no NaN, the rest within `tolerance` of the largest expected value."""

    def one(actual, expected):
        actual, expected = np.asarray(actual), np.asarray(expected)
        bound = TOLERANCE[expected.dtype] if tolerance is None else tolerance
        assert not np.isnan(expected).any()
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(actual[~finite], expected[~finite])
        size = 1 + np.abs(expected[finite]).max(initial=0)
        np.testing.assert_allclose(actual[finite], expected[finite], rtol=0, atol=bound * size)

    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    jax.tree.map(one, actual, expected)


def assert_matches_the_reference(spec, operands, tolerance=None):
    cotangents = make_cotangents(operands)
    actual = value_and_gradients(_blockwise.attention, spec, operands, cotangents)
    expected = value_and_gradients(reference.attend, spec, operands, cotangents)
    assert_agree(actual, expected, tolerance)


# --- values and gradients ---------------------------------------------------------------------


@pytest.mark.usefixtures("small_tiles", "quick_compile")
@pytest.mark.parametrize("seed", range(10))
def test_any_mix_of_options_agrees_with_the_reference(seed):
    assert_matches_the_reference(*draw_call(np.random.default_rng(seed)))


@pytest.mark.usefixtures("small_tiles", "quick_compile")
def test_float64_is_computed_in_float64():
    with jax.enable_x64(True):
        assert_matches_the_reference(*draw_call(np.random.default_rng(101), jnp.float64))


def test_whole_tiles_of_the_real_sizes_agree_with_the_reference():
    """Several tiles of the sizes that users get, the last of them padded."""
    operands = make_operands(batch=(), t=700, s=1100, n=2, k=1, h=16, d=16)
    spec = make_spec(is_causal=True, causal_alignment="bottom_right")
    assert_matches_the_reference(spec, operands)


@pytest.mark.usefixtures("small_tiles", "quick_compile")
@pytest.mark.parametrize("shape", [(2, 1, 35, 1), (1, 4, 1, 50)])
def test_dense_bias_gradient_is_summed_to_the_bias_shape(shape):
    operands = make_operands(bias=normal(shape))
    assert_matches_the_reference(make_spec(logits_soft_cap=1.5), operands)


@pytest.mark.usefixtures("small_tiles", "quick_compile")
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_16_bit_error_is_within_that_of_plain_jax(dtype):
    """Twice plain JAX's error in the same dtype, three times for gradients (API.md's bound)."""
    operands = make_operands(t=80, s=96, h=32, d=32, dtype=dtype)
    spec = make_spec(dtype, scale=32**-0.5)
    wide_spec = make_spec(jnp.float32, scale=32**-0.5)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), operands)
    dout, dlse = make_cotangents(operands)

    def plain(spec, operands):
        see = jnp.ones((80, 96), bool)
        out, lse = helpers.plain(
            operands.query, operands.key, operands.value, see, scale=spec.scale
        )
        return out, jnp.swapaxes(lse, -1, -2)

    actual = value_and_gradients(_blockwise.attention, spec, operands, (dout, dlse))
    yardstick = value_and_gradients(plain, spec, operands, (dout, dlse))
    wide_cotangents = (dout.astype(jnp.float32), dlse)
    exact = value_and_gradients(reference.attend, wide_spec, wide, wide_cotangents)
    # Plain JAX's lse is float32 as ours, so both errors there are float32 rounding.
    helpers.assert_within_reference_error(actual[0], yardstick[0], exact[0], factor=2)
    helpers.assert_within_reference_error(actual[1], yardstick[1], exact[1], factor=3)
    chex.assert_type([*actual[1].values()], dtype)


@pytest.mark.usefixtures("small_tiles", "quick_compile")
def test_backward_works_from_the_saved_out_and_lse():
    spec, operands = make_spec(is_causal=True), make_operands(bias=normal((1, 4, 35, 50)))
    operands = operands._replace(sinks=normal((4,)))
    cotangents = make_cotangents(operands)
    (out, lse), expected = value_and_gradients(_blockwise.attention, spec, operands, cotangents)
    chex.assert_trees_all_equal(
        (out, lse), jax.jit(_blockwise.forward, static_argnums=0)(spec, operands)
    )
    actual = jax.jit(_blockwise.backward, static_argnums=0)(spec, operands, out, lse, *cotangents)
    assert_agree(differentiable(actual), expected)
    others = set(Operands._fields) - set(DIFFERENTIABLE)
    assert all(getattr(actual, name) is None for name in others)
    # From the saved values, not from new ones: another lse scales the probabilities.
    moved = jax.jit(_blockwise.backward, static_argnums=0)(
        spec, operands, out, lse + jnp.log(2.0), *cotangents
    )
    chex.assert_trees_all_close(moved.value, expected["value"] / 2, atol=1e-5)


@pytest.mark.usefixtures("small_tiles", "quick_compile")
@pytest.mark.parametrize(
    "sizes", [{"t": 0}, {"s": 0}, {"n": 0, "k": 0}, {"d": 0}, {"batch": (0,)}], ids=str
)
def test_empty_dimensions(sizes):
    operands = make_operands(**sizes)
    sinks = normal((operands.query.shape[-2],))
    assert_matches_the_reference(make_spec(is_causal=True), operands._replace(sinks=sinks))


# --- float8 -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_tiles", "quick_compile")
def test_float8_dequantises_and_quantises_the_probabilities():
    t, s = 150, 200  # blocks of 64 tokens: the last one is short
    float8 = jnp.float8_e4m3fn
    operands = make_operands(t=t, s=s, dtype=float8)
    operands = operands._replace(
        query_descale=jnp.exp(normal((2, 3, 4))),
        key_descale=jnp.exp(normal((2, 4, 2))),
        value_descale=jnp.exp(normal((2, 4, 2))),
    )
    spec = make_spec(jnp.bfloat16, scale=0.2)
    out, lse = jax.jit(_blockwise.attention, static_argnums=0)(spec, operands)
    chex.assert_type([out, lse], [jnp.bfloat16, jnp.float32])
    exact, exact_lse = reference.attend(make_spec(jnp.float32, scale=0.2), operands)
    # Scores and lse are exact products; only the probabilities are rounded, to 3 bits of fraction.
    chex.assert_trees_all_close(lse, exact_lse, atol=1e-5, rtol=1e-5)
    weights, _ = reference.attend(
        make_spec(jnp.float32, scale=0.2),
        operands._replace(value=jnp.abs(operands.value.astype(jnp.float32)).astype(float8)),
    )
    error = np.abs(np.asarray(out, np.float32) - np.asarray(exact))
    assert (error <= 2**-4 * np.asarray(weights) + 2**-8 * np.abs(exact) + 1e-6).all()
    assert error.max() > 2**-10 * np.abs(exact).max(), "the probabilities were not rounded"


def test_float8_gradient_is_refused_with_the_recipe():
    spec, operands = make_spec(jnp.bfloat16), make_operands(dtype=jnp.float8_e4m3fn)
    dout, dlse = make_cotangents(operands, jnp.bfloat16)
    for call in (
        lambda: value_and_gradients(_blockwise.attention, spec, operands, (dout, dlse)),
        lambda: _blockwise.backward(spec, operands, dout, dlse, dout, dlse),
    ):
        with pytest.raises(jax_fa3.UnsupportedError, match="16-bit"):
            call()


# --- what masked and missing things may not do ------------------------------------------------


@pytest.mark.usefixtures("small_tiles", "quick_compile")
def test_nan_beyond_the_lengths_stays_there():
    q_lengths, kv_lengths = jnp.array([35, 13], jnp.int32), jnp.array([11, 50], jnp.int32)
    clean = make_operands(
        query_seq_lengths=q_lengths,
        key_value_seq_lengths=kv_lengths,
        bias=normal((2, 4, 35, 50)),
        sinks=normal((4,)),
    )
    beyond = jnp.arange(35) >= q_lengths[:, None]
    bias = jnp.where(beyond[:, None, :, None], NAN, clean.bias)
    poisoned = clean._replace(
        query=helpers.poison(clean.query, q_lengths),
        key=helpers.poison(clean.key, kv_lengths),
        value=helpers.poison(clean.value, kv_lengths),
        bias=helpers.poison(bias, kv_lengths, axis=-1),
    )
    dout, dlse = make_cotangents(clean)
    poisoned_cotangents = (
        helpers.poison(dout, q_lengths),
        helpers.poison(dlse, q_lengths, axis=-1),
    )
    spec = make_spec(is_causal=True, causal_alignment="bottom_right")
    expected = value_and_gradients(_blockwise.attention, spec, clean, (dout, dlse))
    actual = value_and_gradients(_blockwise.attention, spec, poisoned, poisoned_cotangents)
    chex.assert_trees_all_equal(actual, expected)
    chex.assert_tree_all_finite(actual[1])
    assert (actual[0][0][1, 13:] == 0).all()
    assert jnp.isneginf(actual[0][1][1, :, 13:]).all()
    for name, lengths in (("query", q_lengths), ("key", kv_lengths), ("value", kv_lengths)):
        zeros = helpers.poison(actual[1][name], lengths, value=0.0)
        chex.assert_trees_all_equal(actual[1][name], zeros)


@pytest.mark.usefixtures("small_tiles", "quick_compile")
def test_nan_in_a_valid_query_makes_nan_of_that_row_alone():
    spec, operands = make_spec(is_causal=True), make_operands()
    poisoned = operands._replace(query=operands.query.at[1, 20, 3, 0].set(NAN))
    out, lse = jax.jit(_blockwise.forward, static_argnums=0)(spec, operands)
    nan_out, nan_lse = jax.jit(_blockwise.forward, static_argnums=0)(spec, poisoned)
    chex.assert_trees_all_equal(nan_out, out.at[1, 20, 3].set(NAN))
    chex.assert_trees_all_equal(nan_lse, lse.at[1, 3, 20].set(NAN))
    # Backward it reaches the keys which that row sees, and no others.
    _, gradients = value_and_gradients(
        _blockwise.attention, spec, poisoned, make_cotangents(operands)
    )
    nan = {name: jnp.isnan(x).any(-1) for name, x in gradients.items()}
    assert not nan["query"].at[1, 20, 3].set(False).any()
    assert not nan["value"].at[1, :21, 1].set(False).any()


@pytest.mark.usefixtures("small_tiles", "quick_compile")
@pytest.mark.parametrize("hide", ["mask", "bias", "offset", "segments", "window"])
def test_rows_without_a_key_give_zero_and_take_no_part(hide):
    """Whatever hid the keys of rows 3 to 7, and whatever their cotangents hold."""
    rows = (jnp.arange(35) >= 3) & (jnp.arange(35) < 8)
    operands, spec = make_operands(), make_spec()
    if hide == "mask":
        operands = operands._replace(mask=~rows[None, None, :, None])
    elif hide == "bias":
        operands = operands._replace(bias=jnp.where(rows, -jnp.inf, 0.0)[None, None, :, None])
    elif hide == "segments":
        ids = jnp.broadcast_to(rows.astype(jnp.int32), (2, 35))
        operands = operands._replace(
            query_segment_ids=ids, key_value_segment_ids=jnp.zeros((2, 50), jnp.int32)
        )
    elif hide == "offset":
        rows = jnp.arange(35) < 8
        spec = make_spec(is_causal=True)
        operands = operands._replace(query_offset=jnp.full((2,), -8, jnp.int32))
    else:
        rows = jnp.arange(35) >= 12
        operands = make_operands(s=10)
        spec = make_spec(window=(2, 2))
    dout, dlse = make_cotangents(operands)
    dout = jnp.where(rows[:, None, None], NAN, dout)
    dlse = jnp.where(rows, NAN, dlse)
    (out, lse), gradients = value_and_gradients(_blockwise.attention, spec, operands, (dout, dlse))
    assert (out[:, rows] == 0).all()
    assert jnp.isneginf(lse[..., rows]).all()
    chex.assert_tree_all_finite((out, lse[..., ~rows], gradients))
    assert (gradients["query"][:, rows] == 0).all()
    assert (gradients["query"][:, ~rows] != 0).any()


# --- which tiles are visited ------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_visited_tiles_are_those_with_a_visible_score(seed, small_tiles):
    """Static masks, against the dense mask: none missed, none in vain, edges only where needed."""
    rng = np.random.default_rng(seed)
    t, s = rng.integers(1, 130, 2).tolist()
    sides = [None, *rng.integers(0, 60, 2).tolist()]
    spec = make_spec(
        is_causal=bool(rng.integers(2)),
        causal_alignment=["top_left", "bottom_right"][rng.integers(2)],
        window=(sides[rng.integers(3)], sides[rng.integers(3)]),
    )
    operands = make_operands(t=t, s=s)
    see = np.broadcast_to(reference.visible(spec, operands), (1, t, s))[0]
    tiles = _blockwise._Tiles(spec, operands)
    visible, cut = tiles._visible_tiles()
    chex.assert_shape([visible, cut], (tiles.num_q, tiles.num_k))
    for i, j in np.ndindex(tiles.num_q, tiles.num_k):
        rows = slice(i * tiles.block_q, (i + 1) * tiles.block_q)
        columns = slice(j * tiles.block_k, (j + 1) * tiles.block_k)
        padded = see[rows, columns].shape[1] != tiles.block_k
        assert visible[i, j] == see[rows, columns].any(), (i, j)
        assert cut[i, j] == (visible[i, j] and (padded or not see[rows, columns].all())), (i, j)


def test_causal_attention_visits_about_half_of_the_tiles():
    operands = jax.eval_shape(lambda: make_operands(batch=(), t=8192, s=8192, n=8, k=8))
    visible, _ = _blockwise._Tiles(make_spec(is_causal=True), operands)._visible_tiles()
    assert visible.mean() < 0.52


def test_the_program_does_not_grow_with_the_sequence():
    def size(length):
        operands = jax.eval_shape(lambda: make_operands(batch=(), t=length, s=length))
        spec = make_spec(is_causal=True)

        def gradients(operands):
            return value_and_gradients(
                _blockwise.attention, spec, operands, make_cotangents(operands)
            )

        return jax.jit(gradients).lower(operands).as_text().count("\n")

    assert size(2**15) == size(2**12)


# --- memory -----------------------------------------------------------------------------------


def temporary_bytes(f, *shapes):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    analysis = jax.jit(f).lower(*shapes).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def loss_of_8192(is_causal):
    spec = make_spec(is_causal=is_causal)
    return lambda *qkv: _blockwise.attention(spec, Operands(*qkv))[0].sum(), (8192, 1, 64)


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradient_of_8192_tokens_needs_little_of_the_score_matrix(is_causal):
    loss, shape = loss_of_8192(is_causal)
    assert temporary_bytes(jax.grad(loss, (0, 1, 2)), *[shape] * 3) < 8192 * 8192 * 4 / 10


def test_second_derivatives_need_linear_memory_too():
    loss, shape = loss_of_8192(False)

    def loss_of_gradient(*qkv):
        return sum((g**2).sum() for g in jax.grad(loss, (0, 1, 2))(*qkv))

    assert temporary_bytes(jax.grad(loss_of_gradient), *[shape] * 3) < 8192 * 8192 * 4 / 4


def test_bias_without_a_gradient_costs_no_memory_for_one():
    spec, shape = make_spec(), (2048, 1, 16)

    def loss(bias, *qkv):
        return _blockwise.attention(spec, Operands(*qkv, bias=bias))[0].sum()

    gradient = jax.grad(loss, (1, 2, 3))
    assert temporary_bytes(gradient, (1, 2048, 2048), *[shape] * 3) < 2048 * 2048 * 4 / 2


# --- transformations --------------------------------------------------------------------------


@pytest.mark.usefixtures("small_tiles", "quick_compile")
def test_reverse_over_reverse():
    ids = jnp.asarray(fresh_rng().integers(0, 2, (2, 30)), jnp.int32)
    fixed = {
        "query_segment_ids": ids,
        "key_value_segment_ids": ids,
        "query_seq_lengths": jnp.array([30, 19], jnp.int32),
    }
    # The last keys are seen by no query, and their scores would overflow exp.
    bias = normal((1, 4, 1, 30)).at[..., 25:].set(200.0)
    operands = make_operands(t=30, s=30, h=4, d=4, bias=bias, sinks=normal((4,)))
    fixed["mask"] = (jnp.arange(30) < 25)[None, None, None]
    spec = make_spec(is_causal=True, window=(21, None))
    arrays, weights = differentiable(operands), make_cotangents(operands)

    def gradients(attend, arrays):
        def loss(arrays):
            out, lse = attend(spec, Operands(**arrays, **fixed))
            lse = jnp.where(jnp.isneginf(lse), 0, lse)
            return (out * weights[0]).sum() + (lse * weights[1]).sum()

        return jax.grad(loss)(arrays)

    directions = jax.tree.map(lambda x: normal(x.shape), arrays)

    def second(attend, arrays):
        return jax.vjp(functools.partial(gradients, attend), arrays)[1](directions)

    actual = jax.jit(functools.partial(second, _blockwise.attention))(arrays)
    assert_agree(actual, jax.jit(functools.partial(second, reference.attend))(arrays), 3e-5)


@pytest.mark.usefixtures("small_tiles", "quick_compile")
def test_numeric_derivatives_of_second_order():
    operands = make_operands(batch=(), t=20, s=26, n=2, k=1, h=4, d=4)
    spec = make_spec(is_causal=True, causal_alignment="bottom_right", logits_soft_cap=3.0)

    @jax.jit
    def f(*qkv):
        return _blockwise.attention(spec, Operands(*qkv))

    check_grads(f, operands[:3], order=2, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.usefixtures("small_tiles", "quick_compile")
@pytest.mark.parametrize("mapped", ["query", "value", "key sinks"])
def test_gradients_under_vmap_are_those_of_each_row(mapped):
    """Also of lse where it is not mapped, as under a vmap over value alone."""
    mapped = mapped.split()
    operands = make_operands(batch=(), sinks=normal((4,)))
    arrays = differentiable(operands)
    rows = {name: normal((3, *arrays[name].shape)) for name in mapped}
    out_shape, lse_shape = output_shapes(operands)
    weights = normal((3, *out_shape)), normal((3, *lse_shape))
    spec = make_spec()

    def loss(attend, arrays, rows):
        def one(row, weights):
            out, lse = attend(spec, Operands(**{**arrays, **row}))
            return out, lse

        out, lse = jax.vmap(one)(rows, weights)
        return (out * weights[0]).sum() + (lse * weights[1]).sum()

    def gradients(attend):
        return jax.jit(jax.grad(functools.partial(loss, attend), (0, 1)))(arrays, rows)

    assert_agree(gradients(_blockwise.attention), gradients(reference.attend))


def test_a_vmap_over_the_query_copies_no_keys():
    rows, keys = 64, (4096, 1, 32)
    spec = make_spec()

    def attend(q, k, v):
        return _blockwise.attention(spec, Operands(q, k, v))[0]

    mapped = jax.vmap(attend, (0, None, None))
    copies = temporary_bytes(mapped, (rows, 1, 1, 32), keys, keys) / (4096 * 32 * 4)
    assert copies < 8, f"{copies} times the keys, for {rows} rows"
