"""convert() of Equinox models: the same parameters and values, and one call of the kernel."""
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import importlib
import pathlib
import subprocess
import sys

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    assert_same_bits,
    cuda_text,
    error_of,
    integers,
    kernel_calls,
    normal,
)

import jax_fa3
from jax_fa3.integrations.equinox import MultiheadAttention, convert

pytestmark = pytest.mark.usefixtures("quick_compile")

T, S, HEADS, SIZE = 5, 7, 4, 16

SIZES = {
    "default": {},
    "every size of its own": {
        "key_size": 12,
        "value_size": 10,
        "output_size": 6,
        "qk_size": 8,
        "vo_size": 3,
    },
    "biases": {f"use_{name}_bias": True for name in ("query", "key", "value", "output")},
}


def layer_of(**fields):
    return eqx.nn.MultiheadAttention(HEADS, SIZE, key=jax.random.key(0), **fields)


def inputs_of(layer, batch=(), t=T, s=S):
    sizes = (t, layer.query_size), (s, layer.key_size), (s, layer.value_size)
    return tuple(normal((*batch, *size)) for size in sizes)


def apart(layer):
    """(parameters, f): the arrays of a layer, and f(call)(parameters, *inputs)."""
    arrays, rest = eqx.partition(layer, eqx.is_inexact_array)
    parameters, tree = jax.tree.flatten(arrays)

    def f(call):
        return lambda parameters, *x: eqx.combine(tree.unflatten(parameters), rest)(*x, **call)

    return parameters, f


def same(layer, inputs, *, options=None, ours=None, **call):
    """Equal values and gradients of every parameter and input, with and without conversion."""
    parameters, theirs = apart(layer)
    converted, of_ours = apart(convert(layer, **(options or {})))
    assert all(x is y for x, y in zip(converted, parameters, strict=True))
    args = (parameters, *inputs)
    cotangent = helpers.cotangents(theirs(call), args)
    wanted = helpers.value_and_pullback(theirs(call), args, cotangent)
    got = helpers.value_and_pullback(of_ours(call if ours is None else ours), args, cotangent)
    assert_close(got, wanted, scale=4)


def causal(t=T, s=S):
    return jnp.tril(jnp.ones((t, s), bool))


# --- Values and gradients of parameters and inputs ----------------------------------------------


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_a_converted_layer_gives_equinoxs_values_and_gradients(sizes):
    layer = layer_of(**sizes)
    same(layer, inputs_of(layer))


@pytest.mark.parametrize("shape", [(T, S), (HEADS, T, S)], ids=str)
def test_masks_are_honoured(shape):
    layer = layer_of()
    mask = integers(0, 1, shape).astype(bool).at[..., 0].set(True)
    same(layer, inputs_of(layer), mask=mask)


def test_process_heads_is_honoured():
    layer = layer_of()
    rotate = eqx.nn.RotaryPositionalEmbedding(SIZE // HEADS)

    def process(q, k, v):
        return *(jax.vmap(rotate, 1, 1)(x) for x in (q, k)), 2 * v

    same(layer, inputs_of(layer), process_heads=process)


def test_a_bound_is_causal_stands_for_the_causal_mask():
    layer = layer_of()
    inputs = inputs_of(layer, s=T)
    same(layer, inputs, options={"is_causal": True}, mask=causal(s=T), ours={})


def test_dropout_that_does_not_act_is_honoured():
    layer = layer_of(dropout_p=0.3)
    same(layer, inputs_of(layer), inference=True)
    same(eqx.nn.inference_mode(layer), inputs_of(layer))
    same(layer_of(), inputs_of(layer), key=jax.random.key(1))


def test_a_layer_in_16_bits_keeps_its_dtype():
    layer = layer_of(dtype=jnp.bfloat16)
    inputs = [x.astype(jnp.bfloat16) for x in inputs_of(layer)]
    got, wanted = convert(layer)(*inputs), layer(*inputs)
    assert got.dtype == wanted.dtype == jnp.bfloat16
    assert_close(got, wanted)


@pytest.mark.usefixtures("kernels")
def test_a_layer_that_the_kernels_take():
    """Head dim 64 in bfloat16, causal; values and gradients."""
    layer = layer_of(qk_size=64, vo_size=64, dtype=jnp.bfloat16)
    inputs = [x.astype(jnp.bfloat16) for x in inputs_of(layer, s=T)]
    options = {"is_causal": True}
    assert kernel_calls(cuda_text(convert(layer, **options), *inputs)) == 1
    same(layer, inputs, options=options, mask=causal(s=T), ours={})


def test_a_row_that_sees_nothing_is_zero_and_not_the_mean():
    layer = convert(layer_of())
    out = layer(*inputs_of(layer), mask=jnp.ones((T, S), bool).at[2].set(False))
    assert not np.asarray(out[2]).any()  # without a bias zero heads are projected to zero
    assert np.asarray(out[1]).any()


# --- convert ------------------------------------------------------------------------------------


class Block(eqx.Module):
    """Two layers among other things."""

    attention: eqx.nn.MultiheadAttention
    more: dict
    activation: object = jax.nn.relu
    name: str = eqx.field(static=True, default="block")

    def __init__(self, key, **fields):
        self.attention, other = (
            eqx.nn.MultiheadAttention(HEADS, SIZE, key=k, **fields) for k in jax.random.split(key)
        )
        self.more = {"other": other, "norm": eqx.nn.LayerNorm(SIZE), "nothing": None}

    def __call__(self, x):
        x = x + self.attention(x, x, x)
        return self.activation(self.more["other"](x, x, x))


def test_every_layer_of_a_model_is_swapped_and_nothing_else():
    model = Block(jax.random.key(0))
    converted = convert(model)
    assert type(converted) is Block
    assert type(converted.attention) is type(converted.more["other"]) is MultiheadAttention
    assert isinstance(converted.attention, eqx.nn.MultiheadAttention)
    assert type(model.attention) is eqx.nn.MultiheadAttention
    before, after = (jax.tree_util.tree_flatten_with_path(m)[0] for m in (model, converted))
    assert [path for path, _ in after] == [path for path, _ in before]
    assert all(x is y for (_, x), (_, y) in zip(after, before))
    x = normal((T, SIZE))
    assert_close(converted(x), model(x))


def test_a_checkpoint_of_the_model_loads_into_the_converted_one(tmp_path):
    trained, fresh = Block(jax.random.key(0)), convert(Block(jax.random.key(1)))
    eqx.tree_serialise_leaves(tmp_path / "model.eqx", trained)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "model.eqx", fresh)
    x = normal((T, SIZE))
    assert_close(loaded(x), trained(x))


