"""Which implementation takes a call, and every reason why the kernels do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import jax

from jax_fa3._spec import AttentionSpec, Operands

IMPLEMENTATIONS = ("fa3", "xla")

# What the compiled kernels take. Written here so that tracing needs no extension; a test compares
# the head dims with the extension's supported_head_dims() and bwd_head_dims().
KERNEL_HEAD_DIMS = (64, 128, 256)
KERNEL_DTYPES = ("bfloat16", "float16")
KERNEL_OPERANDS = ("query", "key", "value", "query_offset")

# The operands that say where packed sequences lie.
_OF_PACKED = (
    "query_seq_lengths",
    "key_value_seq_lengths",
    "query_segment_ids",
    "key_value_segment_ids",
    "query_positions",
    "key_positions",
)


class UnsupportedError(NotImplementedError):
    """The call is valid and the implementation asked for cannot do it; with every reason."""


class Choice(NamedTuple):
    """Who takes a call."""

    implementation: str  # "fa3" or "xla"
    fallback: bool  # for "fa3": the xla path may stand in where the kernels cannot run
    reasons: tuple[str, ...]  # why fa3, asked for earlier, did not take it


def reasons(spec: AttentionSpec, operands: Operands, *, packed: bool = False) -> list[str]:
    """Every reason why the kernels cannot take a call on a Hopper GPU; empty when they can.

    Args:
      packed: the call stands for packed sequences; names the reason so.
    """
    q, k, v = operands.query, operands.key, operands.value
    found = []
    if q.dtype.name not in KERNEL_DTYPES:
        found.append(f"dtype {q.dtype.name}: the kernels take {' and '.join(KERNEL_DTYPES)}")
    elif spec.out_dtype != q.dtype:
        found.append(f"out_dtype {spec.out_dtype.name}: the kernels return the query's dtype")
    dims = ", ".join(map(str, KERNEL_HEAD_DIMS))
    if q.shape[-1] != v.shape[-1]:
        found.append(
            f"head dims {q.shape[-1]} of query and key and {v.shape[-1]} of value: the kernels "
            f"want one of {dims} for all three"
        )
    elif q.shape[-1] not in KERNEL_HEAD_DIMS:
        found.append(f"head dim {q.shape[-1]}: the kernels have {dims}")
    if spec.window != (None, None):
        found.append("local_window_size: the kernels have no sliding window")
    if spec.logits_soft_cap is not None:
        found.append("logits_soft_cap: the kernels have no soft cap")
    for name in operands.present():
        if packed and name in _OF_PACKED:
            continue
        if name not in KERNEL_OPERANDS:
            found.append(f"{name}: the kernels do not take it")
    if packed:
        found.append("cu_seqlens_q: the kernels take no packed sequences")
    longest = max(q.shape[-3], k.shape[-3])
    if longest >= 2**29:
        found.append(f"length {longest}: the kernels take less than 2^29 tokens")
    return found


def choose(
    spec: AttentionSpec,
    operands: Operands,
    implementations: Sequence[str],
    *,
    packed: bool = False,
) -> Choice:
    """The first of `implementations` that can take the call.

    Args:
      packed: as for `reasons`.
    Raises:
      UnsupportedError: none can; with every reason.
    """
    refused: list[str] = []
    for i, implementation in enumerate(implementations):
        if implementation == "xla":
            return Choice("xla", False, tuple(refused))
        refused = reasons(spec, operands, packed=packed)
        if not refused:
            return Choice("fa3", "xla" in implementations[i + 1 :], ())
    raise UnsupportedError(refusal(refused))


def refusal(why: Sequence[str]) -> str:
    """The text of an UnsupportedError."""
    lines = "".join(f"\n  {reason}" for reason in why)
    return f'implementation "fa3" cannot take this call:{lines}\nimplementation=None or "xla" can.'


_logged: set[str] = set()


def log_once(why: Sequence[str], *, on_gpu: bool | None = None) -> None:
    """Warns, once a process for each reason, that attention on this GPU runs without the kernels.

    Args:
      why: the reasons.
      on_gpu: whether the program is for a GPU of this machine; None asks for the default backend.
    """
    new = [reason for reason in why if reason not in _logged]
    if not new:
        return
    if not (jax.default_backend() == "gpu" if on_gpu is None else on_gpu):
        return
    from absl import logging  # slow to import, and rarely needed

    for reason in new:
        _logged.add(reason)
        logging.warning("jax_fa3: attention runs on the xla path, not the kernels: %s", reason)


def refuse_float8_gradient() -> NoReturn:
    raise UnsupportedError(
        "jax_fa3: attention of float8 inputs has no gradient; the recipe is to keep 16-bit "
        "inputs, quantise them for the forward pass, and differentiate bfloat16 attention of "
        "the unquantised ones (jax.custom_vjp); or jax.lax.stop_gradient around this one"
    )
