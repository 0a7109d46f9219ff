"""Gradients through the kernel's forward equal those of the xla path and of the dense oracle."""
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import functools

import helpers
import jax
import jax.numpy as jnp
import pytest
from helpers import assert_within_reference_error, normal, oracle, plain, qkv
from kernel_helpers import attend

import jax_fa3

CASES = {
    "bf16 causal gqa": ({"h": 128, "dtype": jnp.bfloat16, "n": 4, "k": 2}, {"is_causal": True}),
    "fp16 full mqa": ({"h": 64, "dtype": jnp.float16, "n": 3, "k": 1}, {"scale": -0.25}),
    "bf16 bottom right": (
        {"h": 256, "dtype": jnp.bfloat16, "n": 2, "k": 2},
        {"is_causal": True, "causal_alignment": "bottom_right"},
    ),
}


@pytest.mark.parametrize(("sizes", "options"), CASES.values(), ids=CASES)
def test_gradients_are_within_three_times_the_error_of_plain_jax(sizes, options):
    """Cotangents of out and of lse; fully masked rows among them (T > S, bottom right)."""
    args = qkv(batch=(2,), t=150, s=100, **sizes)
    shapes = jax.eval_shape(attend, *args)
    cts = tuple(normal(x.shape, x.dtype) for x in shapes)
    wide = tuple(x.astype(jnp.float32) for x in args)
    masks = {n: x for n, x in options.items() if n != "scale"}
    see = helpers.visible((2,), 150, 100, **masks)
    alive = jnp.any(see, -1)[..., 0, :, None]
    cts = cts[0], jnp.where(alive, cts[1], 0)
    wide_cts = tuple(x.astype(jnp.float32) for x in cts)

    def plain_masked(q, k, v):
        out, lse = plain(q, k, v, see, scale=options.get("scale"))
        return jnp.where(alive[..., None], out, 0), lse

    run = helpers.value_and_pullback
    _, got = run(functools.partial(attend, **options), args, cts)
    xla = functools.partial(attend, **options, implementation="xla")
    _, same = run(xla, args, cts)
    _, exact = run(lambda *a: oracle(*a, **options), wide, wide_cts)
    _, yardstick = run(plain_masked, args, cts)
    assert_within_reference_error(got, yardstick, exact, 3)
    # The backward is the same program; only the saved out and lse differ, by rounding.
    helpers.assert_close(got, same, scale=2)


def test_lse_gradient_alone():
    """d lse / d query is the probabilities' mean of the keys; values get none."""
    args = qkv(t=70, s=90, h=64, dtype=jnp.bfloat16)
    grad = jax.jit(jax.grad(lambda *a: attend(*a, is_causal=True)[1].sum(), (0, 1, 2)))(*args)
    exact = jax.jit(
        jax.grad(
            lambda *a: oracle(*(x.astype(jnp.float32) for x in a), is_causal=True)[1].sum(),
            (0, 1, 2),
        )
    )(*args)
    helpers.assert_close(grad, exact, scale=2)
    assert (grad[2] == 0).all()


def test_value_and_grad_of_the_default_implementation_uses_the_kernel():
    args = qkv(t=70, s=90, h=64, dtype=jnp.bfloat16)
    f = lambda *a: jax_fa3.dot_product_attention(*a).astype(jnp.float32).sum()
    compiled = jax.jit(jax.value_and_grad(f, (0, 1, 2))).lower(*args).compile()
    assert helpers.FWD_TARGET in str(compiled.as_text())
    value, grads = compiled(*args)
    helpers.assert_finite((value, grads))
