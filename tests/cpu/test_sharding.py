"""Eight devices: Manual, Auto and Explicit mesh axes, values and gradients of the dense oracle.

The compiled program is read too: which collectives it has, and what the kernel gets to see.
"""
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import contextlib
import functools
import importlib
import re

import helpers
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    CASES,
    assert_close,
    assert_within_reference_error,
    both_doors,
    exact,
    moves_between_devices,
    normal,
    oracle,
    placed,
    qkv,
    seen_by_kernels,
)
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3
from jax_fa3 import _native, _partitioning, _primitive

pytestmark = pytest.mark.usefixtures("quick_compile")

attend = functools.partial(jax_fa3.dot_product_attention, return_residual=True)
both_kinds = pytest.mark.parametrize(
    "kind", [AxisType.Auto, AxisType.Explicit], ids=["Auto", "Explicit"]
)


def mesh_of(*sizes, names, kind):
    devices = np.asarray(jax.devices("cpu")[: int(np.prod(sizes))]).reshape(sizes)
    return jax.sharding.Mesh(devices, names, axis_types=(kind,) * len(names))


def operands(case, **sizes):
    return qkv(**{"batch": (4,), "t": 8, "s": 8, "n": 4, "k": 2, **case, **sizes})


def loss(attention, **options):
    def f(*args):
        out, lse = attention(*args, **options)
        weight = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
        return (out.astype(jnp.float32) * weight).sum() + (jnp.sin(lse)).sum()

    return f


@functools.cache
def wanted(is_causal):
    """(out, lse) and the gradients of query, key and value, unsharded; compiled once a shape."""

    @jax.jit
    def both(*args):
        f = functools.partial(exact, is_causal=is_causal)
        return f(*args), jax.grad(loss(f), (0, 1, 2))(*args)

    return both


def gradients_of(f):
    """(q, k, v, dout, dlse) -> the gradients of f(q, k, v) = (out, lse)."""

    def gradients(q, k, v, dout, dlse):
        (out, lse), pullback = jax.vjp(f, q, k, v)
        return pullback((dout.astype(out.dtype), dlse.astype(lse.dtype)))

    return gradients


def manual_over_data(mesh, **options):
    """`attend` in a jax.shard_map over "data"; the mesh's other axis stays what it is."""
    return jax.shard_map(
        lambda *a: attend(*a),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        axis_names={"data"},
        **options,
    )


def value_and_grads(f, scalar, args):
    """f(*args) and the gradients of scalar(*args), in one compilation."""
    return jax.jit(lambda *a: (f(*a), jax.grad(scalar, (0, 1, 2))(*a)))(*args)


def check(got, args, case, is_causal=False):
    right = wanted(is_causal)(*args)
    values, grads = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), got)
    assert_close(values, right[0], case["dtype"])
    assert_close(grads, right[1], case["dtype"], scale=6)


# --- Manual: shard_map -------------------------------------------------------------------------

# How query, and how key and value, are split over the mesh (data 4, heads 2).
SPLITS = {
    "batch": (P("data"), P("data")),
    "heads": (P(None, None, "heads"), P(None, None, "heads")),
    "batch and heads": (P("data", None, "heads"), P("data", None, "heads")),
    "query sequence": (P(None, "data"), P()),
    "query alone over heads of one group": (P(None, None, "heads"), P()),
}


@both_doors
@pytest.mark.parametrize(
    ("split", "check_vma"),
    [(name, True) for name in SPLITS] + [("batch and heads", False), ("query sequence", False)],
    ids=lambda x: x if isinstance(x, str) else ("check_vma" if x else "no check"),
)
def test_shard_map_with_the_gradient_outside(case, split, check_vma):
    q_spec, kv_spec = SPLITS[split]
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Auto)
    # Split heads of replicated keys work when every local query head reads head 0.
    k = 1 if q_spec == P(None, None, "heads") and kv_spec == P() else 2
    args = operands(case, k=k)
    lse_spec = q_spec
    f = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(q_spec, kv_spec, kv_spec),
        out_specs=(q_spec, lse_spec),
        check_vma=check_vma,
    )
    check(value_and_grads(f, loss(f), args), args, case)


@both_doors
@pytest.mark.parametrize("check_vma", [True, False], ids=["check_vma", "no check"])
def test_shard_map_with_the_gradient_inside(case, check_vma):
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Auto)
    args = operands(case)
    spec = P("data", None, "heads")

    def local(*args):
        out = lambda *a: (attend(*a, is_causal=True)[0].astype(jnp.float32) ** 2).sum()
        return jax.grad(out, (0, 1, 2))(*args)

    f = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
    got = jax.jit(f)(*args)
    dense = lambda *a: (exact(*a, is_causal=True)[0] ** 2).sum()
    assert_close(got, jax.jit(jax.grad(dense, (0, 1, 2)))(*args), case["dtype"], scale=6)


@both_doors
def test_shard_map_where_only_the_query_varies_sums_the_gradients_of_keys(case):
    """The trap of mixed varying axes: dk and dv are the sum over the shards, not one shard's."""
    mesh = mesh_of(8, names=("data",), kind=AxisType.Auto)
    args = operands(case, batch=(2,), t=16, k=2)

    def local(q, k, v):
        grad = jax.grad(lambda q, k, v: attend(q, k, v)[0].astype(jnp.float32).sum(), (0, 1, 2))
        return grad(q, k, v)

    f = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(None, "data"), P(), P()),
        out_specs=(P(None, "data"), P(), P()),
    )
    got = jax.jit(f)(*args)
    dense = jax.grad(lambda *a: exact(*a)[0].sum(), (0, 1, 2))
    assert_close(got, jax.jit(dense)(*args), case["dtype"], scale=6)


@both_doors
def test_outputs_vary_over_the_axes_of_the_operands(case):
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Auto)
    seen = []

    def local(q, k, v):
        out, lse = attend(q, k, v)
        seen.append((jax.typeof(out).manual_axis_type, jax.typeof(lse).manual_axis_type))
        seen.append(jax.typeof(q).manual_axis_type)
        return out

    spec = P("data", None, "heads")
    jax.eval_shape(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec), *operands(case))
    assert seen[0] == (seen[1], seen[1])


