"""jit, grad, vmap, scan and checkpoint compose in any order, with values of the dense oracle.

`CASES` runs everything through both doors; of the primitives it is their default lowering that runs
here, and the kernel's lowering is read as text.
"""
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import functools
import itertools
import operator

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CASES, assert_close, both_doors, exact, integers, normal, oracle, qkv

import jax_fa3
from jax_fa3 import _primitive

pytestmark = pytest.mark.usefixtures("quick_compile")

attend = functools.partial(jax_fa3.dot_product_attention, return_residual=True)

SUBSETS = [s for r in (1, 2, 3) for s in itertools.combinations(range(3), r)]
SIZE = 3  # of a mapped axis


def operands(case, mapped, axes):
    """query, key, value where the `mapped` ones carry an axis of SIZE at axes[i]."""
    args = []
    for i, x in enumerate(qkv(batch=(2,), t=4, s=5, n=4, k=2, **case)):
        args.append(normal(_with_axis(x.shape, axes[i]), x.dtype) if i in mapped else x)
    in_axes = tuple(axes[i] if i in mapped else None for i in range(3))
    return tuple(args), in_axes


def _with_axis(shape, axis):
    shape = list(shape)
    shape.insert(axis % (len(shape) + 1), SIZE)
    return tuple(shape)


def loop(f, args, in_axes):
    """vmap written as a Python loop."""
    rows = [
        f(*(x if a is None else jnp.take(x, i, a) for x, a in zip(args, in_axes)))
        for i in range(SIZE)
    ]
    return jax.tree.map(lambda *r: jnp.stack(r), *rows)


def total(attention, **options):
    """A scalar that depends on every entry of out and lse with different weights."""

    def loss(*args):
        out, lse = attention(*args, **options)
        weigh = lambda x: jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
        return (out.astype(jnp.float32) * weigh(out)).sum() + (lse * weigh(lse)).sum()

    return loss


# --- vmap: every subset of query, key and value, axes anywhere --------------------------------


@both_doors
@pytest.mark.parametrize("mapped", SUBSETS, ids=lambda m: "".join("qkv"[i] for i in m))
def test_vmap_of_value_and_gradient_over_any_subset(case, mapped):
    """vmap(value_and_grad): each gradient has its own row, also those of unmapped operands."""
    axes = helpers.fresh_rng().integers(-5, 5, 3).tolist()
    args, in_axes = operands(case, mapped, axes)

    def f(attention):
        loss = jax.value_and_grad(total(attention, is_causal=True), (0, 1, 2))
        return lambda *args: (attention(*args, is_causal=True), loss(*args))

    got = jax.jit(jax.vmap(f(attend), in_axes))(*args)
    wanted = jax.jit(lambda *args: loop(f(exact), args, in_axes))(*args)
    assert_close(got[0], wanted[0], case["dtype"])
    assert_close(got[1], wanted[1], case["dtype"], scale=4)


@both_doors
@pytest.mark.parametrize("mapped", SUBSETS, ids=lambda m: "".join("qkv"[i] for i in m))
def test_grad_of_vmap_sums_over_the_mapped_axis_for_unmapped_operands(case, mapped):
    args, in_axes = operands(case, mapped, (0, 1, 2))

    def loss(attention, apply):
        f = lambda *args: attention(*args)
        out = lambda *args: apply(f, args)
        return jax.grad(total(out), (0, 1, 2))

    got = jax.jit(loss(attend, lambda f, a: jax.vmap(f, in_axes)(*a)))(*args)
    wanted = jax.jit(loss(exact, lambda f, a: loop(f, a, in_axes)))(*args)
    assert_close(got, wanted, case["dtype"], scale=6)


@pytest.fixture(params=[True, False], ids=["all rows at once", "row by row"])
def rows_at_once(request, monkeypatch):
    """Both ways to sum the gradients of what a vmap did not map; few rows are made at once."""
    if not request.param:
        monkeypatch.setattr(_primitive, "_ROWS_BYTES", 0)


@pytest.mark.usefixtures("rows_at_once")
@both_doors
def test_grad_of_nested_vmaps_with_different_operands_at_each_level(case):
    """The gradient of key is a sum over the outer axis, that of query over the inner one."""
    q, k, v = qkv(batch=(2,), t=4, s=5, **case)
    outer_q, inner_k = normal((2, *q.shape), q.dtype), normal((SIZE, *k.shape), k.dtype)

    def rows(q, k, v):
        stack = lambda *r: jnp.stack(r)
        return jax.tree.map(stack, *(jax.tree.map(stack, *(exact(a, b, v) for b in k)) for a in q))

    pairs = jax.vmap(jax.vmap(attend, (None, 0, None)), (0, None, None))
    got, wanted = (
        jax.jit(jax.grad(total(f), (0, 1, 2)))(outer_q, inner_k, v) for f in (pairs, rows)
    )
    assert_close(got, wanted, case["dtype"], scale=8)


