"""What an attention call is made of: its static options and its arrays.

Letters, here and in the whole package: B batch, T query length, S key/value length, N query heads,
K key/value heads (K divides N; query head n reads key/value head n // (N // K)), H query/key head
dim, D value head dim. ``*batch`` is any number of leading dims, also none.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

FLOAT8 = np.dtype(jnp.float8_e4m3fn)
DESCALE_BLOCKS = (64, 128)  # tokens that may share one


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """Every option that is known while tracing. Hashable: it is a parameter of the primitives.

    A field added here must reach every implementation, or `_support.reasons` must refuse it.

    Attributes:
      scale: multiplies q . k. Always finite and > 0: an array, a negative or a zero scale was
        folded into the query (and leaves 1.0, or its magnitude, here).
      is_causal: query t sees the keys up to its own place on the diagonal.
      causal_alignment: "top_left" or "bottom_right": where the diagonal lies when T != S, for
        is_causal and window. "bottom_right" puts the last valid query on the last valid key.
      window: (left, right), inclusive distances from the diagonal; None is unbounded.
      logits_soft_cap: cap * tanh(x / cap) on the scaled and biased logits; None is no cap.
      deterministic_backward: gradients repeat bit for bit.
      out_dtype: dtype of the output.
    """

    scale: float
    is_causal: bool
    causal_alignment: str
    window: tuple[int | None, int | None]
    logits_soft_cap: float | None
    deterministic_backward: bool
    out_dtype: np.dtype

    def diagonal(self, seqlen_q: int, seqlen_k: int) -> int:
        """The key position of query 0, where neither an offset nor lengths move it."""
        return seqlen_k - seqlen_q if self.causal_alignment == "bottom_right" else 0


class Operands(NamedTuple):
    """The arrays of a call (or their types); None is absent. A pytree."""

    query: Any  # [*batch, T, N, H]
    key: Any  # [*batch, S, K, H]
    value: Any  # [*batch, S, K, D]
    bias: Any = None  # full rank, each dim 1 or that of [*batch, N, T, S]
    mask: Any = None  # bool, full rank, each dim 1 or that of [*batch, N, T, S]
    query_offset: Any = None  # int32 [*batch]: query t stands at key position t + it
    query_seq_lengths: Any = None  # int32 [*batch], in [0, T]
    key_value_seq_lengths: Any = None  # int32 [*batch], in [0, S]
    query_segment_ids: Any = None  # int [*batch, T]; both ids or neither, one dtype
    key_value_segment_ids: Any = None  # int [*batch, S]
    # Positions replace t + offset and s in the causal and window rules (packed sequences).
    query_positions: Any = None  # int32 [*batch, T]
    key_positions: Any = None  # int32 [*batch, S]
    sinks: Any = None  # float [N], no batch dims
    # float32, float8 inputs only: [*batch, blocks of T, N] and [*batch, blocks of S, K], where one
    # block is all tokens and more of them have 64 or 128 tokens each, whichever gives their number.
    query_descale: Any = None
    key_descale: Any = None
    value_descale: Any = None

    @classmethod
    def of(cls, arrays: Mapping[str, Any]) -> Operands:
        """Those of `arrays` that are operands, by name; the others are absent."""
        return cls(**{name: arrays.get(name) for name in cls._fields})

    def batch(self) -> tuple[int, ...]:
        """The full batch dims, where each operand has them or is 1."""
        present = {name: x for name, x in self.present().items() if name != "sinks"}
        return full_batch(x.shape[: x.ndim - CORE_RANK[name]] for name, x in present.items())

    def present(self) -> dict[str, Any]:
        """The operands that are not absent, by name."""
        return {name: x for name, x in self._asdict().items() if x is not None}


def first_position(spec: AttentionSpec, operands: Operands, seqlen_q: int) -> int | jax.Array:
    """The key position at which query 0 of `seqlen_q` stands: an int, or int32 [*batch]."""
    if operands.query_offset is not None:
        return operands.query_offset
    if spec.causal_alignment == "top_left":
        return 0
    lengths_q, lengths_k = operands.query_seq_lengths, operands.key_value_seq_lengths
    last = operands.key.shape[-3] if lengths_k is None else lengths_k
    return last - (seqlen_q if lengths_q is None else lengths_q)


def full_batch(batches: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """The batch dims of all. Raises ValueError when one has others than those or 1."""
    batches = list(batches)
    if len({len(batch) for batch in batches}) != 1:
        raise ValueError(
            f"jax_fa3: operands have batch dims {batches}, expected one number of them"
        )
    full = []
    for sizes in zip(*batches, strict=True):
        others = {size for size in sizes if size != 1}
        if len(others) > 1:
            raise ValueError(f"jax_fa3: operands have batch dims {batches}, expected full or 1")
        full.append(others.pop() if others else 1)
    return tuple(full)


def softmax_dtype(dtype: Any) -> np.dtype:
    """In what the softmax of inputs of `dtype` is computed, and its lse returned.

    Not jnp.promote_types, which refuses bfloat16 with float32 under strict dtype promotion.
    """
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def promoting_ranks(fun: Callable[..., Any]) -> Callable[..., Any]:
    """fun, in which arrays of other ranks broadcast, whatever jax_numpy_rank_promotion says.

    That setting is about its user's code. A mask here compares [*batch, 1] with [S].
    """

    @functools.wraps(fun)
    def promoting(*args, **kwargs):
        with jax.numpy_rank_promotion("allow"):
            return fun(*args, **kwargs)

    return promoting


# The dims of each operand after its batch dims, by their letters; of out and lse too, and of
# their cotangents. i and j are blocks of T and of S (descales).
CORE_DIMS = {
    "query": "tnh",
    "key": "skh",
    "value": "skd",
    "bias": "nts",
    "mask": "nts",
    "query_offset": "",
    "query_seq_lengths": "",
    "key_value_seq_lengths": "",
    "query_segment_ids": "t",
    "key_value_segment_ids": "s",
    "query_positions": "t",
    "key_positions": "s",
    "sinks": "n",
    "query_descale": "in",
    "key_descale": "jk",
    "value_descale": "jk",
    "out": "tnd",
    "lse": "nt",
    "dout": "tnd",
    "dlse": "nt",
}

# How many trailing dims of an array are not batch dims.
CORE_RANK = {name: len(dims) for name, dims in CORE_DIMS.items()}

# The operands that have a gradient.
DIFFERENTIABLE = ("query", "key", "value", "bias", "sinks")
