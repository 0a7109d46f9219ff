"""Data, oracle, error bounds and readings of the lowered program, shared by every test.

The oracle restates the public contract in dense jnp and shares no code with the package, not even
with `jax_fa3.reference`, which it checks.
"""
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

from __future__ import annotations

import collections
import functools
import importlib
import os
import re
import types
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

# Another seed draws other numbers for every test; the same seed repeats them bit for bit.
SESSION_SEED = int(os.environ.get("JAX_FA3_TEST_SEED", "0"))


# ---------------------------------------------------------------------------------------------
# What this machine has.
# ---------------------------------------------------------------------------------------------


def required(variable: str) -> bool:
    """Whether the environment promises what `variable` names (JAX_FA3_REQUIRE_GPU and the like)."""
    return os.environ.get(variable, "0") not in ("", "0")


@functools.cache
def missing_gpu() -> str | None:
    """Why the kernels cannot run here, or None where they can."""
    try:
        devices = jax.devices("cuda")
    except RuntimeError as error:
        return f"no CUDA device ({str(error).splitlines()[0]})"
    found = sorted({str(device.compute_capability) for device in devices})
    return None if found == ["9.0"] else f"needs compute capability 9.0, found {found}"


@functools.cache
def missing_extension() -> str | None:
    """Why the compiled extension cannot be used here, or None where it can."""
    try:
        importlib.import_module("jax_fa3._jax_fa3")
    except ImportError as error:
        return f"the extension jax_fa3._jax_fa3 does not import ({error})"
    return None


def fake_extension(*, driver: int = 13000, api: tuple[int, int] = (0, 1), workspace: int = 256):
    """A module with the extension's interface and no kernel, for what only the lowering decides."""
    module = types.ModuleType("jax_fa3._jax_fa3")
    shape = (
        "dtype",
        "batch",
        "seqlen_q",
        "seqlen_k",
        "heads_q",
        "heads_k",
        "head_dim",
        "is_causal",
    )

    def describe_plan(*args, **kwargs):
        return f"fake plan {dict(zip(shape, args)) | kwargs}"

    def fwd_workspace_bytes(*args, diagonal=0, **kwargs):
        assert isinstance(diagonal, int)
        assert not set(kwargs) - set(shape)
        assert len(args) + len(kwargs) == len(shape)
        return workspace

    def bwd_workspace_bytes(*args, deterministic=False, **kwargs):
        assert isinstance(deterministic, bool)
        return fwd_workspace_bytes(*args, **kwargs) + 4 * deterministic

    module.registrations = dict  # type: ignore[attr-defined]  (nothing to register)
    module.supported_head_dims = lambda: [64, 128, 256]  # type: ignore[attr-defined]
    module.ffi_api_version = lambda: api  # type: ignore[attr-defined]
    module.driver_version = lambda: driver  # type: ignore[attr-defined]
    module.cuda_version = lambda: 13000  # type: ignore[attr-defined]
    module.kernels = lambda: ["FakeFwd"]  # type: ignore[attr-defined]
    module.bwd_head_dims = lambda: [64, 128, 256]  # type: ignore[attr-defined]
    module.describe_plan = describe_plan  # type: ignore[attr-defined]
    module.describe_bwd_plan = describe_plan  # type: ignore[attr-defined]
    module.fwd_workspace_bytes = fwd_workspace_bytes  # type: ignore[attr-defined]
    module.bwd_workspace_bytes = bwd_workspace_bytes  # type: ignore[attr-defined]
    return module


# ---------------------------------------------------------------------------------------------
# Data.
# ---------------------------------------------------------------------------------------------

_state = {"test": 0, "draw": 0}


def seed_from(test_id: str) -> None:
    """Start the numbers of one test (conftest calls it)."""
    _state.update(test=zlib.crc32(test_id.encode()), draw=0)


def fresh_rng() -> np.random.Generator:
    """A generator that no earlier call of this test has returned."""
    _state["draw"] += 1
    return np.random.default_rng([SESSION_SEED, _state["test"], _state["draw"]])


def normal(shape, dtype=jnp.float32) -> jax.Array:
    """Independent N(0, 1) numbers, rounded to `dtype`."""
    return jnp.asarray(fresh_rng().standard_normal(shape, dtype=np.float32)).astype(dtype)


def integers(low: int, high: int, shape, dtype=jnp.int32) -> jax.Array:
    """Uniform integers in [low, high], both ends included."""
    return jnp.asarray(fresh_rng().integers(low, high, shape, endpoint=True), dtype)