@pytest.mark.usefixtures("rows_at_once")
@both_doors
@pytest.mark.parametrize("rows", [6, 7], ids=["two at once", "a prime number"])
def test_rows_are_made_as_many_at_once_as_there_is_room_for(case, rows, monkeypatch):
    q, k, v = qkv(batch=(2,), t=4, s=5, **case)
    monkeypatch.setattr(_primitive, "_ROWS_BYTES", 2 * (k.nbytes + v.nbytes))
    queries = normal((rows, *q.shape), q.dtype)
    gradients = jax.grad(total(jax.vmap(attend, (0, None, None))), (0, 1, 2))
    stacked = lambda q, k, v: jax.tree.map(lambda *r: jnp.stack(r), *(exact(x, k, v) for x in q))
    wanted = jax.grad(total(stacked), (0, 1, 2))
    args = queries, k, v
    assert_close(jax.jit(gradients)(*args), jax.jit(wanted)(*args), case["dtype"], scale=8)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("rows", "at_once"), [(6, 2), (7, 1), (2, 2)])
def test_one_kernel_in_a_loop_makes_the_rows(rows, at_once, monkeypatch):
    q, k, v = qkv(batch=(2,), t=4, s=5, **CASES["primitive"])
    monkeypatch.setattr(_primitive, "_ROWS_BYTES", 2 * (k.nbytes + v.nbytes))
    gradients = jax.grad(total(jax.vmap(attend, (0, None, None))), (0, 1, 2))
    text = helpers.cuda_text(gradients, normal((rows, *q.shape), q.dtype), k, v)
    (line,) = helpers.kernel_lines(text, helpers.BWD_TARGET)
    assert helpers.signature(line)[1][1] == f"{at_once}x2x5x2x64xbf16"


@both_doors
def test_vmap_of_grad_of_vmap(case):
    """The inner axis is summed over, and the outer one has a gradient for each row."""
    q, k, v = qkv(batch=(2,), t=4, s=5, **case)
    inner_q, outer_k = normal((SIZE, *q.shape), q.dtype), normal((SIZE, *k.shape), k.dtype)
    loss = total(jax.vmap(attend, (0, None, None)))
    got = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)), (None, 0, None)))(inner_q, outer_k, v)
    loss = total(lambda *a: loop(exact, a, (0, None, None)))
    wanted = loop(jax.grad(loss, (0, 1, 2)), (inner_q, outer_k, v), (None, 0, None))
    assert_close(got, wanted, case["dtype"], scale=8)


@pytest.mark.usefixtures("rows_at_once")
@both_doors
def test_grad_of_vmap_over_an_offset_alone(case):
    """No operand that has a gradient is mapped: all gradients are sums."""
    args = qkv(batch=(2,), t=4, s=5, **case)
    offsets = jnp.arange(SIZE)

    def loss(attention, apply):
        f = lambda offset, *a: attention(*a, is_causal=True, query_offset=offset)
        return jax.jit(jax.grad(total(lambda *a: apply(f, (offsets, *a))), (0, 1, 2)))

    in_axes = (0, None, None, None)
    got = loss(attend, lambda f, a: jax.vmap(f, in_axes)(*a))(*args)
    wanted = loss(exact, lambda f, a: loop(f, a, in_axes))(*args)
    assert_close(got, wanted, case["dtype"], scale=6)


def test_grad_of_vmap_where_lengths_and_segments_are_shared_by_the_rows():
    args, in_axes = operands(CASES["xla"], (0, 1, 2), (0, 0, 0))
    shared = {name: OPTIONAL[name](()) for name in ("query_offset", "key_value_seq_lengths")}
    shared["query_segment_ids"] = integers(0, 1, (B, T))
    shared["key_value_segment_ids"] = integers(0, 1, (B, S))
    f = lambda attention: functools.partial(attention, is_causal=True, **shared)
    loss = total(jax.vmap(f(attend), in_axes))
    wanted = total(lambda *a: loop(f(exact), a, in_axes))
    got, wanted = (jax.jit(jax.grad(x, (0, 1, 2)))(*args) for x in (loss, wanted))
    assert_close(got, wanted, scale=6)


@both_doors
def test_grad_of_a_vmap_of_zero_rows_is_zero_where_nothing_is_mapped(case):
    q, k, v = qkv(batch=(2,), t=3, s=4, **case)
    loss = total(jax.vmap(attend, (0, None, None)))
    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(jnp.zeros((0, *q.shape), q.dtype), k, v)
    assert_close(grads[1:], (jnp.zeros_like(k), jnp.zeros_like(v)))