def test_conversion_again_binds_the_new_options():
    causal_layer = convert(convert(layer_of(), scale=0.5), is_causal=True)
    assert causal_layer.options == (("is_causal", True),)


def test_equal_options_are_compiled_once():
    traced = []

    @eqx.filter_jit
    def f(layer, x):
        traced.append(1)
        return layer(x, x, x)

    for _ in range(2):
        f(convert(layer_of(), local_window_size=(2, 0), implementation=["xla"]), normal((T, SIZE)))
    assert len(traced) == 1


def test_a_class_of_the_users_stays_as_it_is():
    class Own(eqx.nn.MultiheadAttention):
        pass

    model = {"own": Own(HEADS, SIZE, key=jax.random.key(0)), "layer": layer_of()}
    converted = convert(model)
    assert type(converted["own"]) is Own
    assert type(converted["layer"]) is MultiheadAttention
    error_of(ValueError, lambda: convert(model["own"]), "Own", "equinox.nn.MultiheadAttention")


def test_the_class_is_made_like_equinoxs_with_options():
    layer = MultiheadAttention(HEADS, SIZE, key=jax.random.key(0), is_causal=True)
    x = normal((T, SIZE))
    assert_close(layer(x, x, x), layer_of()(x, x, x, causal(s=T)))


def test_options_that_cannot_be_bound_are_named():
    layer = layer_of()
    error_of(TypeError, lambda: convert(layer, is_casual=True), "is_casual", "is_causal", "convert")
    error_of(TypeError, lambda: convert(layer, return_residual=True), "return_residual")
    error_of(TypeError, lambda: convert(layer, sinks=jnp.ones(HEADS)), "sinks", [HEADS], "call")
    error_of(TypeError, lambda: convert(layer, local_window_size={}), "local_window_size", "hash")
    error_of(ValueError, lambda: convert(eqx.nn.LayerNorm(3)), "LayerNorm")


# --- The call -----------------------------------------------------------------------------------


def test_options_of_the_call_count_before_the_bound_ones():
    layer = convert(layer_of(), scale=0.1, logits_soft_cap=2.0)
    x = normal((T, SIZE))
    ids = jnp.array([0, 0, 1, 1, 1])
    got = layer(x, x, x, scale=0.5, query_segment_ids=ids)
    wanted = convert(layer_of(), scale=0.5, logits_soft_cap=2.0)
    assert_close(got, wanted(x, x, x, mask=ids[:, None] == ids[None, :]))


def test_active_dropout_is_refused_by_name():
    layer = convert(layer_of(dropout_p=0.1))
    inputs, key = inputs_of(layer), jax.random.key(0)
    for call in (
        lambda: layer(*inputs, key=key),
        lambda: layer(*inputs),
        lambda: convert(layer_of(dropout_p=0.1, inference=True))(*inputs, inference=False),
    ):
        error_of(jax_fa3.UnsupportedError, call, "dropout_p", "0.1", "inference=True")


def test_deterministic_is_inference_and_deprecated():
    layer = convert(layer_of(dropout_p=0.1))
    inputs = inputs_of(layer)
    with pytest.warns(UserWarning, match="deprecated"):
        out = layer(*inputs, deterministic=True)
    assert_same_bits(out, layer(*inputs, inference=True))