def make_qkv(shape, dtype=jnp.float32) -> tuple[jax.Array, jax.Array, jax.Array]:
    """query [B, T, N, H], key [B, S, K, H] and value [B, S, K, D] of a `shapes.Shape`, N(0, 1)."""
    return normal(shape.query, dtype), normal(shape.key, dtype), normal(shape.value, dtype)


def qkv(*, batch=(2,), t=5, s=7, n=4, k=2, h=8, d=None, dtype=jnp.float32):
    """make_qkv for a test that wants to choose its own small sizes; `batch` may have any rank."""
    batch = tuple(batch)
    return (
        normal((*batch, t, n, h), dtype),
        normal((*batch, s, k, h), dtype),
        normal((*batch, s, k, h if d is None else d), dtype),
    )


def bf16(**sizes):
    """qkv that the kernels take."""
    return qkv(**{"h": 64, "t": 6, "s": 10, "dtype": jnp.bfloat16, **sizes})


# Both doors of the package: float32 takes the xla function, bfloat16 of head dim 64 the primitives.
CASES = {
    "xla": {"dtype": jnp.float32, "h": 8},
    "primitive": {"dtype": jnp.bfloat16, "h": 64},
}
both_doors = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def poison(x: jax.Array, after, value=float("nan"), axis: int = -3) -> jax.Array:
    """`x` with `value` at every index >= `after` of `axis`.

    `after` is an int, or one int for each row of the first dimension.
    """
    axis %= x.ndim
    index = jnp.arange(x.shape[axis]).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    after = jnp.asarray(after)
    after = after.reshape(after.shape + (1,) * (x.ndim - 1)) if after.ndim else after
    return jnp.where(index >= after, jnp.asarray(value, x.dtype), x)


# ---------------------------------------------------------------------------------------------
# The oracle: the contract, one sentence at a time.
# ---------------------------------------------------------------------------------------------


def wide(dtype) -> np.dtype:
    """The dtype of lse, and of exact results: float64 for float64, else float32."""
    return np.dtype(np.float64 if np.dtype(dtype) == np.float64 else np.float32)


def _per_row(x, batch) -> jax.Array:
    """[*batch] from a scalar, from [*batch], and from the [1] that stands for no batch."""
    x = jnp.asarray(x)
    return jnp.broadcast_to(x if x.shape == batch else x.reshape(()), batch)


def visible(
    batch,
    t,
    s,
    *,
    mask=None,
    is_causal=False,
    causal_alignment="top_left",
    query_offset=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
):
    """Which key each query sees: bool, broadcastable to [*batch, N, T, S]."""
    integer = jnp.int64 if jax.config.jax_enable_x64 else jnp.int32
    q_index = jnp.arange(t, dtype=integer)[:, None]
    k_index = jnp.arange(s, dtype=integer)[None, :]
    q_len, k_len = (
        jnp.clip(_per_row(size if length is None else length, batch).astype(integer), 0, size)
        for length, size in ((query_seq_lengths, t), (key_value_seq_lengths, s))
    )
    of_row = lambda x: x[..., None, None]  # [*batch] against [T, S]

    see = (q_index < of_row(q_len)) & (k_index < of_row(k_len))
    if query_offset is not None:
        # Past 2^30 every diagonal is out of sight, and sums with it would wrap.
        offset = jnp.clip(_per_row(query_offset, batch).astype(integer), -(2**30), 2**30)
    elif causal_alignment == "bottom_right":
        offset = k_len - q_len  # the last valid query stands on the last valid key
    else:
        offset = jnp.zeros(batch, integer)
    position = q_index + of_row(offset)
    if is_causal:
        see &= k_index <= position
    if local_window_size is not None:
        left, right = (
            local_window_size
            if isinstance(local_window_size, tuple)
            else (local_window_size, local_window_size)
        )
        see &= True if left is None else k_index >= position - left
        see &= True if right is None else k_index <= position + right
    if query_segment_ids is not None:
        q_ids = jnp.asarray(query_segment_ids)
        k_ids = q_ids if key_value_segment_ids is None else jnp.asarray(key_value_segment_ids)
        see &= (
            jnp.broadcast_to(q_ids, (*batch, t))[..., :, None]
            == (jnp.broadcast_to(k_ids, (*batch, s))[..., None, :])
        )
    see = see[..., None, :, :]
    return see if mask is None else see & mask


