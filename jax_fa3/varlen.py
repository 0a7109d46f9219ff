"""Attention over sequences packed one after another in one array."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_fa3 import _sharding, attention
from jax_fa3._arguments import (
    Problems,
    as_array,
    as_integers,
    clipped_int32,
    parse,
    show,
    static_int,
)


def varlen_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    cu_seqlens_q: ArrayLike,
    cu_seqlens_k: ArrayLike | None = None,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    local_window_size: int | tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    deterministic_backward: bool | None = None,
    checkpoint_name: str | None = None,
    return_residual: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    """Attention within each of several packed sequences, as flash_attn_varlen_func.

    Sequence i has the queries cu_seqlens_q[i] to cu_seqlens_q[i + 1] - 1 and the keys and values
    likewise; it sees nothing of the others. Rows past the last end give out 0 and lse -inf, and
    keys and values past it are never read into a result. What follows is as in
    `dot_product_attention`, every sequence by itself: causal_alignment="bottom_right" puts each
    one's last query on its last key.

    Args:
      query: [total_q, N, H].
      key: [total_k, K, H] in the query's dtype; K divides N.
      value: [total_k, K, D] in the query's dtype.
      cu_seqlens_q: integer [sequences + 1], not decreasing, may be traced: where each sequence
        starts, and where the last one ends.
      cu_seqlens_k: the same for keys and values; default cu_seqlens_q, when total_k == total_q.
      max_seqlen_q: the longest sequence, a static hint for the kernels' plan. A wrong one costs
        speed, never the answer; the xla path has no plan to make.
      max_seqlen_k: the same for keys and values.
      scale, is_causal, causal_alignment, local_window_size, logits_soft_cap, sinks,
        deterministic_backward, checkpoint_name, return_residual, implementation: as in
        `dot_product_attention`.
    Returns:
      out [total_q, N, D]; with return_residual (out, lse), lse float32 [total_q, N], natural log.
    Raises:
      ValueError, TypeError, UnsupportedError: as `dot_product_attention`.
    """
    problems = Problems("varlen_attention")
    q = as_array("query", query, problems)
    k = as_array("key", key, problems)
    if q is None or k is None:
        problems.fail()
    for name, x, layout in (("query", q, "[total_q, N, H]"), ("key", k, "[total_k, K, H]")):
        if x.ndim != 3:
            problems.add(name, f"shape {show(x.shape)}", layout)
    total_q, total_k = (x.shape[0] if x.ndim else 0 for x in (q, k))
    _check_hint("max_seqlen_q", max_seqlen_q, problems)
    _check_hint("max_seqlen_k", max_seqlen_k, problems)
    cu_q = _cu_seqlens("cu_seqlens_q", cu_seqlens_q, total_q, problems)
    cu_k = cu_q
    if cu_seqlens_k is not None:
        cu_k = _cu_seqlens("cu_seqlens_k", cu_seqlens_k, total_k, problems)
    elif total_k != total_q:
        wanted = f"the keys' own, since total_q = {total_q} and total_k = {total_k} differ"
        problems.add("cu_seqlens_k", "None", wanted)
    if cu_q is not None and cu_k is not None and cu_q.shape != cu_k.shape:
        wanted = f"{show(cu_q.shape)}, as many as cu_seqlens_q"
        problems.add("cu_seqlens_k", f"shape {show(cu_k.shape)}", wanted)
    if cu_q is None or cu_k is None or q.ndim != 3 or k.ndim != 3:
        problems.fail()

    q_sequence = _sequence_of(cu_q, total_q)
    k_sequence = _sequence_of(cu_k, total_k) if cu_k is not cu_q else q_sequence
    parsed = parse(
        q,
        k,
        value,
        scale=scale,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        query_seq_lengths=cu_q[-1],
        key_value_seq_lengths=cu_k[-1],
        local_window_size=local_window_size,
        query_segment_ids=q_sequence,
        # Tokens before the first start belong to no sequence: -1 for queries, -2 for keys.
        key_value_segment_ids=jnp.where(k_sequence < 0, -2, k_sequence),
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        deterministic_backward=deterministic_backward,
        checkpoint_name=checkpoint_name,
        return_residual=return_residual,
        implementation=implementation,
        problems=problems,
    )
    spec, operands = parsed.spec, parsed.operands
    if spec.is_causal or spec.window != (None, None):
        q_start, k_start = cu_q[q_sequence], cu_k[k_sequence]
        if spec.causal_alignment == "bottom_right" and cu_q.shape[0] > 1:
            offset = jnp.diff(cu_k) - jnp.diff(cu_q)  # of each sequence
            q_start = q_start - offset[q_sequence]
        operands = operands._replace(
            query_positions=jnp.arange(total_q, dtype=jnp.int32) - q_start,
            key_positions=jnp.arange(total_k, dtype=jnp.int32) - k_start,
        )
        spec = dataclasses.replace(spec, causal_alignment="top_left")
    out, lse = attention.run(parsed._replace(spec=spec, operands=operands), packed=True)
    return (out, lse) if return_residual else out


def _check_hint(name: str, hint: int | None, problems: Problems) -> None:
    if hint is None:
        return
    try:
        if static_int(hint) < 0:
            problems.add(name, repr(hint), "a length >= 0")
    except TypeError:
        problems.add(name, repr(hint), "an int that is known while tracing, or None", is_type=True)


def _cu_seqlens(name: str, x: Any, total: int, problems: Problems) -> Any:
    """int32 [sequences + 1], clipped to [0, total]."""
    x = as_integers(name, x, problems)
    if x is None:
        return None
    if x.ndim != 1 or not x.size:
        problems.add(name, f"shape {show(x.shape)}", "[sequences + 1]")
        return None
    return _sharding.gathered(clipped_int32(x, 0, total))


def _sequence_of(cu_seqlens: jax.Array, total: int) -> jax.Array:
    """int32 [total]: each token's sequence; -1 before the first start, the last past the end."""
    token = jnp.arange(total, dtype=jnp.int32)
    sequence = jnp.searchsorted(cu_seqlens, token, side="right").astype(jnp.int32) - 1
    return jnp.minimum(sequence, max(cu_seqlens.shape[0] - 2, 0))
