"""attention_fn in the layers of flax.nnx and flax.linen: their own values, or a refusal by name."""
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import importlib
import inspect
import pathlib
import subprocess
import sys

import chex
import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, cuda_text, error_of, integers, kernel_calls, normal, qkv

import jax_fa3
from jax_fa3.integrations.flax import attention_fn, make_attention_fn

pytestmark = pytest.mark.usefixtures("quick_compile")

FEATURES, HEADS = 16, 4


@pytest.fixture
def implicit_promotion():
    """Flax's own attention mixes 16-bit dtypes with float32, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def nnx_layer(attention=None, **fields):
    """(params, f): f(params, *inputs, **call) of an nnx layer; equal params for equal fields."""
    fields = {"num_heads": HEADS, "in_features": FEATURES, "qkv_features": 32, **fields}
    fields |= {"attention_fn": attention} if attention else {}
    layer = nnx.MultiHeadAttention(decode=False, rngs=nnx.Rngs(0), **fields)
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    return params, lambda params, *x, **call: nnx.merge(graph, params, rest)(*x, **call)


def linen_layer(attention=None, **fields):
    """(params, f) of a linen layer, as nnx_layer."""
    fields = {"num_heads": HEADS, "qkv_features": 32, **fields}
    fields |= {"attention_fn": attention} if attention else {}
    layer = nn.MultiHeadDotProductAttention(**fields)
    plain = nn.MultiHeadDotProductAttention(**{**fields, "attention_fn": lambda q, k, v: q})
    x = jnp.zeros((1, 2, FEATURES))
    return plain.init(jax.random.key(0), x, deterministic=True), layer.apply


LAYERS = {"nnx": nnx_layer, "linen": linen_layer}
both_libraries = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def same(theirs, ours, args, dtype=None, scale=4):
    """Equal values and gradients of every argument."""
    cotangent = helpers.cotangents(theirs, args)
    wanted = helpers.value_and_pullback(theirs, args, cotangent)
    got = helpers.value_and_pullback(ours, args, cotangent)
    chex.assert_trees_all_equal_dtypes(got, wanted)
    assert_close(got, wanted, dtype, scale=scale)


def same_in_the_layer(layer, inputs, *, attention=attention_fn, call=None, theirs=None, **fields):
    """A layer with our attention gives what it gives with Flax's own, called alike."""
    dtype = fields.get("dtype")  # of the arithmetic, whatever the arrays have
    call = call or {}
    params, own = layer(**fields)
    _, ours = layer(attention, **fields)
    same(
        lambda p, *x: own(p, *x, **(call if theirs is None else theirs)),
        lambda p, *x: ours(p, *x, **call),
        (params, *inputs),
        dtype,
    )


# --- In the layers: values and gradients of parameters and inputs -------------------------------


@both_libraries
@pytest.mark.parametrize("batch", [(2,), (), (2, 3)], ids=str)
def test_self_attention_with_any_number_of_batch_dimensions(layer, batch):
    same_in_the_layer(layer, [normal((*batch, 5, FEATURES))])


@both_libraries
def test_cross_attention_with_other_keys_and_values(layer):
    same_in_the_layer(layer, [normal((2, n, FEATURES)) for n in (5, 7, 7)])


@both_libraries
def test_masks_as_flax_makes_them_are_honoured(layer):
    """make_causal_mask and combine_masks give float32 zeros and ones."""
    tokens = integers(1, 9, (2, 6)).at[1, 4:].set(0)
    mask = nn.combine_masks(
        nn.make_causal_mask(tokens), nn.make_attention_mask(tokens >= 0, tokens > 0)
    )
    assert mask.dtype == jnp.float32
    same_in_the_layer(layer, [normal((2, 6, FEATURES))], call={"mask": mask})


@both_libraries
@pytest.mark.parametrize("shape", [(2, HEADS, 5, 7), (1, 1, 5, 7), (2, 1, 1, 7)], ids=str)
def test_boolean_masks_of_every_broadcast_are_honoured(layer, shape):
    mask = integers(0, 1, shape).astype(bool).at[..., 0].set(True)
    inputs = [normal((2, n, FEATURES)) for n in (5, 7)]
    same_in_the_layer(layer, inputs, call={"mask": mask})


