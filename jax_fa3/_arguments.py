"""From the public arguments to a checked `AttentionSpec` and `Operands`.

Every mismatch is collected and reported in one error, which names the argument, what it got and
what was expected. After `parse` the implementations need to check nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from jax_fa3 import _sharding, _support
from jax_fa3._spec import DESCALE_BLOCKS, FLOAT8, AttentionSpec, Operands, softmax_dtype
from jax_fa3.config import config

DTYPES = tuple(
    np.dtype(t) for t in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64, jnp.float8_e4m3fn)
)
OUT_NAME, LSE_NAME = "jax_fa3_out", "jax_fa3_lse"

# A window this wide is unbounded when the offset is traced: positions are int32.
_WIDEST = 2**30


class Parsed(NamedTuple):
    """A checked call."""

    spec: AttentionSpec
    operands: Operands  # query, key and value have one rank, at least 3
    leading: tuple[int, ...]  # shape of the query given, without its head dim: that of the lse
    implementations: tuple[str, ...]  # to try in order
    names: tuple[str, str]  # checkpoint names of out and lse


class Problems:
    """Collects what is wrong with the arguments of one call."""

    def __init__(self, function: str):
        self._function = function
        self._lines: list[str] = []
        self._only_types = True

    def add(self, name: str, got: Any, wanted: str, *, is_type: bool = False) -> None:
        self._lines.append(f"{name}: got {got}, expected {wanted}")
        self._only_types &= is_type

    def raise_if_any(self) -> None:
        if self._lines:
            self.fail()

    def fail(self) -> NoReturn:
        """ValueError with every line, or TypeError when all of them are about types and dtypes."""
        error = TypeError if self._only_types else ValueError
        raise error(f"{self._function}:" + "".join(f"\n  {line}" for line in self._lines))


def parse(
    query,
    key,
    value,
    bias=None,
    mask=None,
    *,
    scale=None,
    is_causal=False,
    causal_alignment="top_left",
    query_offset=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
    query_segment_ids=None,
    key_value_segment_ids=None,
    logits_soft_cap=None,
    sinks=None,
    query_descale=None,
    key_descale=None,
    value_descale=None,
    out_dtype=None,
    deterministic_backward=None,
    checkpoint_name=None,
    return_residual=False,
    implementation=None,
    problems: Problems | None = None,
) -> Parsed:
    """Checks and normalises the arguments of `dot_product_attention`.

    Lengths are clipped, offsets and descales broadcast, bias and mask given full rank, a window
    that hides nothing dropped, and an array, negative or zero scale is folded into the query.

    Args:
      problems: what the caller found already; reported together with what is found here.
    Raises:
      ValueError, TypeError: as `dot_product_attention`.
    """
    problems = problems or Problems("dot_product_attention")

    q = as_array("query", query, problems)
    k = as_array("key", key, problems)
    v = as_array("value", value, problems)
    if q is None or k is None or v is None:
        problems.fail()
    given = {"query": q.shape, "key": k.shape, "value": v.shape}
    q, k, v = _one_rank(q, k, v)
    _check_dtypes(q, k, v, problems)
    have_dims = _check_shapes(q, k, v, given, problems)

    is_causal = _flag("is_causal", is_causal, problems)
    _flag("return_residual", return_residual, problems)
    if deterministic_backward is None:
        deterministic_backward = config.deterministic_backward
    deterministic_backward = _flag("deterministic_backward", deterministic_backward, problems)
    window = _window(local_window_size, problems)
    soft_cap = _soft_cap(logits_soft_cap, problems)
    out_dtype = _out_dtype(out_dtype, q.dtype, problems)
    static_scale, scale_array = _scale(scale, q, problems)
    implementations = _implementations(implementation, problems)
    if checkpoint_name is not None and not isinstance(checkpoint_name, str):
        problems.add("checkpoint_name", repr(checkpoint_name), "a string or None", is_type=True)
    elif checkpoint_name == "":
        problems.add("checkpoint_name", "''", "a name, or None for the default ones")
    if causal_alignment not in ("top_left", "bottom_right"):
        problems.add("causal_alignment", repr(causal_alignment), '"top_left" or "bottom_right"')
    elif query_offset is not None and causal_alignment == "bottom_right":
        problems.add("query_offset", "an offset", 'None with causal_alignment="bottom_right"')
    if key_value_segment_ids is not None and query_segment_ids is None:
        problems.add("key_value_segment_ids", "ids alone", "query_segment_ids with them")

    if not have_dims:  # which the arrays below are compared with
        problems.fail()
    batch, (t, n, _), s = q.shape[:-3], q.shape[-3:], k.shape[-3]

    is_causal, window = _normal_window(is_causal, window, t + s, query_offset is not None)
    dense = (*batch, n, t, s)
    bias = _dense("bias", bias, dense, problems)
    mask = _dense("mask", mask, dense, problems)
    q_lengths = _lengths("query_seq_lengths", query_seq_lengths, batch, t, problems)
    kv_lengths = _lengths("key_value_seq_lengths", key_value_seq_lengths, batch, s, problems)
    q_ids, kv_ids = _segment_ids(query_segment_ids, key_value_segment_ids, batch, t, s, problems)
    offset = _offset(query_offset, batch, t, s, window, problems)
    if not is_causal and window == (None, None):
        offset = None  # there is no diagonal to move
        causal_alignment = "top_left"
    sinks = _sinks(sinks, n, problems)
    heads_k = k.shape[-2]
    q_descale = _descale("query_descale", query_descale, q, batch, t, n, heads_k, problems)
    k_descale = _descale("key_descale", key_descale, q, batch, s, heads_k, heads_k, problems)
    v_descale = _descale("value_descale", value_descale, q, batch, s, heads_k, heads_k, problems)
    problems.raise_if_any()

    static_scale, factor = _split_scale(static_scale, scale_array, q.dtype)
    if factor is not None:
        if q.dtype == FLOAT8:  # multiplying float8 values would round them: their descale is exact
            if q_descale is None:
                q_descale = jnp.ones((*batch, 1, n), jnp.float32)
            q_descale = q_descale * jnp.asarray(factor, jnp.float32)
        else:
            q = _scaled(q, factor, q_lengths)

    spec = AttentionSpec(
        scale=static_scale,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        window=window,
        logits_soft_cap=soft_cap,
        deterministic_backward=deterministic_backward,
        out_dtype=out_dtype,
    )
    operands = Operands(
        query=q,
        key=k,
        value=v,
        bias=bias,
        mask=mask,
        query_offset=offset,
        query_seq_lengths=q_lengths,
        key_value_seq_lengths=kv_lengths,
        query_segment_ids=q_ids,
        key_value_segment_ids=kv_ids,
        sinks=sinks,
        query_descale=q_descale,
        key_descale=k_descale,
        value_descale=v_descale,
    )
    names = (checkpoint_name, checkpoint_name) if checkpoint_name else (OUT_NAME, LSE_NAME)
    return Parsed(spec, operands, given["query"][:-1], implementations, names)


# --- query, key, value ---


def as_array(name: str, x: Any, problems: Problems) -> Any:
    """`x` as a JAX array, or None when it is not an array (a problem)."""
    if not isinstance(x, jax.Array):
        try:
            x = jnp.asarray(x)
        except (TypeError, ValueError, OverflowError):
            problems.add(name, _describe(x), "an array", is_type=True)
            return None
    return _of_known_sizes(name, x, problems)


def _of_known_sizes(name: str, x: Any, problems: Problems) -> Any:
    if not all(isinstance(size, int) for size in x.shape):
        problems.add(
            name,
            f"shape {show(x.shape)}",
            "sizes that are known, from which blocks and workspaces follow (not the symbolic ones "
            "of jax.export: export once for each shape)",
        )
        return None
    return x


def _unwrapped(x: Any) -> Any:
    """The array of what is one by JAX's protocol alone, such as a variable of flax.nnx."""
    convert = None if isinstance(x, jax.Array) else getattr(x, "__jax_array__", None)
    return x if convert is None else convert()


