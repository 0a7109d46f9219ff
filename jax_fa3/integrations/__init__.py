"""Adapters for the attention layers of other libraries, each imported only when asked for.

`jax_fa3.integrations.flax`: `attention_fn`, for flax.nnx and flax.linen. Needs no flax to import.
`jax_fa3.integrations.equinox`: `convert`, for equinox.nn.MultiheadAttention.
"""