@both_doors
@pytest.mark.parametrize("mapped", [(0,), (2,), (0, 1, 2)], ids=["q", "v", "all"])
@pytest.mark.parametrize("empty", ["queries", "heads"])
def test_vmap_where_nothing_is_computed_keeps_the_mapped_axis(case, mapped, empty):
    """The xla path's empty results depend on no operand, mapped or not."""
    sizes = {"queries": {"t": 0, "n": 2, "k": 1}, "heads": {"t": 4, "n": 0, "k": 0}}[empty]
    args = qkv(batch=(2,), s=4, **{**case, **sizes})
    args = tuple(jnp.stack([x] * SIZE) if i in mapped else x for i, x in enumerate(args))
    f = jax.vmap(attend, tuple(0 if i in mapped else None for i in range(3)))
    out, lse = jax.jit(f)(*args)
    assert out.shape[:2] == lse.shape[:2] == (SIZE, 2)
    grads = jax.jit(jax.grad(total(f), (0, 1, 2)))(*args)
    assert [g.shape for g in grads] == [x.shape for x in args]


def test_second_derivative_of_a_vmap_over_the_query_alone():
    q, k, v = qkv(batch=(), t=4, s=5)
    q = normal((SIZE, *q.shape))

    def second(out_and_lse):
        gradients = jax.grad(total(out_and_lse), (0, 1, 2))
        norm = lambda *a: sum((g**2).sum() for g in gradients(*a))
        return jax.jit(jax.grad(norm, (0, 1, 2)))(q, k, v)

    got = second(jax.vmap(functools.partial(attend, is_causal=True), (0, None, None)))
    mapped_exact = lambda *a: loop(functools.partial(exact, is_causal=True), a, (0, None, None))
    assert_close(got, second(mapped_exact), scale=16)


@pytest.mark.optimised
@both_doors
@pytest.mark.parametrize("mapped", [(0,), (1,), (2,), (1, 2)], ids=["q", "k", "v", "kv"])
def test_memory_for_what_is_not_mapped_does_not_grow_with_the_axis(case, mapped, monkeypatch):
    """Forward and backward: six more rows need less than one more copy of the rest.

    Where keys are mapped the forward's out, and what it is made of, has rows of the query's size:
    there the backward alone.
    """
    if mapped != (0,) and case["dtype"] == jnp.bfloat16 and jax.__version_info__ < (0, 11):
        pytest.skip("XLA for CPUs before JAX 0.11 copies all rows of out and dout in float32")
    monkeypatch.setattr(_primitive, "_ROWS_BYTES", 0)  # no row of these is small
    t, s = (2, 2048) if mapped == (0,) else (2048, 2)
    shapes = [(1, length, 2, 64) for length in (t, s, s)]
    dtype = case["dtype"]
    f = jax.vmap(attend, tuple(0 if i in mapped else None for i in range(3)))

    def temporaries(rows):
        args = [
            jax.ShapeDtypeStruct((rows, *shape) if i in mapped else shape, dtype)
            for i, shape in enumerate(shapes)
        ]
        out, pullback = jax.eval_shape(functools.partial(jax.vjp, f), *args)
        if mapped == (0,):
            program = jax.jit(lambda ct, *a: (f(*a), jax.vjp(f, *a)[1](ct))).lower(out, *args)
        else:
            program = jax.jit(lambda ct, pullback: pullback(ct)).lower(out, pullback)
        return program.compile().memory_analysis().temp_size_in_bytes

    copy = 2048 * 2 * 64 * np.dtype(dtype).itemsize
    growth = (temporaries(8) - temporaries(2)) / copy
    assert growth < 1, f"{growth:.1f} copies for 6 rows"


@both_doors
@pytest.mark.parametrize("out_axes", [(1, 2), (-1, -1), (0, 1)])
def test_out_axes(case, out_axes):
    args, in_axes = operands(case, (0, 1, 2), (0, 0, 0))
    got = jax.jit(jax.vmap(attend, in_axes, out_axes))(*args)
    wanted = loop(exact, args, in_axes)
    moved = tuple(jnp.moveaxis(x, 0, a) for x, a in zip(wanted, out_axes))
    assert_close(got, moved, case["dtype"])


@both_doors
def test_nested_vmap_with_different_operands_at_each_level(case):
    """Outer over query and value, inner over key: a result for every pair."""
    q, k, v = qkv(batch=(2,), t=4, s=5, **case)
    outer_q, outer_v = (normal((2, *x.shape), x.dtype) for x in (q, v))
    inner_k = normal((SIZE, *k.shape), k.dtype)
    pair = jax.vmap(jax.vmap(attend, (None, 0, None)), (0, None, 0))
    got = jax.jit(pair)(outer_q, inner_k, outer_v)
    for i, j in itertools.product(range(2), range(SIZE)):
        wanted = exact(outer_q[i], inner_k[j], outer_v[i])
        assert_close(jax.tree.map(operator.itemgetter((i, j)), got), wanted, case["dtype"])


@both_doors
def test_three_vmaps_of_rank_3_inputs(case):
    args = qkv(batch=(2, 3, 2), t=3, s=4, **case)
    f = attend
    for _ in range(3):
        f = jax.vmap(f)
    assert_close(jax.jit(f)(*args), exact(*args), case["dtype"])


