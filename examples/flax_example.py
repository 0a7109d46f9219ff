"""Flax NNX with jax_fa3 attention: a small byte model learns this very file.

python examples/flax_example.py [steps]
"""

import pathlib
import sys

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jax_fa3.integrations.flax import attention_fn

TEXT = np.frombuffer(pathlib.Path(__file__).read_bytes(), np.uint8).astype(np.int32)
LENGTH, WIDTH, HEADS = 64, 128, 2


class Model(nnx.Module):
    """int32 [B, T] bytes -> float32 [B, T, 256] logits of the next byte."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed, self.places = (nnx.Embed(n, WIDTH, rngs=rngs) for n in (256, LENGTH))
        self.attention = nnx.MultiHeadAttention(
            HEADS, WIDTH, dtype=jnp.bfloat16, attention_fn=attention_fn, decode=False, rngs=rngs
        )
        self.out = nnx.Linear(WIDTH, 256, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.places(jnp.arange(tokens.shape[1]))
        # For the kernels: 16 bits (above), and is_causal instead of a dense mask.
        return self.out(x + self.attention(x, is_causal=True))


@nnx.jit
def train_step(model, optimizer, windows):
    def loss(model):
        logits = model(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def main(steps=100):
    model, rng, losses = Model(nnx.Rngs(0)), np.random.default_rng(0), []
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    for _ in range(steps):
        starts = rng.integers(0, TEXT.size - LENGTH, (16, 1))
        losses.append(float(train_step(model, optimizer, TEXT[starts + np.arange(LENGTH + 1)])))
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a byte in {steps} steps")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
