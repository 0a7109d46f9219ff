"""What the options mean: values and gradients against the oracle, and what NaN may not touch.

Float32 inputs run the xla implementation. Bfloat16 inputs of head dim 64 are what the kernels take:
with implementation=None they run the primitives' default lowering, so both doors are held to the
same sentences.
"""
# Options and arrays reach typed functions through ** and *.
# pyright: reportArgumentType=false, reportCallIssue=false
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, assert_finite, integers, normal, oracle, poison, qkv

import jax_fa3

pytestmark = pytest.mark.usefixtures("quick_compile")

attend = functools.partial(jax_fa3.dot_product_attention, return_residual=True)


def reference(*args, **options):
    return jax_fa3.reference.dot_product_attention(*args, **options, return_residual=True)


def check(args, *, arrays=None, more=(), tolerance=1.0, **options):
    """Values, lse and the gradient of every float operand, lse's cotangent included.

    Args:
      args: query, key, value.
      arrays: the traced options by name; `more` holds further values for them, which the same
        compilation must serve.
    """
    dtype = args[0].dtype

    def pullback(f, args, arrays, ct):
        inexact = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
        out, pull = jax.vjp(lambda a, r: f(a, {**arrays, **r}), args, inexact)
        return out, pull(tuple(c.astype(o.dtype) for c, o in zip(ct, out)))

    def ours(args, arrays):
        return attend(*args, **arrays, **options)

    def exact(args, arrays):
        return oracle(*(x.astype(helpers.wide(dtype)) for x in args), **arrays, **options)

    @jax.jit
    def both(args, arrays, ct):
        # A row without a finite lse has no gradient through it to speak of.
        alive = jnp.isfinite(exact(args, arrays)[1])
        ct = ct[0], jnp.where(alive, ct[1], 0)
        return pullback(ours, args, arrays, ct), pullback(exact, args, arrays, ct)

    for values in (arrays or {}, *more):
        shapes = jax.eval_shape(exact, args, values)
        got, wanted = both(args, values, tuple(normal(x.shape) for x in shapes))
        assert got[0][0].dtype == dtype
        assert got[0][1].dtype == helpers.wide(dtype)
        try:
            assert_close(got[0], wanted[0], dtype, scale=tolerance)
            # A gradient sums over more terms than a value.
            assert_close(got[1], wanted[1], dtype, scale=4 * tolerance)
        except AssertionError as error:
            raise AssertionError(f"{values} {options}: {error}") from error


def bf16_qkv(**sizes):
    return qkv(**{"h": 64, "t": 9, "s": 12, "dtype": jnp.bfloat16, **sizes})


# --- Heads and head dims ---------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(4, 4), (6, 2), (5, 1)], ids=["mha", "gqa", "mqa"])
def test_query_head_n_reads_key_head_n_over_group(n, k):
    check(qkv(n=n, k=k))


def test_value_head_dim_may_differ():
    check(qkv(h=12, d=20))


def test_no_batch_dimension():
    check(qkv(batch=()), is_causal=True)


def test_several_batch_dimensions():
    check(qkv(batch=(2, 3)), arrays={"key_value_seq_lengths": jnp.asarray([[1, 7, 3], [0, 2, 5]])})


def test_float64_keeps_float64():
    with jax.enable_x64(True):
        q, k, v = (x.astype(jnp.float64) for x in qkv())
        out, lse = jax.jit(attend)(q, k, v)
        assert out.dtype == lse.dtype == jnp.float64
        assert_close((out, lse), oracle(q, k, v))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_out_has_the_query_dtype_and_lse_is_float32(dtype):
    out, lse = jax.eval_shape(attend, *qkv(dtype=dtype))
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    assert out.shape == (2, 5, 4, 8)
    assert lse.shape == (2, 5, 4)


# --- Scale -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.3, -0.7, 0.0, np.float32(1.5), 3])
def test_static_scale_of_any_sign(scale):
    check(qkv(), scale=scale)


@pytest.mark.parametrize("make", [qkv, bf16_qkv], ids=["xla", "primitive"])
def test_array_scale_is_learnable(make):
    scales = [{"scale": jnp.float32(scale)} for scale in (0.4, -0.4, 0.0)]
    # Its gradient sums over every score: hence the tolerance.
    check(make(), arrays=scales[0], more=scales[1:], tolerance=4.0)


def test_array_scale_of_the_query_dtype_and_of_float32_agree():
    args = bf16_qkv()
    out = [jax.jit(attend)(*args, scale=jnp.asarray(0.5, d)) for d in (jnp.bfloat16, jnp.float32)]
    assert_close(out[0], out[1])


# --- Causal, windows, offsets ----------------------------------------------------------------

LENGTHS = [(6, 6), (4, 9), (9, 4), (1, 5)]


@pytest.mark.parametrize("make", [qkv, bf16_qkv], ids=["xla", "primitive"])
@pytest.mark.parametrize(("t", "s"), LENGTHS)
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_causal_alignment(make, t, s, alignment):
    check(make(t=t, s=s), is_causal=True, causal_alignment=alignment)