@both_doors
def test_shard_map_inside_vmap_and_vmap_inside_shard_map(case):
    mesh = mesh_of(4, names=("data",), kind=AxisType.Auto)
    args = tuple(jnp.stack([x, -x]) for x in operands(case))
    right = jax.vmap(exact)(*args)
    mapped = functools.partial(jax.shard_map, mesh=mesh)
    outside = jax.vmap(mapped(attend, in_specs=P("data"), out_specs=P("data")))
    inside = mapped(jax.vmap(attend), in_specs=P(None, "data"), out_specs=P(None, "data"))
    for f in (outside, inside):
        assert_close(jax.jit(f)(*args), right, case["dtype"])


@both_doors
@pytest.mark.parametrize(
    "options",
    [{"key_value_seq_lengths": P("data")}, {"query_offset": P("data")}, {"sinks": P(None)}],
    ids=lambda o: next(iter(o)),
)
def test_shard_map_with_an_optional_array(case, options):
    mesh = mesh_of(4, names=("data",), kind=AxisType.Auto)
    args = operands(case)
    (name, spec), *_ = options.items()
    x = normal((4,)) if name == "sinks" else helpers.integers(0, 8, (4,))

    def f(q, k, v, x):
        return attend(q, k, v, is_causal=True, **{name: x})

    g = jax.shard_map(f, mesh=mesh, in_specs=(P("data"),) * 3 + (spec,), out_specs=P("data"))
    assert_close(jax.jit(g)(*args, x), exact(*args, is_causal=True, **{name: x}), case["dtype"])
    if name == "sinks":
        got = jax.jit(jax.grad(lambda s: g(*args, s)[1].sum()))(x)
        dense = jax.grad(lambda s: exact(*args, is_causal=True, sinks=s)[1].sum())(x)
        assert_close(got, dense, case["dtype"], scale=8)


@pytest.mark.usefixtures("kernels")
def test_the_kernel_is_called_on_the_local_shard():
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Auto)
    spec = P("data", None, "heads")
    f = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    text = helpers.cuda_text(f, *operands(CASES["primitive"]))
    assert helpers.kernel_calls(text) == 1
    found, _ = helpers.signature(helpers.kernel_lines(text)[0])
    assert found[:2] == ["1x8x2x64xbf16", "1x8x1x64xbf16"]


# --- Auto and Explicit -------------------------------------------------------------------------

PLACED = {
    "batch": (P("data"), P("data")),
    "batch and heads": (P("data", None, "heads"), P("data", None, "heads")),
    "query sequence": (P(None, "data"), P(None, None, "heads")),
    "both sequences": (P(None, "data"), P(None, "data")),
    "key sequence": (P("data"), P(None, "data")),
    "head dim": (P(None, None, None, "data"), P(None, None, None, "data")),
    "nothing": (P(), P()),
    "query alone": (P("data", None, "heads"), P()),
}


@both_doors
@pytest.mark.parametrize(("q_spec", "kv_spec"), PLACED.values(), ids=PLACED)
def test_an_auto_mesh_gives_right_values(case, q_spec, kv_spec):
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Auto)
    args = operands(case)
    sharded = placed(args, mesh, q_spec, kv_spec)
    f = functools.partial(attend, is_causal=True)
    check(value_and_grads(f, loss(f), sharded), args, case, is_causal=True)


@both_doors
@pytest.mark.parametrize(("q_spec", "kv_spec"), PLACED.values(), ids=PLACED)
def test_an_explicit_mesh_gives_right_values(case, q_spec, kv_spec):
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Explicit)
    args = operands(case)
    with jax.set_mesh(mesh):
        sharded = placed(args, mesh, q_spec, kv_spec)

        def scalar(*args):
            out, lse = attend(*args, is_causal=True)
            out, lse = jax.sharding.reshard((out, lse), (P(), P()))
            return loss(lambda o, l: (o, l))(out, lse)

        got = value_and_grads(functools.partial(attend, is_causal=True), scalar, sharded)
        for grad, x in zip(got[1], sharded):
            assert jax.typeof(grad).sharding.spec == jax.typeof(x).sharding.spec
    check(got, args, case, is_causal=True)


@both_doors
def test_lengths_sharded_with_the_batch(case):
    args = operands(case)
    lengths = jnp.asarray([0, 3, 8, 5])
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(4, names=("data",), kind=kind)
        with jax.set_mesh(mesh):
            sharded = placed(args, mesh, P("data"), P("data"))
            spread = jax.device_put(lengths, NamedSharding(mesh, P("data")))
            f = lambda *a: attend(*a[:3], key_value_seq_lengths=a[3])
            values = jax.jit(f)(*sharded, spread)
        right = exact(*args, key_value_seq_lengths=lengths)
        assert_close(jax.tree.map(np.asarray, values), right, case["dtype"])


@both_doors
def test_vmap_over_a_sharded_axis(case):
    mesh = mesh_of(4, names=("data",), kind=AxisType.Explicit)
    args = tuple(
        jnp.stack([x] * 4) * jnp.arange(1, 5, dtype=x.dtype).reshape(4, 1, 1, 1, 1)
        for x in operands(case)
    )
    right = jax.vmap(exact)(*args)
    with jax.set_mesh(mesh):
        sharded = placed(args, mesh, P("data"), P("data"))
        values = jax.jit(jax.vmap(attend))(*sharded)
    assert_close(jax.tree.map(np.asarray, values), right, case["dtype"])


@both_doors
@pytest.mark.parametrize("mapped", ["query", "key and value", "query, key and value"])
@pytest.mark.parametrize("inner", [P("heads"), P(None, None, "heads")], ids=["batch", "heads"])
def test_vmap_over_an_explicit_axis_beside_another_gathers_nothing(case, inner, mapped):
    """Both axes split the call, whichever operands are mapped; once more around that, one is not.

    A jax.shard_map over one of them, mapped over the other, would be gathered over that.
    """
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Explicit)
    args = operands(case)
    has_rows = [name in mapped for name in ("query", "key", "value")]
    arrays = [normal((4, *x.shape), x.dtype) if m else x for x, m in zip(args, has_rows)]
    specs = [P("data", *inner) if m else inner for m in has_rows]
    in_axes = tuple(0 if m else None for m in has_rows)

    def rows(attention):
        causal = functools.partial(attention, is_causal=True)
        one = jax.vmap(causal, in_axes)
        return jax.vmap(
            lambda factor, q, k, v: one(q * factor.astype(q.dtype), k, v), (0,) + 3 * (None,)
        )

    factors = jnp.asarray([1.0, -0.5])
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs)]
        compiled = jax.jit(rows(attend)).lower(factors, *sharded).compile()
        got = compiled(factors, *sharded)
    assert not moves_between_devices(compiled.as_text())
    assert tuple(got[0].sharding.spec)[:3] == (None, "data", inner[0])
    right = jax.jit(rows(exact))(factors, *arrays)
    assert_close(jax.tree.map(np.asarray, got), right, case["dtype"])


