"""Two GPUs of one host: the values of one, through every kind of mesh, and what crosses between.

Each test needs two GPUs and skips itself on a machine with fewer.
"""

import functools
from typing import NamedTuple

import backward_helpers
import bounds
import helpers
import jax
import numpy as np
import pytest
from helpers import assert_close, assert_same_bits, moves_between_devices, placed, seen_by_kernels
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernel_helpers import attend, see_causal

B, T = 2, 1000  # no tile size divides 1000, nor the 500 queries of a half

causal = functools.partial(attend, is_causal=True)


class Placement(NamedTuple):
    """How a causal call of N query heads and K key/value heads lies on the mesh axis "gpus"."""

    n: int
    k: int
    q_spec: P  # of query, out, lse and their cotangents
    kv_spec: P
    local: str  # what a kernel sees of the query's [B, T, N, .]
    collectives: frozenset[str] = frozenset()  # that forward and backward may need


HEADS, QUERIES = P(None, None, "gpus"), P(None, "gpus")
SUM = frozenset({"all-reduce"})  # of dk and dv, over queries or heads of both GPUs
PLACEMENTS = {
    "data parallel": Placement(4, 2, P("gpus"), P("gpus"), "1,1000,4"),
    "tensor parallel": Placement(8, 2, HEADS, HEADS, "2,1000,4"),
    "fewer key heads than GPUs": Placement(8, 1, HEADS, P(), "2,1000,4", SUM),
    "query sequence": Placement(4, 2, QUERIES, P(), "2,500,4", SUM),
}


def local_queries(q, k, v):
    """One GPU's view of a sharded query sequence: only there must the caller say where it is."""
    return causal(q, k, v, query_offset=jax.lax.axis_index("gpus") * q.shape[1])


def through_shard_map(mesh, placement):
    q_spec, kv_spec = placement.q_spec, placement.kv_spec
    return jax.shard_map(
        local_queries if q_spec == QUERIES else causal,
        mesh=mesh,
        in_specs=(q_spec, kv_spec, kv_spec),
        out_specs=(q_spec, q_spec),
    )


# Kind of the mesh axis, and what to call on it.
ROUTES = {
    "shard_map": (AxisType.Auto, through_shard_map),
    "Auto": (AxisType.Auto, lambda mesh, placement: causal),
    "Explicit": (AxisType.Explicit, lambda mesh, placement: causal),
}


class Case(NamedTuple):
    args: tuple
    cts: tuple
    alone: tuple  # (out, lse) and (dq, dk, dv) of one GPU
    exact_and_plain: tuple  # gradients in float32, and by plain JAX in the dtype


@functools.cache
def case(name, h):
    """The problem of a placement and what it is to give, for all routes: worked out once."""
    helpers.seed_from(f"{name}, head dim {h}")  # whichever test asks first
    placement = PLACEMENTS[name]
    args, cts = backward_helpers.problem(batch=B, t=T, s=T, n=placement.n, k=placement.k, h=h)
    alone = jax.tree.map(np.asarray, helpers.pullback_of(causal)(args, cts))
    exact_and_plain = backward_helpers.yardsticks(args, cts, see_causal(T, T, 0))
    return Case(args, cts, alone, jax.tree.map(np.asarray, exact_and_plain))


@pytest.mark.parametrize("h", [64, 128])
@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("route", ROUTES)
def test_two_gpus_give_what_one_gives_and_move_no_more_than_they_must(two_gpus, route, name, h):
    """out, lse, dq, dk and dv of a call whose kernels see one GPU's share and nothing else."""
    placement, (args, cts, alone, exact_and_plain) = PLACEMENTS[name], case(name, h)
    kind, attention_on = ROUTES[route]
    mesh = jax.make_mesh((2,), ("gpus",), axis_types=(kind,), devices=two_gpus)
    step = helpers.pullback_of(attention_on(mesh, placement))
    like_query = NamedSharding(mesh, placement.q_spec)

    with jax.set_mesh(mesh):
        sharded = placed(args, mesh, placement.q_spec, placement.kv_spec)
        sharded_cts = jax.device_put(cts, like_query)
        compiled = step.lower(sharded, sharded_cts).compile()
        values, grads = compiled(sharded, sharded_cts)

    hlo = compiled.as_text()
    assert seen_by_kernels(hlo) == [f"{placement.local},{h}"] * 2  # forward and backward
    assert set(moves_between_devices(hlo)) <= placement.collectives
    for x in (*values, grads[0]):
        assert x.sharding.is_equivalent_to(like_query, x.ndim)

    values, grads = jax.tree.map(np.asarray, (values, grads))
    if name == "query sequence":  # its tiles begin at other rows, so sums have another order
        assert_close(values, alone[0])
    else:  # a shard of these sizes gets the kernel that the whole gets, and no row sees another
        assert_same_bits(values, alone[0])
    bounds.check_against_float32(values, args, diagonal=0)
    # Where dk and dv are sums over the GPUs, each addend was rounded.
    assert_close(grads, alone[1], scale=2)
    slack = backward_helpers.half_ulp(args[0].dtype)
    backward_helpers.check(grads, *exact_and_plain, epsilon=slack, what=f"{route}, {name}")
