"""The gradients of the kernels: bounds, masks, lengths, transformations, launches, memory.

backward_helpers.py has the bounds.
"""
# Options and arrays reach typed functions through ** and *.
# pyright: reportArgumentType=false, reportCallIssue=false
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import functools
import operator
import pathlib

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backward_helpers import (
    MASKS,
    check,
    compiled,
    cut,
    gradients,
    half_ulp,
    padded_yardsticks,
    problem,
    run_all,
    see_of,
    yardsticks,
)
from helpers import BWD_TARGET, FWD_TARGET, assert_close, assert_same_bits, normal, oracle
from kernel_helpers import DTYPES, HEAD_DIMS, attend, captured_step, run_with_dump, see_causal

import jax_fa3
from jax_fa3 import _primitive

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
head_dims = pytest.mark.parametrize("h", HEAD_DIMS)
# A kernel that sums dq in memory, and the one that makes it in a pass of its own.
both_designs = pytest.mark.parametrize("h", [64, 256])


def both_kernels(f, *args):
    """Whether the program of f(*args) holds the forward's and the backward's kernel."""
    text = helpers.cuda_text(f, *args)
    return helpers.kernel_calls(text, FWD_TARGET) > 0 and helpers.kernel_calls(text, BWD_TARGET) > 0


# --- Values ------------------------------------------------------------------------------------


@dtypes
@head_dims
def test_gradients_are_within_three_times_the_error_of_plain_jax(h, dtype):
    """Cotangents of out and of lse; T > S and T < S, so some rows and some keys are unseen."""
    for t, s in ((600, 400), (400, 600)):
        args, cts = problem(t=t, s=s, n=4, k=2, h=h, dtype=dtype)
        for mask, options in MASKS.items():
            got = compiled(**options)(args, cts)
            assert [x.dtype for x in got] == [dtype] * 3
            check(got, *yardsticks(args, cts, see_of(mask, t, s)), what=f"{mask} {t} x {s}")


@dtypes
@head_dims
def test_programs_hold_the_backward_kernel(h, dtype):
    """What every other test here takes for granted: the xla path would pass them too."""
    args, cts = problem(t=70, s=90, h=h, dtype=dtype)
    for options in MASKS.values():
        assert both_kernels(lambda a, c, o=options: gradients(a, c, **o), args, cts)
    f = lambda *a: jax_fa3.dot_product_attention(*a).astype(jnp.float32).sum()
    program = jax.jit(jax.value_and_grad(f, (0, 1, 2))).lower(*args).compile()
    for target in (FWD_TARGET, BWD_TARGET):
        assert target in str(program.as_text())
    helpers.assert_finite(program(*args))


SMALL = (1, 2, 3, 7, 8, 9, 17)
EDGES = tuple(x + d for x in (64, 128, 192, 256) for d in (-1, 0, 1))
LONGEST = 257


@dtypes
@head_dims
def test_every_length_beside_a_tile_edge(h, dtype):
    """T and S from 1, each length once as either, every mask: 19 problems in one program."""
    lengths = [*SMALL, *EDGES]
    partners = np.random.default_rng(h).permutation(lengths).tolist()
    whole = problem(t=LONGEST, s=LONGEST, h=h, dtype=dtype)
    masks = list(MASKS)
    # The other dtype meets the pair with another mask.
    turn = int(dtype == jnp.float16)
    cases = [
        (t, s, masks[(i + turn) % 3])
        for i, (t, s) in enumerate([*zip(lengths, partners), (1, 1), (1, LONGEST), (LONGEST, 1)])
    ]
    problems = [cut(whole, t, s) for t, s, _ in cases]
    results = run_all(problems, [MASKS[mask] for *_, mask in cases])
    for (t, s, mask), p, got in zip(cases, problems, results):
        both = padded_yardsticks(*p, see_of(mask, t, s), LONGEST)
        check(got, *both, epsilon=half_ulp(dtype), what=f"{mask} {t} x {s}")


HEADS = [(3, 3), (6, 2), (8, 1), (71, 1)]


