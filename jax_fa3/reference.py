"""What "correct" means: attention in dense plain jnp, in float32, for any derivative.

Every rule is one line over the whole [*batch, N, T, S] matrix of scores, written from the
definition and sharing no mask code with the implementations that are tested against it. Any
transformation works, forward mode and hessians included; memory is quadratic.

Letters: T query length, S key length, N query heads, K key/value heads, H and D head dims.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from jax_fa3 import _arguments
from jax_fa3._spec import AttentionSpec, Operands, promoting_ranks


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    query_offset: ArrayLike | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    query_descale: ArrayLike | None = None,
    key_descale: ArrayLike | None = None,
    value_descale: ArrayLike | None = None,
    out_dtype: Any = None,
    deterministic_backward: None = None,
    checkpoint_name: None = None,
    return_residual: bool = False,
    implementation: None = None,
) -> Any:
    """`jax_fa3.dot_product_attention`, dense and differentiable in every way.

    The arguments mean what they mean there, and results have the same shapes and dtypes. The
    softmax and the matmuls are float32 (float64 for float64 inputs) and probabilities are never
    rounded, those of float8 inputs included; only out is cast to its dtype.

    Args:
      deterministic_backward, checkpoint_name, implementation: None; there is nothing to choose.
      return_residual: also return lse.
      query, key, value, bias, mask and the others: as for `jax_fa3.dot_product_attention`.
    Returns:
      out [*batch, T, N, D]; with return_residual (out, lse), lse [*batch, T, N].
    Raises:
      ValueError, TypeError: as `jax_fa3.dot_product_attention`; and ValueError for one of the three
        that must be None.
    """
    problems = _arguments.Problems("reference.dot_product_attention")
    for name, given in (
        ("deterministic_backward", deterministic_backward),
        ("checkpoint_name", checkpoint_name),
        ("implementation", implementation),
    ):
        if given is not None:
            problems.add(name, repr(given), "None (the reference has nothing to choose)")
    parsed = _arguments.parse(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        query_offset=query_offset,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        query_descale=query_descale,
        key_descale=key_descale,
        value_descale=value_descale,
        out_dtype=out_dtype,
        return_residual=return_residual,
        problems=problems,
    )
    out, lse = attend(parsed.spec, parsed.operands)
    out = out.reshape(*parsed.leading, out.shape[-1])
    lse = jnp.swapaxes(lse, -1, -2).reshape(parsed.leading)
    return (out, lse) if return_residual else out


@promoting_ranks
def attend(spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """softmax(visible scores) V of parsed arguments.

    Returns: out [*batch, T, N, D] in spec.out_dtype and lse [*batch, N, T], natural log, float32
      (float64 for float64 inputs). Matmuls are float32 whatever the inputs are.
    """
    o = operands
    dtype = jnp.float64 if o.query.dtype == jnp.float64 else jnp.float32
    query, key, value = (
        _dequantised(x, descale, dtype)
        for x, descale in (
            (o.query, o.query_descale),
            (o.key, o.key_descale),
            (o.value, o.value_descale),
        )
    )
    seqlen_q, heads_q = query.shape[-3:-1]
    seqlen_k, heads_k = key.shape[-3:-1]

    # What lies beyond a length does not exist: where, because 0 * NaN is NaN.
    query_exists = _exists(o.query_seq_lengths, seqlen_q)  # [*batch or (), T]
    key_exists = _exists(o.key_value_seq_lengths, seqlen_k)
    query = jnp.where(query_exists[..., None, None], query, 0)
    key = jnp.where(key_exists[..., None, None], key, 0)
    value = jnp.where(key_exists[..., None, None], value, 0)

    # Query head n reads key/value head n // (N // K).
    key = jnp.repeat(key, heads_q // heads_k, axis=-2) if heads_k else key
    value = jnp.repeat(value, heads_q // heads_k, axis=-2) if heads_k else value

    scores = spec.scale * jnp.einsum(
        "...tnh,...snh->...nts", query, key, precision=lax.Precision.HIGHEST
    )
    if o.bias is not None:
        scores = scores + o.bias.astype(dtype)
    if spec.logits_soft_cap is not None:
        scores = spec.logits_soft_cap * jnp.tanh(scores / spec.logits_soft_cap)

    scores = jnp.where(visible(spec, operands), scores, -jnp.inf)
    sinks = jnp.full((heads_q,), -jnp.inf, dtype) if o.sinks is None else o.sinks.astype(dtype)
    sinks = sinks[:, None, None]  # one more column of scores, whose value is 0
    # The softmax does not change with `top`, so neither do its derivatives.
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf), sinks)
    top = lax.stop_gradient(jnp.where(jnp.isneginf(top), 0, top))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True) + jnp.exp(sinks - top)

    something = (total != 0) & query_exists[..., None, :, None]  # [*batch, N, T, 1]
    total = jnp.where(something, total, 1)
    lse = jnp.where(something, top + jnp.log(total), -jnp.inf)[..., 0]
    out = jnp.einsum(
        "...nts,...snd->...ntd", weights / total, value, precision=lax.Precision.HIGHEST
    )
    out = jnp.swapaxes(jnp.where(something, out, 0), -2, -3)
    return out.astype(spec.out_dtype), lse


def visible(spec: AttentionSpec, operands: Operands) -> Array:
    """Which keys each query sees: bool, broadcastable to [*batch, N, T, S]."""
    o = operands
    seqlen_q, seqlen_k = o.query.shape[-3], o.key.shape[-3]
    see = jnp.ones((1, seqlen_q, seqlen_k), bool)

    if o.query_seq_lengths is not None:
        see &= _exists(o.query_seq_lengths, seqlen_q)[..., None, :, None]
    if o.key_value_seq_lengths is not None:
        see &= _exists(o.key_value_seq_lengths, seqlen_k)[..., None, None, :]
    if o.query_segment_ids is not None and o.key_value_segment_ids is not None:
        see &= (o.query_segment_ids[..., :, None] == o.key_value_segment_ids[..., None, :])[
            ..., None, :, :
        ]
    if o.mask is not None:
        see &= o.mask

    # Distances are compared with the offset rather than added to it, so that no sum leaves int32.
    query_place = (
        jnp.arange(seqlen_q, dtype=jnp.int32) if o.query_positions is None else o.query_positions
    )
    key_place = (
        jnp.arange(seqlen_k, dtype=jnp.int32) if o.key_positions is None else o.key_positions
    )
    distance = (key_place[..., None, :] - query_place[..., :, None])[..., None, :, :]
    if o.query_positions is not None:
        offset = 0
    elif o.query_offset is not None:
        offset = o.query_offset[..., None, None, None]
    elif spec.causal_alignment == "bottom_right":
        last_query = seqlen_q if o.query_seq_lengths is None else o.query_seq_lengths
        last_key = seqlen_k if o.key_value_seq_lengths is None else o.key_value_seq_lengths
        offset = jnp.asarray(last_key - last_query, jnp.int32)[..., None, None, None]
    else:
        offset = 0
    left, right = spec.window
    if spec.is_causal:
        see &= distance <= offset
    if left is not None:
        see &= offset <= distance + min(left, np.iinfo(np.int32).max - seqlen_k)
    if right is not None:
        see &= offset >= distance - min(right, np.iinfo(np.int32).max - seqlen_q)
    return see


def _exists(lengths: Array | None, seqlen: int) -> Array:
    """bool [*batch, seqlen], or [seqlen] without lengths."""
    indices = jnp.arange(seqlen, dtype=jnp.int32)
    return jnp.ones((seqlen,), bool) if lengths is None else indices < lengths[..., None]


def _dequantised(x: Array, descale: Array | None, dtype) -> Array:
    """x [*batch, L, heads, width] in `dtype`, times descale [*batch, blocks, heads]."""
    x = x.astype(dtype)
    if descale is None:
        return x
    length, blocks = x.shape[-3], descale.shape[-2]
    block = next((b for b in (64, 128) if -(-length // b) == blocks > 1), -(-length // blocks))
    return x * descale.astype(dtype)[..., jnp.arange(length) // block, :, None]
