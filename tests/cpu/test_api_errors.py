"""Each message names the argument, what it got and what it wanted; all mismatches at once."""
# Options and arrays reach typed functions through ** and *.
# pyright: reportArgumentType=false, reportCallIssue=false
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import functools

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import error_of, normal, qkv

import jax_fa3

attend = jax_fa3.dot_product_attention
DOORS = {
    "attention": attend,
    "reference": lambda **kw: jax_fa3.reference.dot_product_attention(**kw),
}

B, T, S, N, K, H = 2, 5, 7, 4, 2, 8


def ints(*shape):
    return jnp.ones(shape, jnp.int32)


def trio(change):
    """query, key and value, changed alike."""
    names = "query", "key", "value"
    return {n: change(x) for n, x in zip(names, qkv(batch=(B,), t=T, s=S, n=N, k=K, h=H))}


# (what is wrong, replaced arguments, words of the message: argument, value, wish)
WRONG = {
    # Shapes.
    "key heads do not divide": (
        {"key": normal((B, S, 3, H)), "value": normal((B, S, 3, H))},
        ["key", "3", "4"],
    ),
    "more key heads than query heads": (
        {"key": normal((B, S, 8, H)), "value": normal((B, S, 8, H))},
        ["key", "8", "4"],
    ),
    "no key heads": ({"key": normal((B, S, 0, H)), "value": normal((B, S, 0, H))}, ["key", "0"]),
    "value heads differ from key heads": ({"value": normal((B, S, 4, H))}, ["value", "4", "2"]),
    "head dims differ": ({"key": normal((B, S, K, 16))}, ["key", "16", "8"]),
    "value length differs": ({"value": normal((B, 6, K, H))}, ["value", "6", "7"]),
    "batch of key differs": ({"key": normal((3, S, K, H))}, ["key", "3", "2"]),
    "batch of value differs": ({"value": normal((1, S, K, H))}, ["value", "1", "2"]),
    "rank of query": ({"query": normal((B, 1, 1, T, N, H))}, ["query"]),
    "rank of value": ({"value": normal((S, H))}, ["value"]),
    "bias": ({"bias": normal((B, N, T, 6))}, ["bias", "6", "7"]),
    "bias heads": ({"bias": normal((B, 3, T, S))}, ["bias", "3", "4"]),
    "bias rank": ({"bias": normal((1, B, N, T, S))}, ["bias", "5"]),
    "mask": ({"mask": jnp.ones((B, N, 4, S), bool)}, ["mask", "4", "5"]),
    "query_seq_lengths": ({"query_seq_lengths": ints(3)}, ["query_seq_lengths", "(3,)", "(2,)"]),
    "query_seq_lengths scalar": (
        {"query_seq_lengths": ints()},
        ["query_seq_lengths", "()", "(2,)"],
    ),
    "query_seq_lengths of one": (
        {"query_seq_lengths": ints(1)},
        ["query_seq_lengths", "(1,)", "(2,)"],
    ),
    "key_value_seq_lengths": (
        {"key_value_seq_lengths": ints(2, 1)},
        ["key_value_seq_lengths", "(2, 1)", "(2,)"],
    ),
    "query_segment_ids": (
        {"query_segment_ids": ints(B, S), "key_value_segment_ids": ints(B, S)},
        ["query_segment_ids", "(2, 7)", "(2, 5)"],
    ),
    "key_value_segment_ids": (
        {"query_segment_ids": ints(B, T), "key_value_segment_ids": ints(B, T)},
        ["key_value_segment_ids", "(2, 5)", "(2, 7)"],
    ),
    "default key_value_segment_ids": (
        {"query_segment_ids": ints(B, T)},
        ["key_value_segment_ids", "5", "7"],
    ),
    "query_offset": (
        {"query_offset": ints(3), "is_causal": True},
        ["query_offset", "(3,)", "(2,)"],
    ),
    "sinks": ({"sinks": normal((3,))}, ["sinks", "(3,)", "(4,)"]),
    "sinks with a batch": ({"sinks": normal((B, N))}, ["sinks", "(2, 4)", "(4,)"]),
    "scale": ({"scale": normal((4,))}, ["scale", "(4,)"]),
    "scale beyond float64": ({"scale": -(10**400)}, ["scale", "-inf", "a finite float32"]),
    # Dtypes.
    "key dtype": ({"key": normal((B, S, K, H), jnp.bfloat16)}, ["key", "bfloat16", "float32"]),
    "value dtype": ({"value": normal((B, S, K, H), jnp.float16)}, ["value", "float16", "float32"]),
    "integer inputs": (trio(lambda x: x.astype(jnp.int32)), ["query", "int32"]),
    "complex inputs": (trio(lambda x: x.astype(jnp.complex64)), ["query", "complex64"]),
    "float mask": ({"mask": normal((T, S))}, ["mask", "float32", "bool"]),
    "integer mask": ({"mask": ints(T, S)}, ["mask", "int32", "bool"]),
    "float lengths": (
        {"key_value_seq_lengths": jnp.ones(B)},
        ["key_value_seq_lengths", "float32", "integer"],
    ),
    "bool lengths": (
        {"query_seq_lengths": jnp.ones(B, bool)},
        ["query_seq_lengths", "bool", "integer"],
    ),
    "float ids": (
        {"query_segment_ids": jnp.ones((B, T)), "key_value_segment_ids": ints(B, S)},
        ["query_segment_ids", "float32", "integer"],
    ),
    "float offset": (
        {"query_offset": jnp.float32(1), "is_causal": True},
        ["query_offset", "float32", "integer"],
    ),
    "integer sinks": ({"sinks": ints(N)}, ["sinks", "int32"]),
    "out_dtype without float8": ({"out_dtype": jnp.bfloat16}, ["out_dtype", "bfloat16", "float8"]),
    "descale without float8": ({"key_descale": jnp.float32(2)}, ["key_descale", "float8"]),
    # Values and contradictions.
    "negative window": ({"local_window_size": (-1, 2)}, ["local_window_size", "-1"]),
    "negative window int": ({"local_window_size": -3}, ["local_window_size", "-3"]),
    "window of three": ({"local_window_size": (1, 2, 3)}, ["local_window_size", "(1, 2, 3)"]),
    "fractional window": ({"local_window_size": (1.5, 0)}, ["local_window_size", "1.5"]),
    "zero soft cap": ({"logits_soft_cap": 0.0}, ["logits_soft_cap", "0"]),
    "negative soft cap": ({"logits_soft_cap": -2.5}, ["logits_soft_cap", "-2.5"]),
    "soft cap beyond float32": ({"logits_soft_cap": 1e39}, ["logits_soft_cap", "1e+39", "1e30"]),
    "soft cap beyond float64": ({"logits_soft_cap": 10**400}, ["logits_soft_cap", "inf", "1e30"]),
    "vanishing soft cap": ({"logits_soft_cap": 1e-46}, ["logits_soft_cap", "1e-46", "1e-30"]),
    "empty checkpoint name": ({"checkpoint_name": ""}, ["checkpoint_name", "''", "None"]),
    "soft cap of NaN": ({"logits_soft_cap": float("nan")}, ["logits_soft_cap", "nan"]),
    "alignment": (
        {"causal_alignment": "left"},
        ["causal_alignment", "left", "top_left", "bottom_right"],
    ),
    "key_value_segment_ids alone": (
        {"key_value_segment_ids": ints(B, S)},
        ["key_value_segment_ids", "query_segment_ids"],
    ),
    "offset and bottom_right": (
        {"query_offset": ints(), "causal_alignment": "bottom_right", "is_causal": True},
        ["query_offset", "bottom_right"],
    ),
    "offset and bottom_right without causal": (
        {"query_offset": ints(), "causal_alignment": "bottom_right"},
        ["query_offset", "bottom_right"],
    ),
}