@both_doors
@pytest.mark.parametrize("sizes", [(4, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("mapped", ["query", "key", "query, key and value", "cotangents alone"])
def test_vmap_of_gradients_over_an_explicit_axis_beside_another_gathers_nothing(
    case, mapped, sizes
):
    """A gradient for each row, also of what is not mapped; a second one inside of that."""
    mesh = mesh_of(*sizes, names=("data", "heads"), kind=AxisType.Explicit)
    args = operands(case)
    has_rows = [name in mapped for name in ("query", "key", "value")] + [True, True]
    cotangents = normal(args[0].shape, args[0].dtype), normal(args[0].shape[:-1])
    arrays = [
        normal((4, *x.shape), x.dtype) if m else x for x, m in zip((*args, *cotangents), has_rows)
    ]
    heads = P(None, None, "heads")
    specs = [P("data", *heads) if m else heads for m in has_rows]

    def rows(attention):
        def gradients(factor, *args):
            f = lambda q, k, v: attention(q * factor.astype(q.dtype), k, v, is_causal=True)
            return gradients_of(f)(*args)

        one = jax.vmap(gradients, (None, *(0 if m else None for m in has_rows)))
        return jax.vmap(one, (0,) + 5 * (None,))

    factors = jnp.asarray([1.0, -0.5])
    with jax.set_mesh(mesh):
        sharded = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(arrays, specs)]
        compiled = jax.jit(rows(attend)).lower(factors, *sharded).compile()
        got = compiled(factors, *sharded)
        types = jax.tree.map(jax.typeof, jax.eval_shape(rows(attend), factors, *sharded))
    assert not moves_between_devices(compiled.as_text())
    for t in types:
        assert tuple(t.sharding.spec) == (None, "data", None, None, "heads", None)
    right = jax.jit(rows(exact))(factors, *arrays)
    assert_close(jax.tree.map(np.asarray, got), right, case["dtype"], scale=6)


@both_doors
def test_an_explicit_axis_of_size_1_that_maps_the_keys_alone(case):
    """The result's type has it: JAX asks for it in the cotangent."""
    mesh = mesh_of(1, 2, names=("data", "heads"), kind=AxisType.Explicit)
    q, k, v = operands(case)
    rows = jnp.stack([k, -k])

    def scalar(attention):
        return lambda q, rows, v: jax.vmap(lambda k: attention(q, k, v)[1])(rows).sum()

    heads = P(None, None, "heads")
    with jax.set_mesh(mesh):
        q_there, v_there = placed((q, v), mesh, heads, heads)
        rows_there = jax.device_put(rows, NamedSharding(mesh, P("data", *heads)))
        out = jax.vmap(lambda k: attend(q_there, k, v_there)[0])(rows_there)
        assert tuple(jax.typeof(out).sharding.spec) == ("data", None, None, "heads", None)
        got = jax.jit(jax.grad(scalar(attend), (0, 1)))(q_there, rows_there, v_there)
    right = jax.jit(jax.grad(scalar(exact), (0, 1)))(q, rows, v)
    assert_close(jax.tree.map(np.asarray, got), right, case["dtype"], scale=6)


@both_doors
@pytest.mark.parametrize("spec", [P(None, "data"), P()], ids=["query sequence", "nothing"])
def test_an_array_scale_beside_lengths_that_lie_elsewhere(case, spec):
    """The factor of the query wants the lengths, before anything is placed."""
    mesh = mesh_of(4, names=("data",), kind=AxisType.Explicit)
    args, lengths = operands(case), jnp.asarray([1, 5, 3, 8])
    f = lambda lengths, *args: attend(
        *args, scale=jnp.float32(0.3).reshape(()), query_seq_lengths=lengths
    )
    with jax.set_mesh(mesh):
        there = jax.device_put(lengths, NamedSharding(mesh, P("data")))
        got = jax.jit(f)(there, *placed(args, mesh, spec, P()))
    assert_close(
        jax.tree.map(np.asarray, got),
        exact(*args, scale=0.3, query_seq_lengths=lengths),
        case["dtype"],
    )
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, spec), 4)


@both_doors
@pytest.mark.parametrize("mapped", ["query", "key and value"])
@both_kinds
def test_grad_of_vmap_over_a_sharded_axis_of_one_side(case, kind, mapped):
    """Each device makes its rows of the other side's gradient, which one collective adds up."""
    mesh = mesh_of(4, names=("data",), kind=kind)
    is_mapped = [(name in mapped) for name in ("query", "key", "value")]
    args = [normal((4, *x.shape), x.dtype) if m else x for x, m in zip(operands(case), is_mapped)]
    in_axes = tuple(0 if m else None for m in is_mapped)

    def scalar(attention):
        return lambda *a: sum((x.astype(jnp.float32) ** 2).sum() for x in attention(*a))

    with jax.set_mesh(mesh):
        sharded = [
            jax.device_put(x, NamedSharding(mesh, P("data") if m else P()))
            for x, m in zip(args, is_mapped)
        ]
        f = jax.jit(jax.grad(scalar(jax.vmap(attend, in_axes)), (0, 1, 2)))
        grads = f(*sharded)
        moved = moves_between_devices(f.lower(*sharded).compile().as_text())
    right = jax.jit(jax.grad(scalar(jax.vmap(exact, in_axes)), (0, 1, 2)))(*args)
    assert_close(jax.tree.map(np.asarray, grads), right, case["dtype"], scale=8)
    assert set(moved) <= {"all-reduce"}


@both_doors
def test_grad_of_vmap_inside_shard_map_sums_over_the_mapped_axis(case):
    mesh = mesh_of(4, names=("data",), kind=AxisType.Auto)
    q, k, v = operands(case)
    q = normal((3, *q.shape), q.dtype)
    rows, whole = P(None, "data"), P("data")

    def scalar(attention):
        mapped = jax.vmap(attention, (0, None, None))
        return lambda *a: sum((x.astype(jnp.float32) ** 2).sum() for x in mapped(*a))

    local = lambda *a: jax.grad(scalar(attend), (0, 1, 2))(*a)
    specs = (rows, whole, whole)
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs))(q, k, v)
    right = jax.jit(jax.grad(scalar(exact), (0, 1, 2)))(q, k, v)
    assert_close(got, right, case["dtype"], scale=8)