@pytest.mark.parametrize("masked", [False, True], ids=["alone", "with a mask"])
def test_is_causal_of_the_nnx_call_is_honoured(masked):
    call = {"is_causal": True}
    if masked:
        call["mask"] = jnp.ones((2, HEADS, 6, 6), bool).at[1, :, :, 2].set(False)
    same_in_the_layer(nnx_layer, [normal((2, 6, FEATURES))], call=call)


def test_is_causal_of_the_nnx_call_lies_top_left_as_in_flax():
    inputs = [normal((2, n, FEATURES)) for n in (4, 7)]
    same_in_the_layer(nnx_layer, inputs, call={"is_causal": True})


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_heads_of_nnx_are_honoured(num_kv_heads):
    same_in_the_layer(
        nnx_layer,
        [normal((2, 6, FEATURES))],
        call={"is_causal": True},
        num_kv_heads=num_kv_heads,
    )


@both_libraries
def test_normalised_queries_and_keys(layer):
    same_in_the_layer(layer, [normal((2, 5, FEATURES))], normalize_qk=True)


@both_libraries
@pytest.mark.usefixtures("implicit_promotion")
def test_the_layers_dtype_is_honoured(layer):
    same_in_the_layer(layer, [normal((2, 5, FEATURES))], dtype=jnp.bfloat16)


@both_libraries
@pytest.mark.usefixtures("kernels", "implicit_promotion")
def test_a_layer_that_the_kernels_take(layer):
    """Head dim 64 in bfloat16, causal as each library asks for it."""
    x = normal((2, 6, FEATURES))
    attention = make_attention_fn(is_causal=True)
    theirs = {"is_causal": True} if layer is nnx_layer else {"mask": nn.make_causal_mask(x[..., 0])}
    fields = {"qkv_features": 64 * HEADS, "dtype": jnp.bfloat16}
    params, f = layer(attention, **fields)
    assert kernel_calls(cuda_text(f, params, x)) == 1
    same_in_the_layer(layer, [x], attention=attention, theirs=theirs, **fields)


@both_libraries
def test_an_inactive_dropout_is_honoured(layer):
    same_in_the_layer(
        layer, [normal((2, 5, FEATURES))], dropout_rate=0.3, call={"deterministic": True}
    )


@pytest.mark.parametrize("library", ["nnx", "linen"])
def test_decoding_through_the_cache(library):
    """One token a call: a mask of the slots in use, and a causal mask would hide all but slot 0."""
    tokens = normal((2, 5, FEATURES))
    right = make_attention_fn(is_causal=True, causal_alignment="bottom_right")

    def decoded(attention):
        if library == "nnx":
            layer = nnx.MultiHeadAttention(
                HEADS, FEATURES, decode=True, attention_fn=attention, rngs=nnx.Rngs(0)
            )
            layer.init_cache(tokens.shape)
            step = nnx.jit(lambda layer, x: layer(x))
            return jnp.concatenate([step(layer, tokens[:, i : i + 1]) for i in range(5)], 1)
        layer = nn.MultiHeadDotProductAttention(HEADS, decode=True, attention_fn=attention)
        variables = layer.init(jax.random.key(0), tokens)
        step = jax.jit(lambda v, x: layer.apply(v, x, mutable=["cache"]))
        out = []
        for i in range(5):
            y, cache = step(variables, tokens[:, i : i + 1])
            variables = {**variables, **cache}
            out.append(y)
        return jnp.concatenate(out, 1)

    wanted = decoded({"nnx": nnx, "linen": nn}[library].dot_product_attention)
    assert_close(decoded(attention_fn), wanted)
    assert_close(decoded(right), wanted)
    error_of(
        ValueError, lambda: decoded(make_attention_fn(is_causal=True)), "is_causal", "bottom_right"
    )


# --- Called directly: what the layers do not pass -----------------------------------------------


@pytest.mark.parametrize("library", [nnx, nn], ids=["nnx", "linen"])
def test_bias_is_honoured_and_has_a_gradient(library):
    q, k, v = qkv(t=5, s=7, n=4, k=4)
    bias, mask = normal((2, 1, 5, 7)), jnp.ones((2, 4, 5, 7), bool).at[0, 1, :, 3].set(False)
    same(
        lambda q, k, v, bias: library.dot_product_attention(q, k, v, bias, mask),
        lambda q, k, v, bias: attention_fn(q, k, v, bias, mask),
        (q, k, v, bias),
    )


