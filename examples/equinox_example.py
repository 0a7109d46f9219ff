"""Equinox with jax_fa3 attention: a small byte model learns this very file.

python examples/equinox_example.py [steps]
"""

import pathlib
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_fa3.integrations.equinox import convert

TEXT = np.frombuffer(pathlib.Path(__file__).read_bytes(), np.uint8).astype(np.int32)
LENGTH, WIDTH, HEADS = 64, 128, 2


class Model(eqx.Module):
    """int32 [T] bytes -> float32 [T, 256] logits of the next byte."""

    embed: jax.Array
    places: jax.Array
    attention: eqx.nn.MultiheadAttention
    out: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = 0.1 * jax.random.normal(keys[0], (256, WIDTH))
        self.places = 0.1 * jax.random.normal(keys[1], (LENGTH, WIDTH))
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=keys[2])
        self.out = eqx.nn.Linear(WIDTH, 256, key=keys[3])

    def __call__(self, tokens):
        x = self.embed[tokens] + self.places[: tokens.size]
        in_16_bits = lambda *heads: tuple(h.astype(jnp.bfloat16) for h in heads)  # noqa: E731
        return jax.vmap(self.out)(x + self.attention(x, x, x, process_heads=in_16_bits))


def loss_of(model, windows):
    logits = jax.vmap(model)(windows[:, :-1])  # one attention call for the whole batch
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


@eqx.filter_jit
def train_step(model, state, windows):
    loss, grads = eqx.filter_value_and_grad(loss_of)(model, windows)
    updates, state = optax.adam(3e-3).update(grads, state)
    return eqx.apply_updates(model, updates), state, loss


def main(steps=100):
    # For the kernels: is_causal instead of a dense mask, and 16 bits (above).
    model = convert(Model(jax.random.key(0)), is_causal=True)
    state = optax.adam(3e-3).init(eqx.filter(model, eqx.is_inexact_array))
    rng, losses = np.random.default_rng(0), []
    for _ in range(steps):
        starts = rng.integers(0, TEXT.size - LENGTH, (16, 1))
        model, state, loss = train_step(model, state, TEXT[starts + np.arange(LENGTH + 1)])
        losses.append(float(loss))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a byte in {steps} steps")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