def arguments(changes):
    q, k, v = qkv(batch=(B,), t=T, s=S, n=N, k=K, h=H)
    return {"query": q, "key": k, "value": v, **changes}


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_a_mistake_is_named_with_value_and_wish(door, changes, words):
    error_of((ValueError, TypeError), lambda: door(**arguments(changes)), *words)


@pytest.mark.parametrize(
    "name", ["key heads do not divide", "negative window", "offset and bottom_right", "mask"]
)
def test_mistakes_of_value_and_shape_are_value_errors_and_raised_while_tracing(name):
    changes, words = WRONG[name]
    static = {n: x for n, x in changes.items() if not hasattr(x, "shape")}
    args = {n: x for n, x in arguments(changes).items() if n not in static}
    trace = lambda: jax.eval_shape(lambda args: attend(**args, **static), args)
    error_of(ValueError, trace, *words)
    assert not issubclass(ValueError, jax_fa3.UnsupportedError)


def test_all_mismatches_are_reported_at_once():
    changes = {
        "key": normal((3, S, 3, 16)),
        "value": normal((B, 6, 4, H), jnp.bfloat16),
        "sinks": normal((9,)),
        "mask": normal((T, S)),
        "query_seq_lengths": ints(11),
        "logits_soft_cap": -1.0,
        "local_window_size": (-5, 0),
    }
    error_of(
        (ValueError, TypeError),
        lambda: attend(**arguments(changes)),
        *("key", "16", "value", "bfloat16", "sinks", "(9,)", "mask"),
        *("query_seq_lengths", "(11,)", "logits_soft_cap", "-1.0", "local_window_size", "-5"),
    )


@pytest.mark.parametrize("implementation", ["fa2", "", "FA3", 3, (), ("fa3", "cudnn")])
def test_unknown_implementation(implementation):
    error_of(
        (ValueError, TypeError),
        lambda: attend(*qkv(), implementation=implementation),
        "implementation",
        "fa3",
        "xla",
    )