def test_positions_of_the_arguments_are_flaxs():
    """The first twelve are common; then nnx and linen differ and nnx is followed."""
    ours = list(inspect.signature(attention_fn).parameters.values())
    theirs = list(inspect.signature(nnx.dot_product_attention).parameters.values())
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    for mine, other in zip(ours, theirs):
        if mine.name != "promote_dtype":
            assert mine.default == other.default, mine.name


def test_every_argument_of_both_libraries_is_spelled():
    """linen passes only what it finds by name: a new argument there must be known here."""
    ours = set(inspect.signature(attention_fn).parameters)
    for theirs in (nnx.dot_product_attention, nn.dot_product_attention):
        assert set(inspect.signature(theirs).parameters) <= ours
    assert set(inspect.signature(make_attention_fn(scale=1.0)).parameters) == ours
    assert [name for name in ours if name not in attention_fn.__doc__] == []


@pytest.mark.parametrize(
    "precision",
    [None, "default", "highest", "bfloat16", jax.lax.Precision.HIGH, ("high", "highest")],
    ids=str,
)
def test_every_precision_is_met(precision):
    args = qkv(n=4, k=4)
    wanted = nnx.dot_product_attention(*args)
    assert_close(attention_fn(*args, precision=precision), wanted)


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16, jnp.float32], ids=str)
@pytest.mark.parametrize("given", [jnp.bfloat16, jnp.float32], ids=str)
def test_mixed_dtypes_are_promoted_as_in_flax(dtype, given):
    q, k, v = qkv(n=4, k=4)
    q = q.astype(given)
    wanted = nnx.dot_product_attention(q, k, v, dtype=dtype)
    got = attention_fn(q, k, v, dtype=dtype)
    assert got.dtype == wanted.dtype
    assert_close(got, wanted)


@pytest.mark.usefixtures("implicit_promotion")
@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=str)
def test_force_fp32_for_softmax_gives_linens_dtype(force, dtype):
    args = qkv(n=4, k=4, dtype=dtype)
    wanted = nn.dot_product_attention(*args, force_fp32_for_softmax=force)
    got = attention_fn(*args, force_fp32_for_softmax=force)
    assert got.dtype == wanted.dtype
    assert_close(got, wanted, dtype)


def test_promote_dtype_replaces_the_cast():
    seen = []

    def promote(arrays, *, dtype):
        seen.append(dtype)
        return tuple(x.astype(jnp.float32) * 2 for x in arrays)

    args = qkv(dtype=jnp.bfloat16)
    got = attention_fn(*args, dtype=jnp.float16, promote_dtype=promote)
    assert seen == [jnp.float16]
    assert_close(got, jax_fa3.dot_product_attention(*(x.astype(jnp.float32) * 2 for x in args)))


def test_a_row_that_sees_nothing_is_zero_and_not_the_mean():
    q, k, v = qkv()
    mask = jnp.ones((2, 1, 5, 7), bool).at[1, :, 3].set(False)
    got = attention_fn(q, k, v, mask=mask)
    assert not np.asarray(got[1, 3]).any()
    assert_close(got, helpers.oracle(q, k, v, mask=mask)[0])


# --- Refusals -----------------------------------------------------------------------------------


REFUSED = {
    "dropout_rate": {"dropout_rate": 0.1, "dropout_rng": "key"},
    "module": {"module": object()},
    "sow_weights": {"module": object()},
    "precision": {"precision": "F16_F16_F32"},
    "precision of a pair": {"precision": ("highest", jax.lax.DotAlgorithmPreset.F16_F16_F32)},
    "einsum_dot_general": {"einsum_dot_general": jax.lax.dot_general},
    "qk_attn_weights_einsum": {"qk_attn_weights_einsum": jnp.einsum},
    "attn_weights_value_einsum": {"attn_weights_value_einsum": jnp.einsum},
    "input_positions": {"input_positions": jnp.arange(5)},
    "of_the_future": {"of_the_future": 1},
}


