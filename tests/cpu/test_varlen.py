"""Packed sequences: what each one gives alone, and what stays out of it."""
# Options and arrays reach typed functions through ** and *.
# pyright: reportArgumentType=false, reportCallIssue=false
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import functools
import itertools

import chex
import helpers
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, oracle
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3

pytestmark = pytest.mark.usefixtures("quick_compile")

varlen = functools.partial(jax_fa3.varlen_attention, return_residual=True)


def packed(total_q, total_k, *, n=4, k=2, h=8, d=None, dtype=jnp.float32):
    return (
        normal((total_q, n, h), dtype),
        normal((total_k, k, h), dtype),
        normal((total_k, k, d or h), dtype),
    )


def sequence_of(ends, total):
    """Which sequence each row belongs to, and where it stands in it; -1 outside all of them."""
    owner, place = np.full(total, -1), np.zeros(total, int)
    for i, (start, end) in enumerate(itertools.pairwise(ends)):
        owner[start:end] = i
        place[start:end] = np.arange(max(0, end - start))
    return owner, place


def alone(args, cu_q, cu_k=None, *, is_causal=False, causal_alignment="top_left",
          local_window_size=None, **options):  # fmt: skip
    """The oracle over one dense mask written row by row; rows of no sequence give 0 and -inf."""
    return _dense(
        args, _mask(args, cu_q, cu_k, is_causal, causal_alignment, local_window_size), options
    )


def _mask(args, cu_q, cu_k, is_causal, causal_alignment, window):
    """(bool [T, S], rows of some sequence bool [T])"""
    (owner_q, t), (owner_k, s) = (
        sequence_of(np.asarray(cu), len(x))
        for cu, x in zip((cu_q, cu_q if cu_k is None else cu_k), args)
    )
    ends_q, ends_k = np.asarray(cu_q), np.asarray(cu_q if cu_k is None else cu_k)
    offset = np.zeros(len(t), int)
    if causal_alignment == "bottom_right":
        offset = np.where(owner_q < 0, 0, (np.diff(ends_k) - np.diff(ends_q))[owner_q])
    diagonal = (t + offset)[:, None]
    mask = (owner_q[:, None] == owner_k[None]) & (owner_q >= 0)[:, None]
    if is_causal:
        mask &= s <= diagonal
    if window is not None:
        mask &= (s >= diagonal - window[0]) & (s <= diagonal + window[1])
    return jnp.asarray(mask), jnp.asarray(owner_q >= 0)


def _dense(args, mask_and_rows, options):
    mask, rows = mask_and_rows
    out, lse = oracle(*(x.astype(jnp.float32) for x in args), mask=mask, **options)
    return jnp.where(rows[:, None, None], out, 0), jnp.where(rows[:, None], lse, -jnp.inf)


PACKINGS = {
    "one": ([0, 9], None),
    "several": ([0, 3, 4, 9], None),
    "empty in the middle": ([0, 4, 4, 4, 9], None),
    "empty first and last": ([0, 0, 5, 9, 9], None),
    "all empty": ([0, 0, 0], None),
    "rows past the end": ([0, 3, 6], None),
    "keys of their own": ([0, 3, 9], [0, 7, 11]),
    "no keys for one": ([0, 3, 6, 9], [0, 5, 5, 11]),
    "no queries for one": ([0, 4, 4, 9], [0, 2, 8, 11]),
    "keys past the end": ([0, 3, 9], [0, 4, 8]),
}
RULES = {
    "full": {},
    "causal": {"is_causal": True},
    "bottom_right": {"is_causal": True, "causal_alignment": "bottom_right"},
    "window": {"local_window_size": (1, 1), "causal_alignment": "bottom_right"},
    "cap, sinks and scale": {"logits_soft_cap": 2.0, "sinks": True, "scale": -0.7},
}