@head_dims
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_mha_gqa_and_mqa(h, causal):
    """dk and dv are sums over a group of query heads, rounded once; 71 over 1 is Falcon 7B's."""
    problems = [problem(batch=1, t=130, s=150, n=n, k=k, h=h) for n, k in HEADS]
    see = see_causal(130, 150, 0) if causal else None
    results = run_all(problems, [{"is_causal": causal}] * len(HEADS))
    for heads, p, got in zip(HEADS, problems, results):
        exact, yardstick = yardsticks(*p, see)
        check(got, exact, yardstick, what=f"heads {heads}")
        # Not the sum of rounded gradients of each query head: two roundings at most (P or dS, the
        # result), however large the group.
        for x, right in zip(got[1:], exact[1:]):
            error = np.asarray(x, np.float32) - np.asarray(right)
            assert np.sqrt(np.mean(error**2)) < 2 * half_ulp(x.dtype) * np.std(right)


@head_dims
@pytest.mark.parametrize(("t", "s"), [(130, 200), (200, 65)])
def test_scalar_query_offset(h, t, s):
    """Also negative, past the end and beyond what int32 sums hold; one compilation for all."""
    args, cts = problem(t=t, s=s, h=h)
    f = jax.jit(lambda offset: gradients(args, cts, is_causal=True, query_offset=offset))
    for offset in [0, 1, -1, 63, s - t, -t, 1 - t, s - 1, s, 10**6, 2**31 - 1, -(2**31)]:
        got = f(np.int32(offset))
        both = yardsticks(args, cts, see_causal(t, s, offset))
        check(got, *both, epsilon=half_ulp(jnp.bfloat16), what=f"offset {offset}")
        if offset <= -t:
            assert all(not np.asarray(x).any() for x in got)


@head_dims
def test_query_offset_of_each_row(h):
    t, s, batch = 100, 170, 7
    args, cts = problem(batch=batch, t=t, s=s, n=4, k=2, h=h)
    f = jax.jit(lambda offset: gradients(args, cts, is_causal=True, query_offset=offset))
    edges = np.asarray([-t - 5, -t, -1, 0, s - t, s, 2**30], np.int32)
    for offset in (edges, np.asarray(helpers.integers(-t - 3, s + 3, (batch,)))):
        both = yardsticks(args, cts, see_causal(t, s, offset))
        check(f(offset), *both, epsilon=half_ulp(jnp.bfloat16), what=f"{offset}")


@dtypes
@head_dims
@pytest.mark.parametrize(("t", "s", "mask"), [(200, 70, "bottom_right"), (70, 200, "top_left")])
def test_what_sees_nothing_has_zero_gradients(t, s, mask, h, dtype):
    """Queries before the first key and keys after the last query, whatever their cotangents."""
    args, cts = problem(t=t, s=s, h=h, dtype=dtype)
    huge = (cts[0] * 100).astype(cts[0].dtype), cts[1] * 1e30  # of rows that see something, too
    dead = max(t - s, 0)
    huge = tuple(np.concatenate([x[:, :dead], y[:, dead:]], 1) for x, y in zip(huge, cts))
    dq, dk, dv = compiled(**MASKS[mask])(args, huge)
    helpers.assert_finite((dq, dk, dv))
    assert not np.asarray(dq[:, :dead]).any()
    assert np.asarray(dq[:, dead:]).any(-1).all()
    if s > t:
        assert not np.asarray(dk[:, t:]).any()
        assert not np.asarray(dv[:, t:]).any()
    check((dq, dk, dv), *yardsticks(args, cts, see_of(mask, t, s)), epsilon=half_ulp(dtype))


@head_dims
def test_nan_cotangents_of_what_sees_nothing_are_silenced(h):
    args, (dout, dlse) = problem(t=200, s=70, h=h)
    unseen = np.arange(200) < 130
    poisoned = [
        np.where(unseen.reshape(1, -1, *[1] * (x.ndim - 2)), value, x).astype(x.dtype)
        for value in (0, np.nan)
        for x in (dout, dlse)
    ]
    options = {"is_causal": True, "causal_alignment": "bottom_right"}
    zeros, nans = (compiled(**options)(args, tuple(poisoned[i : i + 2])) for i in (0, 2))
    for name, x, want in zip(("dq", "dk", "dv"), nans, zeros):
        assert np.isfinite(np.asarray(x, np.float32)).all(), name
        assert_close(x, want)  # dq is added in no fixed order
    assert not np.asarray(nans[0], np.float32)[:, :130].any()