@pytest.mark.parametrize(("name", "arguments"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(name, arguments):
    call = lambda: attention_fn(*qkv(), **arguments)
    error_of(jax_fa3.UnsupportedError, call, name.split()[0], "attention_fn")


def test_all_refusals_are_in_one_error():
    arguments = {k: x for refused in REFUSED.values() for k, x in refused.items()}
    call = lambda: attention_fn(*qkv(), **arguments)
    error_of(jax_fa3.UnsupportedError, call, *(name.split()[0] for name in REFUSED))


def test_an_unknown_argument_that_asks_for_nothing_passes():
    args = qkv()
    assert_close(attention_fn(*args, of_the_future=None), attention_fn(*args))


@both_libraries
def test_active_dropout_in_a_layer_is_refused_by_name(layer):
    params, f = layer(attention_fn, dropout_rate=0.1)
    rng = {"rngs": nnx.Rngs(0)} if layer is nnx_layer else {"dropout_rng": jax.random.key(0)}
    call = lambda: f(params, normal((2, 5, FEATURES)), deterministic=False, **rng)
    error_of(jax_fa3.UnsupportedError, call, "dropout_rate", "0.1", "deterministic=True")


@both_libraries
def test_sowing_weights_in_a_layer_is_refused_by_name(layer):
    params, f = layer(attention_fn)
    call = lambda: f(params, normal((2, 5, FEATURES)), sow_weights=True)
    error_of(jax_fa3.UnsupportedError, call, "sow_weights")


def test_quantised_products_of_a_linen_layer_are_refused_by_name():
    einsum = lambda: jnp.einsum
    params, f = linen_layer(
        attention_fn, qk_attn_weights_einsum_cls=einsum, attn_weights_value_einsum_cls=einsum
    )
    call = lambda: f(params, normal((2, 5, FEATURES)))
    names = "qk_attn_weights_einsum", "attn_weights_value_einsum"
    error_of(jax_fa3.UnsupportedError, call, *names)


def test_positions_of_an_nnx_layer_are_refused_by_name():
    params, f = nnx_layer(attention_fn)
    if "input_positions" not in inspect.signature(nnx.MultiHeadAttention.__call__).parameters:
        pytest.skip("this Flax passes no positions")
    call = lambda: f(params, normal((2, 5, FEATURES)), input_positions=jnp.arange(5))
    error_of(jax_fa3.UnsupportedError, call, "input_positions", "RoPE")


def test_mistakes_are_named():
    args = qkv()
    error_of(ValueError, lambda: attention_fn(*args, dropout_rate=1.0), "dropout_rate", "1.0")
    error_of(ValueError, lambda: attention_fn(*args, dtype=jnp.int32), "dtype", "int32")
    error_of(
        ValueError, lambda: attention_fn(args[0], args[1], args[2][:, 1:]), "value", [2, 6, 2, 8]
    )


# --- make_attention_fn --------------------------------------------------------------------------


def test_a_bound_is_causal_stands_for_a_linen_layers_mask():
    x = normal((2, 6, FEATURES))
    same_in_the_layer(
        linen_layer,
        [x],
        attention=make_attention_fn(is_causal=True),
        theirs={"mask": nn.make_causal_mask(x[..., 0])},
    )


def test_a_bound_is_causal_holds_although_an_nnx_layer_passes_false():
    """nnx passes is_causal=False by name, which would win over a partial's is_causal=True."""
    same_in_the_layer(
        nnx_layer,
        [normal((2, 6, FEATURES))],
        attention=make_attention_fn(is_causal=True),
        theirs={"is_causal": True},
    )


@both_libraries
def test_options_reach_the_function(layer):
    options = {
        "local_window_size": (2, 0),
        "logits_soft_cap": 3.0,
        "scale": 0.7,
        "key_value_seq_lengths": jnp.array([6, 3]),
    }
    params, f = layer(make_attention_fn(**options))
    direct = lambda q, k, v: jax_fa3.dot_product_attention(q, k, v, **options)
    # linen reads the names of this one and passes nothing; nnx passes everything.
    _, wanted = layer(direct if layer is linen_layer else lambda q, k, v, **_: direct(q, k, v))
    x = normal((2, 6, FEATURES))
    assert_close(f(params, x), wanted(params, x))


@pytest.mark.parametrize("name", ["is_casual", "return_residual", "mask"])
def test_an_option_that_cannot_be_bound_is_named(name):
    error_of(TypeError, lambda: make_attention_fn(**{name: True}), name, "make_attention_fn")
    error_of(TypeError, lambda: attention_fn(*qkv(), options={name: True}), name)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"local_window_size": 0}], ids=str)
