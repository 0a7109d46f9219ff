"""vmap, scan and checkpoint around the kernel: values."""
# Options and arrays reach typed functions through ** and *.
# pyright: reportArgumentType=false, reportCallIssue=false
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import functools
import itertools
import operator

import helpers
import jax
import jax.numpy as jnp
import pytest
from helpers import normal, qkv
from kernel_helpers import attend, check, see_causal

import jax_fa3

SUBSETS = [s for r in (1, 2, 3) for s in itertools.combinations(range(3), r)]


def operands(mapped, size=3, h=64):
    args = qkv(batch=(2,), t=70, s=90, n=4, k=2, h=h, dtype=jnp.bfloat16)
    return tuple(
        normal((size, *x.shape), x.dtype) if i in mapped else x for i, x in enumerate(args)
    )


@pytest.mark.parametrize("mapped", SUBSETS, ids=lambda m: "".join("qkv"[i] for i in m))
def test_vmap_over_any_subset_of_operands(mapped):
    """The unmapped ones are read through a broadcast batch, not copied."""
    args = operands(mapped)
    axes = tuple(0 if i in mapped else None for i in range(3))
    out, lse = jax.jit(jax.vmap(lambda *a: attend(*a, is_causal=True), axes))(*args)
    for row in range(3):
        one = [x[row] if i in mapped else x for i, x in enumerate(args)]
        check((out[row], lse[row]), *one, see=see_causal(70, 90, 0), what=f"row {row}")


def test_nested_vmaps_over_different_operands():
    """Outer over the query, inner over keys and values, the batch inside both."""
    q, k, v = qkv(batch=(2,), t=33, s=65, n=2, k=1, h=128, dtype=jnp.bfloat16)
    q = normal((3, *q.shape), q.dtype)
    k, v = (normal((2, *x.shape), x.dtype) for x in (k, v))
    f = jax.vmap(jax.vmap(attend, (None, 0, 0)), (0, None, None))
    out, lse = jax.jit(f)(q, k, v)
    for i, j in itertools.product(range(3), range(2)):
        check((out[i, j], lse[i, j]), q[i], k[j], v[j], what=f"{i}, {j}")


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_vmaps_that_alternate_between_query_and_keys(levels):
    """Each level maps the other side: no two neighbouring batch dimensions broadcast alike."""
    q, k, v = qkv(batch=(), t=17, s=20, n=2, k=1, h=64, dtype=jnp.bfloat16)
    f, q_lead, k_lead = attend, (), ()
    for level in range(levels):
        over_query = level % 2 == 0
        f = jax.vmap(f, (0, None, None) if over_query else (None, 0, 0))
        q_lead, k_lead = ((2, *q_lead), k_lead) if over_query else (q_lead, (2, *k_lead))
    q = normal((*q_lead, *q.shape), q.dtype)
    k, v = (normal((*k_lead, *x.shape), x.dtype) for x in (k, v))
    out, lse = jax.jit(f)(q, k, v)
    for index in itertools.product(range(2), repeat=levels):
        # The outermost vmap is the last level.
        q_index = tuple(i for n, i in enumerate(index) if (levels - 1 - n) % 2 == 0)
        k_index = tuple(i for n, i in enumerate(index) if (levels - 1 - n) % 2 == 1)
        check((out[index], lse[index]), q[q_index], k[k_index], v[k_index], what=f"{index}")


def test_vmap_over_the_offset_alone():
    args = qkv(batch=(2,), t=40, s=70, n=2, k=1, h=64, dtype=jnp.bfloat16)
    offsets = jnp.asarray([0, 7, -3, 200])
    f = lambda offset: attend(*args, is_causal=True, query_offset=offset)
    out, lse = jax.jit(jax.vmap(f))(offsets)
    for i, offset in enumerate(offsets.tolist()):
        check((out[i], lse[i]), *args, see=see_causal(40, 70, offset), what=f"offset {offset}")


def test_vmap_on_inner_axes_and_out_axes():
    q, k, v = (jnp.moveaxis(x, 0, a) for x, a in zip(operands((0, 1, 2)), (4, 1, 2)))
    out, lse = jax.jit(jax.vmap(attend, (4, 1, 2), (2, 3)))(q, k, v)
    one = [jnp.take(x, 1, a) for x, a in zip((q, k, v), (4, 1, 2))]
    check((out[:, :, 1], lse[..., 1]), *one)


def test_scan_over_layers():
    q, k, v = qkv(batch=(2,), t=70, s=70, n=2, k=2, h=64, dtype=jnp.bfloat16)
    ks, vs = (normal((3, *x.shape), x.dtype) for x in (k, v))

    @jax.jit
    def layers(q, ks, vs):
        return jax.lax.scan(lambda x, kv: (attend(x, *kv, is_causal=True)[0], None), q, (ks, vs))[0]

    x = q
    for i in range(3):
        before, (x, _) = x, jax.jit(lambda *a: attend(*a, is_causal=True))(x, ks[i], vs[i])
        check(
            attend(before, ks[i], vs[i], is_causal=True),
            before,
            ks[i],
            vs[i],
            see_causal(70, 70, 0),
        )
    helpers.assert_same_bits(layers(q, ks, vs), x)


def test_vmap_of_grad_has_a_gradient_for_every_row():
    """Unmapped keys get one gradient a row, never a sum over the mapped axis."""
    q, k, v = operands((0,))
    loss = lambda q, k, v: attend(q, k, v)[0].astype(jnp.float32).sum()
    grads = jax.jit(jax.vmap(jax.grad(loss, (0, 1, 2)), (0, None, None)))(q, k, v)
    single = jax.jit(jax.grad(loss, (0, 1, 2)))
    for row in range(3):
        helpers.assert_close(jax.tree.map(operator.itemgetter(row), grads), single(q[row], k, v))


def test_a_named_policy_saves_what_the_kernel_computed():
    """Checkpointed and plain gradients have the same bits: out and lse are the same arrays."""
    args = qkv(t=70, s=90, h=64, dtype=jnp.bfloat16)
    f = functools.partial(attend, is_causal=True, deterministic_backward=True)
    loss = lambda *a: f(*a)[0].astype(jnp.float32).sum()
    remat = jax.checkpoint(loss, policy=jax_fa3.remat_policy())
    plain, checkpointed = (jax.jit(jax.grad(g, (0, 1, 2)))(*args) for g in (loss, remat))
    helpers.assert_same_bits(checkpointed, plain)
