"""attention_fn for flax.nnx.MultiHeadAttention and flax.linen.MultiHeadDotProductAttention.

    nnx.MultiHeadAttention(..., attention_fn=jax_fa3.integrations.flax.attention_fn)

It imports nothing of flax: the two libraries' layers pass arrays and plain options.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jax_fa3._support import UnsupportedError
from jax_fa3.attention import dot_product_attention
from jax_fa3.integrations import _options

_NAME = "jax_fa3.integrations.flax.attention_fn"


# linen passes only the keywords that it finds by name in inspect.signature (flax.linen.attention):
# behind a bare **kwargs not even the mask would arrive. So every name of both libraries is written.
def attention_fn(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    broadcast_dropout: bool = True,
    dropout_rng: Any = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    input_positions: Any = None,
    options: Mapping[str, Any] | None = None,
    **unknown: Any,
) -> jax.Array:
    """`jax_fa3.dot_product_attention` as Flax's attention layers call it.

    Every argument is honoured or refused by name. The values are Flax's, but for a row whose mask
    hides every key: it gives 0 (Flax: the mean of the values). The layers turn causality, padding
    and a decoding cache into a dense mask, which the kernels do not take: the xla path runs it,
    in linear memory. For the kernels say is_causal (nnx: in the layer's call; linen:
    `make_attention_fn(is_causal=True)`) and leave the causal mask away. (Not functools.partial of
    this function: beside a decoding cache its diagonal would lie at the first slot.)

    [*batch], T, S, N, K, H and D as in `dot_product_attention`.

    Args:
      query: [*batch, T, N, H].
      key: [*batch, S, K, H]; K divides N, as nnx passes it with num_kv_heads.
      value: [*batch, S, K, D].
      bias: added to the scaled logits; broadcastable to [*batch, N, T, S].
      mask: visible where it is not zero, of any dtype (Flax's own masks are float32);
        broadcastable to [*batch, N, T, S].
      broadcast_dropout, dropout_rng: of dropout alone, which is refused where it would act.
      dropout_rate: in [0, 1); above 0 only with deterministic=True.
      deterministic: True: no dropout.
      dtype: query, key and value are cast to it; None: to their common dtype.
      precision: any jax.lax.Precision, by value or name, or a pair: each is met, since products of
        float32 are always computed with HIGHEST and 16-bit products are exact in float32.
        Algorithms (jax.lax.DotAlgorithm and its presets) are refused.
      module: None. A layer passes itself to sow the attention weights (sow_weights=True), which
        are never formed here.
      promote_dtype: promote_dtype((query, key, value), dtype=dtype), instead of the cast above.
      is_causal: query t sees the keys s <= t, as in Flax, unless options place the diagonal.
      force_fp32_for_softmax: the softmax is always in float32 or wider; with True the result is
        float32 or wider too, as linen's is.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: None; no other
        product stands in for the kernels'.
      input_positions: None; rotary positions are applied before attention.
      options: keywords of `dot_product_attention`; `make_attention_fn` binds them.
      **unknown: what another version of Flax passes: refused by name unless it is None.
    Returns: [*batch, T, N, D].
    Raises:
      ValueError, TypeError: as `dot_product_attention`; dropout_rate or dtype is not valid;
        is_causal or a window in options does not say where the diagonal lies and T != S.
      UnsupportedError: an argument that is refused; names each of them.
    Source: flax.nnx.dot_product_attention, flax.linen.dot_product_attention.
    """
    del broadcast_dropout, dropout_rng  # they say how to drop, and nothing is dropped
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"{_NAME}: dropout_rate: got {dropout_rate!r}, expected it in [0, 1)")
    refused = []
    if dropout_rate > 0 and not deterministic:
        refused.append(
            f"dropout_rate: got {dropout_rate!r} with deterministic={deterministic!r}; attention "
            "weights cannot be dropped: set dropout_rate=0 or deterministic=True"
        )
    if module is not None:
        refused.append(
            "module (sow_weights=True): the attention weights are never formed, so they cannot "
            "be sown: call the layer with sow_weights=False"
        )
    if not _is_met(precision):
        refused.append(
            f"precision: got {precision!r}, expected a jax.lax.Precision; the algorithm of the "
            "products cannot be chosen"
        )
    if input_positions is not None:
        refused.append(
            "input_positions: positions are not applied here: give the layer a function that "
            "rotates query and key (nnx.RoPE) and then calls attention_fn without them"
        )
    for name, x in {
        "einsum_dot_general": einsum_dot_general,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }.items():
        if x is not None:
            refused.append(f"{name}: got {x!r}, expected None; the products cannot be replaced")
    for name, x in unknown.items():
        if x is not None:
            refused.append(f"{name}: got {x!r}; this argument is not known here")
    if refused:
        raise UnsupportedError(
            f"{_NAME} cannot take this call:" + "".join(map("\n  {}".format, refused))
        )

    options = dict(options or {})
    _options.check_names(_NAME, options)
    promote = promote_dtype or _promote
    query, key, value = promote((query, key, value), dtype=dtype)
    if mask is not None:
        mask = jnp.asarray(mask).astype(bool)
    if query.ndim >= 3 and key.ndim >= 3:
        _options.check_diagonal(_NAME, options, query.shape[-3], key.shape[-3])
    options["is_causal"] = options.get("is_causal") or is_causal
    out = dot_product_attention(query, key, value, bias, mask, **options)
    if force_fp32_for_softmax:
        out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
    return out


def make_attention_fn(**options: Any) -> Callable[..., jax.Array]:
    """`attention_fn` with options of `dot_product_attention` that Flax's layers do not pass.

        nn.MultiHeadDotProductAttention(..., attention_fn=make_attention_fn(is_causal=True))

    Make it once and not in each call: Flax compares attention functions by identity, and a new one
    is traced and compiled again.

    Args:
      **options: keywords of `dot_product_attention` but return_residual. is_causal adds to the
        layer's own. Where T and S differ (cross-attention, a decoding cache), is_causal and
        local_window_size want causal_alignment or query_offset beside them.
    Returns: a function with the parameters of `attention_fn`.
    Raises:
      TypeError: an option that `dot_product_attention` has not; names it.
    """
    _options.check_names("jax_fa3.integrations.flax.make_attention_fn", options)
    # A partial, because it keeps the parameters' names, which linen reads.
    return functools.partial(attention_fn, options=options)


def _is_met(precision: Any) -> bool:
    """Whether a precision asks for no more than is computed anyway."""
    if isinstance(precision, (tuple, list)):
        return all(_is_met(one) for one in precision)
    if isinstance(precision, str):
        try:
            jax.lax.Precision(precision)
        except ValueError:
            return False
        return True
    return precision is None or isinstance(precision, jax.lax.Precision)


def _promote(arrays: tuple[Any, ...], *, dtype: Any = None) -> tuple[jax.Array, ...]:
    """The arrays in `dtype`, by default in their common one; both layers' rule.

    Raises:
      ValueError: dtype is not a floating one.
    """
    if dtype is None:
        dtype = jnp.result_type(*arrays)
        if not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jnp.float32, dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{_NAME}: dtype: got {jnp.dtype(dtype).name}, expected a floating dtype")
    return tuple(jnp.asarray(x, dtype) for x in arrays)
