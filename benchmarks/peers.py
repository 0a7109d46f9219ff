"""The implementations that are timed side by side, and where FlashAttention-3 itself stands."""

import functools
import importlib
import importlib.util
import sys
import unittest.mock

import harness
import jax
from absl import flags
from harness import Unavailable

import jax_fa3
from jax_fa3 import _native

# FlashAttention-3's forward speed over cuDNN's, for sequences of 512, 1024, ... 16384. Measured
# once on one H200 in August 2026: the original FlashAttention-3 kernels (nvcc 13.0), called from
# JAX 0.11.2 through an FFI binding, beside cuDNN 9.19 through jax.nn.dot_product_attention; bf16,
# this grid, median of 3 interleaved rounds, 8192^3 bf16 GEMM 739 TFLOP/s in the same run.
# Absolute figures move with a machine's clock, ratios hardly: the original's place in another run
# is that run's cuDNN figure times this.
FLASH_ATTENTION_3_OVER_CUDNN = {
    (64, "full"): (0.93, 0.92, 1.06, 1.07, 1.16, 1.13),
    (64, "causal"): (0.99, 0.97, 1.12, 1.10, 1.19, 1.18),
    (128, "full"): (1.15, 1.15, 1.09, 1.07, 1.11, 1.11),
    (128, "causal"): (1.37, 1.30, 1.28, 1.23, 1.22, 1.19),
    (256, "full"): (1.18, 1.14, 1.10, 1.06, 1.06, 1.10),
    (256, "causal"): (1.19, 1.23, 1.18, 1.24, 1.25, 1.18),
}
# The same for the backward pass, of the same run.
FLASH_ATTENTION_3_OVER_CUDNN_BACKWARD = {
    (64, "full"): (1.31, 1.23, 1.20, 1.17, 1.17, 1.18),
    (64, "causal"): (1.37, 1.35, 1.33, 1.29, 1.28, 1.25),
    (128, "full"): (1.18, 1.19, 1.14, 1.11, 1.12, 1.13),
    (128, "causal"): (1.28, 1.25, 1.18, 1.16, 1.14, 1.10),
    (256, "full"): (1.31, 1.29, 1.19, 1.15, 1.26, 1.27),
    (256, "causal"): (1.30, 1.24, 1.21, 1.13, 1.05, 1.12),
}
# The paper's grid.
GRID_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
GRID_TOKENS = 16384
GRID_HIDDEN = 2048

_JNP_MAX_GIB = flags.DEFINE_float(
    "jnp_max_gib", 20, "Leave plain jnp out where its float32 scores alone are larger."
)


def flash_attention_3_over_cudnn(row, backward=False):
    """The measured ratio for a row of the paper's grid, None for others."""
    of_the_grid = (
        row.seqlen in GRID_SEQLENS
        and row.batch * row.seqlen == GRID_TOKENS
        and row.query_shape == row.key_shape
        and row.heads * row.head_dim == GRID_HIDDEN
    )
    if not of_the_grid:
        return None
    table = FLASH_ATTENTION_3_OVER_CUDNN_BACKWARD if backward else FLASH_ATTENTION_3_OVER_CUDNN
    return table[row.head_dim, row.mask][GRID_SEQLENS.index(row.seqlen)]


def flash_attention_3_over_cudnn_together(row, forward_share):
    """The same for forward plus backward; None off the grid.

    `forward_share`: of cuDNN's time for both, what is its forward's. The two ratios are alike, so
    that an error of this share hardly moves their mean.
    """
    forward = flash_attention_3_over_cudnn(row)
    backward = flash_attention_3_over_cudnn(row, backward=True)
    if forward is None or backward is None:
        return None
    return 1 / (forward_share / forward + (1 - forward_share) / backward)


def extension():
    """The compiled extension. Raises: Unavailable, with the reason, where there is none."""
    module = _native.extension()
    if module is None:
        raise Unavailable("; ".join(_native.why_not()))
    return module


