"""What goes wrong between XLA's buffers and the tensor maps: slices in place, a second device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, normal
from kernel_helpers import HEAD_DIMS, attend


@pytest.mark.parametrize("h", HEAD_DIMS)
def test_inputs_and_outputs_that_are_slices_of_larger_arrays(h):
    """XLA may hand over a part of a buffer where it lies: its base must still suit a tensor map."""
    batch, t, s, n, k = 3, 65, 97, 3, 1  # rows of 3 * 65 * 128 bytes and the like: odd multiples
    shapes = (batch, t, n, h), (batch, s, k, h), (batch, s, k, h)
    queries, keys, values = (normal((2, *shape), jnp.bfloat16) for shape in shapes)

    @jax.jit
    def sliced(queries, keys, values):
        parts = [attend(queries[i], keys[i], values[i], is_causal=True) for i in range(2)]
        rows = [attend(*(x[1, b : b + 1] for x in (queries, keys, values))) for b in range(batch)]
        return jnp.stack([out for out, _ in parts]), jnp.concatenate([out for out, _ in rows])

    together, by_row = sliced(queries, keys, values)
    causal = jax.jit(lambda *args: attend(*args, is_causal=True)[0])
    full = jax.jit(lambda *args: attend(*args)[0])
    for i in range(2):
        assert_same_bits(together[i], causal(queries[i], keys[i], values[i]))
    for b in range(batch):
        one = (x[1, b : b + 1] for x in (queries, keys, values))
        assert_same_bits(by_row[b : b + 1], full(*one))


def test_every_device_runs_every_head_dim(two_gpus):
    """What a launch sets once (shared memory, entry points) it sets once a device."""
    for h in HEAD_DIMS:
        args = [normal((2, 300, 4, h), jnp.bfloat16) for _ in range(3)]
        results = [
            jax.jit(lambda *a: attend(*a, is_causal=True))(*jax.device_put(args, device))
            for device in two_gpus
        ]
        for device, result in zip(two_gpus, results):
            assert {x.device for x in result} == {device}
            assert_same_bits(
                tuple(np.asarray(x) for x in result), tuple(np.asarray(x) for x in results[0])
            )
