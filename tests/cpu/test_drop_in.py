"""Every call that works with jax.nn.dot_product_attention works here, with the same meaning."""
# Options and arrays reach typed functions through ** and *.
# pyright: reportArgumentType=false, reportCallIssue=false
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import inspect

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, normal, qkv

import jax_fa3

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(autouse=True)
def _implicit_promotion():
    """jax.nn's function promotes 16-bit dtypes implicitly, so strict promotion refuses it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def both(call, args, tolerance=1.0, dtype=None):
    """call(attention, *args) with jax.nn's function and with ours: values and every gradient."""
    theirs = lambda *args: call(jax.nn.dot_product_attention, *args)
    ours = lambda *args: call(jax_fa3.dot_product_attention, *args)
    cotangent = helpers.cotangents(theirs, args)
    wanted = helpers.value_and_pullback(theirs, args, cotangent)
    got = helpers.value_and_pullback(ours, args, cotangent)
    assert got[0].dtype == wanted[0].dtype
    assert_close(got, wanted, dtype, scale=4 * tolerance)


def values(call, args, dtype=None):
    """call(attention, *args) with jax.nn's function and with ours: values."""
    attentions = jax.nn.dot_product_attention, jax_fa3.dot_product_attention
    wanted, got = jax.jit(lambda args: tuple(call(f, *args) for f in attentions))(args)
    assert_close(got, wanted, dtype)


def test_signature_is_a_superset():
    ours = inspect.signature(jax_fa3.dot_product_attention).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind
        assert ours[name].default == parameter.default
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional


OPTIONS = {
    "nothing": {},
    "scale": {"scale": 0.3},
    "negative scale": {"scale": -0.3},
    "zero scale": {"scale": 0.0},
    "integer scale": {"scale": 1},
    "scale in an array": {"scale": np.asarray([0.3], np.float32)},
    "no causal": {"is_causal": None},
    "numpy scale": {"scale": np.float32(0.7)},
    "numpy float64 scale": {"scale": np.float64(0.7)},
    "causal": {"is_causal": True},
    "window int": {"local_window_size": 2},
    "window pair": {"local_window_size": (3, 1)},
    "window array": {"local_window_size": np.asarray([3, 1])},
    "window zero": {"local_window_size": 0},
    "window and causal": {"local_window_size": (2, 2), "is_causal": True},
    "xla by name": {"implementation": "xla"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_static_options(options):
    values(lambda attention, *args: attention(*args, **options), qkv(t=7, s=7))


@pytest.mark.parametrize("name", ["nothing", "negative scale", "causal", "window and causal"])
def test_gradients(name):
    both(lambda attention, *args: attention(*args, **OPTIONS[name]), qkv(t=7, s=7))


@pytest.mark.parametrize(("t", "s"), [(1, 9), (9, 4), (4, 9), (0, 3)])
@pytest.mark.parametrize("options", [{"is_causal": True}, {}], ids=["causal", "full"])
def test_lengths_that_differ(t, s, options):
    values(lambda attention, *args: attention(*args, **options), qkv(t=t, s=s))


@pytest.mark.parametrize(("n", "k"), [(4, 4), (4, 2), (4, 1), (1, 1)])
def test_head_groups(n, k):
    values(lambda attention, *args: attention(*args), qkv(n=n, k=k))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["full", "causal"])
def test_16_bit_inputs(dtype, options):
    if dtype == jnp.float16:
        # jax.nn has no float16 gradient on the CPU: XLA refuses its F16_F16_F32 matmul there.
        args = qkv(h=64, t=9, s=9, dtype=dtype)
        wide = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in args), **options)
        assert_close(jax_fa3.dot_product_attention(*args, **options), wide.astype(dtype))
        return
    both(lambda attention, *args: attention(*args, **options), qkv(h=64, t=9, s=9, dtype=dtype))


def test_float64_inputs():
    with jax.enable_x64(True):
        # jax.nn's softmax is in float32 whatever the input.
        args = tuple(x.astype(jnp.float64) for x in qkv())
        out, wanted = (
            f(*args) for f in (jax_fa3.dot_product_attention, jax.nn.dot_product_attention)
        )
        assert out.dtype == wanted.dtype == jnp.float64
        assert_close(out, wanted, jnp.float32)