def test_a_bound_diagonal_must_say_where_it_lies_when_the_lengths_differ(options):
    args = qkv(t=1, s=7)
    name = next(iter(options))
    call = lambda: make_attention_fn(**options)(*args)
    error_of(ValueError, call, name, "T = 1", "S = 7", "causal_alignment", "query_offset")
    for place in ({"causal_alignment": "top_left"}, {"query_offset": 4}):
        wanted = jax_fa3.dot_product_attention(*args, **options, **place)
        assert_close(make_attention_fn(**options, **place)(*args), wanted)


def test_a_bound_window_without_sides_has_no_diagonal():
    args = qkv(t=1, s=7)
    unbounded = make_attention_fn(local_window_size=(None, None), is_causal=False)
    assert_close(unbounded(*args), attention_fn(*args))


# --- Composition --------------------------------------------------------------------------------


@both_libraries
def test_a_vmapped_layer_gives_what_a_batch_gives(layer):
    params, f = layer(attention_fn)
    x = normal((3, 2, 5, FEATURES))
    grads = lambda params, x: jax.grad(lambda p: (f(p, x) ** 2).sum())(params)
    got = jax.jit(jax.vmap(grads, (None, 0)))(params, x)
    wanted = jax.tree.map(lambda *rows: jnp.stack(rows), *(grads(params, row) for row in x))
    assert_close(got, wanted, scale=10)


@both_libraries
@pytest.mark.usefixtures("kernels", "implicit_promotion")
def test_a_layer_lowers_to_one_call_of_the_kernel(layer):
    """Also under vmap; a dense mask keeps it out and is_causal does not."""
    fields = {"qkv_features": 128, "num_heads": 2, "dtype": jnp.bfloat16}
    params, f = layer(make_attention_fn(is_causal=True), **fields)
    x = normal((3, 2, 5, FEATURES))
    loss = lambda params, x: f(params, x).astype(jnp.float32).sum()
    text = cuda_text(jax.vmap(jax.grad(loss), (None, 0)), params, x)
    assert kernel_calls(text) == kernel_calls(text, helpers.BWD_TARGET) == 1

    params, f = layer(attention_fn, **fields)
    assert kernel_calls(cuda_text(f, params, x[0])) == 1
    masked = lambda params, x: f(params, x, mask=nn.make_causal_mask(x[..., 0]))
    assert kernel_calls(cuda_text(masked, params, x[0])) == 0


@both_libraries
@pytest.mark.optimised
def test_a_batch_over_devices_stays_there(layer):
    params, f = layer(make_attention_fn(is_causal=True))
    x = normal((8, 5, FEATURES))
    helpers.check_batch_over_devices(f, params, x)


def test_nnx_jit_compiles_a_layer_once():
    """The function is part of what nnx.jit compares."""
    traced = []
    bound = make_attention_fn(is_causal=True)

    @nnx.jit
    def f(layer, x):
        traced.append(1)
        return layer(x)

    for _ in range(2):
        layer = nnx.MultiHeadAttention(
            HEADS, FEATURES, decode=False, attention_fn=bound, rngs=nnx.Rngs(0)
        )
        f(layer, normal((2, 5, FEATURES)))
    assert len(traced) == 1


# --- Import, example ----------------------------------------------------------------------------


def test_the_module_imports_without_flax():
    code = (
        "import sys; sys.modules['flax'] = None; sys.path.insert(0, sys.argv[1])\n"
        "import jax.numpy as jnp\n"
        "from jax_fa3.integrations.flax import attention_fn\n"
        "q = jnp.ones((1, 4, 2, 8))\n"
        "print(attention_fn(q, q, q, deterministic=True).shape)\n"
    )
    root = str(pathlib.Path(jax_fa3.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True)
    assert done.stdout.strip() == "(1, 4, 2, 8)", done.stderr


@pytest.mark.usefixtures("implicit_promotion", "kernels")
def test_the_example_learns_and_runs_the_kernel(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
    example = importlib.import_module("flax_example")
    losses = example.main(steps=6)
    assert losses[-1] < losses[0]
    graph, state = nnx.split(example.Model(nnx.Rngs(0)))
    tokens = jnp.zeros((2, example.LENGTH), jnp.int32)
    text = cuda_text(lambda state, tokens: nnx.merge(graph, state)(tokens), state, tokens)
    assert kernel_calls(text) == 1
