"""The derivative of attention, in two stages, for both implementations.

Stage one computes (out, lse) outside of differentiation and gives them their checkpoint names;
stage two attaches a reverse rule to them. So a remat policy that saves those names saves just what
the rule needs, and the forward kernel does not run again. (A name inside a custom_vjp's forward
rule, or on its outputs, does not do that under every setting of jax.checkpoint.)

Stage two is a primitive, jax_fa3_attach, until it is differentiated. jax.vmap maps both rules of a
jax.custom_vjp, and neither can tell that grad(vmap(f)) adds up what it makes for each row of a
mapped axis; the primitive is mapped as a call is, and then its rule sees what was not mapped.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad, batching, mlir

from jax_fa3 import _blockwise, _primitive, _sharding, _support
from jax_fa3._spec import DIFFERENTIABLE, FLOAT8, AttentionSpec, Operands

# Under one jit, layers of one shape are traced once, and an eager call is compiled.
_blockwise_forward = jax.jit(_blockwise.forward, static_argnums=0)
_blockwise_backward = jax.jit(_blockwise.backward, static_argnums=0)


def attend(
    spec: AttentionSpec, operands: Operands, choice: _support.Choice, names: tuple[str, str]
) -> tuple[jax.Array, jax.Array]:
    """Attention by the implementation chosen.

    Args:
      spec, operands: a checked call.
      choice: the implementation; it can take the call.
      names: checkpoint names of out and lse.
    Returns:
      out [*batch, T, N, D] in spec.out_dtype, lse [*batch, N, T], both with a gradient.
    """
    operands = _sharding.vary_alike(operands)
    constants = jax.tree.map(jax.lax.stop_gradient, operands)
    forward = _xla_forward
    if choice.implementation == "fa3":
        forward = functools.partial(_primitive.forward, fallback=choice.fallback)
    bindable = _primitive.is_bindable(operands)
    out, lse = _sharding.forward(forward, spec, constants, takes_broadcast=bindable)
    out, lse = checkpoint_name(out, names[0]), checkpoint_name(lse, names[1])
    return _attach((spec, choice.implementation), operands, out, lse)


def _xla_forward(spec, operands):
    if _primitive.is_bindable(operands):
        return _primitive.xla_forward(spec, operands)
    return _blockwise_forward(spec, operands)


def _attach(static, operands, out, lse):
    """(out, lse) as they are, with the derivative of attention with regard to the operands."""
    if not _primitive.is_bindable(operands):
        return _with_rule(static, operands, out, lse)
    arrays, tree = jax.tree.flatten((operands, out, lse))
    out, lse = attach_p.bind(*arrays, tree=tree, static=static)
    return out, lse


attach_p = jax.extend.core.Primitive("jax_fa3_attach")


def _attach_jvp(primals, tangents, *, tree, static):
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def attach(*moved):
        arrays = list(primals)
        for i, x in zip(moving, moved, strict=True):
            arrays[i] = x
        return _with_rule(static, *jax.tree.unflatten(tree, arrays))

    return jax.jvp(attach, [primals[i] for i in moving], [tangents[i] for i in moving])


def _out_and_lse(*arrays, tree, static):
    del tree, static
    return arrays[-2:]


def _attach_batch(args, dims, **params):
    """out and lse come out as they are, so they have the mapped axis in full."""
    args, dims = list(args), list(dims)
    size = next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None)
    for i in (-2, -1):
        if dims[i] is None:
            args[i], dims[i] = jnp.broadcast_to(args[i], (size, *args[i].shape)), 0
    return _primitive.batching_rule(attach_p, args, dims, **params)


attach_p.multiple_results = True
attach_p.def_impl(_out_and_lse)
attach_p.def_abstract_eval(_out_and_lse)
mlir.register_lowering(attach_p, lambda _, *arrays, **params: _out_and_lse(*arrays, **params))
batching.primitive_batchers[attach_p] = _attach_batch
ad.primitive_jvps[attach_p] = _attach_jvp


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_rule(static, operands, out, lse):
    """`_attach` where it is differentiated."""
    del static, operands
    return out, lse


def _with_rule_fwd(static, operands, out, lse):
    if operands.query.dtype == FLOAT8:
        _support.refuse_float8_gradient()
    # Not the bare out and lse, which stage one made constants: a second derivative passes here.
    return _attach(static, operands, out, lse), (operands, out, lse)


def _with_rule_bwd(static, residuals, cotangents):
    spec, implementation = static
    backward: Any = _primitive.backward if implementation == "fa3" else _xla_backward
    grads = _sharding.backward(
        backward,
        spec,
        *residuals,
        *cotangents,
        takes_broadcast=_primitive.is_bindable(residuals[0]),
    )
    return grads, None, None


_with_rule.defvjp(_with_rule_fwd, _with_rule_bwd)


def _xla_backward(spec, operands, out, lse, dout, dlse, rows):
    if rows:  # as `_sharding.backward` makes them, once it is no more differentiated
        return _primitive.backward(spec, operands, out, lse, dout, dlse, rows, kernels=False)
    return _xla_backward_of_saved(spec, operands, out, lse, dout, dlse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _xla_backward_of_saved(spec, operands, out, lse, dout, dlse):
    """The operands' cotangents from the saved out and lse.

    Its own derivative must not take out and lse for constants, though stage one hides where they
    come from: it differentiates `_blockwise.attention`'s reverse rule, which knows.
    """
    if _primitive.is_bindable(operands):
        return _primitive.backward(spec, operands, out, lse, dout, dlse, kernels=False)
    return _blockwise_backward(spec, operands, out, lse, dout, dlse)


def _xla_backward_fwd(spec, operands, out, lse, dout, dlse):
    grads = _xla_backward_of_saved(spec, operands, out, lse, dout, dlse)
    return grads, (operands, dout, dlse)


def _xla_backward_bwd(spec, residuals, cotangents):
    operands, dout, dlse = residuals

    def gradients(wanted: dict[str, jax.Array], dout, dlse) -> dict[str, jax.Array]:
        def attention(wanted):
            found = operands._replace(**wanted)
            if _primitive.is_bindable(found):
                return _primitive.xla_attention(spec, found)
            return _blockwise.attention(spec, found)

        return jax.vjp(attention, wanted)[1]((dout, dlse))[0]

    wanted = _only_differentiable(operands)
    _, transpose = jax.vjp(gradients, wanted, dout, dlse)
    second, ddout, ddlse = transpose(_only_differentiable(cotangents))
    return Operands.of(second), None, None, ddout, ddlse


_xla_backward_of_saved.defvjp(_xla_backward_fwd, _xla_backward_bwd)


def _only_differentiable(operands: Operands) -> dict[str, jax.Array]:
    return {name: x for name, x in operands.present().items() if name in DIFFERENTIABLE}