@both_doors
@pytest.mark.parametrize("k", [4, 2, 1])
@both_kinds
def test_tensor_parallel_heads_with_fewer_key_heads_than_shards(case, kind, k):
    """Then a key head's gradient is a sum: it comes from query heads on several devices."""
    mesh = mesh_of(4, names=("heads",), kind=kind)
    heads = P(None, None, "heads")
    args = operands(case, n=8, k=k)
    with jax.set_mesh(mesh):
        sharded = placed(args, mesh, heads, heads if k == 4 else P())

        def scalar(*args):
            found = attend(*args)
            if kind == AxisType.Explicit:  # there a sum over a sharded reshape must be told where
                found = jax.sharding.reshard(found, (P(), P()))
            return loss(lambda *a: a)(*found)

        got = value_and_grads(attend, scalar, sharded)
    check(got, args, case)


LENGTHS = {"query_seq_lengths": [0, 3, 8, 5], "key_value_seq_lengths": [4, 12, 1, 9]}
MOVED = {
    "lengths": LENGTHS,
    "bottom right with lengths": {
        **LENGTHS,
        "is_causal": True,
        "causal_alignment": "bottom_right",
    },
    "window": {"local_window_size": (3, 1), "causal_alignment": "bottom_right"},
    "offset and window": {"local_window_size": (2, None), "query_offset": [-2, 0, 9, 40]},
    "segment ids": {
        "query_segment_ids": np.arange(32).reshape(4, 8) // 3,
        "key_value_segment_ids": np.arange(48).reshape(4, 12) // 4,
        "is_causal": True,
    },
    "bias, mask and sinks": {
        "bias": normal((1, 4, 8, 12)),
        "mask": np.tri(8, 12, 3, dtype=bool)[None, None],
        "sinks": normal((4,)),
    },
}


@pytest.mark.parametrize("options", MOVED.values(), ids=MOVED)
@pytest.mark.parametrize("spec", [P(None, "data", "heads"), P("heads", "data")], ids=str)
def test_a_part_of_the_queries_knows_where_it_begins(options, spec):
    """A sharded query sequence with everything that depends on a query's place. Explicit axes."""
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Explicit)
    q, k, v = operands(CASES["xla"], s=12)
    options = {
        name: jnp.asarray(x) if isinstance(x, list | np.ndarray) else x
        for name, x in options.items()
    }
    wanted = {n: options.pop(n) for n in ("bias", "sinks") if n in options}

    def of(attention):
        def f(arrays, extra):
            out, lse = attention(*arrays, **extra, **options)
            if attention is attend:
                out, lse = jax.sharding.reshard((out, lse), (P(), P()))
            return loss(lambda *a: a)(out, jnp.where(jnp.isneginf(lse), 0, lse)), (out, lse)

        return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))

    right = of(exact)((q, k, v), wanted)
    with jax.set_mesh(mesh):
        arrays = placed((q, k, v), mesh, spec, P())
        got = of(attend)(arrays, wanted)
    (_, values), grads = jax.tree.map(np.asarray, got)
    assert_close(values, right[0][1], jnp.float32)
    assert_close(grads, right[1], jnp.float32, scale=6)


@pytest.mark.parametrize(
    ("q_spec", "kv_spec"),
    [(P("data", None, "heads"), P("data", None, "heads")), (P(None, "data"), P())],
    ids=["batch and heads", "query sequence"],
)
def test_a_second_derivative_of_the_xla_path_over_explicit_axes(q_spec, kv_spec):
    args = operands(CASES["xla"])

    def second(attention, whole=lambda x: x):
        cube = lambda *a: (whole(attention(*a, is_causal=True)[0]) ** 3).sum()
        norm = lambda *a: sum((whole(g) ** 2).sum() for g in jax.grad(cube, (0, 1, 2))(*a))
        return jax.jit(jax.grad(norm, (0, 1, 2)))

    # Hundreds that nearly cancel: what float32 can give is what the dense oracle gives in it.
    plain = second(oracle)(*args)
    with jax.enable_x64(True):
        right = second(oracle)(*(jnp.asarray(np.asarray(x), jnp.float64) for x in args))
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        xla = functools.partial(attend, implementation="xla")
        got = second(xla, lambda x: jax.sharding.reshard(x, P()))(
            *placed(args, mesh, q_spec, kv_spec)
        )
    assert_within_reference_error(got, plain, right, factor=3)


@both_doors
@pytest.mark.parametrize(
    "spec", [P(None, "one", "four"), P("one", None, "four")], ids=["t", "batch"]
)
def test_an_explicit_axis_of_size_1_beside_an_auto_one(case, spec):
    """XLA cannot sum over a group of one device there, and need not."""
    devices = np.asarray(jax.devices("cpu")[:4]).reshape(1, 4)
    kinds = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.sharding.Mesh(devices, ("one", "four"), axis_types=kinds)
    args = operands(case, k=4)
    with jax.set_mesh(mesh):
        sharded = placed(args, mesh, spec, P(None, None, "four"))
        got = value_and_grads(attend, loss(attend), sharded)
    check(got, args, case)


@both_doors
def test_no_query_heads_beside_sharded_key_heads(case):
    mesh = mesh_of(2, names=("heads",), kind=AxisType.Explicit)
    q, k, v = operands(case)
    with jax.set_mesh(mesh):
        k, v = placed((k, v), mesh, P(None, None, "heads"), P(None, None, "heads"))
        out, lse = jax.jit(attend)(q[:, :, :0], k, v)
    assert out.shape == (*q.shape[:2], 0, q.shape[-1])
    assert lse.shape == (*q.shape[:2], 0)


def test_a_sum_that_is_not_done_yet_is_named():
    """Types that stand for an unfinished sum over a mesh axis."""
    mesh = mesh_of(2, names=("data",), kind=AxisType.Explicit)
    q, k, v = operands(CASES["xla"])

    def f(a, w, k, v):
        unfinished = jnp.einsum("btnh,hj->btnj", a, w, out_sharding=P(unreduced={"data"}))
        return attend(unfinished, k, v)

    with jax.set_mesh(mesh):
        a = jax.device_put(q, NamedSharding(mesh, P(None, None, None, "data")))
        w = jax.device_put(normal((8, 8)), NamedSharding(mesh, P("data")))
        helpers.error_of(
            ValueError,
            lambda: jax.jit(f)(a, w, k, v),
            "query is",
            "unreduced",
            "jax.sharding.reshard",
        )


# --- Partial-manual meshes and vmap over a mesh axis -------------------------------------------