@pytest.mark.parametrize("window", [0, (3, 1), (None, 0), (None, None), (2, None)])
@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
def test_window_is_inclusive_and_none_is_unbounded(window, alignment):
    check(qkv(t=6, s=9), local_window_size=window, causal_alignment=alignment)


def test_window_of_one_int_is_symmetric():
    args = qkv(t=8, s=8)
    assert_close(attend(*args, local_window_size=2), attend(*args, local_window_size=(2, 2)))


@pytest.mark.parametrize("window", [(1, 0), (1, 3), (0, None)])
def test_window_together_with_causal(window):
    check(qkv(t=6, s=6), local_window_size=window, is_causal=True)


@pytest.mark.parametrize("make", [qkv, bf16_qkv], ids=["xla", "primitive"])
@pytest.mark.parametrize(
    "offsets", [[0, 3, -2, 7, -5, 50, -50], [[4, -1], [-9, 9], [0, 0]]], ids=["scalar", "row"]
)
def test_query_offset_places_the_diagonal(make, offsets):
    """Negative and past the end too; one compilation serves them all."""
    offsets = [{"query_offset": jnp.asarray(offset)} for offset in offsets]
    check(make(t=5, s=7), arrays=offsets[0], more=offsets[1:], is_causal=True)


def test_query_offset_with_a_window():
    offset = jnp.asarray([2, -3])
    check(qkv(t=6, s=8), arrays={"query_offset": offset}, local_window_size=(2, 1))


def test_query_offset_of_a_huge_value_does_not_wrap():
    with jax.enable_x64(True):
        for huge in (2**40, -(2**40), 2**31 - 1, -(2**31)):
            args = qkv()
            offset = jnp.asarray(huge, jnp.int64)
            got = jax.jit(functools.partial(attend, is_causal=True))(*args, query_offset=offset)
            assert_close(got, oracle(*args, is_causal=True, query_offset=offset), jnp.float32)


@pytest.mark.parametrize("make", [qkv, bf16_qkv], ids=["xla", "primitive"])
def test_query_offset_without_causal_or_window_changes_nothing(make):
    args = make()
    assert_close(attend(*args, query_offset=jnp.asarray([3, -50])), attend(*args))


def test_query_offset_is_traced():
    args = qkv(t=1, s=8)
    traces = []

    @jax.jit
    def step(offset):
        traces.append(offset)
        return attend(*args, is_causal=True, query_offset=offset)

    for offset in (0, 3, 7):
        assert_close(step(jnp.int32(offset)), oracle(*args, is_causal=True, query_offset=offset))
    assert len(traces) == 1


# --- Lengths ---------------------------------------------------------------------------------


LENGTHS_OF = {
    "keys": [{"key_value_seq_lengths": x} for x in ([7, 3], [0, 1], [99, -1])],
    "queries": [{"query_seq_lengths": x} for x in ([2, 5], [0, 1], [-3, 99])],
    "both": [
        {"query_seq_lengths": x, "key_value_seq_lengths": y}
        for x, y in (([0, 4], [6, 2]), ([-3, 99], [99, -1]), ([5, 3], [7, 7]))
    ],
}


@pytest.mark.parametrize("lengths", LENGTHS_OF.values(), ids=LENGTHS_OF)
@pytest.mark.parametrize("rules", [{}, {"is_causal": True}], ids=["full", "causal"])
def test_lengths(lengths, rules):
    """Clipped to [0, T] and [0, S]; one compilation serves them all."""
    values = [{n: jnp.asarray(x) for n, x in one.items()} for one in lengths]
    check(qkv(), arrays=values[0], more=values[1:], **rules)


def test_bottom_right_follows_each_rows_own_lengths():
    lengths = {
        "query_seq_lengths": jnp.asarray([2, 5]),
        "key_value_seq_lengths": jnp.asarray([6, 3]),
    }
    rules = {"is_causal": True, "causal_alignment": "bottom_right"}
    check(qkv(), arrays=lengths, **rules)
    check(qkv(), arrays={"key_value_seq_lengths": jnp.asarray([4, 1])}, **rules)
    # The last valid query sees every valid key: attention over the sliced row says the same.
    q, k, v = qkv()
    out, _ = attend(q, k, v, **lengths, **rules)
    for row, (t, s) in enumerate([(2, 6), (5, 3)]):
        alone, _ = attend(q[row, :t], k[row, :s], v[row, :s], **rules)
        assert_close(out[row, :t], alone)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint32", "int64", "uint64"])
