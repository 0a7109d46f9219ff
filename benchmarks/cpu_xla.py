"""Times jax_fa3's xla path beside jax.nn.dot_product_attention, on this machine's CPU.

    python benchmarks/cpu_xla.py
    python benchmarks/cpu_xla.py --seqlens=1024 --dtypes=float32 --rounds=3 --output=/tmp/x.json

Method. Both are compiled first and checked against each other. Each round then times one call of
each, in turning order, so that whatever else runs on the machine disturbs both; a row gives the
median of the rounds, and as ratio the median of the rounds' own ratios (ours over jax.nn's, below 1
is faster). CPU time counts all threads and barely notices other programs. Temporary memory is what
XLA reserves beside arguments and results. Rows are written to --output as they are measured.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # also on a machine with a GPU

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

sys.path.append(str(pathlib.Path(__file__).resolve().parent.parent))  # last: an installed one wins

import jax_fa3

_OUTPUT = flags.DEFINE_string(
    "output", str(pathlib.Path(__file__).parent / "results/cpu_xla.json"), "Results file."
)
_SEQLENS = flags.DEFINE_list("seqlens", ["1024", "2048"], "Lengths T = S.")
_DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Input dtypes.")
_BATCH = flags.DEFINE_integer("batch", 1, "Batch size.", lower_bound=1)
_HEADS = flags.DEFINE_integer("heads", 8, "Heads, of queries and of keys.", lower_bound=1)
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Head dim.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 15, "Timed calls of each implementation.", lower_bound=1)

IMPLEMENTATIONS = {
    "jax_fa3": lambda *qkv, is_causal: jax_fa3.dot_product_attention(
        *qkv, is_causal=is_causal, implementation="xla"
    ),
    "jax.nn": lambda *qkv, is_causal: jax.nn.dot_product_attention(
        *qkv, is_causal=is_causal, implementation="xla"
    ),
}
# Largest difference between the two over the largest value: a few roundings of the dtype.
TOLERANCE = {"float32": 1e-5, "bfloat16": 3e-2, "float16": 4e-3}


def make_call(attention, is_causal: bool, gradient: bool):
    """The function to time, of query, key, value and the cotangent of out."""

    def forward(q, k, v, dout):
        del dout
        return attention(q, k, v, is_causal=is_causal)

    def forward_and_gradient(q, k, v, dout):
        out, pullback = jax.vjp(lambda *qkv: attention(*qkv, is_causal=is_causal), q, k, v)
        return out, pullback(dout)

    return forward_and_gradient if gradient else forward


def compile_row(dtype: str, seqlen: int, is_causal: bool, gradient: bool):
    """Compiled calls by implementation, checked against each other, and their arguments."""
    rng = np.random.default_rng(seqlen)
    shape = (_BATCH.value, seqlen, _HEADS.value, _HEAD_DIM.value)
    args = [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4)]
    calls = {
        name: jax.jit(make_call(attention, is_causal, gradient)).lower(*args).compile()
        for name, attention in IMPLEMENTATIONS.items()
    }
    results = [jax.tree.leaves(call(*args)) for call in calls.values()]
    for ours, theirs in zip(*results, strict=True):
        ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        if not error <= TOLERANCE[dtype]:
            raise AssertionError(f"results differ by {error:.1e}, expected {TOLERANCE[dtype]:.0e}")
    return calls, args


def time_row(calls, args, rounds: int) -> dict:
    """Wall and CPU time of one call in milliseconds, medians, and the median ratios."""
    wall = {name: [] for name in calls}
    cpu = {name: [] for name in calls}
    for r in range(rounds):
        for name in list(calls) if r % 2 else reversed(calls):
            start, cpu_start = time.perf_counter(), time.process_time()
            jax.block_until_ready(calls[name](*args))
            wall[name].append(1e3 * (time.perf_counter() - start))
            cpu[name].append(1e3 * (time.process_time() - cpu_start))

    def ratio(times):
        return statistics.median(
            ours / theirs for ours, theirs in zip(times["jax_fa3"], times["jax.nn"], strict=True)
        )

    return {
        "wall_ms": {name: round(statistics.median(t), 2) for name, t in wall.items()},
        "cpu_ms": {name: round(statistics.median(t), 2) for name, t in cpu.items()},
        "wall_ratio": round(ratio(wall), 3),
        "cpu_ratio": round(ratio(cpu), 3),
    }


def temporary_bytes(call) -> int:
    """What XLA reserves for a compiled call beside its arguments and results."""
    analysis = call.memory_analysis()
    if analysis is None:
        raise RuntimeError("this backend does not say how much memory a program takes")
    return analysis.temp_size_in_bytes


def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def environment() -> dict:
    """What the figures depend on."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
            "jax_fa3": jax_fa3.__version__,
        },
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "shape": {"batch": _BATCH.value, "heads": _HEADS.value, "head_dim": _HEAD_DIM.value},
        "rounds": _ROUNDS.value,
        "load_average_before": round(os.getloadavg()[0], 2),
    }


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    output = pathlib.Path(_OUTPUT.value)
    output.parent.mkdir(parents=True, exist_ok=True)
    results = {"environment": environment(), "rows": []}
    print(
        f"{results['environment']['cpu']}, {results['environment']['cores']} cores, load", end=" "
    )
    print(results["environment"]["load_average_before"])
    print(
        f"{'dtype':9} {'T = S':>6} {'mask':7} {'pass':9}"
        f"{'jax_fa3 ms':>11} {'jax.nn ms':>10} {'ratio':>6} {'CPU ratio':>10}"
        f"{'jax_fa3 MiB':>13} {'jax.nn MiB':>11}"
    )
    for dtype in _DTYPES.value:
        for seqlen in map(int, _SEQLENS.value):
            for is_causal in (False, True):
                for gradient in (False, True):
                    calls, args = compile_row(dtype, seqlen, is_causal, gradient)
                    row = {
                        "dtype": dtype,
                        "seqlen": seqlen,
                        "mask": "causal" if is_causal else "full",
                        "pass": "gradient" if gradient else "forward",
                        **time_row(calls, args, _ROUNDS.value),
                        "temporary_mib": {
                            name: round(temporary_bytes(call) / 2**20, 2)
                            for name, call in calls.items()
                        },
                    }
                    results["rows"].append(row)
                    wall, memory = row["wall_ms"], row["temporary_mib"]
                    print(
                        f"{dtype:9} {seqlen:6} {row['mask']:7} {row['pass']:9}"
                        f"{wall['jax_fa3']:11.1f} {wall['jax.nn']:10.1f} {row['wall_ratio']:6.2f} "
                        f"{row['cpu_ratio']:10.2f}"
                        f"{memory['jax_fa3']:13.1f} {memory['jax.nn']:11.1f}",
                        flush=True,
                    )
                    output.write_text(json.dumps(results, indent=1) + "\n")
    results["environment"]["load_average_after"] = round(os.getloadavg()[0], 2)
    output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    app.run(main)