@both_doors
def test_vmap_of_zero_rows(case):
    args = qkv(batch=(0, 2), t=3, s=4, **case)
    out, _ = jax.jit(jax.vmap(attend))(*args)
    assert out.shape[:2] == (0, 2)
    grads = jax.jit(jax.vmap(jax.grad(total(attend), (0, 1, 2))))(*args)
    assert [g.shape for g in grads] == [x.shape for x in args]


def test_vmap_where_nothing_is_mapped_but_another_argument():
    q, k, v = qkv(h=64, dtype=jnp.bfloat16)
    got = jax.jit(jax.vmap(lambda i: (attend(q, k, v), i)))(jnp.arange(SIZE))[0]
    wanted = jax.tree.map(lambda x: jnp.stack([x] * SIZE), attend(q, k, v))
    assert_close(got, wanted)


def test_vmap_with_a_named_axis():
    q, k, v = (normal((SIZE, *x.shape), x.dtype) for x in qkv(h=64, dtype=jnp.bfloat16))
    f = lambda q, k, v: jax.lax.pmean(attend(q, k, v)[1], "ensemble")
    got = jax.jit(jax.vmap(f, axis_name="ensemble"))(q, k, v)
    wanted = exact(q, k, v)[1].mean(0)
    assert_close(got, jnp.stack([wanted] * SIZE), jnp.bfloat16)


# --- vmap: every optional array alone ----------------------------------------------------------

B, T, S, N, K = 2, 4, 5, 4, 2
OPTIONAL = {
    "bias": lambda lead: normal((*lead, N, T, S)),
    "mask": lambda lead: normal((*lead, B, 1, T, S)) > -1,
    "scale": lambda lead: 0.2 * normal(lead),  # folding it into bfloat16 rounds large scores
    "query_offset": lambda lead: integers(-2, 3, lead),
    "query_seq_lengths": lambda lead: integers(0, T, (*lead, B)),
    "key_value_seq_lengths": lambda lead: integers(0, S, (*lead, B)),
    "query_segment_ids": lambda lead: integers(0, 1, (*lead, B, T)),
    "key_value_segment_ids": lambda lead: integers(0, 1, (*lead, B, S)),
    "sinks": lambda lead: normal((*lead, N)),
}
FLOATS = ("bias", "scale", "sinks")
# What the kernels take; the others choose the xla function whatever the dtype.
OF_THE_KERNELS = ("scale", "query_offset")


@pytest.mark.parametrize(
    ("case", "name"),
    [(CASES["xla"], name) for name in OPTIONAL]
    + [(CASES["primitive"], name) for name in OF_THE_KERNELS],
    ids=[*OPTIONAL, *(f"{name} of the primitive" for name in OF_THE_KERNELS)],
)
def test_vmap_over_one_optional_array_alone(case, name):
    """The array carries the axis, the operands do not; values, and the gradients there are."""
    q, k, v = qkv(batch=(B,), t=T, s=S, n=N, k=K, **case)
    x = OPTIONAL[name]((SIZE,))
    fixed = {"is_causal": True}
    if name.endswith("segment_ids"):
        ids = {"query_segment_ids": integers(0, 1, (B, T))}
        ids["key_value_segment_ids"] = integers(0, 1, (B, S))
        fixed = {n: i for n, i in ids.items() if n != name}

    def f(attention):
        loss = lambda x, q: total(attention, **fixed, **{name: x})(q, k, v)
        argnums = (0, 1) if name in FLOATS else 1
        return lambda x: (attention(q, k, v, **fixed, **{name: x}), jax.grad(loss, argnums)(x, q))

    got = jax.jit(jax.vmap(f(attend)))(x)
    wanted = jax.jit(lambda x: loop(f(exact), (x,), (0,)))(x)
    assert_close(got[0], wanted[0], case["dtype"])
    assert_close(got[1], wanted[1], case["dtype"], scale=8)


def test_vmap_over_everything_at_once_on_different_axes():
    names = [n for n in OPTIONAL if n != "query_offset"]
    arrays = {n: OPTIONAL[n]((SIZE,)) for n in names}
    axes = {n: int(helpers.fresh_rng().integers(0, x.ndim)) for n, x in arrays.items()}
    moved = {n: jnp.moveaxis(x, 0, axes[n]) for n, x in arrays.items()}
    args = tuple(normal((SIZE, *x.shape)) for x in qkv(batch=(B,), t=T, s=S, n=N, k=K))
    f = lambda attention: lambda a, r: attention(*a, **r, is_causal=True, logits_soft_cap=3.0)
    got = jax.jit(jax.vmap(f(attend), (0, axes)))(args, moved)
    rows = [
        f(exact)(tuple(x[i] for x in args), {n: x[i] for n, x in arrays.items()})
        for i in range(SIZE)
    ]
    assert_close(got, jax.tree.map(lambda *r: jnp.stack(r), *rows))


