"""The primitives: attention's forward and backward, and a loop around the latter.

They are polymorphic in leading batch dims: every operand has the same number of them, each full or
1, and 1 is broadcast. So vmap only moves the mapped axis to the front, and an axis that maps the
query alone copies no key or value. On Auto meshes XLA asks how it may split them.

* jax_fa3_fwd, jax_fa3_bwd: the CUDA lowering is the kernels, or the xla path where they cannot run;
  the default lowering is the xla path. The backward starts from the saved out and lse in both.
* jax_fa3_xla_fwd, jax_fa3_xla_bwd: the xla path everywhere.
* jax_fa3_bwd_sum: a loop around either backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.core
import jax.extend.core
import jax.ffi
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching, mlir, xla
from jax.sharding import PartitionSpec

from jax_fa3 import _blockwise, _native, _partitioning, _sharding, _support
from jax_fa3._spec import (
    CORE_RANK,
    DIFFERENTIABLE,
    AttentionSpec,
    Operands,
    full_batch,
    softmax_dtype,
)

fwd_p = jax.extend.core.Primitive("jax_fa3_fwd")
bwd_p = jax.extend.core.Primitive("jax_fa3_bwd")
xla_fwd_p = jax.extend.core.Primitive("jax_fa3_xla_fwd")
xla_bwd_p = jax.extend.core.Primitive("jax_fa3_xla_bwd")
bwd_sum_p = jax.extend.core.Primitive("jax_fa3_bwd_sum")

# Of the operands: bias and mask broadcast in their own way and sinks have no batch dims. No kernel
# takes them, and the xla path runs without a primitive where they are.
_BINDABLE = tuple(name for name in Operands._fields if name not in ("bias", "mask", "sinks"))


# --- public functions ---


def forward(
    spec: AttentionSpec, operands: Operands, *, fallback: bool
) -> tuple[jax.Array, jax.Array]:
    """Attention by the kernels.

    Args:
      spec: static options; `_support.reasons` has nothing against them.
      operands: arrays with the same number of batch dims, each full or 1.
      fallback: where the kernels cannot run, lower to the xla path; otherwise raise
        UnsupportedError while lowering.
    Returns:
      out [*batch, T, N, D] in spec.out_dtype, lse [*batch, N, T].
    """
    names, arrays = _present(operands)
    out, lse = fwd_p.bind(*arrays, names=names, spec=spec, fallback=fallback)
    return out, lse


def xla_forward(spec: AttentionSpec, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """`forward` by the xla path on every platform, of any call that `is_bindable`."""
    names, arrays = _present(operands)
    out, lse = xla_fwd_p.bind(*arrays, names=names, spec=spec)
    return out, lse


def backward(
    spec: AttentionSpec,
    operands: Operands,
    out: jax.Array,
    lse: jax.Array,
    dout: jax.Array,
    dlse: jax.Array,
    rows: int = 0,
    *,
    kernels: bool = True,
) -> Operands:
    """The cotangents of `forward`'s differentiable operands, each in its operand's shape.

    Args:
      out, lse, dout, dlse: as the operands, each batch dim full or 1.
      rows: how many leading batch dims the cotangents have in full, also where the operand is 1.
      kernels: False: by the xla path everywhere.
    """
    names, arrays = _present(operands)
    arrays += [out, lse, dout, dlse]
    batch = _batch_of([x.shape for x in arrays], _core_ranks(names) + _BWD_CORE_RANKS)
    params: dict[str, Any] = {"names": names, "spec": spec}
    if is_broadcast(operands, batch):
        grads = bwd_sum_p.bind(*arrays, **params, summed=len(batch) - rows, kernels=kernels)
    else:
        grads = (bwd_p if kernels else xla_bwd_p).bind(*arrays, **params)
    return _as_operands(_differentiable(names), grads)


def is_bindable(operands: Operands) -> bool:
    """Whether `forward` takes all of these operands."""
    return all(name in _BINDABLE for name in operands.present())


def is_broadcast(operands: Operands, batch: tuple[int, ...]) -> bool:
    """Whether some operand is 1 in a batch dim in which `batch` is not."""
    return any(
        name in _BINDABLE and x.shape[: x.ndim - CORE_RANK[name]] != batch
        for name, x in operands.present().items()
    )


def xla_attention(spec: AttentionSpec, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """`_blockwise.attention`, with its derivatives, of operands as `forward` takes them."""
    names, arrays = _present(operands)

    def attend(*arrays):
        return list(_blockwise.attention(spec, _as_operands(names, arrays)))

    out, lse = _over_broadcast(attend, _core_ranks(names), arrays)
    return out, lse


def _present(operands: Operands) -> tuple[tuple[str, ...], list[Any]]:
    present = operands.present()
    names = tuple(present)
    if not set(names) <= set(_BINDABLE):
        raise AssertionError(f"cannot bind {sorted(set(names) - set(_BINDABLE))}")
    return names, list(present.values())


def _as_operands(names: Sequence[str], arrays: Sequence[Any]) -> Operands:
    return Operands.of(dict(zip(names, arrays, strict=True)))


def _differentiable(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if name in DIFFERENTIABLE)


def _wanted(names: Sequence[str], of_operands: Sequence[Any]) -> list[Any]:
    """What belongs to a differentiable operand, of a list that begins with one for each operand."""
    return [x for name, x in zip(names, of_operands, strict=False) if name in DIFFERENTIABLE]


def _core_ranks(names: Sequence[str]) -> list[int]:
    """How many trailing dims of each operand are not batch dims."""
    return [CORE_RANK[name] for name in names]


_BWD_CORE_RANKS = [3, 2, 3, 2]  # out, lse, dout, dlse


# --- abstract evaluation ---


def _batch_of(shapes: Sequence[tuple[int, ...]], ranks: Sequence[int]) -> tuple[int, ...]:
    return full_batch(shape[: len(shape) - rank] for shape, rank in zip(shapes, ranks, strict=True))


def _batch_sharding(avals: Sequence[Any], ranks: Sequence[int], batch: tuple[int, ...]) -> list:
    """Partition of the batch dims on Explicit mesh axes (vmap over a sharded axis makes them)."""
    partition: list[Any] = [None] * len(batch)
    for aval, rank in zip(avals, ranks, strict=True):
        spec = _sharding.entries_of(aval)
        n = aval.ndim - rank
        if any(axis is not None for axis in spec[n:]):
            raise ValueError(
                f"jax_fa3: an operand of type {aval} is sharded over Explicit mesh axes in a dim "
                "that is not a batch dim; call jax_fa3.dot_product_attention, which places it, or "
                "reshard it with jax.sharding.reshard first"
            )
        for i, axis in enumerate(spec[:n]):
            if axis is not None and aval.shape[i] == batch[i]:
                if partition[i] not in (None, axis):
                    raise ValueError(
                        f"jax_fa3: batch dim {i} is sharded over {partition[i]} in one operand and "
                        f"over {axis} in another; reshard them alike with jax.sharding.reshard"
                    )
                partition[i] = axis
    return partition


def _check_varying(avals: Sequence[Any]) -> None:
    """All operands must vary over the same manual axes, or cotangents would miss a sum."""
    kinds = {aval.manual_axis_type for aval in avals}
    if len(kinds) != 1:
        raise ValueError(
            "jax_fa3: operands vary over different manual mesh axes: "
            + ", ".join(map(str, avals))
            + "; use jax.lax.pcast(x, axes, to='varying') first"
        )


def _out_avals(shapes_and_dtypes, avals, ranks, batch) -> list[Any]:
    """Avals on the operands' mesh, with their varying axes, batch dims sharded as theirs."""
    like = next((aval for aval in avals if not aval.sharding.mesh.empty), avals[0])
    partition = _batch_sharding(avals, ranks, batch)
    outs = []
    for core, dtype in shapes_and_dtypes:
        spec = PartitionSpec(*partition, *[None] * len(core))
        outs.append(
            like.update(
                shape=(*batch, *core),
                dtype=np.dtype(dtype),
                weak_type=False,
                sharding=like.sharding.update(spec=spec),
            )
        )
    return outs