@head_dims
def test_the_gradient_of_lse_alone(h):
    """d lse / d query is the probabilities' mean of the keys; values get none."""
    args, (dout, dlse) = problem(t=150, s=190, h=h)
    cts = (np.zeros_like(dout), dlse)
    got = compiled(is_causal=True)(args, cts)
    check(got, *yardsticks(args, cts, see_causal(150, 190, 0)), epsilon=half_ulp(jnp.bfloat16))
    assert not np.asarray(got[2]).any()


@head_dims
@pytest.mark.parametrize("scale", [-0.125, 1e-3, 0.3])
def test_scale(scale, h):
    """Any sign; not a power of two, which would hide a factor applied twice or too late."""
    args, cts = problem(t=100, s=140, h=h)
    got = compiled(scale=scale, is_causal=True)(args, cts)
    check(
        got, *yardsticks(args, cts, see_causal(100, 140, 0), scale), epsilon=half_ulp(got[0].dtype)
    )


def test_a_scale_of_zero_gives_queries_and_keys_no_gradient():
    args, cts = problem(t=100, s=140, h=64)
    dq, dk, dv = compiled(scale=0.0)(args, cts)
    assert not np.asarray(dq).any()
    assert not np.asarray(dk).any()
    mean = np.asarray(cts[0], np.float32).mean(2, keepdims=True).sum(1, keepdims=True) * 2 / 140
    np.testing.assert_allclose(
        np.asarray(dv, np.float32), np.broadcast_to(mean, dv.shape), atol=0.02
    )


@head_dims
def test_a_learnable_scale_has_a_gradient(h):
    args, cts = problem(t=100, s=140, h=h)
    both = lambda scale, *a: jax.vjp(lambda s, *a: attend(*a, scale=s), scale, *a)[1](cts)
    exact_of = jax.jit(
        lambda scale, args, cts: jax.vjp(lambda s: oracle(*args, scale=s), scale)[1](cts)[0]
    )
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), (args, cts))
    f = jax.jit(both)
    for scale in (np.float32(0.125), np.float32(-0.0625)):
        dscale, *grads = f(jnp.asarray(scale), *args)
        exact, yardstick = yardsticks(args, cts, scale=scale)
        # dq is rounded before and after it is multiplied by the scale.
        check(grads, exact, yardstick, epsilon=half_ulp(jnp.bfloat16), what=f"scale {scale}")
        # A sum of rounded products of either sign: bounded by their root sum of squares.
        terms = np.asarray(exact[0]) / scale * wide[0][0]
        noise = 4 * half_ulp(jnp.bfloat16) * np.sqrt(np.sum(terms**2))
        np.testing.assert_allclose(dscale, exact_of(scale, *wide), rtol=2e-3, atol=noise)


@dtypes
@head_dims
@pytest.mark.parametrize("factor", [8, 30])
def test_peaked_scores(factor, h, dtype):
    """Probabilities of 0 and 1: nothing overflows, and the rounding of out does not show.

    Where one probability is nearly 1, plain JAX subtracts equal numbers and is exact by luck. The
    kernels subtract rowsum(dout * out), out being rounded: dS is off by an ulp of |dout| |out|.
    """
    args, cts = problem(t=320, s=300, n=4, k=2, h=h, dtype=dtype)
    args = ((args[0] * factor).astype(args[0].dtype), *args[1:])
    for causal in (False, True):
        got = compiled(is_causal=causal)(args, cts)
        see = see_causal(320, 300, 0) if causal else None
        exact, yardstick = yardsticks(args, cts, see)
        check(got, exact, yardstick, epsilon=4 * half_ulp(dtype), what=f"causal {causal}")


