"""Options of dot_product_attention that an adapter adds to a layer's own arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from jax_fa3.attention import dot_product_attention

# Not return_residual: a layer expects one array back.
NAMES = frozenset(
    name
    for name, parameter in inspect.signature(dot_product_attention).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name != "return_residual"
)


def check_names(function: str, options: Mapping[str, Any]) -> None:
    """Raises: TypeError: an option is none of dot_product_attention's; names it."""
    unknown = sorted(set(options) - NAMES)
    if unknown:
        raise TypeError(
            f"{function}: got {', '.join(unknown)}, expected keywords of "
            f"jax_fa3.dot_product_attention: {', '.join(sorted(NAMES))}"
        )


def check_diagonal(function: str, options: Mapping[str, Any], t: int, s: int) -> None:
    """Refuses a diagonal whose place is left open when T and S differ.

    A layer that decodes through a cache calls with one query and all of the cache's slots. There
    the default alignment would let every query see the first key alone, and nothing would say so.

    Raises:
      ValueError: is_causal or a window, T != S, and no option says where the diagonal lies.
    """
    diagonal = ["is_causal"] if options.get("is_causal") else []
    if options.get("local_window_size") not in (None, (None, None)):
        diagonal.append("local_window_size")
    placed = "causal_alignment" in options or options.get("query_offset") is not None
    if diagonal and t != s and not placed:
        raise ValueError(
            f"{function}: got {' and '.join(diagonal)} with T = {t} and S = {s}, expected beside "
            'it causal_alignment ("top_left" or "bottom_right") or query_offset. Decoding '
            'through a cache: is_causal wants "bottom_right" beside the mask of the slots in '
            "use, a window wants query_offset, the position in the cache"
        )