@pytest.mark.parametrize(
    ("query", "key"),
    [((5, 4, 8), (7, 2, 8)), ((4, 8), (7, 2, 8)), ((1, 5, 4, 8), (7, 2, 8)), ((8,), (7, 1, 8))],
    ids=str,
)
def test_missing_leading_dimensions(query, key):
    """jax.nn prepends ones to each operand and gives the query's own rank back."""
    args = normal(query), normal(key), normal(key)
    values(lambda attention, *args: attention(*args), args)
    residual = [
        f(*args, return_residual=True)[1].shape
        for f in (jax_fa3.dot_product_attention, jax.nn.dot_product_attention)
    ]
    assert residual[0] == residual[1]


@pytest.mark.parametrize(
    "shape",
    [(2, 4, 5, 7), (1, 4, 5, 7), (2, 1, 5, 7), (2, 4, 1, 7), (2, 4, 5, 1), (4, 5, 7), (5, 7), (7,)],
    ids=str,
)
def test_bias_and_mask_of_every_rank(shape):
    mask = normal(shape) > -1
    mask = mask.at[..., 0].set(True)  # no fully masked row: there the meanings differ
    values(lambda attention, q, k, v, bias: attention(q, k, v, bias, mask), (*qkv(), normal(shape)))


def test_bias_alone_and_mask_alone():
    mask = (normal((4, 5, 7)) > -1).at[..., 0].set(True)
    both(lambda attention, q, k, v, bias: attention(q, k, v, bias), (*qkv(), normal((4, 5, 7))))
    both(lambda attention, *args: attention(*args, mask=mask), qkv())


def test_bias_of_another_dtype():
    call = lambda attention, q, k, v, b: attention(q, k, v, b)
    for query, bias in [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)]:
        args = qkv(h=16, dtype=query)
        both(call, (*args, normal((1, 4, 5, 7), bias)), dtype=jnp.bfloat16)
    for bias in (jnp.arange(7), jnp.arange(7) > 3):
        both(lambda attention, *args, bias=bias: attention(*args, bias), qkv())


def test_bias_without_a_batch():
    args = qkv(batch=())
    values(lambda attention, q, k, v, b: attention(q, k, v, b), (*args, normal((4, 5, 7))))
    values(lambda attention, q, k, v, b: attention(q, k, v, b), (*args, normal((1, 4, 5, 7))))


@pytest.mark.parametrize(
    "lengths",
    [
        {"query_seq_lengths": [3, 5]},
        {"key_value_seq_lengths": [7, 2]},
        {"query_seq_lengths": [4, 1], "key_value_seq_lengths": [1, 6]},
    ],
    ids=["queries", "keys", "both"],
)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["full", "causal"])
def test_sequence_lengths(lengths, options):
    arrays = {name: jnp.asarray(x, jnp.int32) for name, x in lengths.items()}
    both(lambda attention, *args: attention(*args, **arrays, **options), qkv())


def test_lengths_without_a_batch_have_shape_one():
    arrays = {
        "query_seq_lengths": jnp.asarray([4], jnp.int32),
        "key_value_seq_lengths": jnp.asarray([6], jnp.int32),
    }
    values(lambda attention, *args: attention(*args, **arrays), qkv(batch=()))