@pytest.mark.parametrize(
    "sizes", [{"t": 0}, {"s": 0}, {"batch": 0}, {"t": 0, "s": 0}, {"n": 0, "k": 2}], ids=str
)
@pytest.mark.parametrize("causal", [False, True])
@both_designs
def test_empty_problems_have_zero_gradients_of_their_shapes(h, sizes, causal):
    args, cts = problem(**{"t": 70, "s": 66, "h": h, **sizes})
    for deterministic in (False, True):
        f = compiled(is_causal=causal, deterministic_backward=deterministic)
        for got, x in zip(f(args, cts), args):
            assert got.shape == x.shape
            assert not np.asarray(got).any()


@both_designs
def test_any_number_of_batch_dimensions(h):
    args, cts = problem(batch=6, t=70, s=66, h=h)
    flat = compiled()(args, cts)
    for batch in ((2, 3), (1, 2, 1, 3)):
        fold = lambda x, b=batch: x.reshape(*b, *x.shape[1:])
        got = compiled()(*jax.tree.map(fold, (args, cts)))
        for x, wanted in zip(got, flat):
            assert_close(x, fold(np.asarray(wanted)))
    one = compiled()(*jax.tree.map(operator.itemgetter(2), (args, cts)))
    for x, wanted in zip(one, flat):
        assert_close(x, np.asarray(wanted)[2])


# --- NaN ---------------------------------------------------------------------------------------


@dtypes
@head_dims
@pytest.mark.parametrize(("t", "s"), [(65, 97), (129, 191)])
def test_neighbours_in_memory_are_never_read_into_a_gradient(t, s, h, dtype):
    """All other batch rows and key heads NaN: what lies past T and S in memory is theirs."""
    (q, k, v), (dout, dlse) = problem(batch=3, t=t, s=s, n=4, k=2, h=h, dtype=dtype)

    def lonely(x, heads):
        alone = np.full_like(x, np.nan)
        alone[1, :, heads] = x[1, :, heads]
        return alone

    mine, own = slice(2, 4), slice(1, 2)  # key head 1 and its two query heads
    poisoned = (
        (lonely(q, mine), lonely(k, own), lonely(v, own)),
        (lonely(dout, mine), lonely(dlse, mine)),
    )
    for causal in (False, True):
        f = compiled(is_causal=causal)
        clean, got = f((q, k, v), (dout, dlse)), f(*poisoned)
        assert_close(got[0][1, :, mine], clean[0][1, :, mine], scale=0.5)  # summed in any order
        for x, wanted in zip(got[1:], clean[1:]):
            assert_same_bits(x[1, :, own], wanted[1, :, own])


@head_dims
def test_nan_in_a_query_spares_the_gradients_of_other_queries(h):
    args, cts = problem(t=200, s=150, h=h)
    clean = compiled()(args, cts)
    for row in (0, 70, 199):
        q = args[0].copy()
        q[0, row, 1] = np.nan
        dq, dk, dv = (np.asarray(x) for x in compiled()((q, *args[1:]), cts))
        others = np.ones(dq.shape[:3], bool)
        others[0, row, 1] = False
        assert np.isnan(dq[~others]).all()
        assert_close(dq[others], np.asarray(clean[0])[others], scale=0.5)
        # Every key of that batch row saw it; those of the other did not.
        assert np.isnan(dk[0]).all()
        for x, wanted in ((dk, clean[1]), (dv, clean[2])):
            assert_same_bits(x[1], np.asarray(wanted)[1])


@head_dims
def test_nan_in_masked_keys_of_other_tiles_changes_no_query_before_them(h):
    args, cts = problem(t=600, s=600, h=h)
    clean = compiled(is_causal=True)(args, cts)
    k, v = (x.copy() for x in args[1:])
    k[:, 512:], v[:, 512:] = np.nan, np.nan
    dq, *_ = compiled(is_causal=True)((args[0], k, v), cts)
    assert_close(dq[:, :256], clean[0][:, :256], scale=0.5)


# --- Transformations ---------------------------------------------------------------------------


