"""The reference: against the definition written as loops, and against jax.nn where they agree."""

import math

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import normal, qkv
from jax.test_util import check_grads

import jax_fa3
from jax_fa3 import reference

pytestmark = pytest.mark.usefixtures("quick_compile")

attend = reference.dot_product_attention
NAN = float("nan")


# --- the definition, one score at a time ------------------------------------------------------


def sees(options, b, n, t, s, sizes):
    """Whether query t of row b sees key s: the sentences of the contract, in Python integers."""
    seqlen_q, seqlen_k = sizes
    q_lengths, kv_lengths = (
        options.get(name) for name in ("query_seq_lengths", "key_value_seq_lengths")
    )
    q_length = seqlen_q if q_lengths is None else min(max(int(q_lengths[b]), 0), seqlen_q)
    kv_length = seqlen_k if kv_lengths is None else min(max(int(kv_lengths[b]), 0), seqlen_k)
    if t >= q_length or s >= kv_length:
        return False
    offset = 0
    if options.get("causal_alignment") == "bottom_right":
        offset = kv_length - q_length
    if options.get("query_offset") is not None:
        offset = int(options["query_offset"][b])
    place = t + offset
    if options.get("is_causal") and s > place:
        return False
    left, right = options.get("local_window_size") or (None, None)
    if left is not None and s < place - left:
        return False
    if right is not None and s > place + right:
        return False
    ids = options.get("query_segment_ids")
    if ids is not None and ids[b, t] != options["key_value_segment_ids"][b, s]:
        return False
    mask = options.get("mask")
    return mask is None or bool(np.broadcast_to(mask, (2, 4, *sizes))[b, n, t, s])


def by_definition(query, key, value, bias=None, **options):
    """(out, lse), float64, one exp at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, seqlen_q, heads, _ = query.shape
    seqlen_k, heads_k = key.shape[1:3]
    scale = options.get("scale", 1 / math.sqrt(query.shape[-1]))
    cap, sinks = options.get("logits_soft_cap"), options.get("sinks")
    out = np.zeros((batch, seqlen_q, heads, value.shape[-1]))
    lse = np.full((batch, seqlen_q, heads), -np.inf)
    if bias is not None:
        bias = np.broadcast_to(np.asarray(bias, np.float64), (batch, heads, seqlen_q, seqlen_k))
    for b, t, n in np.ndindex(batch, seqlen_q, heads):
        head = n // (heads // heads_k)
        total = 0.0
        q_lengths = options.get("query_seq_lengths")
        if q_lengths is not None and t >= q_lengths[b]:
            continue
        for s in range(seqlen_k):
            if not sees(options, b, n, t, s, (seqlen_q, seqlen_k)):
                continue
            score = scale * float(query[b, t, n] @ key[b, s, head])
            score += 0.0 if bias is None else bias[b, n, t, s]
            score = score if cap is None else cap * math.tanh(score / cap)
            total += math.exp(score)
            out[b, t, n] += math.exp(score) * value[b, s, head]
        total += 0.0 if sinks is None else math.exp(float(sinks[n]))
        if total:
            out[b, t, n] /= total
            lse[b, t, n] = math.log(total)
    return out, lse


def draw_options(rng, t, s):
    """A random subset of the options, as NumPy arrays."""
    options = {}

    def maybe(probability, **what):
        if rng.random() < probability:
            options.update(what)

    maybe(0.5, is_causal=True)
    sides = [None, 0, 2, 5]
    maybe(0.5, local_window_size=(sides[rng.integers(4)], sides[rng.integers(4)]))
    if rng.random() < 0.5:
        maybe(0.7, causal_alignment="bottom_right")
    else:
        maybe(0.7, query_offset=rng.integers(-t, s, 2))
    maybe(0.4, query_seq_lengths=rng.integers(-1, t + 2, 2))
    maybe(0.4, key_value_seq_lengths=rng.integers(-1, s + 2, 2))
    maybe(
        0.3,
        query_segment_ids=rng.integers(0, 2, (2, t)),
        key_value_segment_ids=rng.integers(0, 2, (2, s)),
    )
    maybe(0.3, mask=rng.random((2, 1, t, s)) < 0.6)
    maybe(0.3, bias=rng.standard_normal((1, 4, t, s)).astype(np.float32))
    maybe(0.3, logits_soft_cap=1.5)
    maybe(0.3, sinks=rng.standard_normal(4).astype(np.float32))
    maybe(0.3, scale=[0.7, -0.3, 0.0][rng.integers(3)])
    return options


@pytest.mark.parametrize("seed", range(18))
def test_any_mix_of_options_follows_the_definition(seed):
    rng = np.random.default_rng(seed)
    t, s = [(5, 7), (8, 3), (1, 6)][seed % 3]  # few shapes: eager operations are compiled by shape
    q, k, v = qkv(t=t, s=s, h=4, d=3)
    options = draw_options(rng, t, s)
    out, lse = attend(q, k, v, **options, return_residual=True)
    chex.assert_type([out, lse], jnp.float32)
    expected = by_definition(q, k, v, **options)
    chex.assert_trees_all_close((np.asarray(out), np.asarray(lse)), expected, atol=2e-6, rtol=2e-6)


# --- jax.nn -----------------------------------------------------------------------------------

SHARED = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (3, 2)},
    "causal window": {"is_causal": True, "local_window_size": (3, 9)},
    "scale": {"scale": -0.3},
    "lengths": {
        "query_seq_lengths": np.array([5, 9], np.int32),
        "key_value_seq_lengths": np.array([4, 11], np.int32),
    },
}


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("dense", [False, True], ids=["", "bias and mask"])
def test_agrees_with_jax_nn(name, dense):
    """Where both give a meaning: jax.nn's rows without a key hold the mean of V instead of 0."""
    args = qkv(t=9, s=11)
    options = dict(SHARED[name])
    if dense:
        mask = jnp.asarray(helpers.fresh_rng().random((2, 4, 9, 11)) < 0.8)
        options.update(bias=normal((2, 1, 9, 11)), mask=mask.at[..., 0].set(True))
    sees_a_key = jnp.isfinite(attend(*args, **options, return_residual=True)[1])
    weights = jnp.where(sees_a_key[..., None], normal(args[0].shape), 0)

    def run(attention):
        def loss(*args):
            out = attention(*args, **options)
            return (out * weights).sum(), jnp.where(sees_a_key[..., None], out, 0)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*args)

    def nn(*args, **options):
        return jax.nn.dot_product_attention(*args, **options, implementation="xla")

    chex.assert_trees_all_close(run(attend), run(nn), atol=3e-5, rtol=3e-5)