def _describe(x: Any) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{type(x).__name__} of shape {show(x.shape)} and dtype {x.dtype}"
    return repr(x)


def show(shape: Sequence[int | str]) -> str:
    """A shape as Python writes it; letters stand for dims that are free."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _one_rank(q, k, v):
    """One rank for the three where, as in jax.nn, leading dims of 1 are missing or too many."""
    rank = max(q.ndim, 3)
    return _of_rank(q, rank), _of_rank(k, rank), _of_rank(v, rank)


def _of_rank(x, rank: int):
    """`x` with leading ones added to reach `rank`, 3 or 4, or with one removed to reach 3."""
    if rank == 3 and x.ndim == 4 and x.shape[0] == 1:
        return x[0]
    if rank <= 4 and 0 < x.ndim < rank:
        return jnp.expand_dims(x, tuple(range(rank - x.ndim)))
    return x


def _check_dtypes(q, k, v, problems: Problems) -> None:
    if q.dtype not in DTYPES:
        wanted = ", ".join(dtype.name for dtype in DTYPES)
        problems.add("query", f"dtype {q.dtype.name}", f"one of {wanted}", is_type=True)
    for name, x in (("key", k), ("value", v)):
        if x.dtype != q.dtype:
            problems.add(name, f"dtype {x.dtype.name}", f"the query's dtype, {q.dtype.name}")


def _check_shapes(q, k, v, given: dict[str, tuple[int, ...]], problems: Problems) -> bool:
    """Whether there are T, S, N, K, H and D to speak of; `given` are the shapes to report."""
    got = {name: f"shape {show(shape)}" for name, shape in given.items()}
    layouts = {"query": "T, N, H", "key": "S, K, H", "value": "S, K, D"}
    for name, x in (("query", q), ("key", k), ("value", v)):
        if x.ndim < 3:
            problems.add(name, got[name], f"[*batch, {layouts[name]}]")
    if min(q.ndim, k.ndim, v.ndim) < 3:
        return False
    *batch, _, n, h = q.shape
    *batch_k, s, heads_k, h_k = k.shape
    *batch_v, s_v, heads_v, _ = v.shape
    if batch_k != batch or h_k != h:
        wanted = show((*batch, "S", "K", h))
        problems.add("key", got["key"], f"{wanted} with the query's batch and head dim")
    if batch_v != batch or (s_v, heads_v) != (s, heads_k):
        wanted = show((*batch, s, heads_k, "D"))
        problems.add("value", got["value"], f"{wanted} with the query's batch, the key's S and K")
    if (n % heads_k if heads_k else n) != 0:
        problems.add("key", f"{heads_k} heads", f"a divisor of the query's {n} heads")
    return True


# --- static options ---


def _flag(name: str, x: Any, problems: Problems) -> bool:
    if x is None or isinstance(x, (bool, int, np.bool_)):  # None, as jax.nn takes it
        return bool(x)
    if isinstance(x, (np.ndarray, jax.Array)) and x.shape == () and x.dtype == bool:
        if not isinstance(x, jax.core.Tracer):
            return bool(x)
        problems.add(name, "a traced array", "a bool that is known while tracing", is_type=True)
    else:
        problems.add(name, _describe(x), "a bool", is_type=True)
    return False


def static_int(x: Any) -> int:
    """`x` as an int. Raises TypeError for anything else, a traced integer included."""
    if isinstance(x, (bool, np.bool_)):
        raise TypeError
    return operator.index(x)


def _window(x: Any, problems: Problems) -> tuple[int | None, int | None]:
    if x is None:
        return None, None
    wanted = "an int or a pair (left, right) of ints or None (unbounded)"
    if isinstance(x, np.ndarray):
        x = x.tolist()
    pair = x if isinstance(x, (tuple, list)) else (x, x)
    if len(pair) != 2:
        problems.add("local_window_size", repr(x), wanted)
        return None, None
    try:
        left, right = (None if side is None else static_int(side) for side in pair)
    except TypeError:
        problems.add("local_window_size", repr(x), f"{wanted}, known while tracing", is_type=True)
        return None, None
    if any(side is not None and side < 0 for side in (left, right)):
        problems.add("local_window_size", repr(x), "no negative side (None is unbounded)")
    return left, right


def _normal_window(
    is_causal: bool, window: tuple[int | None, int | None], reach: int, moves: bool
) -> tuple[bool, tuple[int | None, int | None]]:
    """Drops the sides that hide nothing, and writes "nothing right of the diagonal" as is_causal.

    Args:
      reach: T + S; by an alignment the diagonal moves less than that.
      moves: a traced offset moves the diagonal.
    """
    limit = _WIDEST if moves else reach
    left, right = (None if side is None or side >= limit else side for side in window)
    if is_causal or right == 0:
        return True, (left, None)
    return is_causal, (left, right)


def _soft_cap(x: Any, problems: Problems) -> float | None:
    if x is None:
        return None
    # Beyond these x / cap leaves float32's range, and a cap out there caps nothing.
    wanted = "a number from 1e-30 to 1e30 that is known while tracing, or None"
    cap = _static_number(x)
    if cap is None:
        problems.add("logits_soft_cap", _describe(x), wanted, is_type=True)
    elif not 1e-30 <= cap <= 1e30:
        problems.add("logits_soft_cap", repr(cap), wanted)
    return cap


def _static_number(x: Any) -> float | None:
    """`x` as a float, when it is a real Python or NumPy number."""
    if isinstance(x, (int, float, np.integer, np.floating)):
        try:
            return float(x)
        except OverflowError:  # an int
            return math.inf if x > 0 else -math.inf
    if isinstance(x, np.ndarray) and x.size == 1 and _is_real(x.dtype):
        return float(x.item())
    if isinstance(x, np.generic) and _is_real(x.dtype):  # bfloat16 and other extension scalars
        return float(x)
    return None


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _out_dtype(x: Any, dtype: np.dtype, problems: Problems) -> np.dtype:
    default = np.dtype(jnp.bfloat16) if dtype == FLOAT8 else dtype
    if x is None:
        return default
    try:
        given = np.dtype(x)
    except TypeError:
        problems.add("out_dtype", repr(x), "a dtype or None", is_type=True)
        return default
    if dtype != FLOAT8 and given != dtype:
        problems.add(
            "out_dtype",
            given.name,
            f"None or the query's dtype, {dtype.name} (others only for float8 inputs)",
        )
    elif dtype == FLOAT8 and given not in DTYPES[:3]:
        wanted = ", ".join(allowed.name for allowed in DTYPES[:3])
        problems.add("out_dtype", given.name, f"one of {wanted}")
    return given


def _scale(x: Any, q, problems: Problems) -> tuple[float, jax.Array | None]:
    """(the static scale, the array that multiplies the query as well)."""
    if x is None:
        h = q.shape[-1] if q.ndim else 0
        return (1.0 / math.sqrt(h) if h else 1.0), None
    x = _unwrapped(x)
    if isinstance(x, jax.Array):
        if not _is_real(x.dtype):
            problems.add("scale", f"dtype {x.dtype.name}", "a real number", is_type=True)
        elif x.size != 1:
            problems.add("scale", f"an array of shape {show(x.shape)}", "a scalar")
        else:
            x = x.reshape(())
        return 1.0, x
    scale = _static_number(x)
    if scale is None:
        problems.add("scale", _describe(x), "a real scalar", is_type=True)
    elif not abs(scale) <= float(jnp.finfo(jnp.float32).max):
        problems.add("scale", repr(scale), "a finite float32")
    return (1.0 if scale is None else scale), None


def _split_scale(
    scale: float, array: jax.Array | None, dtype: np.dtype
) -> tuple[float, float | jax.Array | None]:
    """(a scale > 0, what is left to multiply the query with; None for nothing)."""
    if array is not None:
        return 1.0, array
    # float32 is what the kernels compute in; a scale that vanishes there is zero.
    if (scale if dtype == np.float64 else np.float32(scale)) == 0:
        return 1.0, 0.0
    return (scale, None) if scale > 0 else (-scale, -1.0)


def _scaled(q, factor, q_lengths):
    """query * factor, computed in float32 or wider."""
    if isinstance(factor, float):
        return -q if factor == -1.0 else q * jnp.asarray(factor, q.dtype)
    if q_lengths is not None:
        # Padding may hold NaN, which must not reach the gradient of the factor.
        row = jax.lax.broadcasted_iota(jnp.int32, q.shape, q.ndim - 3)
        lengths = _sharding.placed_as(q, q_lengths)[..., None, None, None]
        q = jnp.where(row < lengths, q, jnp.zeros((), q.dtype))
    wide = softmax_dtype(q.dtype)
    return (q.astype(wide) * factor.astype(wide)).astype(q.dtype)


def _implementations(x: Any, problems: Problems) -> tuple[str, ...]:
    known = _support.IMPLEMENTATIONS
    if x is None:
        return known
    wanted = f"None, {', '.join(map(repr, known))} or a sequence of them to try in order"
    if not isinstance(x, (str, tuple, list)):
        problems.add("implementation", repr(x), wanted, is_type=True)
        return ()
    names = (x,) if isinstance(x, str) else tuple(x)
    if not names or any(name not in known for name in names):
        problems.add("implementation", repr(x), wanted)
    return names


# --- other arrays ---


def _dense(name: str, x: Any, full: tuple[int, ...], problems: Problems) -> Any:
    """bias or mask with full rank: every dim 1 or that of `full`, [*batch, N, T, S]."""
    if x is None:
        return None
    x = as_array(name, x, problems)
    if x is None:
        return None
    if name == "mask":
        if x.dtype != bool:
            problems.add(
                "mask", f"dtype {x.dtype.name}", "bool (bias is what is added)", is_type=True
            )
    elif jnp.issubdtype(x.dtype, jnp.complexfloating):
        problems.add("bias", f"dtype {x.dtype.name}", "a real dtype", is_type=True)
    elif not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.float32)  # jax.nn adds integers and bools too
    shape = x.shape
    if len(full) == 3 and len(shape) == 4 and shape[0] == 1:  # as in jax.nn, without a batch
        x = x[0]
    elif len(shape) < len(full):
        x = jnp.expand_dims(x, tuple(range(len(full) - len(shape))))
    if x.ndim != len(full) or any(d not in (1, f) for d, f in zip(x.shape, full, strict=True)):
        wanted = f"a shape that broadcasts to [*batch, N, T, S] = {show(full)}"
        problems.add(name, f"shape {show(shape)}", wanted)
    return x


def as_integers(name: str, x: Any, problems: Problems) -> Any:
    """`x` as an integer NumPy array or JAX array, with its bits whole; None when it is not one."""
    x = _unwrapped(x)
    if not isinstance(x, jax.Array):
        try:
            x = np.asarray(x)
        except (TypeError, ValueError):
            problems.add(name, _describe(x), "an integer array", is_type=True)
            return None
        if x.dtype == object:
            problems.add(name, _describe(x), "an integer array", is_type=True)
            return None
    if not jnp.issubdtype(x.dtype, jnp.integer):
        problems.add(name, f"dtype {x.dtype}", "an integer dtype", is_type=True)
        return None
    return _of_known_sizes(name, x, problems)


def _over_batch(name: str, x: Any, batch: tuple[int, ...], problems: Problems) -> Any:
    """An array over [*batch]; without a batch dim [1] is taken too, as in jax.nn."""
    if batch == () and x.shape == (1,):
        return x.reshape(())
    if x.shape != batch:
        wanted = f"[*batch] = {show(batch)}" if batch else "() or (1,)"
        problems.add(name, f"shape {show(x.shape)}", wanted)
        return None
    return x


def clipped_int32(x: Any, low: int, high: int) -> jax.Array:
    """clip(x, low, high) as int32, from any integer dtype; low <= 0 <= high."""
    if isinstance(x, np.ndarray):
        # Python integers hold all of them; np.clip would refuse bounds beyond a narrow dtype.
        wide = x.astype(np.int64) if x.dtype != np.uint64 else np.minimum(x, high).astype(np.int64)
        return jnp.asarray(np.clip(wide, low, high).astype(np.int32))
    if x.dtype.itemsize < 4:
        x = x.astype(jnp.int32)
    low = max(low, int(jnp.iinfo(x.dtype).min))
    high = min(high, int(jnp.iinfo(x.dtype).max))
    bounds = np.array([low, high], x.dtype)
    return jax.lax.clamp(bounds[0], x, bounds[1]).astype(jnp.int32)


def _lengths(name: str, x: Any, batch: tuple[int, ...], limit: int, problems: Problems) -> Any:
    if x is None:
        return None
    x = as_integers(name, x, problems)
    x = x if x is None else _over_batch(name, x, batch, problems)
    return x if x is None else clipped_int32(x, 0, limit)


def _offset(
    x: Any,
    batch: tuple[int, ...],
    t: int,
    s: int,
    window: tuple[int | None, int | None],
    problems: Problems,
) -> Any:
    """int32 [*batch], clipped to where moving the diagonal further changes nothing."""
    if x is None:
        return None
    x = as_integers("query_offset", x, problems)
    if x is None:
        return None
    if x.shape != () and not (batch == () and x.shape == (1,)) and x.shape != batch:
        wanted = f"a scalar or [*batch] = {show(batch)}"
        problems.add("query_offset", f"shape {show(x.shape)}", wanted)
        return None
    left, right = window
    x = clipped_int32(x, -(t + (right or 0)), s + (left or 0))
    return jnp.broadcast_to(x.reshape(()) if x.size == 1 and not batch else x, batch)


def _segment_ids(
    q_ids: Any, kv_ids: Any, batch: tuple[int, ...], t: int, s: int, problems: Problems
) -> tuple[Any, Any]:
    if q_ids is None:
        return None, None
    if kv_ids is None and t != s:
        wanted = f"ids [*batch, S] too, since T = {t} and S = {s} differ"
        problems.add("key_value_segment_ids", "None", wanted)
        return None, None
    pair = []
    for name, ids, length in (
        ("query_segment_ids", q_ids, t),
        ("key_value_segment_ids", q_ids if kv_ids is None else kv_ids, s),
    ):
        ids = as_integers(name, ids, problems)
        if ids is not None and batch == () and ids.shape == (1, length):
            ids = ids[0]
        if ids is not None and ids.shape != (*batch, length):
            problems.add(name, f"shape {show(ids.shape)}", show((*batch, length)))
            ids = None
        pair.append(ids)
        if kv_ids is None:
            pair.append(ids)
            break
    return (None, None) if pair[0] is None or pair[1] is None else _same_dtype_ids(*pair)


def _same_dtype_ids(q_ids: Any, kv_ids: Any) -> tuple[jax.Array, jax.Array]:
    """The ids in one dtype in which two are equal exactly when the given ones are."""
    if isinstance(q_ids, np.ndarray) and isinstance(kv_ids, np.ndarray):
        if _fits_int32(q_ids) and _fits_int32(kv_ids):
            return jnp.asarray(q_ids.astype(np.int32)), jnp.asarray(kv_ids.astype(np.int32))
        # jnp.asarray would cut wider ids where jax_enable_x64 is off: number the values instead.
        # (Python integers, because NumPy joins uint64 and int64 to float64.)
        flat = np.concatenate([q_ids.ravel().astype(object), kv_ids.ravel().astype(object)])
        numbers = np.unique(flat, return_inverse=True)[1].astype(np.int32).ravel()
        q_numbers, kv_numbers = np.split(numbers, [q_ids.size])
        return (
            jnp.asarray(q_numbers.reshape(q_ids.shape)),
            jnp.asarray(kv_numbers.reshape(kv_ids.shape)),
        )
    q_ids, kv_ids = _to_jax_ids(q_ids), _to_jax_ids(kv_ids)
    if q_ids.dtype == kv_ids.dtype:
        return q_ids, kv_ids
    bits = max(32, 8 * q_ids.dtype.itemsize, 8 * kv_ids.dtype.itemsize)
    signed = jnp.dtype(f"int{bits}")
    return _to_signed(q_ids, signed, kv_ids.dtype), _to_signed(kv_ids, signed, q_ids.dtype)


def _to_jax_ids(ids: Any) -> jax.Array:
    """Ids as a JAX array, whole."""
    if not isinstance(ids, np.ndarray):
        return ids
    if jax.dtypes.canonicalize_dtype(ids.dtype) == ids.dtype:
        return jnp.asarray(ids)
    # jax_enable_x64 is off, so the other side has at most 32 bits.
    if _fits_int32(ids):
        return jnp.asarray(ids.astype(np.int32))
    raise ValueError(
        "segment ids: got NumPy ids beyond 32 bits for one side and a JAX array for the other, "
        "expected NumPy arrays for both, or jax_enable_x64"
    )


def _fits_int32(ids: np.ndarray) -> bool:
    return not ids.size or (int(ids.min()) >= -(2**31) and int(ids.max()) < 2**31)


def _to_signed(ids: jax.Array, signed: np.dtype, other: np.dtype) -> jax.Array:
    """ids in `signed`; those that cannot equal any id of dtype `other` become -1 or -2."""
    if jnp.issubdtype(ids.dtype, jnp.unsignedinteger):
        if ids.dtype.itemsize < signed.itemsize or jnp.issubdtype(other, jnp.unsignedinteger):
            return ids.astype(signed)  # fits, or wraps alike on both sides
        big = ids > jnp.asarray(jnp.iinfo(signed).max, ids.dtype)
        return jnp.where(big, jnp.asarray(-2, signed), ids.astype(signed))
    if jnp.issubdtype(other, jnp.unsignedinteger) and other.itemsize == signed.itemsize:
        return jnp.maximum(ids.astype(signed), jnp.asarray(-1, signed))
    return ids.astype(signed)


def _sinks(x: Any, n: int, problems: Problems) -> Any:
    if x is None:
        return None
    x = as_array("sinks", x, problems)
    if x is None:
        return None
    if not jnp.issubdtype(x.dtype, jnp.floating):
        problems.add("sinks", f"dtype {x.dtype.name}", "a floating dtype", is_type=True)
    if x.shape != (n,):
        problems.add("sinks", f"shape {show(x.shape)}", f"[N] = {show((n,))}")
    return x


def _descale(
    name: str,
    x: Any,
    q,
    batch: tuple[int, ...],
    length: int,
    heads: int,
    heads_k: int,
    problems: Problems,
) -> Any:
    """float32 [*batch, blocks, heads]."""
    if x is None:
        return None
    x = as_array(name, x, problems)
    if x is None:
        return None
    if q.dtype != FLOAT8:
        problems.add(name, "a descale", f"None for {q.dtype.name} inputs (it is for {FLOAT8.name})")
        return None
    if not jnp.issubdtype(x.dtype, jnp.floating):
        problems.add(name, f"dtype {x.dtype.name}", "a floating dtype", is_type=True)
        return None
    x = x.astype(jnp.float32)
    if x.shape == ():
        return jnp.broadcast_to(x, (*batch, 1, heads))
    if x.shape == (*batch, heads_k):  # one per key/value head, shared by its group
        group = heads // heads_k if heads_k else 1
        return jnp.repeat(x, group, axis=-1, total_repeat_length=heads)[..., None, :]
    for block in DESCALE_BLOCKS:
        blocks = -(-length // block)
        if x.shape == (*batch, blocks, heads):
            return x if blocks else jnp.ones((*batch, 1, heads), jnp.float32)
    options = [(), (*batch, heads_k)] + [
        (*batch, -(-length // block), heads) for block in DESCALE_BLOCKS
    ]
    problems.add(name, f"shape {show(x.shape)}", "one of " + ", ".join(map(show, options)))
    return None