def mapped_problem(axes, h, rows=3):
    """A problem whose operands of axis 0 have `rows` rows; cotangents have them where out does."""
    args, cts = problem(t=70, s=90, n=4, k=2, h=h)
    more = lambda x: np.asarray(normal((rows, *x.shape))).astype(x.dtype)
    return tuple(more(x) if a == 0 else x for x, a in zip(args, axes)), tuple(map(more, cts))


AXES = {"query": (0, None, None), "keys": (None, 0, 0), "all": (0, 0, 0)}


@both_designs
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_vmap_of_grad_has_a_gradient_for_every_row(axes, h):
    """Unmapped operands get one gradient a row, never a sum over the mapped axis."""
    args, cts = mapped_problem(axes, h)
    f = functools.partial(gradients, is_causal=True)
    got = jax.jit(jax.vmap(f, (axes, 0)))(args, cts)
    for row in range(3):
        one = tuple(x[row] if a == 0 else x for x, a in zip(args, axes))
        wanted = compiled(is_causal=True)(one, tuple(x[row] for x in cts))
        assert_close(tuple(x[row] for x in got), wanted)


@both_designs
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
@pytest.mark.parametrize("at_once", [True, False], ids=["rows at once", "row by row"])
def test_grad_of_vmap_sums_over_the_rows_that_share_an_operand(axes, h, at_once, monkeypatch):
    if not at_once:
        monkeypatch.setattr(_primitive, "_ROWS_BYTES", 0)
    args, cts = mapped_problem(axes, h)
    f = jax.vmap(functools.partial(attend, is_causal=True), axes)
    got = jax.jit(lambda args, cts: jax.vjp(f, *args)[1](cts))(args, cts)
    rows = [
        compiled(is_causal=True)(
            tuple(x[row] if a == 0 else x for x, a in zip(args, axes)), tuple(x[row] for x in cts)
        )
        for row in range(3)
    ]
    for i, (x, axis) in enumerate(zip(got, axes)):
        each = np.stack([np.asarray(r[i], np.float32) for r in rows])
        assert_close(x, each if axis == 0 else each.sum(0), jnp.bfloat16, scale=2)


def test_jacrev():
    """One backward call over all rows of the Jacobian; operands broadcast, cotangents mapped."""
    args, cts = problem(batch=2, t=70, s=90, n=4, k=2, h=64)
    weights = np.asarray(normal((5, *cts[0].shape))).astype(cts[0].dtype)
    f = lambda *a: jnp.einsum("btnh,rbtnh->r", attend(*a)[0], weights)
    got = jax.jit(jax.jacrev(f, (0, 1, 2)))(*args)
    for row in range(5):
        wanted = compiled()(args, (weights[row], np.zeros_like(cts[1])))
        assert_close(tuple(x[row] for x in got), wanted)


def test_nested_vmaps_over_different_operands():
    """Outer over the query, inner over keys and values: two broadcasting patterns in one batch."""
    args, cts = problem(batch=2, t=33, s=65, h=256)
    draw = lambda *shape: np.asarray(normal(shape)).astype(jnp.bfloat16)
    q = draw(3, *args[0].shape)
    k, v = (draw(2, *x.shape) for x in args[1:])
    dout = draw(3, 2, *args[0].shape)
    one = lambda q, k, v, dout: gradients((q, k, v), (dout, cts[1]))
    f = jax.vmap(jax.vmap(one, (None, 0, 0, 0)), (0, None, None, 0))
    got = jax.jit(f)(q, k, v, dout)
    for i, j in ((0, 0), (1, 1), (2, 0), (2, 1)):
        wanted = compiled()((q[i], k[j], v[j]), (dout[i, j], cts[1]))
        assert_close(tuple(x[i, j] for x in got), wanted)


# --- Repeatability, sizes, memory --------------------------------------------------------------


