"""How XLA splits attention over the devices of an Auto mesh.

XLA cannot see into a kernel's custom call, nor split a loop over blocks of queries, and would
gather the operands on every device. So where a program runs on several devices, and no
jax.shard_map around it made the arrays local, a primitive is lowered as a call that XLA asks us to
split when it knows where every array lies (jax.experimental.custom_partitioning):
`_sharding.Split` says how, as on Explicit axes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, NamedSharding

from jax_fa3._sharding import Axes, Split, is_sharded, split_of
from jax_fa3._spec import CORE_DIMS, CORE_RANK


class Call(NamedTuple):
    """A primitive as XLA is to split it.

    Attributes:
      whole: the primitive, arrays -> results.
      local: what one device does: (split, mesh axis sizes, the results' partitions by name, its
        part of the arrays) -> its part of the results.
      operands, results: names in CORE_DIMS, the query first; a gradient has its operand's.
      key: text of what else `local` depends on.
      summed: batch dims over which results are sums.
    """

    whole: Callable[..., Sequence[jax.Array]]
    local: Callable[..., Sequence[jax.Array]]
    operands: tuple[str, ...]
    results: tuple[str, ...]
    key: str
    summed: frozenset[int] = frozenset()


def _has_axes(ctx: Any) -> bool:
    """Whether the program that is being lowered has axes over which XLA splits its arrays."""
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.SPMDAxisContext):
        types = zip(context.mesh.axis_names, context.mesh.axis_types, strict=True)
        others = {kind for axis, kind in types if axis not in context.manual_axes}
        # Explicit axes may shard nothing here, and then they are no concern of XLA's.
        return AxisType.Auto in others or (bool(others) and any(map(is_sharded, ctx.avals_in)))
    return isinstance(context, mlir.ShardingContext) and context.num_devices > 1


def is_wanted(ctx: Any) -> bool:
    """Whether a call is to be `lower`ed here. Says so where it should be and cannot."""
    if not _has_axes(ctx):
        return False
    if ctx.module_context.lowering_parameters.for_export:
        # The call would hold a function of this process.
        _warn_once(
            "in an exported program, attention over Auto mesh axes runs whole on every device; put "
            "it into jax.shard_map"
        )
        return False
    return True


def lower(ctx: Any, operands: Sequence[Any], call: Call) -> Any:
    """Emits the call that XLA will split, as a lowering rule."""
    context = ctx.module_context.axis_context
    is_manual_in_part = isinstance(context, mlir.SPMDAxisContext)
    if is_manual_in_part:  # XLA's shardings are then within a group of devices
        sizes = context.mesh.shape
        count = math.prod(sizes[axis] for axis in sizes if axis not in context.manual_axes)
    else:
        count = context.num_devices
    # custom_partitioning wants devices, only to see that there are several.
    context = mlir.ShardingContext(count, (jax.devices()[0],) * count)
    module_context = ctx.module_context.replace(axis_context=context)
    find_split = functools.partial(_split, call, count, can_communicate=not is_manual_in_part)

    def partition(_, arguments, results):
        mesh, split = find_split(arguments, results)
        inside, outside = (
            {name: split.partition(name, x.shape) for name, x in zip(names, arrays, strict=True)}
            for names, arrays in ((call.operands, arguments), (call.results, results))
        )

        def local(*arrays):
            # XLA asks while the program is compiled, under whatever mesh is ambient there.
            with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
                return list(call.local(split, mesh.shape, outside, *arrays))

        shardings = [[NamedSharding(mesh, p) for p in side.values()] for side in (outside, inside)]
        return mesh, local, shardings[0], tuple(shardings[1])

    def infer(_, arguments, results):
        mesh, split = find_split(arguments, ())
        return [
            NamedSharding(mesh, split.partition(n, x.shape))
            for n, x in zip(call.results, results, strict=True)
        ]

    def whole(*arrays):
        return list(call.whole(*arrays))

    split_call = custom_partitioning(whole)
    split_call.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        decode_shardings=False,
        sharding_rule=lambda _, operands, results: _sharding_rule(call, operands, results),
    )
    plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
    rule = mlir.lower_fun(split_call, multiple_results=True)
    results = rule(ctx.replace(module_context=module_context, avals_in=plain), *operands)
    # The call itself says no more than where `partition` lies in memory. JAX's persistent cache
    # must not take a program with another mask or scale for this one.
    attributes = results[0].owner.attributes
    if "call_target_name" in attributes:  # not where the devices turned out to be one
        from jax_fa3 import __version__  # which is not there while this module is imported

        all_of_it = (__version__, call.operands, call.results, call.key)
        said = mlir.ir.StringAttr.get(repr(all_of_it))
        attributes["mhlo.frontend_attributes"] = mlir.ir.DictAttr.get({"jax_fa3": said})
    return results


# --- Shardy: which dims of the arrays belong together ---


def _sharding_rule(call: Call, operands: Sequence[Any], results: Sequence[Any]) -> Any:
    """The einsum-like rule by which Shardy propagates shardings through a call."""
    shapes = [tuple(t.shape) for t in (*operands, *results)]
    names = (*call.operands, *call.results)
    batch_rank = len(shapes[0]) - CORE_RANK["query"]
    full = [max(shape[i] for shape in shapes) for i in range(batch_rank)]
    heads = [shapes[names.index(name)][-2] for name in ("query", "key")]
    alone = (f"one{i}" for i in itertools.count())

    def factors(name: str, shape: tuple[int, ...]) -> str:
        batch = [f"b{i}" if shape[i] == full[i] else next(alone) for i in range(batch_rank)]
        # Key/value heads are a factor of their own: within the query heads' they would be split by
        # a part of a mesh axis where they are fewer than its size, which JAX cannot write down.
        core = ["n" if dim == "k" and heads[0] == heads[1] else dim for dim in CORE_DIMS[name]]
        return " ".join(batch + core)

    sides = [
        ", ".join(factors(name, shape) for name, shape in zip(some, part, strict=True))
        for some, part in (
            (call.operands, shapes[: len(operands)]),
            (call.results, shapes[len(operands) :]),
        )
    ]
    rule = " -> ".join(sides)
    whole = [f for f in dict.fromkeys(rule.replace(",", "").split()) if f in ("s", "h", "d")]
    return rule, {"need_replication_factors": tuple(whole)}


# --- XLA's shardings ---


def _split(
    call: Call,
    count: int,
    arguments: Sequence[Any],
    results: Sequence[Any],
    *,
    can_communicate: bool,
) -> tuple[AbstractMesh, Split]:
    """A mesh of `count` devices in whose axes XLA's shardings can be told, and the split."""
    arrays = (*arguments, *results)
    tiles = [_tiles(x.sharding, len(x.shape)) for x in arrays]
    for sizes in _factorizations(count):
        mesh = _mesh(sizes)
        told = [_axes(t, len(x.shape), mesh) for t, x in zip(tiles, arrays, strict=True)]
        if None not in told:
            break
    # Where no one mesh has all shardings, those that the last one has not are gathered.
    axes = [a or [()] * len(x.shape) for a, x in zip(told, arrays, strict=True)]
    names = (*call.operands, *call.results)[: len(arrays)]
    placed = [(name, x.shape, a) for name, x, a in zip(names, arrays, axes, strict=True)]
    find = functools.partial(
        split_of,
        placed,
        mesh.shape,
        heads_k=arguments[call.operands.index("key")].shape[-2],
        summed=call.summed,
    )
    split = find(can_communicate=can_communicate)
    if not can_communicate and split != find():
        _warn_once(
            "inside a jax.shard_map over other axes, attention is not split over Auto mesh axes "
            "where its devices would have to tell one another apart, and runs whole on each; make "
            "these axes manual too"
        )
    return mesh, split


