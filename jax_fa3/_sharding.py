"""Placement of a call on a mesh.

* Manual axes (inside jax.shard_map): arrays are local already; operands that vary over fewer axes
  than others are cast to vary alike, so that their cotangents are summed.
* Explicit axes: the call runs in a jax.shard_map over those that shard it.
* Auto axes: XLA places the call; `_partitioning` tells it how the kernels may be split.

On Explicit and Auto axes alike the batch, the query sequence and the heads stay sharded, as `Split`
says, and everything else is gathered.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_fa3._spec import (
    CORE_DIMS,
    CORE_RANK,
    DIFFERENTIABLE,
    AttentionSpec,
    Operands,
    first_position,
    full_batch,
    softmax_dtype,
)

Axes = tuple[Any, ...]  # names of mesh axes that split one dim, major first


# --- how a call is split ---


class Split(NamedTuple):
    """The mesh axes that split each dim of a call; what is not named here is whole everywhere.

    Where there are fewer key/value heads than shards of the query heads, the shards that read one
    key/value head hold all that `keys` leave whole, read theirs, and sum its gradient.
    """

    batch: tuple[Axes, ...]
    t: Axes  # query sequence
    n: Axes  # query heads
    keys: Axes  # key/value heads: the leading ones of n

    @property
    def axes(self) -> Axes:
        """All of them."""
        return sum((*self.batch, self.t, self.n), ())

    @property
    def sharing(self) -> Axes:
        """The axes over which query heads of one key/value head are split."""
        return self.n[len(self.keys) :]

    def partition(self, name: str, shape: Sequence[int]) -> PartitionSpec:
        """How an operand or result of the call is split."""
        core = {"t": self.t, "n": self.n, "k": self.keys}
        axes = [core.get(dim, ()) for dim in CORE_DIMS[name]]
        if name != "sinks":
            axes = [*self.batch, *axes]
        # A dim of size 1 is broadcast. (A full one is split only where it divides.)
        return PartitionSpec(
            *(a if a and n > 1 else None for a, n in zip(axes, shape, strict=True))
        )


def split_of(
    placed: Iterable[tuple[str, Sequence[int], Sequence[Axes]]],
    sizes: Mapping[Any, int],
    *,
    heads_k: int,
    can_communicate: bool = True,
    summed: Collection[int] = (),
) -> Split:
    """The split that moves least, given how the arrays of a call lie.

    Args:
      placed: (name, shape, axes of each dim) of operands and results, the query first: of several
        that are split in one dim, the first decides.
      sizes: of the mesh axes.
      heads_k: how many key/value heads there are.
      can_communicate: a device may ask where it is, and sum with others.
      summed: batch dims over which results are sums.
    """
    placed = list(placed)
    batch_rank = len(placed[0][1]) - CORE_RANK["query"]
    t, heads_n, _ = placed[0][1][batch_rank:]
    full = [
        max(shape[i] for name, shape, _ in placed if name != "sinks") for i in range(batch_rank)
    ]
    # One scale may span several shards of the sequence.
    t_may_split = can_communicate and all(name != "query_descale" for name, _, _ in placed)

    def fits(dim: Any, axes: Axes) -> bool:
        shards = _count(axes, sizes)
        if isinstance(dim, int):
            return full[dim] % shards == 0 and (can_communicate or dim not in summed)
        if dim == "t":
            return t_may_split and t % shards == 0
        if heads_n % shards or not heads_n:
            return False
        # Each shard reads whole groups of query heads, or a part of one.
        shares = (heads_n // heads_k) % (heads_n // shards) == 0
        return _key_axes(axes, heads_k, sizes) == axes or (can_communicate and shares)

    chosen: dict[Any, Axes] = {}

    def choose(dim: Any, axes: Axes) -> None:
        """Splits a dim, but for axes in use or of size 1, and the last ones that do not fit."""
        used = set().union(*chosen.values())
        axes = tuple(axis for axis in axes if axis not in used and sizes[axis] > 1)
        while axes and not fits(dim, axes):
            axes = axes[:-1]
        if axes:
            chosen[dim] = axes

    split_dims = []
    for name, shape, axes in placed:
        dims = (*range(batch_rank), *CORE_DIMS[name]) if name != "sinks" else ("n",)
        split_dims += [(d, a) for d, n, a in zip(dims, shape, axes, strict=True) if a and n > 1]
    for dim, axes in split_dims:
        if dim in (*range(batch_rank), "t", "n") and dim not in chosen:
            choose(dim, axes)
    # Key/value heads count where no query heads are split: those follow them.
    for dim, axes in split_dims:
        if dim == "k" and "n" not in chosen:
            choose("n", axes)

    batch = tuple(chosen.get(i, ()) for i in range(batch_rank))
    n = chosen.get("n", ())
    return Split(batch, chosen.get("t", ()), n, _key_axes(n, heads_k, sizes))


def _key_axes(axes: Axes, heads_k: int, sizes: Mapping[Any, int]) -> Axes:
    """The leading ones of the query heads' axes that split the key/value heads too."""
    while axes and heads_k % _count(axes, sizes):
        axes = axes[:-1]
    return axes