@head_dims
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_200_runs_give_dk_and_dv_the_same_bits(h, causal):
    """dq is summed in an order that differs from run to run, and is close; not so in 256."""
    args, cts = jax.device_put(problem(t=333, s=517, n=6, k=2, h=h))
    f = compiled(is_causal=causal)
    first = f(args, cts)

    @jax.jit
    def differs(a, b):
        apart = jnp.max(jnp.abs(a[0].astype(jnp.float32) - b[0].astype(jnp.float32)))
        return sum(jnp.sum(x != y) for x, y in zip(a[1:], b[1:])), apart

    counts, apart = zip(*(differs(f(args, cts), first) for _ in range(200)))
    assert not np.asarray(jnp.stack(counts)).any()
    biggest = float(jnp.max(jnp.abs(first[0])))
    assert max(map(float, apart)) <= (0 if h == 256 else 2 * half_ulp(jnp.bfloat16) * biggest)


@pytest.mark.parametrize(("h", "deterministic"), [(64, False), (64, True), (256, False)])
def test_more_than_65535_pairs_of_batch_and_head(h, deterministic):
    """Past what one dimension of a grid other than x holds, of query heads and of key heads."""
    args, cts = problem(batch=4111, t=3, s=5, n=16, k=16, h=h)
    got = compiled(is_causal=True, deterministic_backward=deterministic)(args, cts)
    both = yardsticks(args, cts, see_causal(3, 5, 0))
    check(got, *both, epsilon=half_ulp(jnp.bfloat16))