@both_doors
@pytest.mark.parametrize("draw", range(6))
def test_vmap_over_any_subset_of_all_arguments(case, draw):
    """All arguments are given and some are mapped, each on an axis of its own; with gradients.

    All that the door takes: of the optional arrays the primitive has two.
    """
    del draw  # the test's name draws its numbers: another subset and other axes
    arrays = dict(zip(("query", "key", "value"), qkv(batch=(B,), t=T, s=S, n=N, k=K, **case)))
    optional = OPTIONAL if case is CASES["xla"] else OF_THE_KERNELS
    free = (*arrays, *(name for name in FLOATS if name in optional))
    arrays |= {name: OPTIONAL[name](()) for name in optional}
    mapped = helpers.fresh_rng().random(len(arrays)) < 0.4
    mapped[helpers.fresh_rng().integers(len(arrays))] = True
    axes = dict.fromkeys(arrays)
    for name in itertools.compress(list(arrays), mapped):
        x = arrays[name]
        row = OPTIONAL.get(name, lambda lead, x=x: normal((*lead, *x.shape), x.dtype))((SIZE,))
        axes[name] = int(helpers.fresh_rng().integers(0, row.ndim))
        arrays[name] = jnp.moveaxis(row, 0, axes[name])

    def both(attention, arrays):
        fixed = {n: x for n, x in arrays.items() if n not in free}
        call = lambda wanted: attention(**wanted, **fixed, is_causal=True)
        wanted = {n: arrays[n] for n in free}
        return call(wanted), jax.grad(total(call))(wanted)

    def one_by_one(arrays):
        of_row = lambda i: {
            n: x if axes[n] is None else jnp.take(x, i, axes[n]) for n, x in arrays.items()
        }
        rows = [both(exact_by_name, of_row(i)) for i in range(SIZE)]
        return jax.tree.map(lambda *r: jnp.stack(r), *rows)

    got = jax.jit(jax.vmap(functools.partial(both, attend), (axes,)))(arrays)
    assert_close(got, jax.jit(one_by_one)(arrays), case["dtype"], scale=8)


def exact_by_name(*, query, key, value, **options):
    return exact(query, key, value, **options)


def test_vmap_over_descales():
    q, k, v = (x.astype(jnp.float8_e4m3fn) for x in qkv(batch=(B,), t=T, s=S, n=N, k=K, h=16))
    descale = jnp.exp2(integers(-1, 2, (SIZE, B, K)).astype(jnp.float32))
    f = lambda d: attend(q, k, v, key_descale=d, value_descale=d)
    got = jax.jit(jax.vmap(f))(descale)
    wanted = jax.tree.map(lambda *r: jnp.stack(r), *(f(d) for d in descale))
    assert_close(got, wanted)


# --- jacrev, jit, scan, checkpoint, linearize --------------------------------------------------


@both_doors
def test_jacrev(case):
    """Of out and lse, with regard to query, key and value."""
    args = qkv(batch=(), t=2, s=3, n=2, k=1, **case)
    # jacrev wants both results in one dtype; a cast to float32 rounds nothing.
    floats = lambda attention: lambda *a: jax.tree.map(jnp.float32, attention(*a))
    got, wanted = (jax.jit(jax.jacrev(floats(f), (0, 1, 2)))(*args) for f in (attend, exact))
    assert_close(got, wanted, case["dtype"], scale=2)


@both_doors
def test_scan_over_layers_with_gradient(case):
    q, k, v = qkv(batch=(2,), t=4, s=4, n=4, k=4, **case)
    weights = normal((3,), jnp.float32)

    def loss(attention):
        def layer(x, w):
            out, _ = attention(x, k, v, is_causal=True)
            return (x + w.astype(x.dtype) * out.astype(x.dtype)), None

        f = lambda q, w: jax.lax.scan(layer, q, w)[0].astype(jnp.float32).sum()
        return jax.jit(jax.value_and_grad(f, (0, 1)))

    got, wanted = loss(attend)(q, weights), loss(exact)(q, weights)
    assert_close(got, wanted, case["dtype"], scale=16)


POLICIES = {
    "none": None,
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "by name": jax.checkpoint_policies.save_only_these_names("jax_fa3_out", "jax_fa3_lse"),
    "ours": jax_fa3.remat_policy(),
    "offload": helpers.offload_policy("jax_fa3_out", saved=("jax_fa3_lse",)),
}


@both_doors
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_checkpoint_changes_no_gradient(case, policy):
    args = qkv(batch=(2,), t=4, s=5, **case)
    loss = total(attend, is_causal=True)
    remat = jax.jit(jax.grad(jax.checkpoint(loss, policy=policy), (0, 1, 2)))(*args)
    assert_close(remat, jax.jit(jax.grad(loss, (0, 1, 2)))(*args), case["dtype"])