def padded(ends):
    """As many ends as the longest packing has: empty sequences at the end change nothing."""
    longest = max(len(p) for p, _ in PACKINGS.values())
    return jnp.asarray([*ends, *[ends[-1]] * (longest - len(ends))], jnp.int32)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_each_sequence_gives_what_it_gives_alone(rules):
    """Every packing, values, lse and gradients; one compilation, for the ends are traced."""
    rules = dict(rules)
    if rules.get("sinks"):
        rules["sinks"] = normal((4,))
    masks = ("is_causal", "causal_alignment", "local_window_size")
    options = {n: x for n, x in rules.items() if n not in masks}

    @jax.jit
    def both(args, ends, mask_and_rows, ct):
        ours, pull = jax.vjp(lambda *a: varlen(*a, *ends, **rules), *args)
        exact, pull_exact = jax.vjp(lambda *a: _dense(a, mask_and_rows, options), *args)
        ct = ct[0], jnp.where(jnp.isfinite(exact[1]), ct[1], 0)
        return (ours, pull(ct)), (exact, pull_exact(ct))

    for name, (cu_q, cu_k) in PACKINGS.items():
        args = packed(9, 11)
        cu_k = cu_q if cu_k is None else cu_k
        mask = [rules.get(n, d) for n, d in zip(masks, (False, "top_left", None))]
        ends = padded(cu_q), padded(cu_k)
        ct = normal((9, 4, 8)), normal((9, 4))
        got, wanted = both(args, ends, _mask(args, cu_q, cu_k, *mask), ct)
        try:
            assert_close(got[0], wanted[0])
            assert_close(got[1], wanted[1], scale=4)
        except AssertionError as error:
            raise AssertionError(f"packing {name}: {error}") from error


def test_keys_are_packed_as_the_queries_by_default():
    args = packed(9, 9)
    for cu in ([0, 9], [0, 3, 4, 9], [0, 4, 4, 7]):
        got = varlen(*args, jnp.asarray(cu), is_causal=True)
        assert_close(got, varlen(*args, jnp.asarray(cu), jnp.asarray(cu), is_causal=True))
        assert_close(got, alone(args, cu, is_causal=True))


def test_shapes_and_dtypes():
    q, k, v = packed(9, 11, d=6, dtype=jnp.bfloat16)
    cu = jnp.asarray([0, 4, 9]), jnp.asarray([0, 4, 11])
    out, lse = jax.eval_shape(varlen, q, k, v, *cu)
    chex.assert_shape(out, (9, 4, 6))
    chex.assert_shape(lse, (9, 4))
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    alone = jax.eval_shape(jax_fa3.varlen_attention, q, k, v, *cu)
    assert alone.shape == (9, 4, 6)


def test_ends_are_traced():
    args = packed(9, 9)
    traces = []

    @jax.jit
    def f(cu):
        traces.append(1)
        return varlen(*args, cu, is_causal=True)

    for cu in ([0, 3, 9], [0, 9, 9], [0, 0, 4]):
        assert_close(f(jnp.asarray(cu, jnp.int32)), alone(args, cu, is_causal=True))
    assert len(traces) == 1


def test_ends_of_an_unknown_number_of_sequences_are_refused():
    (count,) = jax.export.symbolic_shape("count")
    f = jax.jit(lambda cu: varlen(*packed(9, 9), cu))
    helpers.error_of(
        ValueError,
        lambda: jax.export.export(f)(jax.ShapeDtypeStruct((count,), jnp.int32)),
        "cu_seqlens_q: got shape (count,)",
        "export once for each shape",
    )


def test_ends_that_are_sharded_over_an_explicit_axis():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    args, cu = packed(9, 9), jnp.asarray([0, 3, 5, 9], jnp.int32)
    with jax.set_mesh(mesh):
        there = jax.device_put(cu, NamedSharding(mesh, P("data")))
        got = jax.jit(lambda cu: varlen(*args, cu, is_causal=True))(there)
    assert_close(jax.tree.map(np.asarray, got), alone(args, cu, is_causal=True))


@pytest.mark.parametrize("hints", [(3, 5), (1, 1), (9, 9), (100, 100), (0, 0)])
def test_a_wrong_hint_never_costs_the_answer(hints):
    args = packed(9, 11)
    cu_q, cu_k = [0, 4, 9], [0, 6, 11]
    max_q, max_k = hints
    got = varlen(
        *args, jnp.asarray(cu_q), jnp.asarray(cu_k), max_seqlen_q=max_q, max_seqlen_k=max_k
    )
    assert_close(got, alone(args, cu_q, cu_k))


def test_first_end_that_is_not_zero():
    """Rows before the first sequence belong to none."""
    args = packed(9, 9)
    out, lse = varlen(*args, jnp.asarray([2, 5, 9]))
    assert (out[:2] == 0).all()
    assert jnp.isneginf(lse[:2]).all()
    assert_close((out, lse), alone(args, [2, 5, 9]))