def test_lengths_ids_and_offsets_of_any_integer_dtype(dtype):
    with jax.enable_x64(True):
        args = qkv(t=5, s=5)
        dtype = np.dtype(dtype)
        arrays = {
            "query_seq_lengths": jnp.asarray([4, 5], dtype),
            "key_value_seq_lengths": jnp.asarray([5, 3], dtype),
            "query_offset": jnp.asarray([1, 0], dtype),
            "query_segment_ids": jnp.asarray([[1, 1, 2, 2, 2], [0, 0, 0, 1, 1]], dtype),
        }
        got = jax.jit(functools.partial(attend, is_causal=True))(*args, **arrays)
        assert_close(got, oracle(*args, is_causal=True, **arrays), jnp.float32)


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "one"])
def test_without_a_batch_a_per_row_array_is_a_scalar_or_has_one_entry(shape, implementation):
    args = qkv(batch=(), t=5, s=7)
    lengths = {
        "query_seq_lengths": jnp.full(shape, 4),
        "key_value_seq_lengths": jnp.full(shape, 3),
    }
    got = attend(*args, **lengths, implementation=implementation)
    assert got[0].shape == (5, 4, 8)
    assert got[1].shape == (5, 4)
    assert_close(got, oracle(*args, query_seq_lengths=4, key_value_seq_lengths=3))
    offset = attend(*args, is_causal=True, query_offset=jnp.full(shape, 2))
    assert_close(offset, oracle(*args, is_causal=True, query_offset=2))


def test_lengths_given_as_numpy_or_python_values():
    args = qkv()
    expected = attend(*args, key_value_seq_lengths=jnp.asarray([3, 5]))
    assert_close(attend(*args, key_value_seq_lengths=np.asarray([3, 5])), expected)
    alone = qkv(batch=())
    assert_close(
        attend(*alone, key_value_seq_lengths=3),
        attend(*alone, key_value_seq_lengths=jnp.asarray(3)),
    )


# --- Segments --------------------------------------------------------------------------------


def test_segment_ids_separate_packed_sequences():
    ids = jnp.asarray([[0, 0, 0, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 9, 9]])
    check(qkv(t=8, s=8), arrays={"query_segment_ids": ids}, is_causal=True)


def test_segment_ids_of_keys_may_differ():
    arrays = {
        "query_segment_ids": jnp.asarray([[0, 1, 1, 3, 0], [2, 2, 2, 2, 2]]),
        "key_value_segment_ids": jnp.asarray([[1, 0, 1, 1, 2, 0, 7], [2, 2, 1, 1, 2, 2, 2]]),
    }
    check(qkv(), arrays=arrays)


def test_64_bit_segment_ids_are_compared_whole():
    with jax.enable_x64(True):
        args = qkv(t=4, s=4)
        ids = jnp.asarray([[0, 2**32, 2**40, 1], [5, 5 + 2**32, 5, 5 - 2**33]], jnp.int64)
        got = jax.jit(attend)(*args, query_segment_ids=ids)
        assert_close(got, oracle(*args, query_segment_ids=ids), jnp.float32)


def test_segment_ids_of_unequal_dtypes_compare_by_value():
    with jax.enable_x64(True):
        args = qkv(t=3, s=3)
        arrays = {
            "query_segment_ids": jnp.asarray([[0, 1, 2], [2, 1, 0]], jnp.int32),
            "key_value_segment_ids": jnp.asarray([[0, 1, 2], [2, 2**32, 0]], jnp.int64),
        }
        got = jax.jit(attend)(*args, **arrays)
        same = {n: x.astype(jnp.int64) for n, x in arrays.items()}
        assert_close(got, oracle(*args, **same), jnp.float32)


# --- Bias, mask, soft cap, sinks -------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 5, 7), (2, 1, 1, 7), (1, 5, 1), (5, 7), ()],
    ids=str,
)
def test_bias_broadcasts_and_has_a_gradient(shape):
    check(qkv(), arrays={"bias": normal(shape)})


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (4, 1, 7), (5, 7)], ids=str)
def test_mask_broadcasts(shape):
    check(qkv(), arrays={"mask": normal(shape) > -0.5})


def test_bias_of_another_dtype_keeps_its_dtype_in_the_gradient():
    args = bf16_qkv()
    bias = normal((2, 1, 9, 12), jnp.float32)
    grad = jax.jit(jax.grad(lambda b: attend(*args, b)[0].astype(jnp.float32).sum()))(bias)
    assert grad.dtype == jnp.float32
    check(args, arrays={"bias": bias})


def test_bias_of_minus_infinity_masks():
    bias = jnp.where(normal((2, 1, 5, 7)) > 0, 0.0, -jnp.inf).at[1, 0, 2].set(-jnp.inf)
    args = qkv()
    got, expected = attend(*args, bias), attend(*args, None, jnp.isfinite(bias))
    assert_close(got, expected)


def test_soft_cap_applies_to_scaled_and_biased_scores_before_masking():
    arrays = {"bias": 3 * normal((4, 5, 7)), "mask": normal((5, 7)) > -0.5}
    check(qkv(), arrays=arrays, logits_soft_cap=1.5, scale=2.0)
    check(qkv(), logits_soft_cap=np.float32(5.0), is_causal=True, scale=-1.0)


def test_sinks_take_probability_and_give_no_value():
    check(qkv(), arrays={"sinks": normal((4,))})
    check(
        qkv(t=6, s=6), arrays={"sinks": 2 * normal((4,))}, is_causal=True, local_window_size=(1, 0)
    )