def test_mistakes_are_named():
    layer = convert(layer_of())
    q, k, v = inputs_of(layer)
    error_of(ValueError, lambda: layer(q, k, v[1:]), "value", S - 1, S)
    error_of(ValueError, lambda: layer(q, k, v, jnp.ones((T, T), bool)), "mask", [T, T], [T, S])
    error_of(TypeError, lambda: layer(q, k, v, jnp.ones((T, S))), "mask", "bool")
    error_of(TypeError, lambda: layer(q, k, v, windw=1), "windw")
    wrong = lambda q, k, v: (q[1:], k, v)
    error_of(ValueError, lambda: layer(q, k, v, process_heads=wrong), "process_heads", T - 1)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"local_window_size": 0}], ids=str)
def test_a_diagonal_must_say_where_it_lies_when_the_lengths_differ(options):
    layer = convert(layer_of(), **options)
    inputs = inputs_of(layer)
    name = next(iter(options))
    error_of(ValueError, lambda: layer(*inputs), name, f"T = {T}", f"S = {S}", "causal_alignment")
    placed = convert(layer, **options, causal_alignment="top_left")
    mask = causal() if name == "is_causal" else jnp.eye(T, S, dtype=bool)
    assert_close(placed(*inputs), layer_of()(*inputs, mask))


# --- Composition --------------------------------------------------------------------------------


def loss(model, x):
    return (jax.vmap(model)(x) ** 2).sum()


def test_a_vmapped_model_gives_what_a_loop_gives():
    model = convert(Block(jax.random.key(0)))
    x = normal((3, T, SIZE))
    got = eqx.filter_jit(eqx.filter_vmap(eqx.filter_grad(loss), in_axes=(None, 0)))(
        model, x[:, None]
    )
    rows = [eqx.filter_grad(loss)(model, row[None]) for row in x]
    assert_close(
        jax.tree.leaves(got),
        jax.tree.leaves(jax.tree.map(lambda *g: jnp.stack(g), *rows)),
        scale=10,
    )


def test_an_ensemble_of_models_is_converted_whole():
    keys = jax.random.split(jax.random.key(0), 3)
    ensemble = eqx.filter_vmap(Block)(keys)
    x = normal((T, SIZE))
    run = eqx.filter_vmap(lambda model, x: model(x), in_axes=(eqx.if_array(0), None))
    assert_close(run(convert(ensemble), x), run(ensemble, x))


@pytest.mark.usefixtures("kernels")
def test_a_vmapped_model_lowers_to_one_call_a_layer():
    """Not one a head nor one a sequence, after any number of vmaps, forward and backward."""
    fields = {"qk_size": 64, "vo_size": 64, "dtype": jnp.bfloat16}
    model = convert(Block(jax.random.key(0), **fields), is_causal=True)
    parameters, rest = eqx.partition(model, eqx.is_array)
    x = normal((2, 3, T, SIZE), jnp.bfloat16)

    def forward(parameters, x):
        return jax.vmap(jax.vmap(eqx.combine(parameters, rest)))(x).astype(jnp.float32).sum()

    text = cuda_text(forward, parameters, x)
    assert kernel_calls(text) == 2
    text = cuda_text(jax.grad(forward), parameters, x)
    assert kernel_calls(text) == kernel_calls(text, helpers.BWD_TARGET) == 2


@pytest.mark.usefixtures("kernels")
def test_a_dense_mask_keeps_the_kernel_out():
    layer = convert(layer_of(qk_size=64, vo_size=64, dtype=jnp.bfloat16))
    x = normal((2, T, SIZE), jnp.bfloat16)
    run = lambda mask: lambda x: jax.vmap(lambda x: layer(x, x, x, mask))(x)
    assert kernel_calls(cuda_text(run(None), x)) == 1
    assert kernel_calls(cuda_text(run(causal(s=T)), x)) == 0


@pytest.mark.optimised
def test_a_batch_over_devices_stays_there():
    model = convert(Block(jax.random.key(0)), is_causal=True)
    parameters, rest = eqx.partition(model, eqx.is_array)
    f = lambda parameters, x: jax.vmap(eqx.combine(parameters, rest))(x)
    x = normal((8, T, SIZE))
    helpers.check_batch_over_devices(f, parameters, x)


# --- Import, example ----------------------------------------------------------------------------


def test_the_import_says_what_to_install():
    code = (
        "import sys; sys.modules['equinox'] = None; sys.path.insert(0, sys.argv[1])\n"
        "import jax_fa3.integrations\n"
        "try:\n    import jax_fa3.integrations.equinox\n"
        "except ImportError as error:\n    print(error)\n"
    )
    root = str(pathlib.Path(jax_fa3.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code, root], capture_output=True, text=True)
    assert "pip install 'jax-fa3[equinox]'" in done.stdout, done.stderr


@pytest.mark.usefixtures("kernels")
def test_the_example_learns_and_runs_the_kernel(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).resolve().parents[2] / "examples"))
    example = importlib.import_module("equinox_example")
    # Its float32 projections meet 16-bit heads.
    with jax.numpy_dtype_promotion("standard"):
        losses = example.main(steps=6)
        assert losses[-1] < losses[0]
        model = convert(example.Model(jax.random.key(0)), is_causal=True)
        text = cuda_text(jax.vmap(model), jnp.zeros((2, example.LENGTH), jnp.int32))
    assert kernel_calls(text) == 1