@both_doors
@pytest.mark.parametrize("outside", ["vmap", "checkpoint"])
def test_checkpoint_and_vmap_in_either_order(case, outside):
    args = tuple(normal((SIZE, *x.shape), x.dtype) for x in qkv(batch=(2,), t=4, s=5, **case))
    policy = jax_fa3.remat_policy()
    remat = functools.partial(jax.checkpoint, policy=policy)
    f = jax.vmap(remat(attend)) if outside == "vmap" else remat(jax.vmap(attend))
    got = jax.jit(jax.grad(total(f), (0, 1, 2)))(*args)
    assert_close(got, jax.jit(jax.grad(total(jax.vmap(attend)), (0, 1, 2)))(*args), case["dtype"])


@both_doors
def test_the_policy_saves_out_and_lse_and_recomputes_the_rest(case):
    """Residuals of a checkpointed layer: its inputs, out and lse, and nothing of size T x S."""
    q, k, v = qkv(batch=(2,), t=16, s=24, **case)
    layer = lambda q, k, v: jnp.sin(attend(jnp.sin(q), jnp.cos(k), v)[0])
    saved = lambda policy: sorted(
        (tuple(x.shape), str(x.dtype))
        for x in jax.tree.leaves(
            jax.eval_shape(lambda *a: jax.vjp(jax.checkpoint(layer, policy=policy), *a)[1], q, k, v)
        )
    )
    out, lse = jax.eval_shape(attend, q, k, v)
    inputs = [(x.shape, str(x.dtype)) for x in (q, k, v)]
    nothing = saved(jax.checkpoint_policies.nothing_saveable)
    ours = saved(jax_fa3.remat_policy())
    assert set(nothing) <= set(inputs)
    extra = list(ours)
    for x in inputs:
        if x in extra:
            extra.remove(x)
    # lse may be kept in the kernel's own layout, [B, N, T].
    lse_forms = {(lse.shape, "float32"), ((2, 4, 16), "float32")}
    assert len(extra) == 2
    assert (out.shape, str(out.dtype)) in extra
    assert lse_forms & set(extra)


@both_doors
def test_linear_transpose_of_the_vjp_runs_twice(case):
    """A pullback may be called again, with another cotangent."""
    args = qkv(**case)
    (out, lse), pullback = jax.vjp(attend, *args)
    one = pullback((jnp.ones_like(out), jnp.zeros_like(lse)))
    two = pullback((2 * jnp.ones_like(out), jnp.zeros_like(lse)))
    assert_close(two, jax.tree.map(lambda x: 2 * x, one), case["dtype"])


@both_doors
def test_gradient_with_respect_to_some_operands_only(case):
    args = qkv(**case)
    whole = jax.jit(jax.grad(total(attend), (0, 1, 2)))(*args)
    for i in range(3):
        assert_close(jax.jit(jax.grad(total(attend), i))(*args), whole[i], case["dtype"])


@both_doors
def test_stop_gradient_on_an_output(case):
    args = qkv(**case)
    out_only = jax.jit(jax.grad(lambda *a: attend(*a)[0].astype(jnp.float32).sum(), (0, 1, 2)))

    def loss(*args):
        out, lse = attend(*args)
        return out.astype(jnp.float32).sum() + jax.lax.stop_gradient(lse).sum()

    stopped = jax.jit(jax.grad(loss, (0, 1, 2)))
    assert_close(stopped(*args), out_only(*args), case["dtype"])


@both_doors
def test_eager_and_jitted_calls_agree(case):
    args = qkv(**case)
    assert_close(
        attend(*args, is_causal=True), jax.jit(functools.partial(attend, is_causal=True))(*args)
    )


@both_doors
def test_inside_cond_and_while_loop(case):
    args = qkv(**case)

    @jax.jit
    def f(n, *args):
        step = lambda i, c: jax.lax.cond(
            i % 2 == 0, lambda: c + attend(*args)[1], lambda: c + attend(*args, is_causal=True)[1]
        )
        return jax.lax.fori_loop(0, n, step, jnp.zeros((2, 5, 4), jnp.float32))

    wanted = 2 * exact(*args)[1] + exact(*args, is_causal=True)[1]
    assert_close(f(3, *args), wanted, case["dtype"], scale=3)


@both_doors
def test_while_loop_that_carries_what_attention_made(case):
    """And under vmap, where rows stop after different numbers of steps."""
    q, k, v = qkv(batch=(2,), t=4, s=5, n=4, k=2, **case)

    def steps(attention, n, q):
        step = lambda c: (c[0] + 1, (0.5 * attention(c[1], k, v)[0]).astype(q.dtype))
        return jax.lax.while_loop(lambda c: c[0] < n, step, (0, q))[1]

    def by_hand(n, q):
        for _ in range(n):
            q = (0.5 * exact(q, k, v)[0]).astype(q.dtype)
        return q

    counts = jnp.asarray([0, 1, 3])
    got = jax.jit(jax.vmap(functools.partial(steps, attend), (0, None)))(counts, q)
    assert_close(got, jnp.stack([by_hand(n, q) for n in counts.tolist()]), case["dtype"])