def test_sinks_are_not_soft_capped():
    check(qkv(), arrays={"sinks": jnp.asarray([9.0, -9.0, 0.0, 30.0])}, logits_soft_cap=2.0)


def test_a_sink_of_minus_infinity_is_no_sink():
    args = qkv()
    assert_close(attend(*args, sinks=jnp.full(4, -jnp.inf)), attend(*args))


def test_sinks_gradient_keeps_their_dtype():
    args = bf16_qkv()
    f = lambda sinks: attend(*args, sinks=sinks)[1].sum()
    assert jax.jit(jax.grad(f))(jnp.zeros(4, jnp.float32)).dtype == jnp.float32
    assert jax.jit(jax.grad(f))(jnp.zeros(4, jnp.bfloat16)).dtype == jnp.bfloat16


# --- Empty and one-element dimensions --------------------------------------------------------


@pytest.mark.parametrize("make", [qkv, bf16_qkv], ids=["xla", "primitive"])
@pytest.mark.parametrize(
    "sizes",
    [{"batch": (0,)}, {"t": 0}, {"s": 0}, {"t": 0, "s": 0}, {"t": 1, "s": 1}, {"n": 1, "k": 1}],
    ids=str,
)
def test_zero_and_one_sized_dimensions(make, sizes):
    check(make(**sizes), is_causal=True, causal_alignment="bottom_right")


def test_no_keys_give_zero_and_the_sink():
    q, k, v = qkv(s=0)
    out, lse = attend(q, k, v)
    assert (out == 0).all()
    assert jnp.isneginf(lse).all()
    sinks = normal((4,))
    out, lse = attend(q, k, v, sinks=sinks)
    assert (out == 0).all()
    assert_close(lse, jnp.broadcast_to(sinks, (2, 5, 4)))


def test_value_head_dim_of_zero():
    out, lse = attend(*qkv(d=0))
    assert out.shape == (2, 5, 4, 0)
    assert_finite(lse)


# --- Fully masked rows -----------------------------------------------------------------------


@pytest.mark.parametrize("make", [qkv, bf16_qkv], ids=["xla", "primitive"])
def test_fully_masked_row_gives_zero_minus_infinity_and_no_gradient(make):
    """T > S aligned bottom right: the first T - S queries see nothing."""
    args = make(t=9, s=4)
    rules = {"is_causal": True, "causal_alignment": "bottom_right"}
    run = helpers.pullback_of(lambda *args: attend(*args, **rules))
    ones = tuple(jnp.ones(x.shape, x.dtype) for x in jax.eval_shape(attend, *args))
    (out, lse), (dq, dk, dv) = run(args, ones)
    assert (out[:, :5] == 0).all()
    assert jnp.isneginf(lse[:, :5]).all()
    assert jnp.isfinite(lse[:, 5:]).all()
    assert_finite((dq, dk, dv))
    assert (dq[:, :5] == 0).all()
    # The masked rows' cotangents reach neither keys nor values.
    other = tuple(x.at[:, :5].set(7) for x in ones)
    _, (_, dk2, dv2) = run(args, other)
    helpers.assert_same_bits((dk, dv), (dk2, dv2))


@pytest.mark.parametrize(
    "options",
    [
        {"mask": jnp.zeros((1, 1, 5, 7), bool)},
        {"key_value_seq_lengths": jnp.zeros(2, jnp.int32)},
        {"local_window_size": (0, 0), "query_offset": jnp.asarray(-20)},
        {"is_causal": True, "query_offset": jnp.asarray(-20)},
        {
            "query_segment_ids": jnp.ones((2, 5), int),
            "key_value_segment_ids": jnp.zeros((2, 7), int),
        },
    ],
    ids=["mask", "lengths", "window", "causal", "segments"],
)
@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_without_a_key_whatever_hid_them(options, with_sinks):
    q, k, v = qkv()
    sinks = normal((4,)) if with_sinks else None

    def f(q, k, v):
        return attend(q, k, v, sinks=sinks, **options)

    shapes = jax.eval_shape(f, q, k, v)
    ct = tuple(normal(x.shape) for x in shapes)
    (out, lse), grads = helpers.value_and_pullback(f, (q, k, v), ct)
    assert (out == 0).all()
    wanted = sinks if with_sinks else jnp.full((4,), -jnp.inf)
    assert_close(lse, jnp.broadcast_to(wanted, lse.shape))
    assert all((g == 0).all() for g in grads)


def test_the_gradient_of_a_sink_on_a_masked_row_is_the_lse_cotangent():
    q, k, v = qkv()
    ct = normal((2, 5, 4))
    f = lambda sinks: (
        attend(q, k, v, sinks=sinks, key_value_seq_lengths=jnp.zeros(2, int))[1] * ct
    ).sum()
    assert_close(jax.jit(jax.grad(f))(normal((4,))), ct.sum((0, 1)), scale=4)


# --- Poison: what is never read --------------------------------------------------------------

NAN = float("nan")


def poisoned(args, q_len, k_len, value=NAN):
    q, k, v = args
    q = q if q_len is None else poison(q, q_len, value)
    return (q, k, v) if k_len is None else (q, poison(k, k_len, value), poison(v, k_len, value))


