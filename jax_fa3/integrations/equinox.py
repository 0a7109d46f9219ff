"""equinox.nn.MultiheadAttention with jax_fa3's attention, and a function that swaps it in.

    model = jax_fa3.integrations.equinox.convert(model)

The parameters and the tree around them stay as they are.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jax_fa3._support import UnsupportedError
from jax_fa3.attention import dot_product_attention
from jax_fa3.integrations import _options

try:
    import equinox as eqx
except ImportError as error:
    raise ImportError(
        "jax_fa3.integrations.equinox needs equinox, which is not installed: "
        "pip install 'jax-fa3[equinox]'"
    ) from error

_NAME = "jax_fa3.integrations.equinox.MultiheadAttention"
_Model = TypeVar("_Model")


class MultiheadAttention(eqx.nn.MultiheadAttention):
    """`equinox.nn.MultiheadAttention` whose heads attend through `jax_fa3.dot_product_attention`.

    Parameters, attributes and values are those of the class that it derives from, but for a row
    whose mask hides every key: it gives 0 (there: the mean of the values). Like that class it
    takes one sequence; under jax.vmap all sequences become one call of the kernel. A dense mask
    runs on the xla path: for the kernels bind is_causal and leave a causal mask away.
    """

    options: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(self, *args: Any, **kwargs: Any):
        """Draws new parameters, as the class that it derives from.

        Args:
          *args, **kwargs: those of `equinox.nn.MultiheadAttention`, and options to bind: keywords
            of `dot_product_attention` but return_residual. They are static: arrays (lengths, ids)
            go to the call.
        Raises:
          TypeError: a bound option is an array or cannot be hashed, or a name is not known.
        """
        options = {name: kwargs.pop(name) for name in tuple(kwargs) if name in _options.NAMES}
        super().__init__(*args, **kwargs)
        self.options = _static(_NAME, options)

    @jax.named_scope("jax_fa3.MultiheadAttention")
    def __call__(
        self,
        query: jax.Array,
        key_: jax.Array,
        value: jax.Array,
        mask: jax.Array | None = None,
        *,
        key: Any = None,
        inference: bool | None = None,
        deterministic: bool | None = None,
        process_heads: Callable[..., Any] | None = None,
        **options: Any,
    ) -> jax.Array:
        """Multi-head attention of one sequence.

        T query length, S key/value length, N heads, H and D head dims of keys and of values.

        Args:
          query: [T, query_size].
          key_: [S, key_size].
          value: [S, value_size].
          mask: bool, True where a query may see a key; [T, S] or [N, T, S].
          key: of dropout alone, which is refused where it would act.
          inference: True: no dropout; None: what the layer's dropout says.
          deterministic: inference, by its deprecated name.
          process_heads: (query [T, N, H], key [S, N, H], value [S, N, D]) -> the same, changed.
          **options: keywords of `dot_product_attention` for this call, arrays too; they count
            before the bound ones.
        Returns: [T, output_size].
        Raises:
          ValueError, TypeError: shapes disagree; an option is not known; is_causal or a window
            does not say where the diagonal lies and T != S.
          UnsupportedError: dropout would act.
        Source: equinox.nn.MultiheadAttention.
        """
        del key
        if deterministic is not None:
            inference = deterministic
            warnings.warn(
                "MultiheadAttention()(deterministic=...) is deprecated in favour of "
                "MultiheadAttention()(inference=...)",
                stacklevel=2,
            )
        self._refuse_dropout(inference)
        _options.check_names(_NAME, options)
        t, s = query.shape[0], key_.shape[0]
        if value.shape[0] != s:
            raise ValueError(
                f"{_NAME}: value: got length {value.shape[0]}, expected the key's length {s}"
            )
        if mask is not None and mask.shape not in ((t, s), (self.num_heads, t, s)):
            raise ValueError(
                f"{_NAME}: mask: got shape {mask.shape}, expected [T, S] = {(t, s)} or "
                f"[N, T, S] = {(self.num_heads, t, s)}"
            )
        heads = tuple(
            jax.vmap(project)(x).reshape(x.shape[0], self.num_heads, -1)
            for project, x in (
                (self.query_proj, query),
                (self.key_proj, key_),
                (self.value_proj, value),
            )
        )
        if process_heads is not None:
            heads = _processed(process_heads, heads)
        dtype = jnp.result_type(*heads)
        options = {**dict(self.options), **options}
        _options.check_diagonal(_NAME, options, t, s)
        out = dot_product_attention(*(x.astype(dtype) for x in heads), mask=mask, **options)
        return jax.vmap(self.output_proj)(out.reshape(t, -1))

    def _refuse_dropout(self, inference: bool | None) -> None:
        """Raises: UnsupportedError: the layer's dropout would act."""
        rate = self.dropout.p
        if isinstance(rate, (int, float)) and rate == 0:
            return
        if not (self.dropout.inference if inference is None else inference):
            raise UnsupportedError(
                f"{_NAME} cannot take this call:\n  dropout_p: got {rate!r} with inference=False; "
                "attention weights cannot be dropped: make the layer with dropout_p=0, or call "
                "it with inference=True (equinox.nn.inference_mode for a model)"
            )