@pytest.mark.parametrize("name", ["dropout_rate", "dropout_rng", "casual"])
def test_unknown_keywords_are_refused(name):
    error_of(TypeError, lambda: attend(*qkv(), **{name: 0.1}), name)


@pytest.mark.parametrize("name", ["deterministic_backward", "checkpoint_name", "implementation"])
def test_the_reference_refuses_what_it_could_only_ignore(name):
    value = {"deterministic_backward": True, "checkpoint_name": "x", "implementation": "xla"}[name]
    call = lambda: jax_fa3.reference.dot_product_attention(*qkv(), **{name: value})
    error_of((ValueError, TypeError), call, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("is_causal", jnp.asarray(True)),
        ("local_window_size", jnp.asarray(3)),
        ("logits_soft_cap", jnp.asarray(3.0)),
    ],
)
def test_a_traced_value_for_a_static_option_is_named(name, value):
    trace = lambda: jax.eval_shape(lambda x: attend(*qkv(), **{name: x}), value)
    error_of((ValueError, TypeError), trace, name)


@pytest.mark.parametrize(
    "changes",
    [
        {"query_descale": jnp.ones((B, 3, N))},
        {"key_descale": jnp.ones((B, 3))},
        {"value_descale": jnp.ones((B, 9, K))},
        {"key_descale": ints()},
        {"query_descale": jnp.ones((B, N))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_descale_shapes_and_dtypes(changes):
    f8 = {n: x.astype(jnp.float8_e4m3fn) for n, x in arguments({}).items()}
    name, value = next(iter(changes.items()))
    shape_or_dtype = "int32" if value.dtype == jnp.int32 else str(value.shape)
    error_of((ValueError, TypeError), lambda: attend(**f8, **changes), name, shape_or_dtype)


@pytest.mark.parametrize("dtype", ["float8_e5m2", "float8_e4m3b11fnuz"])
def test_other_float8_kinds_are_refused(dtype):
    args = {n: x.astype(dtype) for n, x in arguments({}).items()}
    error_of((ValueError, TypeError), lambda: attend(**args), "query", dtype)


# --- varlen ----------------------------------------------------------------------------------

varlen = jax_fa3.varlen_attention

WRONG_VARLEN = {
    "cu_seqlens_q dtype": (
        {"cu_seqlens_q": jnp.asarray([0.0, 5.0])},
        ["cu_seqlens_q", "float32", "int"],
    ),
    "cu_seqlens_q rank": ({"cu_seqlens_q": ints(2, 2)}, ["cu_seqlens_q", "(2, 2)"]),
    "cu_seqlens_q empty": ({"cu_seqlens_q": ints(0)}, ["cu_seqlens_q", "(0,)"]),
    "cu_seqlens_k count": ({"cu_seqlens_k": ints(4)}, ["cu_seqlens_k", "(4,)", "(3,)"]),
    "cu_seqlens_k missing": ({"cu_seqlens_k": None}, ["cu_seqlens_k", "7", "5"]),
    "rank": ({"query": normal((1, T, N, H))}, ["query", "(1, 5, 4, 8)"]),
    "heads": ({"key": normal((S, 3, H)), "value": normal((S, 3, H))}, ["key", "3", "4"]),
    "value length": ({"value": normal((6, K, H))}, ["value", "6", "7"]),
    "dtype": ({"key": normal((S, K, H), jnp.bfloat16)}, ["key", "bfloat16", "float32"]),
    "alignment": ({"causal_alignment": "middle"}, ["causal_alignment", "middle"]),
    "window": ({"local_window_size": (-1, 0)}, ["local_window_size", "-1"]),
    "soft cap": ({"logits_soft_cap": 0}, ["logits_soft_cap", "0"]),
    "sinks": ({"sinks": normal((5,))}, ["sinks", "(5,)", "(4,)"]),
    "implementation": ({"implementation": "fa2"}, ["implementation", "fa2"]),
}


@pytest.mark.parametrize(("changes", "words"), WRONG_VARLEN.values(), ids=WRONG_VARLEN)
def test_a_mistake_in_a_varlen_call_is_named(changes, words):
    arguments = {
        "query": normal((T, N, H)),
        "key": normal((S, K, H)),
        "value": normal((S, K, H)),
        "cu_seqlens_q": jnp.asarray([0, 2, 5]),
        "cu_seqlens_k": jnp.asarray([0, 3, 7]),
    }
    error_of((ValueError, TypeError), lambda: varlen(**{**arguments, **changes}), *words)


def test_is_supported_and_explain_raise_the_same_mistakes():
    for question in (jax_fa3.is_supported, jax_fa3.explain):
        bad = functools.partial(question, *qkv(), local_window_size=(-1, 0))
        helpers.error_of(ValueError, bad, "local_window_size", "-1")


def test_messages_show_numpy_inputs_as_they_are():
    q, k, v = (np.asarray(x) for x in qkv())
    error_of((ValueError, TypeError), lambda: attend(q, k[..., :4], v), "key", "4", "8")