def _fwd_abstract(*avals, names, spec, fallback=None):
    del fallback
    ranks = _core_ranks(names)
    _check_varying(avals)
    q, k, v = avals[:3]
    if (k.shape[-1], v.shape[-3:-1]) != (q.shape[-1], k.shape[-3:-1]):
        raise ValueError(f"jax_fa3_fwd: query {q}, key {k} and value {v} do not match")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"jax_fa3_fwd: query {q}, key {k} and value {v} have different dtypes")
    batch = _batch_of([a.shape for a in avals], ranks)
    t, n, _ = q.shape[-3:]
    return _out_avals(
        [((t, n, v.shape[-1]), spec.out_dtype), ((n, t), softmax_dtype(q.dtype))],
        avals,
        ranks,
        batch,
    )


def _bwd_abstract(*avals, names, spec, is_row=None):
    del spec, is_row
    ranks = _core_ranks(names) + _BWD_CORE_RANKS
    _check_varying(avals)
    batch = _batch_of([a.shape for a in avals], ranks)
    wanted = set(_differentiable(names))
    grads = [
        (aval.shape[aval.ndim - CORE_RANK[name] :], aval.dtype)
        for name, aval in zip(names, avals, strict=False)
        if name in wanted
    ]
    return _out_avals(grads, avals, ranks, batch)