# --- derivatives ------------------------------------------------------------------------------

HARD = {
    "is_causal": True,
    "causal_alignment": "bottom_right",
    "local_window_size": (4, None),
    "logits_soft_cap": 2.0,
    "query_seq_lengths": np.array([6, 4]),
    "key_value_seq_lengths": np.array([5, 1]),  # shorter than the queries: rows without a key
}


def finite_attention(q, k, v, bias, sinks):
    out, lse = attend(q, k, v, bias, **HARD, sinks=sinks, return_residual=True)
    return out, jnp.where(jnp.isneginf(lse), 0, lse)


def hard_arguments():
    return (*qkv(t=6, s=5, h=3, d=2, n=2, k=1), normal((2, 1, 1, 5)), normal((2,)))


def test_forward_and_reverse_derivatives_to_second_order():
    args = hard_arguments()
    check_grads(
        jax.jit(finite_attention), args, order=2, modes=["fwd", "rev"], atol=2e-2, rtol=2e-2
    )


def test_jacobians_and_hessians_agree_between_modes():
    q, *others = hard_arguments()

    def f(q):
        return finite_attention(q, *others)

    forward, reverse = jax.jit(jax.jacfwd(f))(q), jax.jit(jax.jacrev(f))(q)
    chex.assert_trees_all_close(forward, reverse, atol=1e-6)

    def loss(q):
        return sum((x**2).sum() for x in f(q))

    hessian = jax.jit(jax.hessian(loss))(q)
    chex.assert_trees_all_close(hessian, jax.jit(jax.jacrev(jax.grad(loss)))(q), atol=1e-5)
    chex.assert_tree_all_finite(hessian)
    assert jnp.abs(hessian).max() > 0.1


def test_rows_without_a_key_have_zero_derivatives_and_no_nan():
    q, k, v = qkv(t=6, s=5)
    options = {"is_causal": True, "query_offset": -3, "return_residual": True}
    f = jax.jit(lambda *args: attend(*args, **options))
    (out, lse), pullback = jax.vjp(f, q, k, v)
    assert (out[:, :3] == 0).all()
    assert jnp.isneginf(lse[:, :3]).all()
    dout, dlse = normal(out.shape).at[:, :3].set(NAN), normal(lse.shape).at[:, :3].set(NAN)
    gradients = pullback((dout, dlse))
    chex.assert_tree_all_finite(gradients)
    assert (gradients[0][:, :3] == 0).all()
    tangents = jax.jvp(f, (q, k, v), (q, k, v))[1]
    chex.assert_tree_all_finite(tangents)