@both_doors
@pytest.mark.parametrize(
    ("kind", "check_vma"),
    [
        (AxisType.Auto, True),
        (AxisType.Auto, False),
        (AxisType.Explicit, False),
        (AxisType.Explicit, True),
    ],
    ids=["Auto", "Auto, no check", "Explicit, no check", "Explicit"],
)
def test_a_mesh_that_is_manual_in_part_gives_right_values(case, kind, check_vma):
    """shard_map over one axis; the other stays what it was and shards the heads."""
    mesh = mesh_of(2, 2, names=("data", "heads"), kind=kind)
    args = operands(case)
    full = P("data", None, "heads")
    with jax.set_mesh(mesh):
        sharded = placed(args, mesh, full, full)
        f = manual_over_data(mesh, check_vma=check_vma)

        def scalar(*args):
            found = f(*args)
            if kind == AxisType.Explicit:
                found = jax.sharding.reshard(found, (P(), P()))
            return loss(lambda *a: a)(*found)

        got = value_and_grads(f, scalar, sharded)
        for x in got[0]:
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, full), x.ndim)
    check(got, args, case)


@both_doors
@pytest.mark.parametrize("around", ["the call", "shard_map"])
def test_spmd_axis_name_keeps_the_mapped_axis_on_its_mesh_axis(case, around):
    """An ensemble of one member a device group: no member's arrays leave its devices."""
    if around == "shard_map" and jax.__version_info__ < (0, 10, 2):
        pytest.skip("JAX before 0.10.2 cannot vmap this shard_map: its own varying axes differ")
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Auto)
    args = tuple(normal((4, *x.shape), x.dtype) for x in operands(case, batch=(2,)))
    heads = P(None, None, "heads")
    on_heads = lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, heads))
    member = {
        "the call": lambda q, k, v: attend(on_heads(q), on_heads(k), on_heads(v)),
        "shard_map": jax.shard_map(attend, mesh=mesh, in_specs=heads, out_specs=heads),
    }[around]

    def values_and_grads(*args):
        return jax.vmap(member, spmd_axis_name="data")(*args[:3]), jax.vmap(
            gradients_of(member), spmd_axis_name="data"
        )(*args)

    sharded = with_cotangents(args, mesh, P("data"), P("data"))
    compiled = jax.jit(values_and_grads).lower(*sharded).compile()
    got = compiled(*sharded)
    values, grads = jax.tree.map(np.asarray, got)
    assert_close(values, jax.vmap(exact)(*args), case["dtype"])
    assert_close(grads, jax.vmap(gradients_of(exact))(*sharded), case["dtype"], scale=6)
    for x in jax.tree.leaves(got):
        wanted = NamedSharding(mesh, P("data", None, None, "heads"))
        assert x.sharding.is_equivalent_to(wanted, x.ndim)
    assert not moves_between_devices(compiled.as_text())


# --- What the compiled program moves between devices -------------------------------------------


def with_pullback(q, k, v, dout, dlse):
    """(out, lse) and the gradients for given cotangents: a layer's whole work on a mesh."""
    (out, lse), pullback = jax.vjp(functools.partial(attend, is_causal=True), q, k, v)
    return (out, lse), pullback((dout, dlse))


def with_cotangents(args, mesh, q_spec, kv_spec):
    """`args` and cotangents of out and lse, placed; the cotangents as the query is."""
    q = args[0]
    cotangents = normal(q.shape, q.dtype), normal(q.shape[:-1])
    sharded = placed(args, mesh, q_spec, kv_spec)
    return sharded + tuple(jax.device_put(x, NamedSharding(mesh, q_spec)) for x in cotangents)


@both_doors
@both_kinds
@pytest.mark.parametrize(
    "spec",
    [P("data", None, "heads"), P(("data", "heads"))],
    ids=["batch and heads", "batch over both axes"],
)
def test_batch_and_heads_need_no_collective_and_outputs_keep_the_sharding(case, kind, spec):
    """Forward and backward."""
    mesh = mesh_of(2, 2, names=("data", "heads"), kind=kind)
    with jax.set_mesh(mesh):
        sharded = with_cotangents(operands(case), mesh, spec, spec)
        compiled = jax.jit(with_pullback).lower(*sharded).compile()
        (out, lse), grads = compiled(*sharded)
    assert not moves_between_devices(compiled.as_text())
    for x in (out, lse, *grads):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)


@both_kinds
@both_doors
@pytest.mark.parametrize("t", [8, 600], ids=["one tile", "tiles"])
def test_a_sharded_query_sequence_with_whole_keys_needs_a_sum_of_their_gradients_alone(
    case, t, kind
):
    mesh = mesh_of(4, names=("data",), kind=kind)
    spec = P(None, "data")
    with jax.set_mesh(mesh):
        sharded = with_cotangents(operands(case, t=t), mesh, spec, P())
        forward = jax.jit(attend).lower(*sharded[:3]).compile()
        assert not moves_between_devices(forward.as_text())
        for x in forward(*sharded[:3]):
            assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
        backward = jax.jit(with_pullback).lower(*sharded).compile()
        assert moves_between_devices(backward.as_text()) == {"all-reduce": 1}
        dq = backward(*sharded)[1][0]
    assert dq.sharding.is_equivalent_to(NamedSharding(mesh, spec), dq.ndim)


@both_kinds
@both_doors
@pytest.mark.parametrize(
    ("spec", "gathers"),
    [(P(None, "data"), 2), (P(None, None, None, "data"), 2)],
    ids=["key sequence", "head dim"],
)
def test_what_no_device_can_do_alone_is_gathered(case, kind, spec, gathers):
    """The values are above. Also: the reading of the program does see a collective."""
    mesh = mesh_of(4, names=("data",), kind=kind)
    with jax.set_mesh(mesh):
        sharded = placed(operands(case), mesh, P(), spec)
        hlo = jax.jit(attend).lower(*sharded).compile().as_text()
    assert moves_between_devices(hlo) == {"all-gather": gathers}


@pytest.fixture
def kernels_on_the_cpu(monkeypatch):
    """Programs for the CPU call the kernels, so that XLA partitions them over the fake devices.

    Such a program compiles and cannot run: nothing here is a kernel.
    """
    handlers = importlib.import_module("jaxlib.cpu._lapack").registrations()
    # XLA looks a target up while compiling; which handler it finds there does not matter.
    handler = next(x for name, x in sorted(handlers.items()) if name.endswith("_ffi"))
    for target in (helpers.FWD_TARGET, helpers.BWD_TARGET):
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    fake = helpers.fake_extension()
    monkeypatch.setattr(_native, "_load", lambda: (fake, ""))
    monkeypatch.setattr(_native, "visible_gpus", list)
    rules = {
        _primitive.fwd_p: _primitive._lower_forward_cuda,
        _primitive.bwd_p: _primitive._lower_backward_cuda,
    }
    with lowered_on_the_cpu_by(rules):
        yield