# --- default lowering: the xla path ---


def _over_broadcast(
    fun: Callable[..., Sequence[jax.Array]], ranks: Sequence[int], arrays: Sequence[jax.Array]
) -> Sequence[jax.Array]:
    """fun(*arrays), where fun wants full batch dims, without copying what is broadcast.

    A batch dim in which some array is broadcast becomes a vmap with in_axes=None for that array.
    """
    batch = _batch_of([x.shape for x in arrays], ranks)
    arrays = list(arrays)
    mapped = []  # (batch dim, in_axes), the outermost vmap last
    for dim in reversed(range(len(batch))):
        absent = [x.shape[dim] != batch[dim] for x in arrays]
        if not any(absent):
            continue
        arrays = [
            jax.lax.squeeze(x, (dim,)) if a else x for x, a in zip(arrays, absent, strict=True)
        ]
        mapped.append((dim, [None if a else dim for a in absent]))
    # A dim that an array lost shifts its later ones.
    for i, (_, axes) in enumerate(mapped):
        for _, later_axes in mapped[i + 1 :]:
            axes[:] = [
                axis if axis is None or lost is not None else axis - 1
                for axis, lost in zip(axes, later_axes, strict=True)
            ]
    for dim, axes in reversed(mapped):
        fun = jax.vmap(fun, in_axes=tuple(axes), out_axes=dim)
    return fun(*arrays)


def _xla_forward(*arrays, names, spec):
    ranks = _core_ranks(names)
    q, v = arrays[0], arrays[2]
    batch = _batch_of([x.shape for x in arrays], ranks)
    t, n, _ = q.shape[-3:]
    if 0 in (*batch, t, n):
        return [
            jnp.zeros((*batch, t, n, v.shape[-1]), spec.out_dtype),
            jnp.zeros((*batch, n, t), softmax_dtype(q.dtype)),
        ]

    def attend(*arrays):
        return list(_blockwise.forward(spec, _as_operands(names, arrays)))

    return _over_broadcast(attend, ranks, arrays)


def _xla_backward(*arrays, names, spec):
    ranks = _core_ranks(names) + _BWD_CORE_RANKS
    batch = _batch_of([x.shape for x in arrays], ranks)
    wanted = _differentiable(names)
    if 0 in (*batch, *arrays[0].shape[-3:-1]):
        return [
            jnp.zeros((*batch, *x.shape[x.ndim - CORE_RANK[name] :]), x.dtype)
            for name, x in zip(names, arrays, strict=False)
            if name in wanted
        ]

    def differentiate(*arrays):
        operands, rest = arrays[: len(names)], arrays[len(names) :]
        grads = _blockwise.backward(spec, _as_operands(names, operands), *rest)
        return [getattr(grads, name) for name in wanted]

    return _over_broadcast(differentiate, ranks, arrays)