@both_doors
def test_gradient_through_cond_is_that_of_the_branch_taken(case):
    args = qkv(batch=(2,), t=4, s=5, **case)

    def loss(attention):
        def f(causal, *args):
            branches = [functools.partial(attention, is_causal=c) for c in (True, False)]
            out, lse = jax.lax.cond(causal, *branches, *args)
            return (out.astype(jnp.float32) ** 2).sum() + lse.sum()

        return jax.jit(jax.grad(f, (1, 2, 3)))

    for causal in (True, False):
        got, wanted = (loss(a)(jnp.asarray(causal), *args) for a in (attend, exact))
        assert_close(got, wanted, case["dtype"], scale=8)


@both_doors
def test_a_custom_vjp_around_it(case):
    """A rule of the user's own that calls the pullback, as gradient clipping does."""
    args = qkv(batch=(2,), t=4, s=5, **case)

    @jax.custom_vjp
    def clipped(*args):
        return attend(*args)[0]

    def forward(*args):
        out, pullback = jax.vjp(lambda *a: attend(*a)[0], *args)
        return out, pullback

    def backward(pullback, dout):
        return pullback(jnp.clip(dout, -0.5, 0.5))

    clipped.defvjp(forward, backward)
    dout = normal(args[0].shape, args[0].dtype)
    got = jax.jit(lambda a, d: jax.vjp(clipped, *a)[1](d))(args, dout)
    plain = jax.jit(lambda a, d: jax.vjp(lambda *b: attend(*b)[0], *a)[1](d))
    assert_close(got, plain(args, jnp.clip(dout, -0.5, 0.5)), case["dtype"])


@both_doors
def test_donated_operands_give_their_memory_to_the_results(case):
    """A donated query becomes out, and a donated state the next one; values stay right."""
    args = qkv(batch=(2,), t=4, s=5, **case)
    wanted = exact(*args)[0]
    f = jax.jit(lambda *a: attend(*a)[0], donate_argnums=(0,))
    compiled = f.lower(*args).compile()
    assert "input_output_alias" in compiled.as_text().splitlines()[0]
    query = args[0] + 0
    assert_close(f(query, *args[1:]), wanted, case["dtype"])
    assert query.is_deleted()
    assert not args[1].is_deleted()


@both_doors
def test_a_donated_training_state(case):
    args = qkv(batch=(2,), t=4, s=5, **case)
    scalar = total(attend, is_causal=True)
    step = lambda args: jax.tree.map(jnp.subtract, args, jax.grad(lambda a: scalar(*a))(args))
    wanted = jax.jit(step)(args)
    given = jax.tree.map(lambda x: x + 0, args)
    assert_close(jax.jit(step, donate_argnums=0)(given), wanted, case["dtype"])
    assert all(x.is_deleted() for x in given)


def test_one_trace_serves_every_call_of_a_shape():
    args = qkv(h=64, dtype=jnp.bfloat16)
    traces = []

    @jax.jit
    def f(*args):
        traces.append(1)
        return attend(*args)

    for _ in range(3):
        f(*args)
    assert len(traces) == 1


# --- vmap in the CUDA lowering -----------------------------------------------------------------


def kernel_operands(f, *args):
    """Operand types of the one kernel call in f's CUDA lowering."""
    text = helpers.cuda_text(f, *args)
    assert helpers.kernel_calls(text) == 1
    return helpers.signature(helpers.kernel_lines(text)[0])[0]


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_any_number_of_vmaps_is_one_kernel_call(depth):
    lead = (2, 3, 5)[:depth]
    args = qkv(batch=(*lead, 2), t=4, s=5, n=4, k=2, h=64, dtype=jnp.bfloat16)
    f = attend
    for _ in lead:
        f = jax.vmap(f)
    shape = "x".join(map(str, (*lead, 2, 4, 4, 64)))
    assert kernel_operands(f, *args)[0] == f"{shape}xbf16"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("mapped", SUBSETS, ids=lambda m: "".join("qkv"[i] for i in m))
def test_an_axis_over_some_operands_copies_no_other(mapped):
    """What is not mapped enters the kernel with a batch of 1 and is not broadcast on the way."""
    args, in_axes = operands(CASES["primitive"], mapped, (0, 0, 0))
    text = helpers.cuda_text(jax.vmap(attend, in_axes), *args)
    assert helpers.kernel_calls(text) == 1
    found = helpers.signature(helpers.kernel_lines(text)[0])[0]
    for i, (x, length, heads) in enumerate(zip(found, (4, 5, 5), (4, 2, 2))):
        lead = SIZE if i in mapped else 1
        assert x == f"{lead}x2x{length}x{heads}x64xbf16"


@pytest.mark.usefixtures("kernels")
def test_nested_vmaps_over_different_operands_copy_nothing():
    q, k, v = qkv(batch=(2,), t=4, s=5, n=4, k=2, h=64, dtype=jnp.bfloat16)
    outer = normal((7, *q.shape), q.dtype)
    inner_k, inner_v = (normal((3, *x.shape), x.dtype) for x in (k, v))
    f = jax.vmap(jax.vmap(attend, (None, 0, 0)), (0, None, None))
    assert kernel_operands(f, outer, inner_k, inner_v) == [
        "7x1x2x4x4x64xbf16",
        "1x3x2x5x2x64xbf16",
        "1x3x2x5x2x64xbf16",
    ]