def test_past_the_end_is_never_read_forward_or_backward():
    args = packed(9, 11)
    cu = jnp.asarray([0, 2, 6]), jnp.asarray([0, 3, 7])
    f = lambda *a: varlen(*a, *cu, is_causal=True)
    ct = normal((9, 4, 8)), normal((9, 4))
    results = []
    for fill in (0.0, float("nan")):
        q = helpers.poison(args[0], 6, fill)
        k, v = (helpers.poison(x, 7, fill) for x in args[1:])
        bad_ct = helpers.poison(ct[0], 6, fill), helpers.poison(ct[1], 6, fill, -2)
        results.append(helpers.value_and_pullback(f, (q, k, v), bad_ct))
    (clean, clean_grads), (dirty, dirty_grads) = results
    helpers.assert_same_bits(dirty, clean)
    helpers.assert_same_bits(dirty_grads[1:], clean_grads[1:])
    helpers.assert_same_bits(dirty_grads[0][:6], clean_grads[0][:6])
    assert all((g[7:] == 0).all() for g in dirty_grads[1:])


def test_a_sequence_never_sees_another_ones_finite_values():
    args = packed(9, 9)
    cu = jnp.asarray([0, 4, 9])
    other = tuple(x.at[4:].set(1e4) for x in args)
    clean, changed = (jax.jit(varlen)(*a, cu) for a in (args, other))
    helpers.assert_same_bits(
        jax.tree.map(lambda x: x[:4], changed), jax.tree.map(lambda x: x[:4], clean)
    )


def test_no_rows_at_all():
    q, k, v = packed(0, 0)
    out, lse = varlen(q, k, v, jnp.asarray([0, 0]))
    assert out.shape == (0, 4, 8)
    assert lse.shape == (0, 4)


def test_array_scale_and_sinks_have_gradients():
    args = packed(9, 9)
    cu = [0, 4, 9]
    f = lambda call: jax.jit(jax.grad(lambda s, x: call(s, x)[1].sum(), (0, 1)))
    got = f(lambda s, x: varlen(*args, jnp.asarray(cu), scale=s, sinks=x))
    wanted = f(lambda s, x: alone(args, cu, scale=s, sinks=x))
    inputs = jnp.float32(0.4), normal((4,))
    assert_close(got(*inputs), wanted(*inputs), scale=16)


def test_vmap_and_grad_of_vmap():
    q, k, v = (jnp.stack([x, -x]) for x in packed(9, 9))
    ends = [0, 4, 9], [0, 1, 6]
    cu = jnp.asarray(ends)
    got = jax.jit(jax.vmap(varlen))(q, k, v, cu)
    stacked = lambda *a: jax.tree.map(
        lambda *x: jnp.stack(x), *(alone(tuple(x[i] for x in a), ends[i]) for i in range(2))
    )
    loss = lambda f: lambda q, k, v: (f(q, k, v)[0] ** 2).sum()
    assert_close(got, stacked(q, k, v))
    grads = jax.jit(jax.grad(loss(lambda *a: jax.vmap(varlen)(*a, cu)), (0, 1, 2)))(q, k, v)
    assert_close(grads, jax.jit(jax.grad(loss(stacked), (0, 1, 2)))(q, k, v), scale=8)


@pytest.mark.parametrize("implementation", [None, "xla", ("fa3", "xla")])
def test_implementations_agree(implementation):
    args = packed(9, 9, h=64, dtype=jnp.bfloat16)
    cu = [0, 4, 9]
    got = varlen(*args, jnp.asarray(cu), is_causal=True, implementation=implementation)
    assert_close(got, alone(args, cu, is_causal=True), jnp.bfloat16)


def test_fa3_takes_it_or_says_why_not():
    args = packed(9, 9, h=64, dtype=jnp.bfloat16)
    with pytest.raises(jax_fa3.UnsupportedError, match=r"varlen|cu_seqlens"):
        jax.eval_shape(functools.partial(varlen, implementation="fa3"), *args, jnp.asarray([0, 9]))


def test_a_long_packing_crosses_blocks():
    lengths = [513, 1, 0, 511, 64]
    cu = np.concatenate([[0], np.cumsum(lengths)])
    args = packed(int(cu[-1]), int(cu[-1]), n=2, k=1)
    got = jax.jit(functools.partial(varlen, is_causal=True))(*args, jnp.asarray(cu))
    assert_close(got, alone(args, cu.tolist(), is_causal=True))


def test_checkpoint_names():
    args = packed(9, 9)
    f = lambda *a: varlen(*a, jnp.asarray([0, 9]), checkpoint_name="mine")
    assert str(jax.make_jaxpr(lambda *a: jax.vjp(f, *a)[0])(*args)).count("name=mine") == 2