def _lower_xla(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun` as a lowering rule that sees plain arrays.

    What the operands' types say of meshes has done its work in abstract evaluation; here it, or the
    ambient mesh, would only ask every intermediate value of `fun` for the same, or to be whole.
    """
    rule = mlir.lower_fun(fun, multiple_results=True)

    def lower(ctx, *operands, **params):
        plain = [jax.core.ShapedArray(aval.shape, aval.dtype) for aval in ctx.avals_in]
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
            return rule(ctx.replace(avals_in=plain), *operands, **params)

    return lower


_lower_xla_forward_here = _lower_xla(_xla_forward)
_lower_xla_backward_here = _lower_xla(_xla_backward)


def _lower_xla_forward(ctx, *operands, **params):
    if ctx.avals_out[0].size and _partitioning.is_wanted(ctx):
        return _partitioning.lower(ctx, operands, _forward_call(xla_fwd_p, **params))
    return _lower_xla_forward_here(ctx, *operands, **params)


def _lower_xla_backward(ctx, *operands, **params):
    if ctx.avals_out[0].size and _partitioning.is_wanted(ctx):
        return _partitioning.lower(ctx, operands, _backward_call(xla_bwd_p, ctx.avals_in, **params))
    return _lower_xla_backward_here(ctx, *operands, **params)


def _lower_forward(ctx, *operands, names, spec, fallback):
    if not fallback:
        platforms = ctx.platforms or ctx.module_context.platforms
        raise _support.UnsupportedError(
            _support.refusal([f"platform {', '.join(platforms)}: the kernels run on CUDA devices"])
        )
    return _lower_xla_forward(ctx, *operands, names=names, spec=spec)


def _lower_backward(ctx, *operands, names, spec, is_row=False):
    lower = _lower_xla_backward_here if is_row else _lower_xla_backward
    return lower(ctx, *operands, names=names, spec=spec)


# --- CUDA lowering ---


def _full_batch(ctx, x, aval, shape, dtype):
    """(x, its aval) in the given shape and dtype, copied where a batch dim of `aval` is 1."""
    want = jax.core.ShapedArray(shape, np.dtype(dtype))
    if aval.shape == shape and aval.dtype == want.dtype:
        return x, want

    def spread(x):
        return jnp.broadcast_to(x, shape).astype(dtype)

    plain = ctx.replace(avals_in=[jax.core.ShapedArray(aval.shape, aval.dtype)], avals_out=[want])
    (x,) = mlir.lower_fun(lambda x: [spread(x)], multiple_results=True)(plain, x)
    return x, want


def _call_kernels(
    ctx, target, operands, avals_in, results, workspace_bytes, *, diagonal, spec, **attributes
):
    """Emits the custom call; its last result, the workspace, is dropped.

    The one place where the attributes that both passes have get their types: XLA takes a Python
    float for f64, an int for s64, and decoding in C++ is strict.

    Args:
      diagonal: query t sees keys s <= t + this; None: the last operand, query_offset, says so.
      attributes: further ones, typed.
    """
    workspace = jax.core.ShapedArray((workspace_bytes,), np.dtype(np.uint8))
    rule = jax.ffi.ffi_lowering(target)
    out = rule(
        ctx.replace(avals_in=avals_in, avals_out=[*results, workspace]),
        *operands,
        scale=np.float32(spec.scale),
        is_causal=np.bool_(spec.is_causal),
        diagonal=np.int64(0 if diagonal is None else diagonal),
        has_query_offset=np.bool_(diagonal is None),
        **attributes,
    )
    return list(out)[:-1]


def _problem(names, avals_in, batch, spec):
    """(the problem as the extension knows it, the diagonal of `_call_kernels`)."""
    q, k = (avals_in[names.index(name)] for name in ("query", "key"))
    problem = _native.problem_of(q, k, math.prod(batch), spec.is_causal)
    if "query_offset" in names:
        return problem, None
    return problem, spec.diagonal(problem.seqlen_q, problem.seqlen_k)


def _silence_unseen_rows(ctx, arguments, avals_in, *, lse, dout):
    """Zeros dout where a row saw no key: the kernels multiply it by 0, and NaN would stay NaN."""

    def silence(lse, dout):
        unseen = jnp.swapaxes(jnp.isneginf(lse), -1, -2)[..., None]
        return [jnp.where(unseen, jnp.zeros_like(dout), dout)]

    plain = [jax.core.ShapedArray(avals_in[i].shape, avals_in[i].dtype) for i in (lse, dout)]
    rule = mlir.lower_fun(silence, multiple_results=True)
    ctx = ctx.replace(avals_in=plain, avals_out=plain[1:])
    (arguments[dout],) = rule(ctx, arguments[lse], arguments[dout])


def _lower_forward_cuda(ctx, *operands, names, spec, fallback):
    why_not = _native.why_not()
    if why_not and not fallback:
        raise _support.UnsupportedError(_support.refusal(why_not))
    out, lse = ctx.avals_out
    if why_not or not out.size:  # an empty result needs no kernel
        if why_not:
            _support.log_once(why_not, on_gpu=bool(_native.visible_gpus()))
        return _lower_xla_forward(ctx, *operands, names=names, spec=spec)

    if _partitioning.is_wanted(ctx):
        call = _forward_call(fwd_p, names=names, spec=spec, fallback=fallback)
        return _partitioning.lower(ctx, operands, call)

    batch = out.shape[:-3]
    arguments, avals_in = list(operands), list(ctx.avals_in)
    if "query_offset" in names:  # one a batch row: these are 4 bytes each
        i = names.index("query_offset")
        arguments[i], avals_in[i] = _full_batch(ctx, arguments[i], avals_in[i], batch, np.int32)
    problem, diagonal = _problem(names, avals_in, batch, spec)
    module = _native.extension()
    assert module is not None  # or why_not would have said so
    return _call_kernels(
        ctx,
        _native.FWD_TARGET,
        arguments,
        avals_in,
        [out, lse],
        module.fwd_workspace_bytes(*problem, diagonal=diagonal or 0),
        diagonal=diagonal,
        spec=spec,
    )


def _lower_backward_cuda(ctx, *operands, names, spec, is_row=False):
    dq, dk = ctx.avals_out[:2]
    why_not = _native.why_not()
    heads_q = dq.shape[-2]
    if why_not or not heads_q or not (dq.size or dk.size):
        if why_not:
            _support.log_once(why_not, on_gpu=bool(_native.visible_gpus()))
        return _lower_backward(ctx, *operands, names=names, spec=spec, is_row=is_row)

    if not is_row and _partitioning.is_wanted(ctx):
        call = _backward_call(bwd_p, ctx.avals_in, names=names, spec=spec)
        return _partitioning.lower(ctx, operands, call)

    batch = dq.shape[:-3]
    t, n, h = dq.shape[-3:]
    arguments, avals_in = list(operands), list(ctx.avals_in)
    count = len(names)
    # query, key, value and what the kernels want whole: out, lse, dout, dlse, then query_offset.
    order = [names.index(name) for name in ("query", "key", "value")]
    order += [count + i for i in range(4)]
    wanted = {count: (t, n, h), count + 1: (n, t), count + 2: (t, n, h), count + 3: (n, t)}
    if "query_offset" in names:
        order.append(names.index("query_offset"))
        wanted[order[-1]] = ()
    for i, core in wanted.items():
        dtype = np.dtype(np.int32) if not core else avals_in[i].dtype
        arguments[i], avals_in[i] = _full_batch(
            ctx, arguments[i], avals_in[i], (*batch, *core), dtype
        )
    problem, diagonal = _problem(names, avals_in, batch, spec)
    if diagonal is None or (spec.is_causal and diagonal < 0):
        _silence_unseen_rows(ctx, arguments, avals_in, lse=count + 1, dout=count + 2)
    module = _native.extension()
    assert module is not None
    return _call_kernels(
        ctx,
        _native.BWD_TARGET,
        [arguments[i] for i in order],
        [avals_in[i] for i in order],
        ctx.avals_out,
        module.bwd_workspace_bytes(*problem, deterministic=spec.deterministic_backward),
        diagonal=diagonal,
        spec=spec,
        deterministic=np.bool_(spec.deterministic_backward),
    )


# --- how XLA may split a call over an Auto mesh ---


def _forward_call(primitive, *, names, **params) -> _partitioning.Call:
    def local(split, sizes, partitions, *arrays):
        del partitions
        spec, operands = _sharding.localize(
            params["spec"], _as_operands(names, arrays), split, sizes
        )
        here, arrays = _present(operands)
        return primitive.bind(*arrays, **{**params, "names": here, "spec": spec})

    whole = functools.partial(primitive.bind, names=names, **params)
    key = f"{primitive} {_native.FWD_TARGET} {params}"
    return _partitioning.Call(whole, local, names, ("out", "lse"), key)


def _backward_call(primitive, avals, *, names, **params) -> _partitioning.Call:
    wanted = _differentiable(names)

    def local(split, sizes, partitions, *arrays):
        operands, rest = _as_operands(names, arrays[: len(names)]), arrays[len(names) :]
        spec, here = _sharding.localize(params["spec"], operands, split, sizes)
        local_names, local_arrays = _present(here)
        params_here = {**params, "names": local_names, "spec": spec}
        grads = primitive.bind(*local_arrays, *rest, **params_here)
        grads = dict(zip(wanted, grads, strict=True))
        grads = _sharding.sum_gradients(grads, operands, split, sizes, partitions)
        return list(grads.values())

    whole = functools.partial(primitive.bind, names=names, **params)
    operands = (*names, "out", "lse", "dout", "dlse")
    key = f"{primitive} {_native.BWD_TARGET} {params}"
    summed = _summed_dims([aval.shape for aval in avals], names, params.get("summed", 0))
    return _partitioning.Call(whole, local, operands, wanted, key, frozenset().union(*summed))


# --- batching ---


def batching_rule(primitive: Any, args: Sequence[Any], dims: Sequence[int | None], **params):
    """Moves the mapped axis to the front; an unmapped operand gets a leading 1."""
    if all(dim is None for dim in dims):
        outs = primitive.bind(*args, **params)
        return outs, [None] * len(outs)
    args = [
        jnp.expand_dims(x, 0) if dim is None else jnp.moveaxis(x, dim, 0)
        for x, dim in zip(args, dims, strict=True)
    ]
    outs = primitive.bind(*args, **params)
    return outs, [0] * len(outs)


# --- gradients of what is broadcast ---
#
# Where an operand is broadcast over a mapped axis, vmap(grad(f)) wants its gradient for each row,
# and grad(vmap(f)) wants their sum. bwd_sum_p gives the sum and makes no rows. Its last `summed`
# batch dims, those that it was bound with, are of grad(vmap(f)); vmap puts others before them.


def _bwd_sum_abstract(*avals, names, spec, summed, kernels):
    del kernels
    full = _bwd_abstract(*avals, names=names, spec=spec)
    sums = _summed_dims([aval.shape for aval in avals], names, summed)
    outs = []
    for aval, dims in zip(full, sums, strict=True):
        shape, partition = list(aval.shape), list(_sharding.entries_of(aval))
        for dim in dims:
            shape[dim], partition[dim] = 1, None
        sharding = aval.sharding.update(spec=PartitionSpec(*partition))
        outs.append(aval.update(shape=tuple(shape), sharding=sharding))
    return outs


def _summed_dims(shapes, names, summed) -> list[list[int]]:
    """Of each differentiable operand the batch dims over which its gradient is a sum."""
    batch = _batch_of(shapes, _core_ranks(names) + _BWD_CORE_RANKS)
    dims = range(len(batch) - summed, len(batch))
    return [[d for d in dims if shape[d] != batch[d]] for shape in _wanted(names, shapes)]


# What the gradients of rows that are made at once, and summed, may take.
_ROWS_BYTES = 2**24


def _sum_row_by_row(*arrays, names, spec, summed, kernels):
    """Adds rows as they are made, some at a time: what is broadcast needs no room for all."""
    batch = _batch_of([x.shape for x in arrays], _core_ranks(names) + _BWD_CORE_RANKS)
    wanted = _wanted(names, arrays)
    sums = _summed_dims([x.shape for x in arrays], names, summed)
    dims = sorted(set().union(*sums))
    # is_row: never split again. JAX keeps a lowering for each set of parameters and types, and here
    # the types name no mesh: another call of these shapes may be one that is split.
    make_rows = functools.partial(bwd_p.bind, is_row=True) if kernels else _xla_backward
    if 0 in batch:
        return [
            jnp.zeros([1 if d in own else n for d, n in enumerate(x.shape)], x.dtype)
            for x, own in zip(make_rows(*arrays, names=names, spec=spec), sums, strict=True)
        ]
    if not dims:
        return make_rows(*arrays, names=names, spec=spec)
    wide = [softmax_dtype(x.dtype) if own else x.dtype for x, own in zip(wanted, sums, strict=True)]

    one_row = math.prod(size for dim, size in enumerate(batch) if dim not in dims)
    row_bytes = sum(
        one_row * math.prod(x.shape[len(batch) :]) * x.dtype.itemsize
        for x, own in zip(wanted, sums, strict=True)
        if own
    )
    rows = batch[dims[-1]]
    fitting = [n for n in range(2, rows + 1) if rows % n == 0 and n * row_bytes <= _ROWS_BYTES]
    at_once = max(fitting, default=1)

    def add_rows(arrays, dims):
        """The gradients, by a loop over the first of `dims` around loops over the others."""
        dim, *inner = dims
        count = 1 if inner else at_once

        def step(i, totals):
            part = [
                x if x.shape[dim] == 1 else jax.lax.dynamic_slice_in_dim(x, i * count, count, dim)
                for x in arrays
            ]
            grads = add_rows(part, inner) if inner else make_rows(*part, names=names, spec=spec)
            return [
                total + jnp.sum(grad, dim, keepdims=True, dtype=total.dtype)
                if total.shape[dim] == 1
                else jax.lax.dynamic_update_slice_in_dim(
                    total, grad.astype(total.dtype), i * count, dim
                )
                for total, grad in zip(totals, grads, strict=True)
            ]

        whole = _batch_of([x.shape for x in arrays], _core_ranks(names) + _BWD_CORE_RANKS)
        totals = [
            jnp.zeros(
                (*(1 if d in own else n for d, n in enumerate(whole)), *x.shape[len(whole) :]),
                dtype,
            )
            for x, own, dtype in zip(wanted, sums, wide, strict=True)
        ]
        return jax.lax.fori_loop(0, whole[dim] // count, step, totals)

    grads = add_rows(arrays, dims)
    return [grad.astype(x.dtype) for grad, x in zip(grads, wanted, strict=True)]


_lower_sum_row_by_row = _lower_xla(_sum_row_by_row)


def _lower_bwd_sum(ctx, *operands, **params):
    if all(aval.size for aval in ctx.avals_in) and _partitioning.is_wanted(ctx):
        return _partitioning.lower(ctx, operands, _backward_call(bwd_sum_p, ctx.avals_in, **params))
    return _lower_sum_row_by_row(ctx, *operands, **params)


# --- registration ---


def _no_derivative(primals, tangents, **params):
    del primals, tangents, params
    raise _support.UnsupportedError(
        'jax_fa3: a second derivative is not defined for the kernels; implementation="xla" has '
        "reverse over reverse, and jax_fa3.reference.dot_product_attention any derivative"
    )


for _p, _abstract in (
    (fwd_p, _fwd_abstract),
    (bwd_p, _bwd_abstract),
    (xla_fwd_p, _fwd_abstract),
    (xla_bwd_p, _bwd_abstract),
    (bwd_sum_p, _bwd_sum_abstract),
):
    _p.multiple_results = True
    _p.def_impl(functools.partial(xla.apply_primitive, _p))
    _p.def_abstract_eval(_abstract)
    batching.primitive_batchers[_p] = functools.partial(batching_rule, _p)
ad.primitive_jvps[bwd_p] = _no_derivative
ad.primitive_jvps[bwd_sum_p] = _no_derivative
mlir.register_lowering(fwd_p, _lower_forward)
mlir.register_lowering(fwd_p, _lower_forward_cuda, platform="cuda")
mlir.register_lowering(bwd_p, _lower_backward)
mlir.register_lowering(bwd_p, _lower_backward_cuda, platform="cuda")
mlir.register_lowering(xla_fwd_p, _lower_xla_forward)
mlir.register_lowering(xla_bwd_p, _lower_xla_backward)
mlir.register_lowering(bwd_sum_p, _lower_bwd_sum)