def test_nan_beyond_the_lengths_is_never_read():
    q, k, v = qkv(t=6, s=7)
    lengths = {"query_seq_lengths": np.array([6, 2]), "key_value_seq_lengths": np.array([3, 7])}
    poisoned = (
        helpers.poison(q, lengths["query_seq_lengths"]),
        helpers.poison(k, lengths["key_value_seq_lengths"]),
        helpers.poison(v, lengths["key_value_seq_lengths"]),
    )

    @jax.jit
    def run(args, dout):
        out, pullback = jax.vjp(lambda *args: attend(*args, **lengths), *args)
        return out, pullback(dout)

    dout = normal(q.shape)
    actual = run(poisoned, helpers.poison(dout, lengths["query_seq_lengths"]))
    chex.assert_trees_all_equal(actual, run((q, k, v), dout))
    chex.assert_tree_all_finite(actual)


def test_nan_in_a_valid_query_makes_nan_of_that_row_alone():
    q, k, v = qkv(t=6, s=7)
    nan = attend(q.at[1, 2, 3, 0].set(NAN), k, v)
    chex.assert_trees_all_equal(nan, attend(q, k, v).at[1, 2, 3].set(NAN))


# --- dtypes and arguments ---------------------------------------------------------------------


def test_computes_in_float32_and_returns_the_query_dtype():
    q, k, v = qkv(dtype=jnp.bfloat16)
    out, lse = attend(q, k, v, return_residual=True)
    exact, exact_lse = attend(*(x.astype(jnp.float32) for x in (q, k, v)), return_residual=True)
    chex.assert_type([out, lse], [jnp.bfloat16, jnp.float32])
    chex.assert_trees_all_equal(out, exact.astype(jnp.bfloat16))
    chex.assert_trees_all_equal(lse, exact_lse)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        q, k, v = (x.astype(jnp.float64) for x in qkv())
        lengths = {"key_value_seq_lengths": np.array([3, 7])}
        options = {"is_causal": True, "causal_alignment": "bottom_right", **lengths}
        out, lse = attend(q, k, v, **options, return_residual=True)
        chex.assert_type([out, lse], jnp.float64)
        expected = by_definition(q, k, v, **options)
        chex.assert_trees_all_close((np.asarray(out), np.asarray(lse)), expected, atol=1e-13)


@pytest.mark.parametrize("length", [60, 100])  # 100 in two blocks of 64 or one of 128
@pytest.mark.parametrize("block", [None, 64, 128])
def test_float8_descales_multiply_their_block_of_tokens(length, block):
    q, k, v = qkv(t=length, s=length, dtype=jnp.float8_e4m3fn)
    blocks = 1 if block is None else -(-length // block)
    descales = [jnp.exp(normal((2, blocks, heads))) for heads in (4, 2, 2)]
    if block is None:
        descales = [d[:, 0, :2] for d in descales]  # [*batch, K], shared by the group
    names = ("query_descale", "key_descale", "value_descale")
    out = attend(q, k, v, **dict(zip(names, descales)), out_dtype=jnp.float32)

    def whole(x, descale):
        descale = np.asarray(descale)
        if block is None:
            descale = np.repeat(descale, x.shape[2] // 2, axis=-1)[:, None]
            return x.astype(jnp.float32) * descale[..., None]
        per_token = np.stack([descale[:, t // block] for t in range(length)], axis=1)
        return x.astype(jnp.float32) * per_token[..., None]

    exact = attend(*(whole(x, d) for x, d in zip((q, k, v), descales)))
    chex.assert_trees_all_close(out, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 4, 8), (1, 5, 4, 8), (2, 3, 5, 4, 8)])
def test_results_have_the_shapes_of_the_public_function(shape):
    q = normal(shape)
    k, v = (normal((*shape[:-3], 7, 2, width)) for width in (8, 6))
    actual = attend(q, k, v, return_residual=True)
    public = jax_fa3.dot_product_attention(q, k, v, return_residual=True, implementation="xla")
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, public)
    chex.assert_trees_all_close(actual, public, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("implementation", "xla"), ("checkpoint_name", "x"), ("deterministic_backward", True)],
)
def test_refuses_what_it_cannot_choose(name, value):
    helpers.error_of(ValueError, lambda: attend(*qkv(), **{name: value}), name, value)