DEFAULT_RULES = {
    _primitive.fwd_p: _primitive._lower_forward,
    _primitive.bwd_p: _primitive._lower_backward,
    _primitive.xla_fwd_p: _primitive._lower_xla_forward,
    _primitive.xla_bwd_p: _primitive._lower_xla_backward,
}


@contextlib.contextmanager
def lowered_on_the_cpu_by(rules):
    """Other lowering rules of some primitives for the CPU."""
    for primitive, rule in rules.items():
        mlir.register_lowering(primitive, rule, platform="cpu")
    try:
        yield
    finally:
        for primitive in rules:
            mlir.register_lowering(primitive, DEFAULT_RULES[primitive], platform="cpu")
        jax.clear_caches()


BOTH, QUERIES, HEADS = P("data", None, "heads"), P(None, "data"), P(None, None, "data")
# Mesh kind, specs of query and of key and value, what a kernel sees of the query's 4 x 8 x 4 x 64,
# and the collectives that it needs.
SUM = {"all-reduce": 1}  # of the gradients of keys that several devices' queries see
KERNEL_PLACEMENTS = {
    "Explicit": (AxisType.Explicit, BOTH, BOTH, "1,8,2,64", {}),
    "Auto": (AxisType.Auto, BOTH, BOTH, "1,8,2,64", {}),
    "query sequence, Explicit": (AxisType.Explicit, QUERIES, P(), "4,2,4,64", SUM),
    "query sequence, Auto": (AxisType.Auto, QUERIES, P(), "4,2,4,64", SUM),
    "fewer key heads than shards, Explicit": (AxisType.Explicit, HEADS, P(), "4,8,1,64", SUM),
    # Two heads over four devices: each gradient is summed over two, and the heads are exchanged.
    "fewer key heads than shards, Auto": (
        AxisType.Auto,
        HEADS,
        P(),
        "4,8,1,64",
        {**SUM, "all-gather": 2},
    ),
    # The results go back to where the query was whole.
    "keys alone over heads, Auto": (
        AxisType.Auto,
        P(),
        P(None, None, "heads"),
        "4,8,2,64",
        {"all-gather": 3},
    ),
}


@pytest.mark.usefixtures("kernels_on_the_cpu")
@pytest.mark.parametrize(
    ("kind", "q_spec", "kv_spec", "local", "moved"),
    KERNEL_PLACEMENTS.values(),
    ids=KERNEL_PLACEMENTS,
)
def test_the_kernels_work_on_their_shard_and_nothing_is_replicated(
    kind, q_spec, kv_spec, local, moved
):
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=kind)
    with jax.set_mesh(mesh):
        sharded = with_cotangents(operands(CASES["primitive"]), mesh, q_spec, kv_spec)
        hlo = jax.jit(lambda *a: with_pullback(*a)).lower(*sharded).compile().as_text()
    assert seen_by_kernels(hlo) == [local, local]
    assert moves_between_devices(hlo) == moved


@pytest.mark.usefixtures("kernels_on_the_cpu")
def test_the_kernels_inside_shard_map_work_on_their_shard_without_a_collective():
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Auto)
    sharded = with_cotangents(operands(CASES["primitive"]), mesh, BOTH, BOTH)
    f = jax.shard_map(with_pullback, mesh=mesh, in_specs=BOTH, out_specs=BOTH)
    hlo = jax.jit(f).lower(*sharded).compile().as_text()
    assert seen_by_kernels(hlo) == ["1,8,2,64"] * 2
    assert not moves_between_devices(hlo)


@pytest.mark.usefixtures("kernels_on_the_cpu")
@both_kinds
def test_a_vmap_over_a_mesh_axis_gives_the_kernels_the_local_members(kind):
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=kind)
    args = tuple(normal((4, *x.shape), x.dtype) for x in operands(CASES["primitive"]))
    with jax.set_mesh(mesh):
        sharded = placed(args, mesh, P("data"), P("data"))
        f = jax.vmap(lambda *a: attend(*a), spmd_axis_name="data")
        hlo = jax.jit(f).lower(*sharded).compile().as_text()
    assert seen_by_kernels(hlo) == ["1,4,8,4,64"]
    assert not moves_between_devices(hlo)


@pytest.mark.usefixtures("kernels_on_the_cpu")
def test_an_auto_axis_beside_manual_ones_shards_the_kernels_heads():
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Auto)
    sharded = placed(operands(CASES["primitive"]), mesh, BOTH, BOTH)
    f = manual_over_data(mesh)
    hlo = jax.jit(f).lower(*sharded).compile().as_text()
    assert seen_by_kernels(hlo) == ["1,8,2,64"]
    assert not moves_between_devices(hlo)


@pytest.mark.usefixtures("kernels_on_the_cpu")
@pytest.mark.parametrize(
    ("k", "spec"),
    [(1, P(None, None, "model")), (2, P(None, "model"))],
    ids=["fewer key heads than shards", "query sequence"],
)
def test_a_split_that_needs_communication_beside_manual_axes_is_not_made_silently(k, spec, caplog):
    """A device knows its place on an Auto axis only where no other axis is manual."""
    _partitioning._warn_once.cache_clear()
    mesh = mesh_of(2, 4, names=("data", "model"), kind=AxisType.Auto)
    f = manual_over_data(mesh)
    sharded = placed(operands(CASES["primitive"], k=k), mesh, P("data", *spec[1:]), P("data"))
    with caplog.at_level("WARNING", logger="absl"):
        hlo = jax.jit(f).lower(*sharded).compile().as_text()
    assert seen_by_kernels(hlo) == ["2,8,4,64"]
    assert "make these axes manual too" in caplog.text


# --- Auto axes: the values of what each device does ----------------------------------------------


@pytest.fixture
def split_on_the_cpu():
    """Shapes of the queries that devices see, forward and backward."""
    seen = []

    def noting(rule):
        def lower(ctx, *operands, **params):
            if not _partitioning.is_wanted(ctx):
                seen.append(ctx.avals_in[0].shape)
            return rule(ctx, *operands, **params)

        return lower

    with lowered_on_the_cpu_by({p: noting(rule) for p, rule in DEFAULT_RULES.items()}):
        yield seen