def assert_poison_stays(args, options, q_len=None, k_len=None, implementation=None, value=NAN):
    """NaN behind the lengths changes no bit before them, forward and backward.

    Cotangents of queries behind their length are NaN too. Gradients behind a length are finite
    zeros for keys and values; what is in a query behind its length is its own affair.
    """
    if q_len is not None:
        options = {**options, "query_seq_lengths": jnp.asarray(q_len)}
    if k_len is not None:
        options = {**options, "key_value_seq_lengths": jnp.asarray(k_len)}
    f = lambda *args: attend(*args, **options, implementation=implementation)
    ct = tuple(normal(x.shape, x.dtype) for x in jax.eval_shape(f, *args))
    clean_ct = ct if q_len is None else (poison(ct[0], q_len, 0.0), poison(ct[1], q_len, 0.0, -2))
    dirty_ct = (
        ct if q_len is None else (poison(ct[0], q_len, value), poison(ct[1], q_len, value, -2))
    )
    run = helpers.pullback_of(f)
    clean, clean_grads = run(poisoned(args, q_len, k_len, 0.0), clean_ct)
    dirty, dirty_grads = run(poisoned(args, q_len, k_len, value), dirty_ct)
    helpers.assert_same_bits(dirty, clean, "value")
    helpers.assert_same_bits(dirty_grads[1:], clean_grads[1:], "gradient of key and value")
    if k_len is not None:
        for grad in dirty_grads[1:]:
            assert (poison(grad, k_len, 0.0) == grad).all(), (
                "gradient beyond the length is not zero"
            )
    if q_len is None:
        helpers.assert_same_bits(dirty_grads[0], clean_grads[0], "gradient of query")
    else:
        before = [poison(g[0], q_len, 0.0) for g in (dirty_grads, clean_grads)]
        helpers.assert_same_bits(*before, "gradient of valid queries")


@pytest.mark.optimised  # what the optimiser rewrites must not read padding either
@pytest.mark.parametrize("value", [NAN, float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "causal_alignment": "bottom_right"},
        {"local_window_size": (2, 1)},
        {"logits_soft_cap": 2.0, "sinks": jnp.ones(4)},
        {
            "query_segment_ids": jnp.zeros((2, 5), int),
            "key_value_segment_ids": jnp.zeros((2, 7), int),
        },
    ],
    ids=["full", "causal", "bottom_right", "window", "cap and sinks", "segments"],
)
def test_padding_is_never_read(options, value):
    assert_poison_stays(qkv(), options, q_len=[3, 5], k_len=[2, 6], value=value)


@pytest.mark.optimised  # what the optimiser rewrites must not read padding either
def test_padding_of_keys_alone_and_of_queries_alone_is_never_read():
    assert_poison_stays(qkv(), {}, k_len=[0, 4])
    assert_poison_stays(qkv(), {}, q_len=[0, 4])


@pytest.mark.optimised  # what the optimiser rewrites must not read padding either
def test_padding_is_never_read_across_key_blocks():
    """Long enough for several blocks, with lengths beside their edges."""
    args = qkv(batch=(3,), t=40, s=1100, n=2, k=1)
    assert_poison_stays(args, {"is_causal": True}, q_len=[33, 1, 40], k_len=[511, 513, 1025])


@pytest.mark.optimised  # what the optimiser rewrites must not read padding either
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_padding_is_never_read_in_16_bit(dtype):
    assert_poison_stays(qkv(h=64, dtype=dtype), {"is_causal": True}, q_len=[3, 5], k_len=[2, 6])


def test_poison_in_the_reference_stays_too():
    q, k, v = qkv()
    lengths = {
        "query_seq_lengths": jnp.asarray([3, 5]),
        "key_value_seq_lengths": jnp.asarray([2, 6]),
    }
    bad = poisoned((q, k, v), [3, 5], [2, 6])
    assert_close(reference(*bad, **lengths), oracle(q, k, v, **lengths))


def test_queries_beyond_their_length_give_zero_and_minus_infinity_whatever_else_is_given():
    q, k, v = qkv(t=5, s=7)
    options = {
        "bias": normal((4, 5, 7)),
        "mask": jnp.ones((5, 7), bool),
        "sinks": normal((4,)),
        "query_offset": jnp.asarray([1, 2]),
        "is_causal": True,
        "logits_soft_cap": 3.0,
    }
    out, lse = attend(poison(q, 3), k, v, **options, query_seq_lengths=jnp.asarray([3, 3]))
    assert (out[:, 3:] == 0).all()
    assert jnp.isneginf(lse[:, 3:]).all()
    assert_finite((out[:, :3], lse[:, :3]))


