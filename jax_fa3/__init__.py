"""FlashAttention-3 for JAX, with CUDA kernels for Hopper GPUs."""

from jax_fa3 import _native, reference
from jax_fa3._support import UnsupportedError
from jax_fa3.attention import (
    dot_product_attention,
    explain,
    export_disabled_checks,
    is_supported,
    remat_policy,
)
from jax_fa3.config import config
from jax_fa3.varlen import varlen_attention

__version__ = "0.1.0"

__all__ = [
    "UnsupportedError",
    "config",
    "dot_product_attention",
    "explain",
    "export_disabled_checks",
    "is_supported",
    "reference",
    "remat_policy",
    "varlen_attention",
]

# On import, so that a program exported elsewhere finds its custom-call targets.
_native.register()