@functools.cache
def _warn_once(text: str) -> None:
    from absl import logging  # slow to import, and rarely needed

    logging.warning("jax_fa3: %s", text)


def _factorizations(count: int) -> Iterator[tuple[int, ...]]:
    """The prime factors of a count, in every order."""
    if count == 1:
        yield ()
    for prime in range(2, count + 1):
        if count % prime == 0 and all(prime % divisor for divisor in range(2, prime)):
            for rest in _factorizations(count // prime):
                yield (prime, *rest)


def _mesh(sizes: Sequence[int]) -> AbstractMesh:
    names = tuple(f"jax_fa3_{i}" for i in range(len(sizes)))
    return AbstractMesh(tuple(sizes), names, axis_types=(AxisType.Auto,) * len(sizes))


def _tiles(sharding: Any, rank: int) -> np.ndarray | None:
    """Device numbers by tile, one dim for each of the array's and further ones for copies.

    None: the array is whole everywhere, lies in a way that has no tiles, or does not lie yet.
    """
    if sharding is None:
        return None
    hlo = sharding._to_xla_hlo_sharding(rank)
    if not hlo.is_tiled():
        return None
    return np.reshape(hlo.tile_assignment_devices(), hlo.tile_assignment_dimensions())


def _axes(tiles: np.ndarray | None, rank: int, mesh: AbstractMesh) -> list[Axes] | None:
    """The mesh axes that split each dim of an array; None where the mesh has none that do."""
    if tiles is None:
        return [()] * rank
    by_stride, stride = {}, mesh.size
    for axis, size in mesh.shape.items():
        stride //= size
        by_stride[stride] = (axis, size)
    numbers_of = np.asarray(tiles.reshape(*tiles.shape[:rank], -1)[..., 0] - tiles.flat[0])
    found, told = [], np.zeros((), int)
    for dim in range(rank):
        line = np.moveaxis(numbers_of, dim, 0).reshape(numbers_of.shape[dim], -1)[:, 0]
        axes: list[Any] = []
        numbers = np.zeros(1, int)  # what the axes found tell of the line, minor first
        while len(numbers) < len(line):
            stride = int(line[len(numbers)])
            if stride not in by_stride:
                return None
            axis, size = by_stride[stride]
            axes.insert(0, axis)
            numbers = np.add.outer(np.arange(size) * stride, numbers).ravel()
        found.append(tuple(axes))
        if len(numbers) != len(line):
            return None
        told = np.add.outer(told, numbers)
    return found if np.array_equal(numbers_of, told) else None