def test_bias_and_sinks_get_no_gradient_from_queries_beyond_their_length():
    q, k, v = qkv()
    bias, sinks = normal((2, 4, 5, 7)), normal((4,))
    lengths = jnp.asarray([3, 5])
    f = lambda b, s, q: attend(q, k, v, b, sinks=s, query_seq_lengths=lengths)
    out, lse = normal((2, 5, 4, 8)), normal((2, 5, 4))
    grads, run = [], helpers.pullback_of(f)
    for fill in (0.0, NAN):
        ct = (poison(out, lengths, fill), poison(lse, lengths, fill, -2))
        grads.append(run((bias, sinks, poison(q, lengths, fill)), ct)[1])
    helpers.assert_same_bits(grads[1][:2], grads[0][:2])
    assert (grads[1][0][0, :, 3:] == 0).all()


@pytest.mark.optimised  # what the optimiser rewrites must not read padding either
@pytest.mark.parametrize("make", [qkv, bf16_qkv], ids=["xla", "primitive"])
def test_nan_in_a_valid_query_makes_nan_of_that_row_alone(make):
    q, k, v = make()
    clean = attend(q, k, v)
    out, lse = attend(q.at[1, 2, 3].set(NAN), k, v)
    assert jnp.isnan(out[1, 2, 3]).all()
    assert jnp.isnan(lse[1, 2, 3])
    others = jnp.ones(lse.shape, bool).at[1, 2, 3].set(False)
    helpers.assert_same_bits(out[others], clean[0][others])
    helpers.assert_same_bits(lse[others], clean[1][others])


@pytest.mark.optimised  # what the optimiser rewrites must not read padding either
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"local_window_size": (1, 1)},
        {"query_segment_ids": jnp.asarray([[0, 0, 1, 1, 1, 2, 2]] * 2)},
        {"mask": jnp.tril(jnp.ones((7, 7), bool))},
    ],
    ids=["future", "window", "segment", "mask"],
)
def test_masked_positions_never_change_a_result_by_their_finite_values(options):
    q, k, v = qkv(t=7, s=7)
    f = lambda k, v: attend(q[:, :2], k, v, **{**options, **cut})
    cut = {
        n: x[..., :2, :] if n == "mask" else x[:, :2]
        for n, x in options.items()
        if hasattr(x, "ndim")
    }
    if "query_segment_ids" in options:
        cut["key_value_segment_ids"] = options["query_segment_ids"]
    # The first two queries see at most keys 0 to 2, whichever rule it is.
    other_k, other_v = k.at[:, 3:].set(1e4), v.at[:, 3:].set(-1e30)
    helpers.assert_same_bits(jax.jit(f)(other_k, other_v), jax.jit(f)(k, v))


# --- lse and its gradient --------------------------------------------------------------------


def test_lse_is_the_log_of_the_denominator():
    q, k, v = qkv(n=1, k=1, batch=())
    _, lse = attend(q, k, v)
    scores = np.einsum("tnh,snh->ts", q, k) / np.sqrt(8)
    np.testing.assert_allclose(lse[:, 0], np.log(np.exp(scores).sum(-1)), rtol=1e-5)


@pytest.mark.parametrize("make", [qkv, bf16_qkv], ids=["xla", "primitive"])
def test_lse_alone_has_a_gradient(make):
    """d lse / d query is the probabilities' mean of the keys."""
    args = make()
    f = lambda f: jax.jit(jax.grad(lambda *a: f(*a)[1].sum(), (0, 1, 2)))
    got = f(attend)(*args)
    wanted = f(oracle)(*(x.astype(jnp.float32) for x in args))
    assert_close(got, jax.tree.map(lambda w, x: w.astype(x.dtype), wanted, args), scale=4)
    assert (got[2] == 0).all()
    assert float(jnp.abs(got[0].astype(jnp.float32)).max()) > 0.01


def test_two_halves_merged_by_lse_equal_the_whole_with_gradients():
    """What ring attention does; wrong wherever an lse cotangent is dropped."""
    args = qkv(t=5, s=8)

    def halves(q, k, v):
        (o1, l1), (o2, l2) = attend(q, k[:, :4], v[:, :4]), attend(q, k[:, 4:], v[:, 4:])
        lse = jnp.logaddexp(l1, l2)
        return o1 * jnp.exp(l1 - lse)[..., None] + o2 * jnp.exp(l2 - lse)[..., None], lse

    ct = helpers.cotangents(halves, args)
    got = helpers.value_and_pullback(halves, args, ct)
    wanted = helpers.value_and_pullback(lambda *a: attend(*a), args, ct)
    assert_close(got, wanted, scale=4)


# --- Derivatives that exist, and those that do not -------------------------------------------


def test_xla_allows_reverse_over_reverse():
    q, k, v = qkv(batch=(), t=3, s=4, n=2, k=1, h=4)

    def curvature(f):
        loss = lambda q, k, v: (f(q, k, v)[0] ** 2).sum()
        return jax.jit(jax.grad(lambda *a: (jax.grad(loss)(*a) ** 2).sum(), (0, 1, 2)))

    ours = functools.partial(attend, is_causal=True, implementation="xla")
    exact = functools.partial(oracle, is_causal=True)
    assert_close(curvature(ours)(q, k, v), curvature(exact)(q, k, v), scale=20)


