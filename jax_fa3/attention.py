"""The public door: dot_product_attention, and the questions one may ask about a call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_fa3 import _arguments, _native, _support, _vjp
from jax_fa3._arguments import Parsed
from jax_fa3._spec import AttentionSpec, Operands


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
    deterministic_backward: bool | None = None,
    checkpoint_name: str | None = None,
    return_residual: bool = False,
    implementation: str | Sequence[str] | None = None,
) -> Any:
    """Exact attention, softmax(scale * Q K^T + bias) V over the visible keys, in linear memory.

    A superset of `jax.nn.dot_product_attention`: every call that works there (but for
    implementation="cudnn") works here and means the same, with three differences. A row that sees
    no key gives out 0, lse -inf and zero gradients (there: the mean of V). lse stays float32
    (there: cast to the inputs' dtype). lse has a gradient.

    B batch, T query length, S key/value length, N query heads, K key/value heads, H query/key head
    dim, D value head dim. [*batch] is any number of leading dims, also none; without one, an array
    over [*batch] has shape [] or, as in jax.nn, [1]. Query head n reads key/value head
    n // (N // K), and keys are never repeated.

    Keys and values beyond a length are never read into a result: NaN there stays there, forward and
    backward. Queries beyond their length give out 0 and lse -inf and take no part in any gradient.
    Other masked positions never change a result by their finite values. NaN in a valid query makes
    NaN of that row alone.

    Differentiable in query, key, value, bias, sinks and an array scale, in reverse mode. Where the
    kernels' primitive takes the call, forward mode and second derivatives raise an error:
    implementation="xla" has reverse over reverse, `jax_fa3.reference` any derivative.

    Args:
      query: [*batch, T, N, H]; bfloat16, float16, float32, float64 or float8_e4m3fn.
      key: [*batch, S, K, H] in the query's dtype; K divides N.
      value: [*batch, S, K, D] in the query's dtype; D may differ from H.
      bias: added to the scaled logits; broadcastable to [*batch, N, T, S].
      mask: bool, True where a query may see a key; broadcastable to [*batch, N, T, S].
      scale: multiplies Q K^T; default 1 / sqrt(H), any sign. A Python or NumPy number is static;
        a scalar JAX array is folded into the query, in its dtype, and has a gradient.
      is_causal: query t sees the keys s <= t + offset; causal_alignment says which offset.
      causal_alignment: where the diagonal of is_causal and local_window_size lies. "top_left", as
        in jax.nn: offset 0. "bottom_right", as in FlashAttention: the last valid query stands on
        the last valid key, so the offset is S - T, or each row's key length - query length.
      query_offset: integer scalar or [*batch], may be traced: the offset itself, instead of an
        alignment (a decoding step's position in its cache). Without is_causal or a window it
        changes nothing.
      query_seq_lengths: integer [*batch], how many queries are valid; clipped to [0, T].
      key_value_seq_lengths: integer [*batch], how many keys and values are; clipped to [0, S].
      local_window_size: (left, right): query t sees t + offset - left <= s <= t + offset + right;
        an int is both; None for a side is unbounded.
      query_segment_ids: integer [*batch, T]; a query sees the keys with an equal id.
      key_value_segment_ids: integer [*batch, S]; default query_segment_ids, when T == S.
      logits_soft_cap: cap, from 1e-30 to 1e30: cap * tanh(x / cap) of x = scale * q.k + bias,
        before masking.
      sinks: float [N], one more logit a head that takes probability and gives no value.
      query_descale: for float8 inputs, what query is to be multiplied with: a float scalar,
        [*batch, K] (one per key/value head, shared by its group of query heads), or one per block
        of 64 or 128 tokens, [*batch, ceil(T / block), N].
      key_descale: as query_descale: scalar, [*batch, K] or [*batch, ceil(S / block), K].
      value_descale: as key_descale.
      out_dtype: default the query's dtype, bfloat16 for float8 inputs; only for those may it be
        another (bfloat16, float16, float32).
      deterministic_backward: True: gradients repeat bit for bit, from run to run and on machines of
        the same kind. For fa3 it concerns query's gradient, which is otherwise summed in no fixed
        order, and makes the backward pass slower in head dims 64 and 128; in 256 it is free.
        None: `jax_fa3.config.deterministic_backward`, read while tracing.
      checkpoint_name: one name for out and lse in remat policies; default "jax_fa3_out" and
        "jax_fa3_lse", those of `remat_policy`.
      return_residual: also return lse.
      implementation: "fa3", the Hopper kernels; "xla", blockwise pure JAX for any platform and
        dtype; None, the same as ("fa3", "xla"): fa3 where it can take the call, with the xla path
        wherever the kernels cannot run, and else xla; or a sequence to try in order. `explain`
        tells.
    Returns:
      out [*batch, T, N, D]; with return_residual (out, lse). lse is float32 (float64 for float64
      inputs) [*batch, T, N], the natural log of the softmax's denominator, the sink included.
    Raises:
      ValueError: arguments disagree; names each one, what it got and what was expected.
      TypeError: a dtype or a type that no implementation takes.
      UnsupportedError: the implementation asked for cannot do this; with every reason. For "fa3"
        also while lowering for a CPU or for a GPU that is not compute capability 9.0; and for the
        gradient of float8 inputs.
    Source: Shah et al. 2024, FlashAttention-3; Dao 2023, FlashAttention-2.
    """
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
        deterministic_backward=deterministic_backward,
        checkpoint_name=checkpoint_name,
        return_residual=return_residual,
        implementation=implementation,
    )
    out, lse = run(parsed)
    return (out, lse) if return_residual else out


def run(parsed: Parsed, *, packed: bool = False) -> tuple[jax.Array, jax.Array]:
    """A checked call: chooses the implementation, places the arrays, computes.

    Args:
      packed: the call stands for packed sequences.
    Returns:
      out [*batch, T, N, D] and lse [*batch, T, N]; with the query's own rank.
    Raises:
      UnsupportedError: no implementation asked for can take the call.
    """
    choice = _support.choose(parsed.spec, parsed.operands, parsed.implementations, packed=packed)
    if choice.reasons:
        _support.log_once(choice.reasons)

    out, lse = _vjp.attend(parsed.spec, parsed.operands, choice, parsed.names)
    lse = jnp.swapaxes(lse, -1, -2)
    if lse.shape != parsed.leading:  # a query of lower rank, as jax.nn takes it
        out, lse = out.reshape(*parsed.leading, out.shape[-1]), lse.reshape(parsed.leading)
    return out, lse


def remat_policy() -> Callable[..., bool]:
    """A policy for jax.checkpoint that saves attention's out and lse and recomputes the rest.

    So the backward pass does not run the forward kernel again. It goes by the default names; with
    checkpoint_name= use jax.checkpoint_policies.save_only_these_names of that name.
    """
    return jax.checkpoint_policies.save_only_these_names(_arguments.OUT_NAME, _arguments.LSE_NAME)


def export_disabled_checks() -> list[Any]:
    """What jax.export must be told to let the kernels' custom calls through.

    `jax.export.export(f, platforms=["cuda"], disabled_checks=jax_fa3.export_disabled_checks())`.
    The process that runs the exported program must import jax_fa3, which registers the calls.
    """
    import jax.export

    targets = (_native.FWD_TARGET, _native.BWD_TARGET)
    return [jax.export.DisabledSafetyCheck.custom_call(target) for target in targets]


# --- questions about a call ---

_ARRAYS = {*Operands._fields, "scale"}  # of these, what may be abstract


def _abstractly(arguments: dict[str, Any]) -> tuple[AttentionSpec, Operands, tuple[str, ...]]:
    """Parses a call without computing; arrays may be, and become, jax.ShapeDtypeStructs."""
    options = inspect.signature(dot_product_attention).parameters
    if unknown := [name for name in arguments if name not in options]:
        raise TypeError(f"dot_product_attention has no argument {', '.join(unknown)}")
    abstract = {
        name: arguments[name]
        for name in arguments
        if name in _ARRAYS and isinstance(arguments[name], (jax.Array, jax.ShapeDtypeStruct))
    }
    concrete = {name: x for name, x in arguments.items() if name not in abstract}
    static = []

    def parse(abstract: dict[str, Any]) -> Operands:
        parsed = _arguments.parse(**concrete, **abstract)
        static.append((parsed.spec, parsed.implementations))
        return parsed.operands

    operands = jax.eval_shape(parse, abstract)
    return static[0][0], operands, static[0][1]


def is_supported(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    implementation: str | Sequence[str] | None = "fa3",
    **options: Any,
) -> bool:
    """Whether an implementation could take a call on its own hardware, wherever this is asked.

    It calls the function by which `dot_product_attention` itself decides, so the two agree.

    Args:
      query, key, value, bias, mask, **options: the arguments of `dot_product_attention`; arrays or
        jax.ShapeDtypeStructs.
      implementation: the one asked about, by default the kernels. None or a sequence: whether any
        of them could ("xla" takes every valid call).
    Raises:
      ValueError, TypeError: the call is not valid, as `dot_product_attention` says.
    """
    arguments = dict(query=query, key=key, value=value, bias=bias, mask=mask, **options)
    spec, operands, names = _abstractly({**arguments, "implementation": implementation})
    try:
        _support.choose(spec, operands, names)
    except _support.UnsupportedError:
        return False
    return True


def explain(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    implementation: str | Sequence[str] | None = None,
    **options: Any,
) -> str:
    """Says which implementation takes a call, and every reason why the kernels do not.

    Args:
      query, key, value, bias, mask, implementation, **options: the arguments of
        `dot_product_attention`; arrays or jax.ShapeDtypeStructs.
    Returns: lines of text, for print.
    Raises:
      ValueError, TypeError: the call is not valid, as `dot_product_attention` says.
    """
    arguments = dict(query=query, key=key, value=value, bias=bias, mask=mask, **options)
    spec, operands, names = _abstractly({**arguments, "implementation": implementation})
    q, k, v = operands.query, operands.key, operands.value
    lines = [f"query {_type_text(q)}, key {_type_text(k)}, value {_type_text(v)}"]
    refused = _support.reasons(spec, operands)
    try:
        choice = _support.choose(spec, operands, names)
    except _support.UnsupportedError:
        lines.append(f"refused: implementation={_quoted(names)} cannot take this call; xla can")
        lines += [f"  not fa3: {reason}" for reason in refused]
        return "\n".join(lines)

    if choice.implementation == "xla":
        lines.append("xla takes this call: pure JAX, blockwise, on any platform")
        if choice.reasons:
            lines += [f"  not fa3: {reason}" for reason in choice.reasons]
        elif refused:
            lines += [f"  not fa3, had it been asked for: {reason}" for reason in refused]
        else:
            lines.append("  not fa3: xla comes first in implementation; fa3 could take the call")
        return "\n".join(lines)

    lines.append("fa3 takes this call: the Hopper kernels, where it is lowered for CUDA")
    where_not = _native.why_not()
    if not where_not and not _native.visible_gpus():
        where_not = [f"this process has no GPU (default backend {jax.default_backend()})"]
    instead = "runs xla" if choice.fallback else "raises UnsupportedError"
    lines += [f"  here it {instead}: {reason}" for reason in where_not]
    module = _native.extension()
    if module is not None and q.size and v.size:
        problem = _native.problem_of(q, k, math.prod(q.shape[:-3]), spec.is_causal)
        has_offset = operands.query_offset is not None
        diagonal = 0 if has_offset else spec.diagonal(problem.seqlen_q, problem.seqlen_k)
        plan = module.describe_plan(*problem, diagonal=diagonal)
        lines += [f"  plan: {line}" for line in plan.splitlines()]
        plan = module.describe_bwd_plan(*problem, deterministic=spec.deterministic_backward)
        lines += [f"  backward plan: {line}" for line in plan.splitlines()]
    return "\n".join(lines)


def _type_text(x: Any) -> str:
    return f"{x.dtype.name}[{', '.join(map(str, x.shape))}]"


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)