def _fa3(row, config):
    if not config:
        return _ours("fa3", row)
    call = harness.kernel_call(extension(), _native.FWD_TARGET, row, config)
    return lambda query, key, value: call(query, key, value)[0]


# A fixed implementation: a silent fallback would be timed as the kernel.
def _ours(implementation, row, **options):
    return functools.partial(
        jax_fa3.dot_product_attention,
        is_causal=row.causal,
        implementation=implementation,
        **options,
    )


def _fa3_deterministic(row):
    """The same forward; its backward gives the same bits every time."""
    # Where dQ has a pass of its own, all sums are in a fixed order: the default's kernel.
    if "in a pass of its own" in harness.backward_plan(extension(), row):
        raise Unavailable("the default's backward kernel is deterministic")
    return _ours("fa3", row, deterministic_backward=True)


def _cudnn(row):
    if jax.default_backend() != "gpu":
        raise Unavailable("cuDNN needs a GPU")
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=row.causal, implementation="cudnn"
    )


class TooLarge(Unavailable):
    """Plain jnp's scores are larger than --jnp_max_gib."""


def _jnp(row):
    gib = row.scores_bytes / 2**30
    if gib > _JNP_MAX_GIB.value:
        raise TooLarge(f"its scores alone are {gib:.0f} GiB")
    return jnp_of_any_size(row)


def jnp_of_any_size(row):
    """jnp.einsum and softmax, as jax.nn writes them."""
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=row.causal, implementation="xla"
    )


PACKAGES = ("tokamax", "flash_attn3_jax", "dew_flash_attn")  # the peers that are one, by its name


@functools.cache
def _package(name):
    """Raises: Unavailable where it is not installed, and what its import raises."""
    if importlib.util.find_spec(name) is None:
        raise Unavailable("not installed")
    if name == "tokamax":
        # Its benchmark helper imports xprof, a large package that attention does not need.
        for unused in ("", ".cli", ".cli.tools", ".cli.tools.get_kernel_stats_tool"):
            sys.modules.setdefault(f"xprof{unused}", unittest.mock.MagicMock())
    return importlib.import_module(name)


def broken(peers):
    """Why those of `peers` whose package is installed cannot be imported: a line each.

    A figure without them would look as if they had not been asked for.
    """
    lines = []
    for peer in PACKAGES:
        if peer not in peers:
            continue
        try:
            _package(peer)
        except Unavailable:
            pass
        except Exception as error:  # whatever the import of a stranger raises
            lines.append(f"{peer} is installed and cannot be imported: {error!r}")
    return lines


def _tokamax(row):
    if jax.default_backend() != "gpu":
        raise Unavailable("its mosaic kernels need a GPU")
    return functools.partial(
        _package("tokamax").dot_product_attention, is_causal=row.causal, implementation="mosaic"
    )


def _flash_mha(module, row):
    """A wheel of the original FlashAttention-3 kernels for JAX."""
    if jax.default_backend() != "gpu":
        raise Unavailable("needs a GPU")
    return functools.partial(_package(module).flash_mha, is_causal=row.causal)


_OTHERS = {
    "fa3_deterministic": _fa3_deterministic,
    "xla": functools.partial(_ours, "xla"),
    "cudnn": _cudnn,
    "jnp": _jnp,
    "tokamax": _tokamax,
    "flash_attn3_jax": functools.partial(_flash_mha, "flash_attn3_jax"),
    "dew_flash_attn": functools.partial(_flash_mha, "dew_flash_attn"),
}
PEERS = ("fa3", *_OTHERS)


def attention(peer, row, config=None):
    """A peer's attention function (query, key, value) -> out for a row.

    `config` names the configuration that the kernels of peer fa3 take in place of the plan's.

    Raises:
      Unavailable: it cannot run here, or not this row.
    """
    return _fa3(row, config) if peer == "fa3" else _OTHERS[peer](row)
