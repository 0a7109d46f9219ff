"""The "xla" implementation: exact attention in pure JAX, blockwise, with an online softmax.

The scores exist one [block_q, block_k] tile per head at a time, so memory is linear in T and S,
forward and backward. The tiles that a static mask leaves visible are listed while tracing, and a
scan walks over that list: causal attention costs half, a window costs its band, and the program
does not grow with the sequence.

Letters: B batch, T query length, S key length, N query heads, K key/value heads, G = N // K,
H query/key head dim, D value head dim. Tiles of queries are laid out [*batch, K, G, block_q, H]:
a group of query heads meets its one key head in a single matmul, and keys are never repeated.

Source: Dao 2023, FlashAttention-2, Algorithms 1 and 2, with dS = P * (dP - delta + dlse).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jax_fa3 import _support
from jax_fa3._spec import (
    DESCALE_BLOCKS,
    FLOAT8,
    AttentionSpec,
    Operands,
    first_position,
    promoting_ranks,
    softmax_dtype,
)

# A tile of scores, over all heads and batch rows, has about this many elements: on a CPU it should
# stay in the caches (2 MiB of float32; measured on 2 Zen 3 cores, 10 % slower at four times that),
# on a GPU it should fill the device, since every tile costs some ten kernel launches.
_TILE_ELEMENTS = {"cpu": 2**19, "other": 2**24}
_SMALLEST_BLOCK = 256  # queries or keys of a tile, however many heads share it
_LARGEST_BLOCK_Q = {"cpu": 512, "other": 1024}

# The probabilities of a float8 call are quantised as P * 2^8: e4m3 ends at 448, so that uses its
# range and keeps small probabilities out of its subnormals.
_FLOAT8_HEADROOM = 256.0


def attention(spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """Attention with its own reverse rule, itself reverse-differentiable any number of times.

    Args:
      spec: the static options.
      operands: arrays as `Operands` says; every batch dim is full (those of bias and mask may
        be 1).
    Returns: out [*batch, T, N, D] in spec.out_dtype and lse [*batch, N, T], natural log, float32
      (float64 for float64 inputs).
    Raises: UnsupportedError for the gradient of float8 inputs.
    """
    return _attention(spec, operands)


def _attention_fwd(spec, operands):
    if operands.query.dtype == FLOAT8:
        _support.refuse_float8_gradient()
    # Through `attention`, not `forward`: a second derivative then meets this rule again.
    out, lse = attention(spec, operands)
    return (out, lse), (operands, out, lse)


def _attention_bwd(spec, residuals, cotangents):
    return (backward(spec, *residuals, *cotangents),)


@promoting_ranks
def forward(spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """The same values as `attention`, without a derivative rule."""
    tiles = _Tiles(spec, operands)
    dtype = tiles.compute_dtype
    q, k, v = tiles.clean_inputs()
    qs, ks, vs = tiles.split_queries(q), tiles.split_keys(k), tiles.split_keys(v)
    rows = (tiles.num_q, *tiles.batch, tiles.heads_k, tiles.group, tiles.block_q)
    acc = jnp.zeros((*rows, v.shape[-1]), dtype)
    row_max = jnp.full(rows, -jnp.inf, dtype)
    row_sum = jnp.zeros(rows, dtype)

    def step(edge, carry, pair):
        acc, row_max, row_sum = carry
        i, j = pair
        scores, keep, _ = tiles.scores(edge, i, j, _get(qs, i), _get(ks, j))
        if keep is not None:
            scores = jnp.where(keep, scores, -jnp.inf)
        old_max = _get(row_max, i)
        new_max = jnp.maximum(old_max, scores.max(-1))
        # Rows with nothing visible yet: exp(-inf - 0) = 0, where exp(-inf + inf) would be NaN.
        safe_max = jnp.where(jnp.isneginf(new_max), 0, new_max)
        probs = jnp.exp(scores - safe_max[..., None])
        rescale = jnp.exp(old_max - safe_max)
        new_sum = _get(row_sum, i) * rescale + probs.sum(-1)
        new_acc = _get(acc, i) * rescale[..., None] + tiles.probs_times_values(probs, _get(vs, j))
        return (_put(acc, i, new_acc), _put(row_max, i, new_max), _put(row_sum, i, new_sum)), None

    acc, row_max, row_sum = tiles.walk(step, (acc, row_max, row_sum))

    if operands.sinks is not None:
        sinks = tiles.per_head(operands.sinks.astype(dtype))[..., None]  # [K, G, 1]
        new_max = jnp.maximum(row_max, sinks)
        safe_max = jnp.where(jnp.isneginf(new_max), 0, new_max)
        rescale = jnp.exp(row_max - safe_max)
        row_sum = row_sum * rescale + jnp.exp(sinks - safe_max)
        acc = acc * rescale[..., None]
        row_max = new_max
    safe_max = jnp.where(jnp.isneginf(row_max), 0, row_max)
    lse = tiles.join_rows(safe_max + jnp.log(row_sum))  # log(0) is the -inf of a masked row
    out = tiles.join_queries(acc / jnp.where(row_sum == 0, 1, row_sum)[..., None])
    valid = tiles.valid_queries()
    if valid is not None:
        lse = jnp.where(valid[..., None, :], lse, -jnp.inf)
        out = jnp.where(valid[..., :, None, None], out, 0)
    return _depending_on(operands, (out.astype(spec.out_dtype), lse))


_attention = jax.custom_vjp(forward, nondiff_argnums=(0,))
_attention.defvjp(_attention_fwd, _attention_bwd)


@promoting_ranks
def backward(
    spec: AttentionSpec, operands: Operands, out: Array, lse: Array, dout: Array, dlse: Array
) -> Operands:
    """Cotangents of the operands from the saved out and lse.

    Args:
      out, dout: [*batch, T, N, D]. lse, dlse: [*batch, N, T].
    Returns: Operands with the cotangents of query, key, value, bias and sinks, each in its
      operand's shape and dtype; None in every other field and where the operand is absent.
    Raises: UnsupportedError for float8 inputs.
    """
    if operands.query.dtype == FLOAT8:
        _support.refuse_float8_gradient()
    tiles = _Tiles(spec, operands)
    dtype = tiles.compute_dtype
    q, k, v = tiles.clean_inputs()
    # Rows that attend to nothing take no part, whatever their cotangents hold.
    alive = ~jnp.isneginf(lse)
    valid = tiles.valid_queries()
    if valid is not None:
        alive &= valid[..., None, :]
    alive_rows = jnp.swapaxes(alive, -1, -2)[..., None]  # [*batch, T, N, 1]
    dout = jnp.where(alive_rows, dout, 0).astype(v.dtype)
    out = jnp.where(alive_rows, out, 0)
    delta = jnp.swapaxes(jnp.sum(dout.astype(dtype) * out.astype(dtype), -1), -1, -2)
    delta = delta - jnp.where(alive, dlse, 0).astype(dtype)  # [*batch, N, T]
    lse = jnp.where(alive, lse, 0)

    qs, ks, vs = tiles.split_queries(q), tiles.split_keys(k), tiles.split_keys(v)
    douts = tiles.split_queries(dout)
    lses, deltas = tiles.split_rows(lse), tiles.split_rows(delta)
    # dK and dV are accumulated transposed, [.., H, block_k]: then every matmul of the walk reads
    # its left side along rows, twice as fast on XLA:CPU as contracting the rows of both sides.
    qts, doutts = (jnp.moveaxis(x, -1, -3) for x in (qs, douts))
    bias = operands.bias
    dbias = None
    if bias is not None and tiles.bias is not None:
        dbias = jnp.zeros(tiles.bias.shape, dtype)

    def step(edge, carry, pair):
        dqs, dkts, dvts, dbias = carry
        i, j = pair
        q, k, v, dout = _get(qs, i), _get(ks, j), _get(vs, j), _get(douts, i)
        scores, keep, slope = tiles.scores(edge, i, j, q, k)
        if keep is not None:
            # Before exp: a hidden score may be far above lse, and a second derivative would
            # multiply exp's infinity by zero.
            scores = jnp.where(keep, scores, -jnp.inf)
        probs = jnp.exp(scores - _get(lses, i)[..., None])
        dprobs = tiles.matmul(dout, v, "...kgqd,...ksd->...kgqs")
        dscores = probs * (dprobs - _get(deltas, i)[..., None])
        if slope is not None:
            dscores = dscores * slope
        if keep is not None:
            # After it too: NaN in a row's lse would reach the keys that the row does not see.
            probs = jnp.where(keep, probs, 0)
            dscores = jnp.where(keep, dscores, 0)
        if dbias is not None:
            dbias = tiles.add_bias_gradient(dbias, i, j, dscores)
        probs, dscores = probs.astype(dout.dtype), dscores.astype(q.dtype)
        dq = tiles.matmul(dscores, k, "...kgqs,...ksh->...kgqh")
        dkt = tiles.matmul(_get(qts, i), dscores, "...khgq,...kgqs->...khs")
        dvt = tiles.matmul(_get(doutts, i), probs, "...kdgq,...kgqs->...kds")
        return (_add(dqs, i, dq), _add(dkts, j, dkt), _add(dvts, j, dvt), dbias), None

    carry = (
        jnp.zeros(qs.shape, dtype),
        jnp.zeros((*ks.shape[:-2], ks.shape[-1], ks.shape[-2]), dtype),
        jnp.zeros((*vs.shape[:-2], vs.shape[-1], vs.shape[-2]), dtype),
        dbias,
    )
    dqs, dkts, dvts, dbias = tiles.walk(step, carry)

    dq = tiles.join_queries(dqs) * spec.scale
    dk = tiles.join_keys(jnp.swapaxes(dkts, -1, -2)) * spec.scale
    dv = tiles.join_keys(jnp.swapaxes(dvts, -1, -2))
    gradients = Operands(
        dq.astype(operands.query.dtype),
        dk.astype(operands.key.dtype),
        dv.astype(operands.value.dtype),
    )
    if bias is not None and dbias is not None:
        dbias = dbias[..., : bias.shape[-2], : bias.shape[-1]]
        gradients = gradients._replace(bias=dbias.reshape(bias.shape).astype(bias.dtype))
    if operands.sinks is not None:
        sink_probs = jnp.exp(operands.sinks.astype(dtype)[:, None] - lse)
        dsinks = jnp.where(alive, sink_probs * -delta, 0)
        dsinks = dsinks.sum((*range(len(tiles.batch)), -1))
        gradients = gradients._replace(sinks=dsinks.astype(operands.sinks.dtype))
    return _depending_on((operands, out, lse, dout, dlse), gradients)


class _Band(NamedTuple):
    """Which keys a query sees by distance: low <= key position - query position <= high.

    A bound is None (open), a Python int (known while tracing) or int32 [*batch].
    """

    low: int | Array | None
    high: int | Array | None

    @property
    def is_static(self) -> bool:
        return not (isinstance(self.low, Array) or isinstance(self.high, Array))


class _Tiles:
    """How one call is cut into tiles, and the mask of each tile."""

    def __init__(self, spec: AttentionSpec, operands: Operands):
        query, key = operands.query, operands.key
        self.spec, self.operands = spec, operands
        *self.batch, self.seqlen_q, self.heads_q, _ = query.shape
        self.seqlen_k, self.heads_k = key.shape[-3:-1]
        self.group = self.heads_q // self.heads_k if self.heads_k else 0
        self.compute_dtype = softmax_dtype(query.dtype)
        heads = math.prod(self.batch) * self.heads_q
        block_q, block_k = _block_sizes(heads, self.seqlen_q)
        self.num_q, self.block_q = _cut(self.seqlen_q, block_q)
        self.num_k, self.block_k = _cut(self.seqlen_k, block_k)
        self.band = _band(spec, operands)
        # Both per token, cut like the queries and the keys.
        self.segments = self.positions = None
        if operands.query_segment_ids is not None and operands.key_value_segment_ids is not None:
            self.segments = self._split_tokens(
                operands.query_segment_ids, operands.key_value_segment_ids
            )
        # They replace the distance of indices by one that only the running program knows.
        if operands.query_positions is not None or operands.key_positions is not None:
            self.positions = self._split_tokens(*_positions(spec, operands))
        self.bias = self._grouped(operands.bias)
        self.mask = self._grouped(operands.mask)

    # Cutting and joining.

    def clean_inputs(self):
        """Query, key and value, dequantised, with zeros beyond the lengths.

        NaN times a zero probability is NaN, so what lies beyond a length must go before a matmul.
        """
        o = self.operands
        q, k, v = o.query, o.key, o.value
        if q.dtype == FLOAT8:
            q, k, v = (
                _dequantise(x, descale)
                for x, descale in ((q, o.query_descale), (k, o.key_descale), (v, o.value_descale))
            )
        valid_q, valid_k = self.valid_queries(), self.valid_keys()
        if valid_q is not None:
            q = jnp.where(valid_q[..., None, None], q, 0)
        if valid_k is not None:
            k = jnp.where(valid_k[..., None, None], k, 0)
            v = jnp.where(valid_k[..., None, None], v, 0)
        return q, k, v

    def valid_queries(self):
        """bool [*batch, T], or None when every query counts."""
        lengths = self.operands.query_seq_lengths
        return None if lengths is None else _arange(self.seqlen_q) < lengths[..., None]

    def valid_keys(self):
        """bool [*batch, S], or None when every key counts."""
        lengths = self.operands.key_value_seq_lengths
        return None if lengths is None else _arange(self.seqlen_k) < lengths[..., None]

    def per_head(self, x):
        """[N, ...] -> [K, G, ...]."""
        return x.reshape(self.heads_k, self.group, *x.shape[1:])

    def split_queries(self, x):
        """[*batch, T, N, H] -> [num_q, *batch, K, G, block_q, H]."""
        x = _split(x, -3, self.num_q, self.block_q)  # [num_q, *batch, block_q, N, H]
        x = jnp.moveaxis(x, -3, -2)
        return x.reshape(*x.shape[:-3], self.heads_k, self.group, *x.shape[-2:])

    def join_queries(self, x):
        """[num_q, *batch, K, G, block_q, H] -> [*batch, T, N, H]."""
        x = x.reshape(*x.shape[:-4], self.heads_q, *x.shape[-2:])
        return _join(jnp.moveaxis(x, -2, -3), -3, self.seqlen_q)

    def split_keys(self, x):
        """[*batch, S, K, H] -> [num_k, *batch, K, block_k, H]."""
        return jnp.moveaxis(_split(x, -3, self.num_k, self.block_k), -3, -2)

    def join_keys(self, x):
        """[num_k, *batch, K, block_k, H] -> [*batch, S, K, H]."""
        return _join(jnp.moveaxis(x, -2, -3), -3, self.seqlen_k)

    def _split_tokens(self, x, y):
        """[*batch, T], [*batch, S] -> [num_q, *batch, block_q], [num_k, *batch, block_k]."""
        x = _split(x, -1, self.num_q, self.block_q)
        return x, _split(y, -1, self.num_k, self.block_k)

    def split_rows(self, x):
        """[*batch, N, T] -> [num_q, *batch, K, G, block_q]."""
        x = _split(x, -1, self.num_q, self.block_q)
        return x.reshape(*x.shape[:-2], self.heads_k, self.group, x.shape[-1])

    def join_rows(self, x):
        """[num_q, *batch, K, G, block_q] -> [*batch, N, T]."""
        return _join(x.reshape(*x.shape[:-3], self.heads_q, x.shape[-1]), -1, self.seqlen_q)

    # Walking over the tiles.

    def walk(self, step, carry):
        """Runs step(edge, carry, (i, j)) over every tile that a static mask leaves visible.

        Tiles cut by the band's edge, or holding padding keys, come last and with edge=True: only
        they pay for that mask.
        """
        visible, cut = self._visible_tiles()
        # Inside jax.shard_map a scan wants its carry to vary over the mesh as its results will.
        axes = tuple(sorted(jax.typeof(self.operands.query).manual_axis_type.varying, key=str))
        if axes:
            carry = jax.tree.map(lambda x: lax.pcast(x, axes, to="varying"), carry)
        for edge, chosen in ((False, visible & ~cut), (True, cut)):
            pairs = np.argwhere(chosen).astype(np.int32)
            if len(pairs):
                # Checkpointed, so that differentiating the walk again keeps memory linear.
                body = jax.checkpoint(functools.partial(step, edge), prevent_cse=False)
                carry, _ = lax.scan(body, carry, (pairs[:, 0], pairs[:, 1]))
        return carry

    def _visible_tiles(self):
        """Bool arrays [num_q, num_k]: which tiles are visible, and which an edge cuts."""
        low, high = -math.inf, math.inf
        if self.positions is None and self.band.is_static:
            low = low if self.band.low is None else self.band.low
            high = high if self.band.high is None else self.band.high
        first_q = np.arange(self.num_q)[:, None] * self.block_q
        first_k = np.arange(self.num_k)[None, :] * self.block_k
        last_q = np.minimum(first_q + self.block_q, self.seqlen_q) - 1
        last_k = np.minimum(first_k + self.block_k, self.seqlen_k) - 1
        nearest, farthest = first_k - last_q, last_k - first_q  # distances, key minus query
        visible = (nearest <= high) & (farthest >= low)
        padded = first_k + self.block_k > self.seqlen_k
        return visible, visible & ((nearest < low) | (farthest > high) | padded)

    # One tile.

    def matmul(self, a, b, subscripts):
        precision = lax.Precision.HIGHEST if a.dtype.itemsize >= 4 else None
        return jnp.einsum(
            subscripts, a, b, precision=precision, preferred_element_type=self.compute_dtype
        )

    def scores(self, edge, i, j, q, k):
        """Scores of tile (i, j), before masking, what the mask keeps, and the soft cap's slope.

        Returns: scores [*batch, K, G, block_q, block_k]; keep, bool and broadcastable to them, or
          None when all are kept; slope, d(capped)/d(uncapped), or None without a cap.
        """
        x = self.matmul(q, k, "...kgqh,...ksh->...kgqs") * self.spec.scale
        if self.bias is not None:
            x = x + self._tile_of(self.bias, i, j).astype(self.compute_dtype)
        slope = None
        if self.spec.logits_soft_cap is not None:
            tanh = jnp.tanh(x / self.spec.logits_soft_cap)
            x = self.spec.logits_soft_cap * tanh
            slope = 1 - tanh * tanh
        return x, self._keep(edge, i, j), slope

    def probs_times_values(self, probs, v):
        if self.operands.query.dtype == FLOAT8:
            quantised = (probs * _FLOAT8_HEADROOM).astype(self.operands.query.dtype)
            probs = quantised.astype(v.dtype) / _FLOAT8_HEADROOM
        return self.matmul(probs.astype(v.dtype), v, "...kgqs,...ksd->...kgqd")

    def _keep(self, edge, i, j):
        o = self.operands
        t = i * self.block_q + _arange(self.block_q)
        s = j * self.block_k + _arange(self.block_k)
        keep = []

        def over_heads(x):  # [*batch, block_q, block_k] -> [*batch, 1, 1, block_q, block_k]
            return x[..., None, None, :, :]

        if edge and self.num_k * self.block_k > self.seqlen_k:
            keep.append(s < self.seqlen_k)
        if o.query_seq_lengths is not None:  # a bias may hold anything there
            keep.append(over_heads((t < o.query_seq_lengths[..., None])[..., :, None]))
        if o.key_value_seq_lengths is not None:
            keep.append(over_heads((s < o.key_value_seq_lengths[..., None])[..., None, :]))
        if self.positions is not None:
            place_q, place_k = _get(self.positions[0], i), _get(self.positions[1], j)
            distance = place_k[..., None, :] - place_q[..., :, None]
            keep += [over_heads(x) for x in _inside(self.band, distance)]
        elif self.band.is_static:
            if edge:
                keep += _inside(self.band, s[None, :] - t[:, None])
        else:
            keep += [over_heads(x) for x in _inside(self.band, s[None, :] - t[:, None])]
        if self.segments is not None:
            ids_q, ids_k = _get(self.segments[0], i), _get(self.segments[1], j)
            keep.append(over_heads(ids_q[..., :, None] == ids_k[..., None, :]))
        if self.mask is not None:
            keep.append(self._tile_of(self.mask, i, j))
        return functools.reduce(jnp.logical_and, keep) if keep else None

    # Dense bias and mask.

    def _grouped(self, x):
        """[*batch or 1, N or 1, T or 1, S or 1] -> [.., K, G, T, S], padded to whole tiles."""
        if x is None:
            return None
        *batch, heads, rows, columns = x.shape
        if heads == self.heads_q:
            x = x.reshape(*batch, self.heads_k, self.group, rows, columns)
        else:
            x = x.reshape(*batch, 1, 1, rows, columns)
        pad_q = self.num_q * self.block_q - rows if rows != 1 else 0
        pad_k = self.num_k * self.block_k - columns if columns != 1 else 0
        if pad_q or pad_k:
            x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, pad_q), (0, pad_k)])
        return x

    def _tile_of(self, x, i, j):
        if x.shape[-2] != 1:
            x = lax.dynamic_slice_in_dim(x, i * self.block_q, self.block_q, -2)
        if x.shape[-1] != 1:
            x = lax.dynamic_slice_in_dim(x, j * self.block_k, self.block_k, -1)
        return x

    def add_bias_gradient(self, dbias, i, j, dscores):
        """Adds a tile's share, summed over the dims along which the bias is broadcast."""
        old = self._tile_of(dbias, i, j)
        axes = [a for a in range(old.ndim) if old.shape[a] != dscores.shape[a]]
        new = old + dscores.sum(axes, keepdims=True)
        start = [jnp.zeros((), jnp.int32)] * dbias.ndim
        if dbias.shape[-2] != 1:
            start[-2] = i * self.block_q
        if dbias.shape[-1] != 1:
            start[-1] = j * self.block_k
        return lax.dynamic_update_slice(dbias, new, start)