@pytest.mark.usefixtures("kernels")
def test_a_mapped_offset_alone_maps_the_call_and_copies_no_operand():
    q, k, v = qkv(batch=(2,), t=4, s=5, n=4, k=2, h=64, dtype=jnp.bfloat16)
    f = lambda offset: attend(q, k, v, is_causal=True, query_offset=offset)
    assert kernel_operands(jax.vmap(f), jnp.arange(3)) == [
        "1x2x4x4x64xbf16",
        "1x2x5x2x64xbf16",
        "1x2x5x2x64xbf16",
        "3x2xi32",
    ]


@pytest.mark.usefixtures("kernels")
def test_vmap_of_grad_runs_one_forward_kernel():
    args = tuple(normal((3, *x.shape), x.dtype) for x in qkv(h=64, dtype=jnp.bfloat16))
    text = helpers.cuda_text(jax.vmap(jax.value_and_grad(total(attend), (0, 1, 2))), *args)
    assert helpers.kernel_calls(text) == 1


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap"])
def test_any_number_of_vmaps_around_or_inside_a_gradient_is_one_call_of_each_kernel(depth, order):
    lead = (2, 3, 5)[:depth]
    args = qkv(batch=(*lead, 2), t=4, s=5, n=4, k=2, h=64, dtype=jnp.bfloat16)

    def many(f):
        for _ in lead:
            f = jax.vmap(f)
        return f

    if order == "vmap of grad":
        f = many(jax.grad(total(attend), (0, 1, 2)))
    else:
        f = jax.grad(total(many(attend)), (0, 1, 2))
    text = helpers.cuda_text(f, *args)
    calls = helpers.kernel_calls(text), helpers.kernel_calls(text, helpers.BWD_TARGET)
    assert calls == (1, 1)
    shape = "x".join(map(str, (*lead, 2, 4, 4, 64)))
    for target in (helpers.FWD_TARGET, helpers.BWD_TARGET):
        operand_types, _ = helpers.signature(helpers.kernel_lines(text, target)[0])
        assert operand_types[0] == f"{shape}xbf16"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("mapped", [(0,), (1,), (1, 2)], ids=["q", "k", "kv"])
def test_grad_of_vmap_makes_no_rows_of_what_is_not_mapped(mapped, monkeypatch):
    """One call of each kernel, the backward's in a loop over the rows; its results are summed."""
    monkeypatch.setattr(_primitive, "_ROWS_BYTES", 0)  # no row of these is small
    args, in_axes = operands(CASES["primitive"], mapped, (0, 0, 0))
    text = helpers.cuda_text(jax.grad(total(jax.vmap(attend, in_axes)), (0, 1, 2)), *args)
    calls = helpers.kernel_calls(text), helpers.kernel_calls(text, helpers.BWD_TARGET)
    assert calls == (1, 1)
    (backward,) = helpers.kernel_lines(text, helpers.BWD_TARGET)
    queries, keys = "1x2x4x4x64xbf16", "1x2x5x2x64xbf16"
    found, results = helpers.signature(backward)
    assert found[:3] == results[:3] == [queries, keys, keys]
    if 0 in mapped:
        assert f"tensor<{SIZE}{keys[1:]}>" not in text


@pytest.mark.usefixtures("kernels")
def test_grad_of_nested_vmaps_over_different_operands_is_one_call_of_each_kernel():
    q, k, v = qkv(batch=(2,), t=4, s=5, n=4, k=2, h=64, dtype=jnp.bfloat16)
    outer, inner_k, inner_v = (normal((n, *x.shape), x.dtype) for n, x in ((7, q), (3, k), (3, v)))
    f = jax.vmap(jax.vmap(attend, (None, 0, 0)), (0, None, None))
    text = helpers.cuda_text(jax.grad(total(f), (0, 1, 2)), outer, inner_k, inner_v)
    calls = helpers.kernel_calls(text), helpers.kernel_calls(text, helpers.BWD_TARGET)
    assert calls == (1, 1)
    assert "tensor<7x3x2x5x" not in text


def test_the_oracle_itself_agrees_with_numpy():
    """One case by hand, so that the yardstick of these files is measured too."""
    q, k, v = (np.asarray(x, np.float64) for x in qkv(batch=(), t=3, s=4, n=2, k=1, h=4))
    out, lse = oracle(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), is_causal=True, scale=0.5)
    for t, n in itertools.product(range(3), range(2)):
        scores = [0.5 * q[t, n] @ k[s, 0] for s in range(t + 1)]
        weights = np.exp(scores) / np.exp(scores).sum()
        np.testing.assert_allclose(out[t, n], weights @ v[: t + 1, 0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[t, n], np.log(np.exp(scores).sum()), rtol=1e-5, atol=1e-6)