def _count(axes: Axes, sizes: Mapping[Any, int]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def localize(
    spec: AttentionSpec, operands: Operands, split: Split, sizes: Mapping[Any, int]
) -> tuple[AttentionSpec, Operands]:
    """The call that one device makes, where its part of the arrays is at hand.

    Takes the key/value head that the device's query heads read, and moves the diagonal and the
    query lengths to where its part of the query sequence begins.
    """
    changed: dict[str, Any] = {}
    if split.sharing:
        head = _key_head(operands.key.shape[-2], split, sizes)
        for name in ("key", "value", "key_descale", "value_descale"):
            x = getattr(operands, name)
            if x is not None:
                axis = x.ndim - 2 + (CORE_DIMS[name][-1] == "k")
                changed[name] = jax.lax.dynamic_slice_in_dim(x, head, 1, axis)
    if split.t:
        here = operands.query.shape[-3]
        start = np.int32(here) * jax.lax.axis_index(split.t)
        lengths = operands.query_seq_lengths
        if lengths is not None:
            changed["query_seq_lengths"] = jnp.clip(lengths - start, 0, here)
        has_diagonal = spec.is_causal or spec.window != (None, None)
        if has_diagonal and operands.query_positions is None:
            offset = _offset(spec, operands, here * _count(split.t, sizes))
            changed["query_offset"] = offset + start
            spec = dataclasses.replace(spec, causal_alignment="top_left")
    return spec, vary_alike(operands._replace(**changed))


def sum_gradients(
    grads: Mapping[str, jax.Array],
    operands: Operands,
    split: Split,
    sizes: Mapping[Any, int],
    partitions: Mapping[str, PartitionSpec],
) -> dict[str, jax.Array]:
    """The gradients of `operands`, from those of what `localize` made of them on each device.

    A gradient is summed, in float32 at least, over the axes that do not split it.

    Args:
      partitions: how each gradient is split.
    """
    found = {}
    for name, x in grads.items():
        if split.sharing and CORE_DIMS[name][1:2] == "k":
            heads_k = getattr(operands, name).shape[-2]
            whole = jnp.zeros((*x.shape[:-2], heads_k, x.shape[-1]), x.dtype)
            head = _key_head(heads_k, split, sizes)
            x = jax.lax.dynamic_update_slice_in_dim(_vary_as(whole, x), x, head, x.ndim - 2)
        own = {axis for entry in partitions[name] for axis in _entry(entry)}
        others = tuple(axis for axis in split.axes if axis not in own)
        found[name] = _sum(x, others) if others else x
    return found


def _key_head(heads_k: int, split: Split, sizes: Mapping[Any, int]) -> jax.Array:
    """Which of the key/value heads that a device holds its query heads read, where they share."""
    shards = _count(split.sharing, sizes)
    return jax.lax.axis_index(split.sharing) * np.int32(heads_k) // np.int32(shards)


def _offset(spec: AttentionSpec, operands: Operands, t: int) -> jax.Array:
    """At which key position the first of all t queries stands, int32 [*batch]."""
    offset = first_position(spec, operands, t)
    if operands.query_offset is not None:
        # So that a start can be added; nothing changes so far from the keys.
        return jnp.clip(offset, -(2**30), 2**30)
    batch = operands.query.shape[: -CORE_RANK["query"]]
    batch = jnp.broadcast_shapes(batch, jnp.shape(offset) or batch)
    return jnp.broadcast_to(jnp.asarray(offset, jnp.int32), batch)


# --- while tracing ---


def vary_alike(operands: Operands) -> Operands:
    """Casts every operand to vary over all manual axes over which some operand varies."""
    return Operands.of(_all_vary_alike(operands.present()))


def _all_vary_alike(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    varying = {name: jax.typeof(x).manual_axis_type.varying for name, x in arrays.items()}
    every = frozenset().union(*varying.values())
    missing = {name: tuple(sorted(every - have, key=str)) for name, have in varying.items()}
    return {name: _vary(missing[name], x) if missing[name] else x for name, x in arrays.items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vary(axes: Axes, x: jax.Array) -> jax.Array:
    """x, cast to vary over manual axes. Its cotangent is summed over them, in float32 at least."""
    return jax.lax.pcast(x, axes, to="varying")


def _vary_fwd(axes, x):
    return _vary(axes, x), None


def _vary_bwd(axes, _, cotangent):
    if not jnp.issubdtype(cotangent.dtype, jnp.floating):  # float0, of integer operands
        return (None,)
    return (_sum(cotangent, axes),)


_vary.defvjp(_vary_fwd, _vary_bwd)


def _vary_as(x: jax.Array, like: jax.Array) -> jax.Array:
    axes = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def _sum(x: jax.Array, axes: Axes) -> jax.Array:
    """The sum over mesh axes, in float32 at least, rounded once."""
    return jax.lax.psum(x.astype(softmax_dtype(x.dtype)), axes).astype(x.dtype)


# A function of a call's options and operands that gives out [*batch, T, N, D], lse [*batch, N, T].
Forward = Callable[[AttentionSpec, Operands], tuple[jax.Array, jax.Array]]
# The same, and of out, lse, dout, dlse and the number of rows, that gives the operands' cotangents.
Backward = Callable[..., Operands]


def forward(
    fun: Forward, spec: AttentionSpec, operands: Operands, *, takes_broadcast: bool
) -> tuple[jax.Array, jax.Array]:
    """fun(spec, operands), over the Explicit axes that shard the operands.

    Args:
      takes_broadcast: an operand may be 1 in a batch dim in which others are not. Then an axis of
        jax.vmap becomes a batch dim here, and may lie on a mesh axis as any other. (A jax.shard_map
        over the other axes, mapped over one that lies on an axis of its own, is gathered over it.)
    Returns:
      out and lse; sharded as the query is in batch, T and N.
    Raises:
      ValueError: the arrays live on different meshes.
    """

    def over(arrays: dict[str, jax.Array], rows: int) -> dict[str, jax.Array]:
        del rows
        return _forward_over(fun, spec, arrays)

    arrays = operands.present()
    is_placed = _explicit(arrays) is not None
    results = _with_rows(over)(arrays) if is_placed and takes_broadcast else over(arrays, 0)
    return results["out"], results["lse"]


def backward(
    fun: Backward,
    spec: AttentionSpec,
    operands: Operands,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    *,
    takes_broadcast: bool,
) -> Operands:
    """fun(spec, operands, out, lse, dout, dlse, rows), as `forward`.

    Each cotangent lies as its operand. Those of an operand that is 1 in a batch dim are sums over
    it, but for the first `rows` batch dims: vmap(grad(f)) wants a gradient for each.
    """

    def over(arrays: dict[str, jax.Array], rows: int) -> dict[str, jax.Array]:
        return _backward_over(fun, spec, arrays, rows)

    def plain(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return over(arrays, 0)

    arrays = {**operands.present(), "out": out, "lse": lse, "dout": dout, "dlse": dlse}
    if _explicit(arrays) is None or not takes_broadcast:
        return Operands.of(plain(arrays))
    mapped = _with_rows(over)
    # A second derivative does not pass through a jax.custom_batching.custom_vmap.
    twice = jax.custom_vjp(mapped)
    twice.defvjp(
        lambda arrays: (mapped(arrays), arrays),
        lambda arrays, cotangents: jax.vjp(plain, arrays)[1](cotangents),
    )
    return Operands.of(twice(arrays))


def _with_rows(
    over: Callable[[dict[str, jax.Array], int], dict[str, jax.Array]], rows: int = 0
) -> Callable[[dict[str, jax.Array]], dict[str, jax.Array]]:
    """over(., rows), which each jax.vmap makes over(., rows + 1) of arrays with a dim in front.

    That dim is 1 for what is not mapped.
    """

    @jax.custom_batching.custom_vmap
    def call(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return over(arrays, rows)

    @call.def_vmap
    def call_rows(_, mapped, arrays):
        (is_mapped,) = mapped
        arrays = {
            name: x if is_mapped[name] else jnp.expand_dims(x, 0) for name, x in arrays.items()
        }
        results = _with_rows(over, rows + 1)(arrays)
        return results, dict.fromkeys(results, True)

    return call


def _forward_over(
    fun: Forward, spec: AttentionSpec, arrays: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    placement = _explicit(arrays)
    if placement is None:
        out, lse = fun(spec, Operands.of(arrays))
        return {"out": out, "lse": lse}
    mesh, split = placement
    query = arrays["query"]
    batch, (t, n, h) = _batch_of(arrays), query.shape[-3:]
    shapes = {"out": (*batch, t, n, h), "lse": (*batch, n, t)}

    def local(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        out, lse = fun(*localize(spec, Operands.of(arrays), split, mesh.shape))
        return {"out": out, "lse": lse}

    results = _over(mesh, split, local, arrays, shapes)
    *queries, t, n, _ = _dim_axes(jax.typeof(query))
    is_broadcast = [size != whole for size, whole in zip(query.shape, batch, strict=False)]
    used = {*t, *n}.union(*queries)
    as_query = tuple(
        _axes_of_rows(i, arrays, split, mesh.shape, used) if is_broadcast[i] else axes
        for i, axes in enumerate(queries)
    )
    wanted = Split(as_query, t, n, ())
    if wanted[:3] != split[:3]:
        results = {
            name: _reshard(x, mesh, wanted.partition(name, x.shape)) for name, x in results.items()
        }
    return results


def _backward_over(
    fun: Backward, spec: AttentionSpec, arrays: dict[str, jax.Array], rows: int
) -> dict[str, jax.Array]:
    rest = ("out", "lse", "dout", "dlse")
    wanted = [name for name in DIFFERENTIABLE if name in arrays]
    placement = _explicit(arrays)
    if placement is None:
        grads = fun(spec, Operands.of(arrays), *(arrays[name] for name in rest), rows)
        return {name: getattr(grads, name) for name in wanted}
    mesh, split = placement
    full = _batch_of(arrays)[:rows]
    shapes = {
        name: arrays[name].shape if name == "sinks" else (*full, *arrays[name].shape[rows:])
        for name in wanted
    }
    partitions = {name: split.partition(name, shape) for name, shape in shapes.items()}

    def local(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        here = Operands.of(arrays)
        saved = (arrays[name] for name in rest)
        grads = fun(*localize(spec, here, split, mesh.shape), *saved, rows)
        found = {name: getattr(grads, name) for name in shapes}
        return sum_gradients(found, here, split, mesh.shape, partitions)

    grads = _over(mesh, split, local, arrays, shapes)

    def as_operand(name: str) -> PartitionSpec:
        spec = list(entries_of(jax.typeof(arrays[name])))
        used = {axis for entry in spec for axis in _entry(entry)}
        for i in range(rows):
            if arrays[name].shape[i] != full[i]:
                axes = _axes_of_rows(i, arrays, split, mesh.shape, used)
                spec[i] = axes or None
        return PartitionSpec(*spec)

    return {name: _reshard(x, mesh, as_operand(name)) for name, x in grads.items()}


def _batch_of(arrays: Mapping[str, jax.Array]) -> tuple[int, ...]:
    """The full batch dims of a call, where each array has them or is 1."""
    return full_batch(
        x.shape[: x.ndim - CORE_RANK[name]] for name, x in arrays.items() if name != "sinks"
    )


def _axes_of_rows(
    dim: int,
    arrays: Mapping[str, jax.Array],
    split: Split,
    sizes: Mapping[Any, int],
    used: Collection[Any],
) -> Axes:
    """How a batch dim lies that a result has and the array that it lies as has not.

    As the split has it, and on axes of size 1, which a split leaves out and a type does not.
    """
    full = _batch_of(arrays)[dim]
    for name, x in arrays.items():
        if name != "sinks" and x.shape[dim] == full and (axes := _dim_axes(jax.typeof(x))[dim]):
            return tuple(
                axis
                for axis in axes
                if axis in split.batch[dim] or (sizes[axis] == 1 and axis not in used)
            )
    return ()


def placed_as(x: jax.Array, y: jax.Array) -> jax.Array:
    """y, sharded over Explicit axes as x is in its first dims, which are y's."""
    types = [jax.typeof(x), jax.typeof(y)]
    if not any(map(is_sharded, types)):
        return y
    mesh = next(t.sharding.mesh for t in types if not t.sharding.mesh.empty)
    return _reshard(y, mesh, PartitionSpec(*entries_of(types[0])[: y.ndim]))


def gathered(x: jax.Array) -> jax.Array:
    """x, whole on every device of its Explicit axes."""
    aval = jax.typeof(x)
    return _reshard(x, aval.sharding.mesh, PartitionSpec()) if is_sharded(aval) else x


def is_sharded(aval: Any) -> bool:
    """Whether a dim is sharded over Explicit axes: a type names no other axes."""
    return any(axis is not None for axis in aval.sharding.spec)


def entries_of(aval: Any) -> tuple[Any, ...]:
    """The entries of a type's PartitionSpec, one for each dim."""
    spec = tuple(aval.sharding.spec)
    return spec + (None,) * (aval.ndim - len(spec))


def _explicit(arrays: Mapping[str, jax.Array]) -> tuple[Any, Split] | None:
    """The mesh and the split over its Explicit axes; None where they shard nothing."""
    # The query first: a pytree may have put the names in another order.
    types = {name: jax.typeof(arrays[name]) for name in CORE_DIMS if name in arrays}
    for name, t in types.items():
        if t.sharding.spec.unreduced or t.sharding.spec.reduced:
            raise ValueError(
                f"dot_product_attention: {name} is {t}, unreduced or reduced over a mesh axis; "
                "jax.sharding.reshard it to a type that is neither"
            )
    if not any(map(is_sharded, types.values())):
        return None
    meshes = {t.sharding.mesh for t in types.values() if not t.sharding.mesh.empty}
    if len(meshes) != 1:
        raise ValueError(
            f"dot_product_attention: the arrays live on different meshes, {meshes}; "
            "jax.sharding.reshard them to one"
        )
    mesh = meshes.pop()
    placed = [(name, t.shape, _dim_axes(t)) for name, t in types.items()]
    return mesh, split_of(placed, mesh.shape, heads_k=arrays["key"].shape[-2])


def _over(
    mesh: Any,
    split: Split,
    local: Callable[[dict[str, jax.Array]], dict[str, jax.Array]],
    arrays: dict[str, jax.Array],
    shapes: Mapping[str, Sequence[int]],
) -> dict[str, jax.Array]:
    """local(arrays) over the split's axes; results of whole `shapes`."""
    # Not all Explicit axes: one over which an outer vmap is sharded may not be named here.
    used = set(split.axes)
    inside = {name: split.partition(name, x.shape) for name, x in arrays.items()}
    arrays = {name: _reshard(x, mesh, inside[name]) for name, x in arrays.items()}
    if not used:
        return local(arrays)

    def varying(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return local(_all_vary_alike(arrays))

    return jax.shard_map(
        varying,
        mesh=mesh,
        in_specs=(inside,),
        out_specs={name: split.partition(name, shape) for name, shape in shapes.items()},
        axis_names=used,
    )(arrays)


def _reshard(x: jax.Array, mesh: Any, partition: PartitionSpec) -> jax.Array:
    return jax.sharding.reshard(x, NamedSharding(mesh, partition))


def _dim_axes(aval: Any) -> list[Axes]:
    """The mesh axes of each dim of a type."""
    return [_entry(entry) for entry in entries_of(aval)]


def _entry(entry: Any) -> Axes:
    """The mesh axes in one entry of a PartitionSpec: None, an axis or a tuple of axes."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)