def oracle(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    logits_soft_cap=None,
    sinks=None,
    query_seq_lengths=None,
    **rules,
):
    """out [*batch, T, N, D] and lse [*batch, T, N], dense, in float32 (float64 for float64)."""
    dtype = wide(query.dtype)
    *batch, t, n, h = query.shape
    batch, (s, k) = tuple(batch), key.shape[-3:-1]
    q, k_, v = (x.astype(dtype) for x in (query, key, value))
    k_, v = (jnp.repeat(x, n // k, axis=-2) for x in (k_, v))  # head n reads head n // (N // K)
    scale = jnp.asarray(1 / np.sqrt(h) if scale is None else scale).astype(dtype)

    with jax.default_matmul_precision("highest"):
        x = jnp.einsum("...tnh,...snh->...nts", q, k_) * scale
        if bias is not None:
            x += bias.astype(dtype)
        if logits_soft_cap is not None:
            x = logits_soft_cap * jnp.tanh(x / logits_soft_cap)
        see = visible(batch, t, s, mask=mask, query_seq_lengths=query_seq_lengths, **rules)
        see = jnp.broadcast_to(see, x.shape)
        x = jnp.where(see, x, -jnp.inf)

        sink = jnp.full((n, 1), -jnp.inf, dtype)
        if sinks is not None:
            sink = sinks.astype(dtype)[:, None]
        top = jnp.maximum(jnp.max(x, axis=-1, initial=-jnp.inf), sink)
        top = jax.lax.stop_gradient(jnp.where(jnp.isneginf(top), 0, top))
        p = jnp.where(see, jnp.exp(jnp.where(see, x - top[..., None], 0)), 0)
        denominator = jnp.sum(p, axis=-1) + jnp.exp(sink - top)
        alive = denominator > 0
        safe = jnp.where(alive, denominator, 1)
        out = jnp.einsum("...nts,...snd->...tnd", p / safe[..., None], v)
        lse = jnp.swapaxes(jnp.where(alive, jnp.log(safe) + top, -jnp.inf), -1, -2)

    if query_seq_lengths is not None:
        valid = visible(batch, t, 1, query_seq_lengths=query_seq_lengths)[..., 0, :, :]
        lse = jnp.where(valid, lse, -jnp.inf)
        out = jnp.where(valid[..., None], out, 0)
    return out, lse


def exact(*args, **options):
    """The oracle in float32 on the rounded inputs, gradients back in the inputs' dtype."""
    return oracle(*(x.astype(jnp.float32) for x in args), **options)


def plain(query, key, value, see=None, *, scale=None):
    """Attention as plain JAX writes it in the inputs' own dtype: the yardstick of the error bounds.

    Logits and softmax in float32, probabilities and output in the inputs' dtype: the arithmetic
    of `jax.nn.dot_product_attention(implementation="xla")`. Returns (out, lse float32).
    """
    n, h = query.shape[-2:]
    key, value = (jnp.repeat(x, n // x.shape[-2], axis=-2) for x in (key, value))
    scale = 1 / np.sqrt(h) if scale is None else scale
    x = jnp.einsum("...tnh,...snh->...nts", query, key, preferred_element_type=jnp.float32)
    x = x * jnp.float32(scale)
    if see is not None:
        x = jnp.where(see, x, -0.7 * float(jnp.finfo(jnp.float32).max))
    probs = jax.nn.softmax(x, axis=-1).astype(value.dtype)
    lse = jnp.swapaxes(jax.nn.logsumexp(x, axis=-1), -1, -2)
    return jnp.einsum("...nts,...snd->...tnd", probs, value), lse


# ---------------------------------------------------------------------------------------------
# Comparisons. NaN never passes unless a test asks for it.
# ---------------------------------------------------------------------------------------------

# Rounding left over where the yardstick happens to be exact: a few ulps of float32 accumulation.
EPSILON = 16 * float(np.finfo(np.float32).eps)

# Absolute and relative tolerance for values of order one against the oracle: some ulps of the
# dtype. Wide enough for another order of summation, far below what a wrong mask entry changes.
TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def _wide(x) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(wide(x.dtype) if x.dtype.kind not in "biu" else np.float64)


def assert_within_reference_error(actual, yardstick, exact, factor=2, epsilon=EPSILON):
    """Error of `actual` at most `factor` times the error of `yardstick`, both against `exact`.

    Held for the largest error and for the root mean square. `yardstick` is plain JAX in the
    same dtype on the same inputs, so the bound survives another GPU. `epsilon` is relative to the
    largest exact value. Infinities must agree; NaN anywhere fails. The arguments may be trees.
    """

    def one(path, actual, yardstick, exact):
        where = jax.tree_util.keystr(path)
        actual, yardstick, exact = _wide(actual), _wide(yardstick), _wide(exact)
        assert actual.shape == exact.shape == yardstick.shape, (actual.shape, exact.shape)
        assert not np.isnan(exact).any(), f"{where}: the exact value is NaN: choose other inputs"
        _no_nan(actual, where)
        infinite = np.isinf(exact)
        assert np.array_equal(actual[infinite], exact[infinite]), f"{where}: infinities differ"
        assert np.isfinite(actual[~infinite]).all(), f"{where}: {_where(~np.isfinite(actual))}"
        if infinite.all():
            return
        error, allowed = (np.abs(x - exact)[~infinite] for x in (actual, yardstick))
        slack = epsilon * max(1.0, float(np.abs(exact[~infinite]).max()))
        for name, norm in (("largest", np.max), ("rms", lambda e: np.sqrt(np.mean(e**2)))):
            got, bound = float(norm(error)), factor * float(norm(allowed)) + slack
            assert got <= bound, (
                f"{where}: {name} error {got:.3e}, bound {bound:.3e} = "
                f"{factor} x {float(norm(allowed)):.3e} + {slack:.1e}"
            )

    jax.tree_util.tree_map_with_path(one, actual, yardstick, exact)


def _where(bad: np.ndarray) -> str:
    count, first = int(bad.sum()), np.argwhere(bad)[:4].tolist()
    return f"{count} of {bad.size} entries, first at {first}"


def _no_nan(x: np.ndarray, where: str = "") -> None:
    assert not np.isnan(x).any(), f"{where}: NaN in {_where(np.isnan(x))}"


def assert_close(actual, expected, dtype=None, scale: float = 1.0):
    """Equal up to TOLERANCE of `dtype` (default: the coarser one); infinities equal, no NaN."""

    def one(actual, expected):
        actual, expected = jnp.asarray(actual), jnp.asarray(expected)
        dtypes = [actual.dtype, expected.dtype] if dtype is None else [dtype]
        tol = scale * max(TOLERANCE[np.dtype(d).name] for d in dtypes)
        a, b = _wide(actual), _wide(expected)
        assert a.shape == b.shape, f"shape {a.shape}, expected {b.shape}"
        _no_nan(a)
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)

    chex.assert_trees_all_equal_structs(actual, expected)
    jax.tree.map(one, actual, expected)


def assert_same_bits(actual, expected, message=""):
    """Bit for bit equal, NaN payloads and signed zeros included; reports the first coordinates."""

    def one(path, actual, expected):
        a, b = np.asarray(actual), np.asarray(expected)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        unsigned = np.dtype(f"u{a.dtype.itemsize}")
        differ = np.ascontiguousarray(a).view(unsigned) != np.ascontiguousarray(b).view(unsigned)
        if differ.any():
            first = tuple(np.argwhere(differ)[0])
            raise AssertionError(
                f"{message} {jax.tree_util.keystr(path)}: bits differ in {_where(differ)}; "
                f"there {a[first]!r} against {b[first]!r}"
            )

    jax.tree_util.tree_map_with_path(one, actual, expected)


def assert_finite(tree):
    """No NaN and no infinity anywhere."""
    chex.assert_tree_all_finite(tree)


def pullback_of(f):
    """(args, cotangent) -> (f(*args), gradients of every argument), compiled once a shape."""

    @jax.jit
    def both(args, cotangent):
        out, pullback = jax.vjp(f, *args)
        return out, pullback(cotangent)

    return both


def value_and_pullback(f, args, cotangent):
    """(f(*args), gradients of every argument) in one compilation."""
    return pullback_of(f)(args, cotangent)


def cotangents(f, args):
    """N(0, 1) cotangents for the outputs of f(*args)."""
    return jax.tree.map(lambda o: normal(o.shape, o.dtype), jax.eval_shape(f, *args))


# ---------------------------------------------------------------------------------------------
# Errors.
# ---------------------------------------------------------------------------------------------


def error_of(kind, call, *words) -> str:
    """The message of the `kind` that call() raises; every word of `words` must be in it."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    # (2, 3) and [2, 3] say the same.
    same = str.maketrans("()", "[]")
    plain_text = message.translate(same).replace(",]", "]")
    words = [str(word).translate(same).replace(",]", "]") for word in words]
    missing = [word for word in words if word not in plain_text]
    assert not missing, f"{missing} not in the message: {message}"
    return message


# ---------------------------------------------------------------------------------------------
# The lowered program.
# ---------------------------------------------------------------------------------------------

FWD_TARGET = "jax_fa3_fwd_v1"
BWD_TARGET = "jax_fa3_bwd_v1"


def cuda_text(f, *args) -> str:
    """The StableHLO of f(*args) lowered for CUDA; needs no GPU."""

    def fresh(*args):  # jit keeps the lowering of a function that it has seen
        return f(*args)

    return jax.jit(fresh).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def _functions(text: str) -> dict[str, str]:
    found = {}
    for chunk in re.split(r"(?m)^(?=\s*func\.func )", text)[1:]:
        (name,) = re.findall(r"^\s*func\.func (?:\w+ )?@\"?([\w.$-]+)", chunk)
        found[name] = chunk
    return found


def kernel_calls(text: str, target: str = FWD_TARGET) -> int:
    """How often @main runs `target`, following calls of functions (a loop's body counts once)."""
    bodies = _functions(text)

    @functools.cache
    def count(name: str) -> int:
        callees = re.findall(r"(?<!_)call @\"?([\w.$-]+)", bodies[name])
        own = len(re.findall(rf"custom_call @\"?{re.escape(target)}\"?\(", bodies[name]))
        return own + sum(count(callee) for callee in callees)

    return count("main")


def kernel_lines(text: str, target: str = FWD_TARGET) -> list[str]:
    """The custom calls of `target` as written, one line each."""
    return [line.strip() for line in text.splitlines() if f"@{target}(" in line]


def signature(line: str) -> tuple[list[str], list[str]]:
    """Operand and result types of a custom call, such as (["2x8x4x64xbf16"], ["2x4x8xf32"])."""
    types = line[line.rindex(" : (") :]
    operands, results = types.split("->")
    read = lambda part: re.findall(r"tensor<([^>]*)>", part)
    return read(operands), read(results)


def attributes(line: str) -> dict[str, str]:
    """A custom call's attributes, name to MLIR text."""
    (config,) = re.findall(r"mhlo.backend_config = \{([^}]*)\}", line)
    return dict(item.split(" = ", 1) for item in config.split(", "))


def float_of(text: str) -> np.float32:
    """The value of an f32 attribute's MLIR text."""
    value, kind = text.split(" : ")
    assert kind == "f32"
    if value.startswith("0x"):
        return np.frombuffer(bytes.fromhex(value[2:]), ">f4")[0]
    return np.float32(value)


def layouts(line: str) -> list[tuple[list[int], int]]:
    """Of each operand, then of each result of a custom call: dims from minor to major, rank."""
    found = re.findall(r"dense<(\[[\d, ]*\]|\d+)> : tensor<(\d+)xindex>", line)
    return [([int(d) for d in re.findall(r"\d+", order)], int(rank)) for order, rank in found]


def offload_policy(*names, saved=()):
    """The remat policy that sends values of these names to the host and keeps those `saved`."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(saved),
        names_which_can_be_offloaded=list(names),
        offload_src="device",
        offload_dst="pinned_host",
    )


# ---------------------------------------------------------------------------------------------
# Programs over several devices.
# ---------------------------------------------------------------------------------------------


def placed(args, mesh, q_spec, kv_spec):
    """query, key and value on a mesh."""
    specs = (q_spec, kv_spec, kv_spec)
    return tuple(jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(args, specs))


COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


def moves_between_devices(hlo: str) -> dict[str, int]:
    """How often a compiled program runs each collective that moves numbers.

    Not counted: agreement on flags (pred[]), which the xla path of JAX 0.10 has in bfloat16.
    """
    found = re.findall(rf"(?m)^.*? = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", hlo)
    moved = [name for types, name in found if re.search(r"\b(?!pred\[\])\w+\[", types)]
    return dict(collections.Counter(moved))


def check_batch_over_devices(f, parameters, x) -> None:
    """f(parameters, x) over eight devices by x's batch: values, gradients, and nothing moves."""
    mesh = jax.sharding.Mesh(
        np.asarray(jax.devices("cpu")[:8]), ("data",), axis_types=(AxisType.Auto,)
    )
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    placed = jax.device_put(parameters, NamedSharding(mesh, P()))
    compiled = jax.jit(f).lower(placed, sharded).compile()
    text = compiled.as_text()
    assert not any(collective in text for collective in COLLECTIVES)
    out = compiled(placed, sharded)
    assert out.sharding.is_equivalent_to(sharded.sharding, out.ndim)
    assert_close(out, f(parameters, x))

    grads = jax.jit(jax.grad(lambda p, x: (f(p, x) ** 2).sum()))
    assert_close(grads(placed, sharded), grads(parameters, x), scale=20)


def seen_by_kernels(hlo: str) -> list[str]:
    """Shape of out, or of the query's gradient, in each kernel call of a compiled program."""
    lines = [line for line in hlo.splitlines() if 'custom_call_target="jax_fa3_' in line]
    return [re.findall(r"bf16\[([\d,]+)\]", line)[0] for line in lines]