def test_the_reference_allows_any_derivative():
    q, k, v = qkv(batch=(), t=2, s=3, n=1, k=1, h=2)
    for derivative in (jax.jacfwd, jax.hessian):
        of = [jax.jit(derivative(lambda q, f=f: f(q, k, v)[0]))(q) for f in (reference, oracle)]
        assert_close(*of, scale=20)
    tangents = normal(q.shape), normal(k.shape), normal(v.shape)
    of = [jax.jit(lambda *a, f=f: jax.jvp(f, (q, k, v), a))(*tangents) for f in (reference, oracle)]
    assert_close(*of, scale=4)


@pytest.mark.parametrize("attention", [attend, reference], ids=["xla", "reference"])
def test_every_option_where_ranks_may_not_be_promoted(attention):
    """jax_numpy_rank_promotion is about its user's code; drawn before, compared with itself."""
    args = qkv(batch=(2,), t=6, s=9, n=4, k=2, h=8)
    lengths, ids = jnp.asarray([4, 5]), jnp.zeros((2, 9), jnp.int32)
    options = {
        "bias": normal((1, 4, 1, 9)),
        "mask": jnp.ones((2, 1, 6, 1), bool),
        "query_seq_lengths": lengths,
        "key_value_seq_lengths": lengths,
        "query_offset": lengths,
        "is_causal": True,
        "local_window_size": (3, 1),
        "query_segment_ids": ids[:, :6],
        "key_value_segment_ids": ids,
        "logits_soft_cap": 2.0,
        "sinks": normal((4,)),
    }

    def both():
        f = lambda *args: attention(*args, **options)
        (out, lse), pullback = jax.vjp(f, *args)
        return out, lse, pullback((jnp.ones_like(out), jnp.ones_like(lse)))

    right = both()
    with jax.numpy_rank_promotion("raise"):
        assert_close(both(), right)


def total_of_out(*args):
    return attend(*args)[0].astype(jnp.float32).sum()


FORWARD_MODE = {
    "jvp": lambda *a: jax.jvp(attend, a, a),
    "jvp of jit": lambda *a: jax.jvp(jax.jit(attend), a, a),
    "jvp of vmap": lambda *a: jax.jvp(jax.vmap(attend), a, a),
    "linearize": lambda *a: jax.linearize(attend, *a)[1](*a),
    "jacfwd": jax.jacfwd(total_of_out),
    "hessian": jax.hessian(total_of_out),
}


@pytest.mark.parametrize("derivative", FORWARD_MODE.values(), ids=FORWARD_MODE)
def test_forward_mode_of_the_primitive_raises(derivative):
    with pytest.raises(TypeError, match="forward-mode"):  # JAX's own words
        derivative(*bf16_qkv(t=3, s=4))


@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.vmap], ids=["bare", "jit", "vmap"])
def test_a_second_derivative_of_the_primitive_raises(around):
    gradient = around(jax.grad(total_of_out))
    with pytest.raises(jax_fa3.UnsupportedError, match="second derivative"):
        jax.grad(lambda *a: gradient(*a).astype(jnp.float32).sum())(*bf16_qkv(t=3, s=4))


# --- FP8 -------------------------------------------------------------------------------------

F8 = jnp.float8_e4m3fn