@pytest.mark.parametrize("lengths", [{}, {"key_value_seq_lengths": [7, 3]}], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_where_ranks_may_not_be_promoted(is_causal, lengths):
    """jax_numpy_rank_promotion is about its user's code."""
    arrays = {name: jnp.asarray(x, jnp.int32) for name, x in lengths.items()}
    with jax.numpy_rank_promotion("raise"):
        both(lambda f, *args: f(*args, is_causal=is_causal, **arrays), qkv(t=7, s=7))


def test_everything_at_once():
    arrays = {
        "mask": (normal((1, 1, 7, 7)) > -1) | jnp.eye(7, dtype=bool),
        "key_value_seq_lengths": jnp.asarray([7, 7], jnp.int32),
        "query_seq_lengths": jnp.asarray([7, 3], jnp.int32),
    }
    options = {"scale": 0.5, "is_causal": True, "local_window_size": (4, 0)}
    args = (*qkv(t=7, s=7), normal((2, 4, 7, 7)))
    both(lambda attention, q, k, v, b: attention(q, k, v, b, **arrays, **options), args)


def test_numpy_arrays():
    args = tuple(np.asarray(x) for x in qkv())
    out, wanted = (f(*args) for f in (jax_fa3.dot_product_attention, jax.nn.dot_product_attention))
    assert isinstance(out, jax.Array)
    assert_close(out, wanted)
    mask = np.tril(np.ones((5, 7), bool))
    out, wanted = (
        f(*args, np.zeros((5, 7), np.float32), mask, key_value_seq_lengths=np.int32([7, 6]))
        for f in (jax_fa3.dot_product_attention, jax.nn.dot_product_attention)
    )
    assert_close(out, wanted)


def test_arguments_by_keyword():
    q, k, v = qkv()
    out = jax_fa3.dot_product_attention(query=q, key=k, value=v, bias=None, mask=None)
    assert_close(out, jax.nn.dot_product_attention(q, k, v))


def test_residual():
    args = qkv()
    got = jax_fa3.dot_product_attention(*args, return_residual=True)
    assert_close(got, jax.nn.dot_product_attention(*args, return_residual=True))


def test_traced_scale():
    args = (*qkv(), jnp.float32(0.4))
    both(lambda attention, q, k, v, scale: attention(q, k, v, scale=scale), args, tolerance=4)


@jax.tree_util.register_pytree_node_class
class Variable:
    """An array by JAX's protocol alone, as flax.nnx has them."""

    def __init__(self, value):
        self.value = value

    def __jax_array__(self):
        return self.value

    def tree_flatten(self):
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_variables():
    lengths, scale = Variable(jnp.asarray([1, 5])), Variable(jnp.float32(0.4))
    values(
        lambda attention, q, k, v, scale, lengths: attention(
            q, k, v, scale=scale, key_value_seq_lengths=lengths
        ),
        (*qkv(), scale, lengths),
    )


@pytest.mark.parametrize("axis", [0, 3])
def test_under_vmap_and_grad(axis):
    args = tuple(normal((3, 2, 5, 4, 8)) for _ in range(3))
    args = tuple(jnp.moveaxis(x, 0, axis) for x in args)

    def call(attention, *args):
        f = lambda *a: attention(*a, is_causal=True).sum()
        return jax.vmap(jax.grad(f, (0, 1, 2)), axis, axis)(*args)

    got, wanted = (
        jax.jit(lambda *a, f=f: call(f, *a))(*args)
        for f in (jax_fa3.dot_product_attention, jax.nn.dot_product_attention)
    )
    assert_close(got, wanted, scale=4)


def test_the_three_documented_differences():
    """A fully masked row, the dtype of lse, and its gradient."""
    q, k, v = qkv(h=16, dtype=jnp.bfloat16)
    mask = jnp.ones((5, 7), bool).at[2].set(False)
    out, lse = jax_fa3.dot_product_attention(q, k, v, mask=mask, return_residual=True)
    theirs, their_lse = jax.nn.dot_product_attention(q, k, v, mask=mask, return_residual=True)
    assert (out[:, 2] == 0).all()
    assert jnp.isneginf(lse[:, 2]).all()
    assert_close(theirs[:, 2], jnp.repeat(v.mean(1), 2, axis=1))  # jax.nn: the mean of V
    assert (lse.dtype, their_lse.dtype) == (jnp.float32, jnp.bfloat16)
    for attention, moves in [
        (jax_fa3.dot_product_attention, True),
        (jax.nn.dot_product_attention, False),
    ]:

        def loss(q, attention=attention):
            return attention(q, k, v, return_residual=True)[1].astype(jnp.float32).sum()

        assert bool((jax.grad(loss)(q) != 0).any()) == moves


def test_cudnn_is_refused_by_name():
    helpers.error_of(
        ValueError,
        lambda: jax_fa3.dot_product_attention(*qkv(), implementation="cudnn"),
        "implementation",
        "cudnn",
        "fa3",
        "xla",
    )