TENSOR, TWO = P(None, None, ("data", "heads")), P(None, None, "heads")
# Specs of query and of key and value, heads, and what a device sees of a 4 x 8 x N x 64 query.
SPLIT_CASES = {
    "batch and heads": (BOTH, BOTH, (4, 2), (1, 8, 2, 64)),
    "one head a device": (TENSOR, TENSOR, (8, 8), (4, 8, 1, 64)),
    "four key heads, eight devices": (TENSOR, P(), (8, 4), (4, 8, 1, 64)),
    "two key heads, eight devices": (TENSOR, P(None, None, "heads"), (8, 2), (4, 8, 1, 64)),
    "one key head": (TENSOR, P(), (8, 1), (4, 8, 1, 64)),
    "key heads that two devices would have to halve": (TWO, P(), (6, 3), (4, 8, 6, 64)),
    "query sequence": (P(None, "data"), P(), (4, 2), (4, 2, 4, 64)),
    "query sequence and heads": (P(None, "data", "heads"), P(), (4, 1), (4, 2, 2, 64)),
    "query sequence over both axes": (P(None, ("heads", "data")), P(), (2, 2), (4, 1, 2, 64)),
    "both sequences": (P(None, "data"), P(None, "data"), (4, 2), (4, 2, 4, 64)),
    "key sequence": (P("data"), P(None, "data"), (4, 2), (1, 8, 4, 64)),
    "query sequence, batch of keys": (P(None, "data"), P("data"), (4, 2), (4, 2, 4, 64)),
    "head dim": (P(None, None, None, "data"), P(None, None, None, "data"), (4, 2), (4, 8, 4, 64)),
    "keys alone over heads": (P(), P(None, None, "heads"), (4, 2), (4, 8, 2, 64)),
    "axes in the other order": (P(("heads", "data")), P("data"), (4, 2), (1, 8, 4, 64)),
}


@pytest.mark.parametrize(
    ("q_spec", "kv_spec", "heads", "local"), SPLIT_CASES.values(), ids=SPLIT_CASES
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "causal_alignment": "bottom_right"},
        {"is_causal": True, "query_offset": np.asarray([-2, 0, 3, 40, 1, -9, 8, 5], np.int32)},
        # The xla path's own: at the first queries of a device the window hides keys.
        {"local_window_size": (6, 1), "key_value_seq_lengths": np.arange(9, 17)},
    ],
    ids=["full", "bottom right", "offset", "window and lengths"],
)
def test_the_parts_of_a_split_call_give_the_values_of_the_whole(
    split_on_the_cpu, q_spec, kv_spec, heads, local, options
):
    n, k = heads
    batch = 8 if q_spec == P(("heads", "data")) else 4
    of_a_row = ("query_offset", "key_value_seq_lengths")
    options = {name: x[:batch] if name in of_a_row else x for name, x in options.items()}
    args = qkv(batch=(batch,), t=8, s=16, n=n, k=k, h=64, dtype=jnp.bfloat16)
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Auto)
    sharded = placed(args, mesh, q_spec, kv_spec)
    f = functools.partial(attend, **options)
    got = value_and_grads(f, loss(f), sharded)
    dense = functools.partial(exact, **options)
    right = jax.jit(lambda *a: (dense(*a), jax.grad(loss(dense), (0, 1, 2))(*a)))(*args)
    values, grads = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), got)
    assert_close(values, right[0], jnp.bfloat16)
    assert_close(grads, right[1], jnp.bfloat16, scale=6)
    assert set(split_on_the_cpu) == {local}, "not what the devices were to do"


def test_a_split_call_under_vmap_and_in_a_mesh_that_is_manual_in_part(split_on_the_cpu):
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Auto)
    args = operands(CASES["primitive"])
    sharded = placed(args, mesh, BOTH, BOTH)
    f = manual_over_data(mesh)
    check(value_and_grads(f, loss(f), sharded), args, CASES["primitive"])
    assert set(split_on_the_cpu) == {(1, 8, 2, 64)}
    split_on_the_cpu.clear()
    queries = jnp.stack([args[0], -args[0]])  # mapped; key and value are not
    over_queries = jax.vmap(attend, in_axes=(0, None, None))
    sharded = placed((queries, *args[1:]), mesh, P(None, "data", None, "heads"), BOTH)
    right = jax.vmap(exact, in_axes=(0, None, None))(queries, *args[1:])
    assert_close(jax.tree.map(np.asarray, jax.jit(over_queries)(*sharded)), right, jnp.bfloat16)
    assert set(split_on_the_cpu) == {(2, 1, 8, 2, 64)}


def test_gspmd_splits_a_kernel_too(split_on_the_cpu):
    """XLA's older partitioner, still behind a flag, asks for shardings instead of a rule."""
    if "jax_use_shardy_partitioner" not in jax.config.values:
        pytest.skip("this JAX has Shardy alone")
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
        mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Auto)
        args = operands(CASES["primitive"])
        got = value_and_grads(attend, loss(attend), placed(args, mesh, BOTH, BOTH))
    finally:
        jax.config.update("jax_use_shardy_partitioner", True)
    check(got, args, CASES["primitive"])
    assert set(split_on_the_cpu) == {(1, 8, 2, 64)}


@pytest.mark.parametrize("sizes", [(8,), (2, 4), (3, 4), (4, 3), (2, 3, 2), (5, 2)], ids=str)
def test_a_sharding_of_any_mesh_is_told_in_prime_axes(sizes):
    mesh = jax.sharding.AbstractMesh(sizes, tuple("xyz")[: len(sizes)])
    names = mesh.axis_names
    for spec in (P(names), P(names[::-1]), P(None, *names), P(names[-1]), P(None, names[0])):
        wanted = NamedSharding(mesh, spec)._to_xla_hlo_sharding(4)
        tiles = _partitioning._tiles(NamedSharding(mesh, spec), 4)
        found = []
        for primes in _partitioning._factorizations(mesh.size):
            prime_mesh = _partitioning._mesh(primes)
            axes = _partitioning._axes(tiles, 4, prime_mesh)
            if axes is not None:
                found.append(NamedSharding(prime_mesh, P(*axes))._to_xla_hlo_sharding(4))
        assert found
        for hlo in found:
            assert hlo.tile_assignment_dimensions() == wanted.tile_assignment_dimensions()
            assert hlo.tile_assignment_devices() == wanted.tile_assignment_devices()