def convert(model: _Model, **options: Any) -> _Model:
    """A model whose every equinox.nn.MultiheadAttention attends through jax_fa3.

    Layers in stacked or shared form are swapped too. A layer that has been swapped is bound to
    the new options instead. A class derived from equinox.nn.MultiheadAttention stays as it is:
    what it overrides would be lost. So does what is no node of the tree: a layer behind
    equinox.filter_jit or functools.partial, its stored `__call__`, a static field. Convert first.

    Args:
      model: any tree with such layers in it, or a layer.
      **options: keywords of `dot_product_attention` but return_residual, bound to each layer;
        static, so no arrays. is_causal=True takes the place of a causal mask.
    Returns: the same tree; the same arrays in the same places.
    Raises:
      TypeError: an option is not one of `dot_product_attention`, is an array or cannot be hashed.
      ValueError: there is no such layer in the model.
    """
    function = "jax_fa3.integrations.equinox.convert"
    _options.check_names(function, options)
    bound = _static(function, options)
    swapped = 0

    def is_layer(x: Any) -> bool:
        return type(x) in (eqx.nn.MultiheadAttention, MultiheadAttention)

    def swap(x: Any) -> Any:
        nonlocal swapped
        if not is_layer(x):
            return x
        swapped += 1
        # As Equinox itself unflattens a module: __init__ would draw new parameters.
        layer = object.__new__(MultiheadAttention)
        for field in dataclasses.fields(eqx.nn.MultiheadAttention):
            object.__setattr__(layer, field.name, getattr(x, field.name))
        object.__setattr__(layer, "options", bound)
        return layer

    converted = jax.tree.map(swap, model, is_leaf=is_layer)
    if not swapped:
        raise ValueError(
            f"{function}: model: got {type(model).__name__} with no layer of the class "
            "equinox.nn.MultiheadAttention in it, expected one or more"
        )
    return converted


def _static(function: str, options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Options as a hashable value, equal for equal options, so that jit compiles once.

    Raises:
      TypeError: an option is an array or cannot be hashed; names it.
    """
    pairs = []
    for name, x in sorted(options.items()):
        x = tuple(x) if isinstance(x, list) else x
        if isinstance(x, (jax.Array, np.ndarray)):
            raise TypeError(
                f"{function}: {name}: got an array of shape {x.shape}, expected a static value; "
                f"an array goes to the layer's call: layer(query, key_, value, {name}=...)"
            )
        try:
            hash(x)
        except TypeError:
            raise TypeError(f"{function}: {name}: got {x!r}, expected a hashable value") from None
        pairs.append((name, x))
    return tuple(pairs)


def _processed(process_heads: Callable[..., Any], heads: tuple[Any, ...]) -> tuple[Any, ...]:
    """process_heads(*heads). Raises: ValueError: it changed a shape."""
    processed = tuple(process_heads(*heads))
    got, wanted = ([x.shape for x in xs] for xs in (processed, heads))
    if got != wanted:
        raise ValueError(f"{_NAME}: process_heads: got shapes {got} from it, expected {wanted}")
    return processed