def f8_case(per, *, t=130, s=200, block=64, n=4, k=2, batch=(2,)):
    """Float8 arrays with descales of the given form; returns (args, descales, dequantised args)."""
    q, k_, v = qkv(batch=batch, t=t, s=s, n=n, k=k, h=16)
    shapes = {
        "scalar": [(), (), ()],
        "head": [(*batch, k)] * 3,
        "block": [(*batch, -(-t // block), n)] + [(*batch, -(-s // block), k)] * 2,
    }[per]
    descales = [jnp.exp2(integers(-2, 2, shape).astype(jnp.float32)) for shape in shapes]
    quantised, wide = [], []
    for x, d in zip((q, k_, v), descales):
        heads, tokens = x.shape[-2], x.shape[-3]
        if per == "head":
            d = jnp.repeat(d, heads // k, axis=-1)[..., None, :, None]
        elif per == "block":
            d = jnp.repeat(d, block, axis=-2)[..., :tokens, :, None]
        low = (x / d).astype(F8)
        quantised.append(low)
        wide.append(low.astype(jnp.float32) * d)
    names = ("query_descale", "key_descale", "value_descale")
    return tuple(quantised), dict(zip(names, descales)), tuple(wide)


@pytest.mark.parametrize(
    ("per", "block"), [("scalar", 0), ("head", 0), ("block", 64), ("block", 128)]
)
def test_fp8_descales(per, block):
    args, descales, wide = f8_case(per, block=block or 64)
    out, lse = jax.jit(functools.partial(attend, is_causal=True))(*args, **descales)
    assert out.dtype == jnp.bfloat16
    assert lse.dtype == jnp.float32
    wanted = oracle(*wide, is_causal=True)
    # lse knows no rounding of the probabilities; out carries float8's 3 mantissa bits of them.
    np.testing.assert_allclose(lse, wanted[1], rtol=1e-4, atol=1e-4)
    error = jnp.abs(out.astype(jnp.float32) - wanted[0])
    assert float(error.max()) <= 2.0**-4 * float(jnp.abs(wide[2]).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_fp8_out_dtype(dtype):
    args, descales, _ = f8_case("scalar", t=8, s=8)
    out = jax_fa3.dot_product_attention(*args, **descales, out_dtype=dtype)
    assert out.dtype == dtype


def test_fp8_without_descales_means_one():
    args, _, _ = f8_case("scalar", t=8, s=8)
    wide = tuple(x.astype(jnp.float32) for x in args)
    np.testing.assert_allclose(attend(*args)[1], oracle(*wide)[1], rtol=1e-4, atol=1e-4)


def test_fp8_gradient_raises_and_names_the_recipe():
    args, descales, _ = f8_case("scalar", t=8, s=8)

    def loss(d):
        return attend(*args, **{**descales, "query_descale": d})[0].astype(jnp.float32).sum()

    with pytest.raises(jax_fa3.UnsupportedError, match=r"bf16|bfloat16"):
        jax.grad(loss)(descales["query_descale"])
    wide = tuple(x.astype(jnp.float32) for x in args)
    through = lambda q: attend(q.astype(F8), *args[1:], **descales)[0].astype(jnp.float32).sum()
    with pytest.raises(jax_fa3.UnsupportedError, match=r"bf16|bfloat16"):
        jax.grad(through)(wide[0])


# --- Determinism, names ----------------------------------------------------------------------


@pytest.mark.parametrize("flag", [None, True, False])
def test_deterministic_backward_takes_none_true_and_false(flag):
    args = qkv()
    grad = jax.jit(jax.grad(lambda *a: attend(*a, deterministic_backward=flag)[0].sum(), (0, 1, 2)))
    first = grad(*args)
    for _ in range(3):
        helpers.assert_same_bits(grad(*args), first)


def test_out_and_lse_carry_their_checkpoint_names():
    args = bf16_qkv()
    names = lambda **kw: str(
        jax.make_jaxpr(lambda *a: jax.vjp(lambda *b: attend(*b, **kw), *a)[0])(*args)
    )
    assert "jax_fa3_out" in names()
    assert "jax_fa3_lse" in names()
    renamed = names(checkpoint_name="layer_attention")
    assert renamed.count("name=layer_attention") == 2
    assert "jax_fa3_out" not in renamed


# --- Any combination -------------------------------------------------------------------------


def random_case(seed):
    """A call with a random subset of the options, sizes included."""
    rng = np.random.default_rng(seed)
    flip = lambda p=0.5: bool(rng.random() < p)
    batch = ((), (2,), (2, 2))[rng.integers(3)]
    t, s = (int(rng.integers(1, 12)) for _ in range(2))
    k = int(rng.integers(1, 4))
    n = k * int(rng.integers(1, 4))
    args = qkv(
        batch=batch, t=t, s=s, n=n, k=k, h=int(rng.integers(1, 9)), d=int(rng.integers(1, 9))
    )
    arrays, options = {}, {}
    if flip():
        options["is_causal"] = True
    if flip():
        side = lambda limit: None if flip(0.3) else int(rng.integers(0, limit + 1))
        options["local_window_size"] = (side(t), side(s))
    if flip():
        options["causal_alignment"] = "bottom_right"
    elif flip():
        arrays["query_offset"] = integers(-t, s, batch if flip() else ())
    if flip(0.4):
        arrays["query_seq_lengths"] = integers(0, t, batch)
    if flip(0.4):
        arrays["key_value_seq_lengths"] = integers(0, s, batch)
    if flip(0.4):
        arrays["query_segment_ids"] = integers(0, 1, (*batch, t))
        arrays["key_value_segment_ids"] = integers(0, 1, (*batch, s))
    full = (*batch, n, t, s)
    thin = lambda: tuple(x if flip(0.7) else 1 for x in full)[int(rng.integers(len(full))) :]
    if flip(0.4):
        arrays["bias"] = normal(thin())
    if flip(0.4):
        arrays["mask"] = normal(thin()) > -0.7
    if flip(0.4):
        options["logits_soft_cap"] = float(rng.uniform(0.5, 4))
    if flip(0.4):
        arrays["sinks"] = normal((n,))
    if flip(0.4):
        options["scale"] = float(rng.normal())
    elif flip(0.3):
        arrays["scale"] = normal(())
    return args, arrays, options


@pytest.mark.parametrize("seed", range(20))
def test_any_combination_of_options(seed):
    args, arrays, options = random_case(seed)
    check(args, arrays=arrays, **options, tolerance=2.0)


@pytest.mark.parametrize("seed", range(100, 106))
def test_any_combination_in_the_reference(seed):
    args, arrays, options = random_case(seed)
    got = jax.jit(lambda a, r: reference(*a, **r, **options))(args, arrays)
    assert_close(got, jax.jit(lambda a, r: oracle(*a, **r, **options))(args, arrays), scale=2)