def _band(spec: AttentionSpec, operands: Operands) -> _Band:
    """The causal and the window rule as one band around the diagonal."""
    left, right = spec.window
    if spec.is_causal:
        right = 0 if right is None else min(right, 0)
    if operands.query_positions is not None or operands.key_positions is not None:
        # Positions carry the offset already.
        offset = 0
    else:
        offset = first_position(spec, operands, operands.query.shape[-3])
    low = None if left is None else _shift(offset, -left, operands)
    high = None if right is None else _shift(offset, right, operands)
    return _Band(low, high)


def _shift(offset: int | Array, distance: int, operands: Operands) -> int | Array | None:
    """offset + distance, kept inside [-T - 1, S + 1], beyond which nothing changes.

    In int32 the sum could wrap round, so an array is clipped before it is shifted.
    """
    smallest, largest = -operands.query.shape[-3] - 1, operands.key.shape[-3] + 1
    if not isinstance(offset, Array):
        return min(max(offset + distance, smallest), largest)
    limits = np.iinfo(np.int32)
    low, high = smallest - distance, largest - distance
    if high < limits.min:  # every offset lands beyond the largest
        return largest
    if low > limits.max:
        return smallest
    return jnp.clip(offset, max(low, limits.min), min(high, limits.max)) + np.int32(distance)