@pytest.mark.big
@pytest.mark.parametrize("side", ["query", "key"])
def test_more_than_two_to_the_31_elements_in_one_array(side):
    """Offsets past int32 in the arrays and in dq's accumulator.

    The batch repeats 41 rows 800 times: 32800 rows of 64 tokens x 1024 channels. So every row of
    the result is known from the first 41, and 2^31 elements are not a whole number of periods.
    """
    period, repeats = 41, 800
    assert period * repeats * 64 * 1024 > 2**31
    assert (2**31 // (64 * 1024)) % period

    @jax.jit
    def program(args, cts):
        tile = lambda x: jnp.broadcast_to(x, (repeats, *x.shape)).reshape(-1, *x.shape[1:])
        grads = gradients(*jax.tree.map(tile, (args, cts)), is_causal=True)
        rows = [x.reshape(repeats, period, *x.shape[1:]) for x in grads]
        first = [x[0] for x in rows]
        apart = [
            jnp.max(jnp.abs(x.astype(jnp.float32) - y[None].astype(jnp.float32)))
            for x, y in zip(rows, first)
        ]
        return first, apart

    for h in (64, 256):  # one after the other: each takes a good part of the memory
        heads = 1024 // h
        t, s, k = (64, 5, 1) if side == "query" else (2, 64, heads)
        args, cts = problem(batch=period, t=t, s=s, n=heads, k=k, h=h)
        first, apart = program(args, cts)
        both = yardsticks(args, cts, see_causal(t, s, 0))
        check(first, *both, epsilon=half_ulp(jnp.bfloat16), what=f"head dim {h}")
        assert [float(x) for x in apart[1:]] == [0, 0]
        biggest = float(jnp.max(jnp.abs(first[0])))
        assert float(apart[0]) <= (0 if h == 256 else 2 * half_ulp(jnp.bfloat16) * biggest)


@head_dims
@pytest.mark.parametrize("deterministic", [False, True])
def test_memory_is_the_results_and_the_workspace_of_the_documentation(h, deterministic):
    """Two numbers a row, and in 64 and 128 dq in float32; nothing of T x S, nothing twice.

    Forward and backward in one program, compiled and not run.
    """
    t, n = 131072, 8
    array = jax.ShapeDtypeStruct((1, t, n, h), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((1, t, n), jnp.float32)
    options = {"is_causal": True, "deterministic_backward": deterministic}
    program = jax.jit(functools.partial(gradients, **options))
    analysis = program.lower((array,) * 3, (array, lse)).compile().memory_analysis()
    assert analysis is not None  # the CUDA backend has one
    results = 3 * array.size * 2  # dq, dk, dv
    saved = array.size * 2 + lse.size * 4  # out and lse
    workspace = n * t * (8 if h == 256 else 4 * h + 8)
    workspace += 4 * n * t // 64 if deterministic and h < 256 else 0
    by_token = lse.size * 4  # dlse in the kernel's order
    assert analysis.output_size_in_bytes == pytest.approx(results, rel=0.01)
    wanted = saved + workspace + by_token
    assert analysis.temp_size_in_bytes == pytest.approx(wanted, rel=0.05)


# --- Under XLA's runtime -----------------------------------------------------------------------


def test_many_backward_calls_in_one_program():
    """Fifteen calls of five shapes that share XLA's buffers, workspaces among them."""
    shapes = [(70, 90), (64, 64), (33, 130), (129, 1), (1, 200)]
    problems = [problem(t=t, s=s, h=HEAD_DIMS[i % 3]) for i, (t, s) in enumerate(shapes)]

    @jax.jit
    def program(problems):
        queries, results = [], []
        for i in range(15):
            (q, k, v), cts = problems[i % 5]
            if i >= 5:  # each round depends on the one before, so none can be merged
                q = q + results[i - 5][0]
            queries.append(q)
            results.append(gradients((q, k, v), cts, is_causal=i % 2 == 0))
        return queries, results

    for i, (q, got) in enumerate(zip(*program(problems))):
        (_, k, v), cts = problems[i % 5]
        wanted = compiled(is_causal=i % 2 == 0)((q, k, v), cts)
        assert_close(got[0], wanted[0])
        assert_same_bits(got[1:], wanted[1:], f"call {i}")


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
@both_designs
def test_donated_inputs(h):
    """A gradient may take its operand's memory only after the operand was read."""
    args, cts = problem(t=300, s=300, n=4, k=2, h=h)
    wanted = compiled()(args, cts)
    donating = jax.jit(lambda args, cts: gradients(args, cts), donate_argnums=(0, 1))
    for _ in range(5):
        got = donating(*jax.tree.map(jnp.array, (args, cts)))
        assert_close(got[0], wanted[0], scale=0.5)
        assert_same_bits(got[1:], wanted[1:])


@both_designs
def test_a_training_step_replays_with_changing_inputs(h):
    """What a command buffer captured must read the new buffers, not the recorded ones."""
    (q, k, v), cts = problem(t=100, s=130, n=4, k=2, h=h)
    move = lambda q, dq: q - (dq * jnp.asarray(0.5, q.dtype))

    @jax.jit
    def step(q):
        for i in range(4):
            q = move(q, gradients((q, k, v), cts, is_causal=i % 2 == 0)[0])
        return q

    single = jax.jit(
        lambda q, causal: move(q, gradients((q, k, v), cts, is_causal=causal)[0]), static_argnums=1
    )
    inputs = [np.asarray(normal(q.shape)).astype(q.dtype) for _ in range(6)]
    wanted = []
    for x in inputs:
        for i in range(4):
            x = single(x, i % 2 == 0)
        wanted.append(np.asarray(x, np.float32))
    for _ in range(10):
        for x, right in zip(inputs, wanted):
            got = np.asarray(step(x), np.float32)
            assert np.abs(right - np.asarray(x, np.float32)).max() > 0.2  # the steps do something
            np.testing.assert_allclose(got, right, atol=0.04, rtol=0.04)


CAPTURE = """
import sys
sys.path[:0] = sys.argv[1:3]
import jax, jax.numpy as jnp, jax_fa3

def loss(q, deterministic):
    out = jax_fa3.dot_product_attention(
        q, q, q, is_causal=True, implementation="fa3", deterministic_backward=deterministic
    )
    return out.astype(jnp.float32).sum()

def step(q):
    for i in range(4):
        q = q - jax.grad(loss)(q, i % 2 == 0)
    return q

f = jax.jit(step)
q = jnp.ones((1, 100, 2, 64), jnp.bfloat16)
for _ in range(3):
    q = f(q)
print(float(q.astype(jnp.float32).sum()))
"""


def test_xla_captures_both_kernels_into_a_command_buffer(tmp_path):
    """A program whose only calls are ours: XLA's dump of its thunks shows a command buffer."""
    run_with_dump(CAPTURE, tmp_path, pathlib.Path(__file__).parent)
    dumped = captured_step(tmp_path)
    assert any(BWD_TARGET in x for n, x in dumped.items() if "jit_step" in n)
