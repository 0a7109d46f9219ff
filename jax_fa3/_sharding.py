"""Placement of a call on a mesh.

* Manual axes (inside jax.shard_map): arrays are local already; operands that vary over fewer axes
  than others are cast to vary alike, so that their cotangents are summed.
* Explicit axes: batch and heads stay sharded as the query's are, everything else is gathered, and
  the call runs in a jax.shard_map over those axes.
* Auto axes: XLA places the call, and gathers what a kernel needs whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jax_fa3._spec import CORE_RANK, Operands

# A function of operands that gives out [*batch, T, N, D] and lse [*batch, N, T].
Attend = Callable[[Operands], tuple[jax.Array, jax.Array]]


def place(attend: Attend, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """attend(operands), each array where it may be.

    Returns:
      out and lse; on Explicit axes sharded as the query is in batch, T and N.
    Raises:
      ValueError: the arrays live on different meshes.
    """
    types = [jax.typeof(x) for x in operands if x is not None]
    if all(t.sharding.mesh.empty for t in types):
        return attend(operands)
    if any(_is_sharded(t) for t in types):
        return _over_explicit_axes(attend, operands, types)
    return attend(_vary_alike(operands))


def _is_sharded(aval: Any) -> bool:
    """Whether a dim is sharded over Explicit axes: a type names no other axes."""
    return any(axis is not None for axis in aval.sharding.spec)


def _vary_alike(operands: Operands) -> Operands:
    """Casts every operand to vary over all manual axes over which some operand varies."""
    varying = [
        frozenset() if x is None else jax.typeof(x).manual_axis_type.varying for x in operands
    ]
    every = frozenset().union(*varying)
    return Operands(
        *(
            jax.lax.pcast(x, tuple(sorted(every - have, key=str)), to="varying")
            if x is not None and every - have
            else x
            for x, have in zip(operands, varying, strict=True)
        )
    )


def _over_explicit_axes(
    attend: Attend, operands: Operands, types: list[Any]
) -> tuple[jax.Array, jax.Array]:
    meshes = {t.sharding.mesh for t in types if not t.sharding.mesh.empty}
    if len(meshes) != 1:
        raise ValueError(
            f"dot_product_attention: the arrays live on different meshes, {meshes}; "
            "jax.sharding.reshard them to one"
        )
    mesh = meshes.pop()
    q_type = jax.typeof(operands.query)
    *batch, t, n, _ = _partition(q_type)
    if _shards(n, mesh) > 1 and operands.key.shape[-2] % _shards(n, mesh):
        n_inside = None  # too few key/value heads for that many shards: gather the heads
    else:
        n_inside = n
    inside = {
        name: _operand_partition(name, x, batch, n_inside)
        for name, x in zip(Operands._fields, operands, strict=True)
        if x is not None
    }
    # Not all Explicit axes: one over which an outer vmap is sharded may not be named here.
    used = {axis for spec in inside.values() for axes in spec for axis in _axes(axes)}
    placed = {
        name: jax.sharding.reshard(getattr(operands, name), NamedSharding(mesh, spec))
        for name, spec in inside.items()
    }

    def local(placed: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        found = Operands(**{name: placed.get(name) for name in Operands._fields})
        return attend(_vary_alike(found))

    if used:
        local = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(inside,),
            out_specs=(PartitionSpec(*batch, None, n_inside), PartitionSpec(*batch, n_inside)),
            axis_names=used,
        )
    out, lse = local(placed)
    if t is not None or n_inside != n:
        out = jax.sharding.reshard(out, NamedSharding(mesh, PartitionSpec(*batch, t, n)))
        lse = jax.sharding.reshard(lse, NamedSharding(mesh, PartitionSpec(*batch, n, t)))
    return out, lse


def _partition(aval: Any) -> list[Any]:
    spec = tuple(aval.sharding.spec)
    return list(spec + (None,) * (aval.ndim - len(spec)))


def _shards(axes: Any, mesh: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in _axes(axes))


def _axes(axes: Any) -> tuple[Any, ...]:
    """The mesh axes in one entry of a PartitionSpec: None, an axis or a tuple of axes."""
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def _operand_partition(name: str, x: Any, batch: list[Any], heads: Any) -> PartitionSpec:
    """Batch and heads as the query's; of bias and mask only the dims that are not broadcast."""
    if name == "sinks":
        return PartitionSpec(heads)
    core = {
        "query": (None, heads, None),
        "key": (None, heads, None),
        "value": (None, heads, None),
        "bias": (heads, None, None),
        "mask": (heads, None, None),
        "query_descale": (None, heads),
        "key_descale": (None, heads),
        "value_descale": (None, heads),
    }.get(name, (None,) * CORE_RANK[name])
    spec = (*batch, *core)
    if name in ("bias", "mask"):
        spec = tuple(None if size == 1 else axis for size, axis in zip(x.shape, spec, strict=True))
    return PartitionSpec(*spec)