def _positions(spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """Positions of queries and keys, where at least one of them was given."""
    positions_q, positions_k = operands.query_positions, operands.key_positions
    if positions_q is None:
        length = operands.query.shape[-3]
        offset = jnp.asarray(first_position(spec, operands, length), jnp.int32)[..., None]
        positions_q = _arange(length) + offset
        positions_q = jnp.broadcast_to(positions_q, operands.query.shape[:-2])
    if positions_k is None:
        positions_k = _arange(operands.key.shape[-3])
        positions_k = jnp.broadcast_to(positions_k, operands.key.shape[:-2])
    return positions_q, positions_k


def _inside(band: _Band, distance: Array) -> list[Array]:
    """The band's conditions on distance [.., block_q, block_k], none for an open side."""

    def bound(x):
        return x[..., None, None] if isinstance(x, Array) else np.int32(x)

    keep = []
    if band.low is not None:
        keep.append(distance >= bound(band.low))
    if band.high is not None:
        keep.append(distance <= bound(band.high))
    return keep


def _block_sizes(heads: int, seqlen_q: int) -> tuple[int, int]:
    """Largest number of queries and of keys in a tile that `heads` heads (times batch) share.

    Few queries leave room for more keys: a decoding step walks over few tiles. The backend here
    only tunes speed: a program that is lowered for another one stays right.
    """
    backend = "cpu" if jax.default_backend() == "cpu" else "other"
    area = _TILE_ELEMENTS[backend] // max(1, heads)
    block_q = min(max(math.isqrt(area), _SMALLEST_BLOCK), _LARGEST_BLOCK_Q[backend])
    block_k = max(area // max(1, min(block_q, seqlen_q)), _SMALLEST_BLOCK)
    return _power_of_two(block_q), _power_of_two(block_k)


def _power_of_two(x: int) -> int:
    """The largest one that is at most x >= 1."""
    return 1 << (x.bit_length() - 1)


def _depending_on(inputs, outputs):
    """The outputs as they are, but each a function of every input.

    jax.vmap counts the cotangent of a custom_vjp's output once for each row when that output alone
    is not mapped (jax 0.10 to 0.11), as lse is not under a vmap over value. XLA drops the select.
    """
    flags = []
    for x in jax.tree.leaves(inputs):
        first = lax.slice(x, [0] * x.ndim, [min(size, 1) for size in x.shape])
        flags.append((first == first).all())
    flag = functools.reduce(jnp.logical_and, flags)
    return jax.tree.map(lambda x: jnp.where(flag, x, x), outputs)


def _arange(length: int) -> Array:
    return jnp.arange(length, dtype=jnp.int32)  # as lengths and offsets, also under jax_enable_x64


def _cut(length: int, largest: int) -> tuple[int, int]:
    """(count, size) of equal blocks that cover `length` with little padding."""
    if length <= largest:
        return (1, length) if length else (0, 0)
    count = -(-length // largest)
    size = -(-length // count)
    return count, -(-size // 8) * 8


def _split(x: Array, axis: int, count: int, size: int) -> Array:
    """Cuts `axis` (negative) into blocks and puts their number first; the last is padded by 0."""
    axis %= x.ndim
    pad = count * size - x.shape[axis]
    if pad:
        x = jnp.pad(x, [(0, pad if a == axis else 0) for a in range(x.ndim)])
    x = x.reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(x: Array, axis: int, length: int) -> Array:
    """Inverse of _split: the leading dim goes back before `axis` (negative), padding is cut."""
    axis = axis % x.ndim - 1
    x = jnp.moveaxis(x, 0, axis)
    x = x.reshape(*x.shape[:axis], x.shape[axis] * x.shape[axis + 1], *x.shape[axis + 2 :])
    return lax.slice_in_dim(x, 0, length, axis=axis)


def _get(x: Array, i: Array) -> Array:
    return lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x: Array, i: Array, tile: Array) -> Array:
    return lax.dynamic_update_index_in_dim(x, tile, i, 0)


def _add(x: Array, i: Array, tile: Array) -> Array:
    return _put(x, i, _get(x, i) + tile)


def _dequantise(x: Array, descale: Array | None) -> Array:
    """x [*batch, L, heads, width] times descale [*batch, blocks, heads], in float32."""
    x = x.astype(jnp.float32)
    if descale is None:
        return x
    length, blocks = x.shape[-3], descale.shape[-2]
    sizes = [b for b in DESCALE_BLOCKS if -(-length // b) == blocks]
    size = sizes[0] if sizes and blocks > 1 else -(-length // max(blocks, 1))
    descale = jnp.repeat(descale.astype(jnp.float32), size, axis=-2)[..., :length, :]
    return x * descale[..., None]