@pytest.mark.usefixtures("kernels")
def test_an_exported_program_holds_the_bare_kernel_and_a_warning(caplog):
    """A call that XLA asks this process to split could not be saved."""
    _partitioning._warn_once.cache_clear()
    mesh = mesh_of(4, names=("data",), kind=AxisType.Auto)
    sharded = placed(operands(CASES["primitive"]), mesh, P("data"), P("data"))
    with caplog.at_level("WARNING", logger="absl"):
        exported = jax.export.export(
            jax.jit(attend),
            platforms=["cuda"],
            disabled_checks=jax_fa3.export_disabled_checks(),
        )(*sharded)
    assert helpers.kernel_calls(exported.mlir_module()) == 1
    assert "CustomSPMDPartitioning" not in exported.mlir_module()
    assert "jax.shard_map" in caplog.text


def test_explicit_axes_beside_the_auto_ones_that_split_a_kernel(split_on_the_cpu):
    """What a device does is traced while the program is compiled, under the ambient mesh."""
    kinds = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.sharding.Mesh(
        mesh_of(2, 4, names=("e", "a"), kind=kinds[0]).devices, ("e", "a"), kinds
    )
    args = operands(CASES["primitive"], k=1)
    rows = tuple(jnp.stack([x, -x]) for x in args)
    f = jax.vmap(functools.partial(attend, is_causal=True))
    with jax.set_mesh(mesh):
        sharded = placed(rows, mesh, P("e", None, "a"), P("e"))
        got = jax.tree.map(np.asarray, jax.jit(f)(*sharded))
    right = jax.vmap(functools.partial(exact, is_causal=True))(*rows)
    assert_close(got, right, jnp.bfloat16)
    assert set(split_on_the_cpu) == {(1, 4, 2, 4, 64)}


@pytest.mark.parametrize("inside_first", [True, False])
@pytest.mark.parametrize(
    ("manual", "calls"),  # a forward and a backward for each of the two that XLA splits
    [(("data",), 4), (("data", "heads"), 2)],
    ids=["in part", "whole"],
)
def test_one_program_sums_rows_inside_and_outside_of_a_shard_map(
    split_on_the_cpu, manual, calls, inside_first
):
    """Types and shapes are the same: JAX must not take the lowering of one for the other's."""
    mesh = mesh_of(2, 4, names=("data", "heads"), kind=AxisType.Auto)
    q, k, v = operands(CASES["primitive"], batch=(2,), n=8, k=4)
    heads = P(None, None, None, "heads")
    args = placed((jnp.stack([q, -q, 2 * q]), k, v), mesh, heads, P())

    def gradients(q, k, v):
        def total(q, k, v):
            out = jax.vmap(lambda q: attend(q, k, v)[0])(q)
            return (out.astype(jnp.float32) ** 2).sum()

        return jax.grad(total, (0, 1, 2))(q, k, v)

    inside = jax.shard_map(
        gradients, mesh=mesh, in_specs=P(), out_specs=P(), axis_names=set(manual), check_vma=False
    )
    order = (inside, gradients) if inside_first else (gradients, inside)
    lowered = jax.jit(lambda *a: [f(*a) for f in order]).lower(*args)
    assert lowered.as_text().count("@CustomSPMDPartitioning") == calls
    one, other = lowered.compile()(*args)
    assert_close(one, other, jnp.bfloat16)
    # Outside, a device has two of the heads, forward and backward.
    assert split_on_the_cpu.count((3, 2, 8, 2, 64)) >= 2


@pytest.mark.optimised
def test_memory_of_a_sum_over_rows_does_not_grow_with_them_on_an_auto_mesh(monkeypatch):
    """A loop over rows, on each device: XLA could not split one of its own over the batch."""
    monkeypatch.setattr(_primitive, "_ROWS_BYTES", 0)  # no row of these is small
    mesh = mesh_of(4, names=("data",), kind=AxisType.Auto)

    def temporaries(rows):
        shapes = (rows, 4, 2, 2, 64), (4, 2048, 2, 64), (4, 2048, 2, 64)
        args = [
            jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
            for shape, spec in zip(shapes, (P(None, "data"), P("data"), P("data")), strict=True)
        ]

        def total(q, k, v):
            return sum(map(jnp.sum, jax.vmap(attend, (0, None, None))(q, k, v)))

        compiled = jax.jit(jax.grad(total, (1, 2))).lower(*args).compile()
        assert not moves_between_devices(compiled.as_text())
        return compiled.memory_analysis().temp_size_in_bytes

    keys_of_a_device = 2048 * 2 * 64 * 4
    growth = (temporaries(8) - temporaries(2)) / keys_of_a_device
    assert growth < 1, f"{growth:.1f} copies for 6 rows"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("policy", "calls"),
    [(jax_fa3.remat_policy(), 1), (jax.checkpoint_policies.nothing_saveable, 2)],
    ids=["ours", "nothing"],
)
def test_a_remat_policy_holds_over_explicit_axes(policy, calls):
    mesh = mesh_of(4, 2, names=("data", "heads"), kind=AxisType.Explicit)

    def f(q, k, v):
        layer = lambda x, k, v: x + attend(x, k, v, is_causal=True)[0]
        step = jax.checkpoint(layer, policy=policy)
        x, _ = jax.lax.scan(lambda x, _: (step(x, k, v), None), q, length=3)
        return x.astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        args = placed(operands(CASES["primitive"]), mesh, BOTH, BOTH)
        traced = jax.jit(jax.grad(f, (0, 1, 2))).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert helpers.kernel_calls(text) == calls


@pytest.mark.usefixtures("kernels")
def test_a_split_kernels_text_says_what_it_computes():
    """JAX's persistent cache goes by the text, in which the rest is an address in memory."""
    mesh = mesh_of(4, names=("data",), kind=AxisType.Auto)
    args = placed(operands(CASES["primitive"]), mesh, P("data"), P("data"))

    def said(**options):
        f = lambda *a: jax.vjp(functools.partial(attend, **options), *a)[0]
        text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        (line,) = [x for x in text.splitlines() if "@CustomSPMDPartitioning" in x]
        return re.sub(r'backend_config = "\d+"', "", line)

    texts = [said(), said(is_causal=True), said(scale=0.5), said(implementation="fa3")]
    assert len(set(texts)) == 4
    assert said(is_causal=True) == texts[1], "the same call, another text: the cache never hits"
    assert all(helpers.FWD_TARGET in text for text in texts)
