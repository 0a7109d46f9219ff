"""The handler's own errors: the FFI target called directly with what Python would never send.

Each names what it got and what it wanted, comes as an exception, and the process lives on.
"""
# Options and arrays reach typed functions through ** and *.
# pyright: reportArgumentType=false, reportCallIssue=false

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FWD_TARGET, normal
from kernel_helpers import attend, check

import jax_fa3  # noqa: F401  (registers the target)

B, T, S, N, K, H = 2, 70, 90, 4, 2, 64
BF16 = jnp.bfloat16


def launch(
    shapes=None, results=None, dtypes=None, extra=(), workspace=1 << 16, attributes=None, drop=()
):
    """Calls the target with some operands, results or attributes replaced."""
    shapes = {"query": (B, T, N, H), "key": (B, S, K, H), "value": (B, S, K, H)} | (shapes or {})
    dtypes = {"query": BF16, "key": BF16, "value": BF16, "out": BF16, "lse": jnp.float32} | (
        dtypes or {}
    )
    results = {"out": (B, T, N, H), "lse": (B, N, T)} | (results or {})
    attributes = {
        "scale": np.float32(0.125),
        "is_causal": np.bool_(False),
        "diagonal": np.int64(0),
        "has_query_offset": np.bool_(False),
    } | (attributes or {})
    attributes = {n: x for n, x in attributes.items() if n not in drop}
    operands = [normal(shape, jnp.float32).astype(dtypes[n]) for n, shape in shapes.items()]
    out_types = [jax.ShapeDtypeStruct(shape, dtypes[n]) for n, shape in results.items()]
    out_types.append(jax.ShapeDtypeStruct((workspace,), jnp.uint8))
    call = jax.ffi.ffi_call(FWD_TARGET, out_types)
    out = jax.jit(lambda *a: call(*a, **attributes))(*operands, *extra)
    return operands, jax.block_until_ready(out)


def test_the_direct_call_itself_is_right():
    operands, (out, lse, _) = launch()
    check((out, jnp.swapaxes(lse, 1, 2)), *operands)


def test_a_configuration_can_be_forced():
    operands, (out, lse, _) = launch(attributes={"config": "FwdBf16Hdim64Full"})
    check((out, jnp.swapaxes(lse, 1, 2)), *operands)


OFFSET = {"has_query_offset": np.bool_(True), "is_causal": np.bool_(True)}
WRONG = {
    "key heads": ({"shapes": {"key": (B, S, 3, H), "value": (B, S, 3, H)}}, ["key", "3", "4"]),
    "key head dim": ({"shapes": {"key": (B, S, K, 128)}}, ["key", "128", "64"]),
    "value length": ({"shapes": {"value": (B, 80, K, H)}}, ["value", "80", "90"]),
    "value head dim": ({"shapes": {"value": (B, S, K, 32)}}, ["value", "32", "64"]),
    "batch": ({"shapes": {"key": (3, S, K, H)}}, ["key", "3", "2"]),
    "rank": ({"shapes": {"key": (S, K, H)}}, ["key", "rank"]),
    "rank of query": ({"shapes": {"query": (T, H)}}, ["query", "70"]),
    "head dim without a kernel": (
        {
            "shapes": {"query": (B, T, N, 96), "key": (B, S, K, 96), "value": (B, S, K, 96)},
            "results": {"out": (B, T, N, 96)},
        },
        ["96", "FwdBf16Hdim64Full"],
    ),
    "dtype": (
        {"dtypes": dict.fromkeys(("query", "key", "value", "out"), jnp.float32)},
        ["query", "dtype"],
    ),
    "dtype of key": ({"dtypes": {"key": jnp.float16}}, ["key", "dtype"]),
    "dtype of out": ({"dtypes": {"out": jnp.float32}}, ["out", "dtype"]),
    "dtype of lse": ({"dtypes": {"lse": BF16}}, ["lse", "float32"]),
    "shape of out": ({"results": {"out": (B, T, N, 128)}}, ["out", "128", "64"]),
    "shape of lse": ({"results": {"lse": (B, T, N)}}, ["lse", "70", "4"]),
    "workspace": ({"workspace": 3}, ["workspace", "3 bytes"]),
    "scale of zero": ({"attributes": {"scale": np.float32(0)}}, ["scale", "0"]),
    "negative scale": ({"attributes": {"scale": np.float32(-2)}}, ["scale", "-2"]),
    "NaN scale": ({"attributes": {"scale": np.float32(np.nan)}}, ["scale", "nan"]),
    "huge diagonal": (
        {"attributes": {"diagonal": np.int64(2**40), "is_causal": np.bool_(True)}},
        ["diagonal", str(2**40)],
    ),
    "offset missing": ({"attributes": OFFSET}, ["0", "1"]),
    "offset not announced": ({"extra": (jnp.zeros(B, jnp.int32),)}, ["1", "0"]),
    "offset shape": (
        {"attributes": OFFSET, "extra": (jnp.zeros(3, jnp.int32),)},
        ["query_offset", "3", "2"],
    ),
    "offset dtype": (
        {"attributes": OFFSET, "extra": (jnp.zeros(B, jnp.float32),)},
        ["query_offset", "int32"],
    ),
    "attribute missing": ({"drop": ("diagonal",)}, ["diagonal"]),
    "config without a kernel": ({"attributes": {"config": "Nonesuch"}}, ["config", "Nonesuch"]),
    "config for another mask": (
        {"attributes": {"config": "FwdBf16Hdim64Causal"}},
        ["FwdBf16Hdim64Causal", "full"],
    ),
    "config of another type": ({"attributes": {"config": np.int64(1)}}, ["config", "string"]),
    "attribute of another type": ({"attributes": {"scale": np.float64(1)}}, ["scale"]),
}


@pytest.mark.parametrize(("changes", "words"), WRONG.values(), ids=WRONG)
def test_a_wrong_call_is_an_error_with_words(changes, words):
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        launch(**changes)
    message = str(caught.value)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


def test_several_mismatches_are_reported_at_once():
    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        launch(shapes={"value": (B, 80, K, H)}, results={"lse": (B, T, N)})
    for word in (FWD_TARGET, "value", "lse", "expected", "got"):
        assert word in str(caught.value)


def test_the_process_lives_on_after_errors():
    args = normal((B, T, N, H), BF16), normal((B, S, K, H), BF16), normal((B, S, K, H), BF16)
    before = jax.jit(attend)(*args)
    for changes, _ in list(WRONG.values())[:6]:
        with pytest.raises(jax.errors.JaxRuntimeError):
            launch(**changes)
    after = jax.jit(attend)(*args)
    check(after, *args)
    assert (np.asarray(before[0]) == np.asarray(after[0])).all()
