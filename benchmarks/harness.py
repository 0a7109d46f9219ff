"""What the benchmarks of attention share: problems, checks, timing, the machine, the results file.

Method. Every implementation of a row is compiled first, then checked against a dense float32
reference on random normal inputs (NaN never passes), then timed: each round times every
implementation once, in an order that turns from round to round, and the median of the rounds
counts. One timing is as many back-to-back calls as fill --min_seconds, ended by
block_until_ready, so that the host's dispatch overlaps the device's work; the result holds what a
call costs the host alone. A square bfloat16 matrix product, timed between the rows in the same
way, says how fast the device was. The results file is rewritten after each row: what a time limit
cuts off is named in it, and nothing measured is lost.

TFLOP/s count 4 * B * N * T * S * H operations forward, half of it when causal and T = S, as the
FlashAttention papers do; when causal and T != S, the pairs that a query sees.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import threading
import time
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tree_hashes
from absl import flags, logging

sys.path.append(str(tree_hashes.REPOSITORY))  # last: an installed jax_fa3 has the extension

import jax_fa3

ROUNDS = flags.DEFINE_integer("rounds", 3, "Timings of each implementation; the median counts.")
MIN_SECONDS = flags.DEFINE_float("min_seconds", 0.03, "Least length of one timing.")
TIME_LIMIT = flags.DEFINE_float("time_limit_s", 0, "Start no row after this long; 0 is no limit.")
COMPILE_THREADS = flags.DEFINE_integer(
    "compile_threads", min(16, os.cpu_count() or 1), "Functions compiled at a time."
)
SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes that show only that the script works.")
TREE_HASHES = flags.DEFINE_string(
    "tree_hashes",
    None,
    "What benchmarks/tree_hashes.py printed for the commit, or a file that holds it; for a machine "
    "without .git. Default: asks git.",
)
OUTPUT = flags.DEFINE_string("output", None, "Results file, JSON; default: build/bench/KIND.json.")
COMMIT = flags.DEFINE_string("commit", None, "Commit, where git cannot tell. Only recorded.")

# Relative errors allowed against the float32 reference. Rounding the probabilities and the output
# to bfloat16 leaves 2e-3 to 4e-3; a wrong or unwritten block of rows leaves about 1.
MAX_RELATIVE_ERROR = 1e-2
MAX_BLOCK_ERROR = 2e-2
# Of gradients: few queries see the last keys of a causal mask, which leaves little to compare with.
MAX_GRADIENT_BLOCK_ERROR = 5e-2
ERROR_BLOCK = 64  # rows

# Operations of a backward pass over those of a forward pass, as the papers count: five products for
# two.
BACKWARD_PASSES = 2.5

# Scores of the reference that are worked out at most for one check: past this a sample of the
# query rows stands for all. 2^33 are all rows of 16k tokens.
MAX_CHECKED_SCORES = 2**33


# --------------------------------------------------------------------------------------------------
# Problems
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One problem, bfloat16; where a field is left out, self-attention with equal heads."""

    head_dim: int
    mask: str  # "full" or "causal" (query t sees keys s <= t)
    seqlen: int
    batch: int
    heads: int
    seqlen_k: int | None = None  # None: seqlen
    heads_k: int | None = None  # None: heads
    case: str | None = None  # what the name says in place of the length

    @property
    def name(self):
        return f"{self.head_dim}-{self.mask}-{self.case or self.seqlen}"

    @property
    def causal(self):
        return self.mask == "causal"

    @property
    def query_shape(self):
        """[B, T, N, H], of the output too."""
        return (self.batch, self.seqlen, self.heads, self.head_dim)

    @property
    def key_shape(self):
        """[B, S, K, H], of the values too."""
        return (
            self.batch,
            self.seqlen_k or self.seqlen,
            self.heads_k or self.heads,
            self.head_dim,
        )

    @property
    def scores(self):
        """How many scores count: those of the keys that a query sees."""
        t, s = self.seqlen, self.key_shape[1]
        if not self.causal:
            pairs = t * s
        elif t == s:
            pairs = t * t // 2  # as the papers count
        else:
            seeing = min(t, s)
            pairs = seeing * (seeing + 1) // 2 + (t - seeing) * s
        return self.batch * self.heads * pairs

    @property
    def flops(self):
        """Forward: two products of two operations."""
        return 4 * self.scores * self.head_dim

    @property
    def scores_bytes(self):
        """Of one float32 [B, N, T, S]."""
        return 4 * self.batch * self.heads * self.seqlen * self.key_shape[1]

    def fields(self):
        """For the results file."""
        given = {name: x for name, x in dataclasses.asdict(self).items() if x is not None}
        return {"name": self.name, **given, "flops": self.flops}


class Unavailable(Exception):
    """An implementation that cannot run here or cannot take a row; the message says why."""


@functools.partial(jax.jit, static_argnums=1)
def _random_inputs(key, shapes):
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(k, x, jnp.bfloat16) for k, x in zip(keys, shapes, strict=True))


def random_inputs(key, row):
    """query, key and value of the row, bfloat16, standard normal."""
    return _random_inputs(key, (row.query_shape, row.key_shape, row.key_shape))


# --------------------------------------------------------------------------------------------------
# Compiling and checking
# --------------------------------------------------------------------------------------------------


def input_types(row):
    """Of query, key and value."""
    shapes = (row.query_shape, row.key_shape, row.key_shape)
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


def compile_for(function, row, **compiler_options):
    """`function` compiled for the row's inputs, so that no call ever compiles."""
    return jax.jit(function).lower(*input_types(row)).compile(compiler_options)


def compile_with_cotangent(function, row, **compiler_options):
    """As compile_for, of a function of query, key, value and the cotangent of the output."""
    types = input_types(row)
    return jax.jit(function).lower(*types, types[0]).compile(compiler_options)


def untimed_options() -> dict[str, Any]:
    """Compiler options of what is never timed: XLA need not search for its fastest GEMM."""
    return {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else {}


def compile_reference(row):
    """(query, key, value) -> the reference's output at checked_rows(row)."""
    rows = checked_rows(row)

    def reference(query, key, value):
        taken = query if rows is None else query[:, rows]
        return reference_attention(taken, key, value, causal=row.causal, positions=rows)

    return compile_for(reference, row, **untimed_options())


def compile_reference_gradients(row):
    """(query, key, value, cotangent of the output) -> the reference's gradients."""
    reference = functools.partial(reference_gradients, causal=row.causal)
    return compile_with_cotangent(reference, row, **untimed_options())


def warm_up(row):
    """Compiles what a check of the row needs beside the reference, where others compile too.

    One problem after another in a mode of many shapes, these would take longer than the timings.
    """
    shapes = (row.query_shape, row.key_shape, row.key_shape)
    _random_inputs.lower(jax.random.key(0), shapes).compile()
    rows = checked_rows(row)
    batch, seqlen, heads, head_dim = row.query_shape
    checked = (batch, seqlen if rows is None else len(rows), heads, head_dim)
    errors_against.lower(
        jax.ShapeDtypeStruct(checked, jnp.bfloat16), jax.ShapeDtypeStruct(checked, jnp.float32)
    ).compile()


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def compile_all(jobs):
    """{key: compiled, or a str that says why not} of {key: thunk}, several at a time.

    A key is a tuple that ends in the implementation's name; the log says how long each took.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    begin = time.monotonic()

    def attempt(job):
        (*_, name), thunk = job
        start = time.monotonic()
        try:
            return thunk()
        except Unavailable as reason:
            return str(reason)
        except Exception as error:  # A peer that fails is a result to report, not our crash.
            return one_line(error)
        finally:
            seconds[name] += time.monotonic() - start

    with futures.ThreadPoolExecutor(COMPILE_THREADS.value) as pool:
        compiled = dict(zip(jobs, pool.map(attempt, jobs.items()), strict=True))
    slowest = sorted(seconds, key=lambda name: -seconds[name])[:8]
    logging.info(
        "Compiled %d functions in %.1f s with %d threads; thread time by name: %s",
        len(jobs),
        time.monotonic() - begin,
        COMPILE_THREADS.value,
        ", ".join(f"{name} {seconds[name]:.1f} s" for name in slowest),
    )
    return compiled


def checked_rows(row):
    """Which query rows the reference works out: None for all, else blocks of ERROR_BLOCK of them.

    The first block and the last are among them, the others evenly between.
    """
    scores = row.scores_bytes // 4
    if scores <= MAX_CHECKED_SCORES:
        return None
    blocks = math.ceil(row.seqlen / ERROR_BLOCK)
    kept = max(2, blocks * MAX_CHECKED_SCORES // scores)
    starts = np.unique(np.linspace(0, blocks - 1, kept).round().astype(int)) * ERROR_BLOCK
    rows = (starts[:, None] + np.arange(ERROR_BLOCK)).reshape(-1)
    return rows[rows < row.seqlen]


def reference_attention(query, key, value, *, causal, positions=None):
    """Dense attention in float32, a few heads at a time.

    It shares no code with jax_fa3 or jax.nn: each could be wrong.

    Args:
      query: [B, T, N, H].
      key, value: [B, S, K, H]; query head n reads key head n // (N // K).
      causal: query row t sees keys s <= positions[t].
      positions: [T]; None: each row's index.
    """
    batch, seqlen, heads, head_dim = query.shape
    seqlen_k, heads_k = key.shape[1:3]
    steps = jnp.arange(seqlen) if positions is None else jnp.asarray(positions)

    def one_head(inputs):
        q, k, v = (x.astype(jnp.float32) for x in inputs)
        scores = jnp.matmul(q, k.T, precision="highest") / math.sqrt(head_dim)
        if causal:
            scores = jnp.where(steps[:, None] >= jnp.arange(seqlen_k)[None, :], scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return jnp.matmul(weights, v, precision="highest")

    def by_head(x):
        x = jnp.repeat(x, heads // x.shape[2], axis=2)
        return jnp.moveaxis(x, 2, 1).reshape(batch * heads, x.shape[1], head_dim)

    assert heads % heads_k == 0
    at_once = max(1, min(batch * heads, 2**28 // (seqlen * seqlen_k)))  # scores of at most 1 GiB
    inputs = tuple(by_head(x) for x in (query, key, value))
    out = jax.lax.map(one_head, inputs, batch_size=at_once)
    return jnp.moveaxis(out.reshape(batch, heads, seqlen, head_dim), 1, 2)


def reference_gradients(query, key, value, dout, *, causal):
    """Gradients of dense attention in float32, written out, one head at a time.

    Args:
      query, dout: [B, T, N, H].
      key, value: [B, T, K, H]; query head n reads key head n // (N // K).
    Returns: dq, dk, dv, float32, in the shapes of query, key and value.
    """
    batch, seqlen, heads, head_dim = query.shape
    heads_k = key.shape[2]
    matmul = functools.partial(jnp.matmul, precision="highest")

    def one_head(inputs):
        q, k, v, do = (x.astype(jnp.float32) for x in inputs)
        scores = matmul(q, k.T) / math.sqrt(head_dim)
        if causal:
            steps = jnp.arange(seqlen)
            scores = jnp.where(steps[:, None] >= steps[None, :], scores, -jnp.inf)
        probs = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        probs /= probs.sum(axis=-1, keepdims=True)
        dprobs = matmul(do, v.T)
        dscores = probs * (dprobs - (probs * dprobs).sum(axis=-1, keepdims=True))
        dscores /= math.sqrt(head_dim)
        return matmul(dscores, k), matmul(dscores.T, q), matmul(probs.T, do)

    def by_head(x):
        x = jnp.repeat(x, heads // x.shape[2], axis=2)
        return jnp.moveaxis(x, 2, 1).reshape(batch * heads, seqlen, head_dim)

    at_once = max(1, min(batch * heads, 2**27 // seqlen**2))
    grads = jax.lax.map(
        one_head, tuple(by_head(x) for x in (query, key, value, dout)), batch_size=at_once
    )
    dq, dk, dv = (jnp.moveaxis(x.reshape(batch, heads, seqlen, head_dim), 1, 2) for x in grads)
    group = (batch, seqlen, heads_k, heads // heads_k, head_dim)
    return [dq, *(x.reshape(group).sum(axis=3) for x in (dk, dv))]


def check_gradients(gradients, reference):
    """{"relative_error", "worst_block_error", "ok"}: the worst of dq, dk and dv."""
    errors = [errors_against(*pair) for pair in zip(gradients, reference, strict=True)]
    error, worst = (max(map(float, column)) for column in zip(*errors, strict=True))
    finite = all(math.isfinite(x) for pair in errors for x in map(float, pair))
    ok = finite and error <= MAX_RELATIVE_ERROR and worst <= MAX_GRADIENT_BLOCK_ERROR
    return {"relative_error": error, "worst_block_error": worst, "ok": ok}


@jax.jit
def errors_against(out, reference):
    """(relative error of the whole, the worst of any ERROR_BLOCK rows of a head), 2-norms."""
    batch, seqlen, heads, head_dim = reference.shape
    blocks = math.ceil(seqlen / ERROR_BLOCK)
    rest = [(0, 0), (0, blocks * ERROR_BLOCK - seqlen), (0, 0), (0, 0)]

    def squares(x):
        x = jnp.pad(x * x, rest)
        return x.reshape(batch, blocks, ERROR_BLOCK, heads, head_dim).sum(axis=(2, 4))

    wrong, right = squares(out.astype(jnp.float32) - reference), squares(reference)
    return jnp.sqrt(wrong.sum() / right.sum()), jnp.sqrt((wrong / right).max())


def check(run, inputs, reference, rows=None):
    """{"relative_error", "worst_block_error", "ok"} of one implementation's output.

    `reference` holds the rows `rows` of the output; None is all of them.
    """
    # Freed memory may still hold an earlier implementation's right answer. Fill it with NaN, so
    # that a block nobody writes shows.
    poison = [jnp.full(inputs[0].shape, jnp.nan, inputs[0].dtype) for _ in range(2)]
    jax.block_until_ready(poison)
    del poison
    out = run(*inputs)
    out = out if rows is None else out[:, rows]
    error, worst = (float(x) for x in errors_against(out, reference))
    ok = bool(error <= MAX_RELATIVE_ERROR and worst <= MAX_BLOCK_ERROR)  # False for NaN
    return {"relative_error": error, "worst_block_error": worst, "ok": ok}


def fail_or_result(function, *args):
    """(result, None) or (None, why): a peer that fails when it runs must not end the run."""
    try:
        return function(*args), None
    except Exception as error:
        return None, one_line(error)


def check_all(compiled, inputs, reference, rows=None):
    """({name: entry of the results file}, {name: those that may be timed}) of {name: compiled}."""
    entries, runs = {}, {}
    for name, run in compiled.items():
        if isinstance(run, str):
            entries[name] = {"skipped": run}
            continue
        entry, failure = fail_or_result(check, run, inputs, reference, rows)
        entries[name] = {"skipped": failure} if entry is None else entry
        if entry and entry["ok"]:
            runs[name] = run
    return entries, runs


# --------------------------------------------------------------------------------------------------
# Timing
# --------------------------------------------------------------------------------------------------


def seconds_per_call(run, inputs, calls):
    """Mean wall time of `calls` back-to-back calls, the device's work included."""
    start = time.perf_counter()
    for _ in range(calls):
        out = run(*inputs)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def calls_to_fill(run, inputs, min_seconds):
    """How many calls take `min_seconds`."""
    seconds_per_call(run, inputs, 1)  # first call: modules load, handles are made
    once = seconds_per_call(run, inputs, 1)
    if once >= min_seconds:
        return 1
    # One call's time is mostly latency when calls are short; a longer burst tells.
    burst = seconds_per_call(run, inputs, max(2, min(50, int(min_seconds / once / 4))))
    return max(1, math.ceil(min_seconds / burst))


def time_interleaved(runs, inputs, rounds, min_seconds):
    """{name: [seconds a call, one a round]} of {name: function}; the order turns each round."""
    if not runs:
        return {}
    calls = {name: calls_to_fill(run, inputs, min_seconds) for name, run in runs.items()}
    names = list(runs)
    seconds = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(seconds_per_call(runs[name], inputs, calls[name]))
    return seconds


def time_all(row, entries, runs, inputs, passes=1.0):
    """Adds "seconds", "rounds" and "tflops" to the entries of `runs`.

    `passes`: how many forward passes' operations a run counts for; see BACKWARD_PASSES.
    """
    timed = time_interleaved(runs, inputs, ROUNDS.value, MIN_SECONDS.value)
    for name, seconds in timed.items():
        median = statistics.median(seconds)
        entries[name] |= {
            "seconds": median,
            "rounds": seconds,
            "tflops": passes * row.flops / median / 1e12,
        }


class Yardstick:
    """A size^3 bfloat16 matrix product on random normal inputs: how fast the device is now."""

    def __init__(self, size):
        self.size = size
        keys = jax.random.split(jax.random.key(7))
        self._inputs = [jax.random.normal(k, (size, size), jnp.bfloat16) for k in keys]
        shape = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
        self._run = jax.jit(jnp.matmul).lower(shape, shape).compile()
        self._calls = calls_to_fill(self._run, self._inputs, MIN_SECONDS.value)
        self.samples = []

    def measure(self):
        """Appends one timing, in TFLOP/s."""
        seconds = seconds_per_call(self._run, self._inputs, self._calls)
        self.samples.append(2 * self.size**3 / seconds / 1e12)

    def summary(self):
        return {
            "size": self.size,
            "tflops": statistics.median(self.samples),
            "samples": self.samples,
        }


def host_dispatch_seconds():
    """What one call costs the host when the device has nothing to do: the floor of a timing."""
    tiny = [jnp.ones((8, 128), jnp.bfloat16)] * 3
    run = jax.jit(lambda q, k, v: q + k + v).lower(*tiny).compile()
    seconds_per_call(run, tiny, 10)
    return min(seconds_per_call(run, tiny, 200) for _ in range(3))


# --------------------------------------------------------------------------------------------------
# The kernels, called by name
# --------------------------------------------------------------------------------------------------


def kernel_plan(module, row, config=""):
    """What the extension `module` plans for the row, as text; `config` forces a configuration.

    Raises:
      ValueError: there is no such configuration, or it is not for this row.
    """
    return module.describe_plan("bfloat16", *_sizes(row), config)


def backward_plan(module, row):
    """What the extension `module` plans for the row's backward pass, as text."""
    return module.describe_bwd_plan("bfloat16", *_sizes(row))


def kernel_call(module, target, row, config=""):
    """(query, key, value) -> (out, workspace) of the forward kernels, below jax_fa3's front.

    The one way to name a configuration: programs have none. `module` is the extension, `target`
    the name that its forward handler is registered under.
    """
    workspace = module.fwd_workspace_bytes("bfloat16", *_sizes(row), config)
    batch, seqlen, heads, head_dim = row.query_shape
    results = (
        jax.ShapeDtypeStruct(row.query_shape, jnp.bfloat16),
        jax.ShapeDtypeStruct((batch, heads, seqlen), jnp.float32),
        jax.ShapeDtypeStruct((workspace,), jnp.uint8),
    )
    attributes = {
        "scale": np.float32(1 / math.sqrt(head_dim)),
        "is_causal": np.bool_(row.causal),
        "diagonal": np.int64(0),
        "has_query_offset": np.bool_(False),
    } | ({"config": config} if config else {})

    def call(query, key, value):
        out, _, scratch = jax.ffi.ffi_call(target, results)(query, key, value, **attributes)
        return out, scratch

    return call


def _sizes(row):
    """batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, is_causal: the extension's order."""
    batch, seqlen, heads, head_dim = row.query_shape
    _, seqlen_k, heads_k, _ = row.key_shape
    return batch, seqlen, seqlen_k, heads, heads_k, head_dim, row.causal


# --------------------------------------------------------------------------------------------------
# The machine and the code
# --------------------------------------------------------------------------------------------------


class ClockSampler:
    """Reads the SM clock while a row is timed, with one nvidia-smi that runs along."""

    def __init__(self):
        self._samples = []
        # A terminal, because into a pipe it could keep its lines back until a buffer is full.
        reader, writer = os.openpty()
        try:
            self._process = subprocess.Popen(
                ["nvidia-smi", "--id=0", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
                + ["--loop-ms=100"],
                stdout=writer,
                stderr=subprocess.DEVNULL,
            )
        except FileNotFoundError:
            self._process = None
            os.close(reader)
            return
        finally:
            os.close(writer)
        threading.Thread(target=self._read, args=(reader,), daemon=True).start()

    def _read(self, terminal):
        # OSError: the terminal's other end closed with the process.
        with contextlib.suppress(OSError), os.fdopen(terminal) as lines:
            for line in lines:
                with contextlib.suppress(ValueError):
                    self._samples.append((time.monotonic(), int(line)))

    def median_since(self, start):
        """MHz, or None where nothing was read since `start` (time.monotonic)."""
        recent = [mhz for when, mhz in self._samples if when >= start]
        return statistics.median(recent) if recent else None

    def stop(self):
        if self._process is not None:
            self._process.terminate()
            self._process.wait()


def _version(*distributions):
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def _nvidia_smi(field):
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--id=0", f"--query-gpu={field}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def describe_environment():
    """Device, driver and versions of everything that has a part in the figures."""
    device = jax.devices()[0]
    return {
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "driver": _nvidia_smi("driver_version"),
            "max_sm_clock_mhz": _nvidia_smi("clocks.max.sm"),
            "compute_capability": getattr(device, "compute_capability", None),
            "multiprocessors": getattr(device, "core_count", None),
        },
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": _version("jaxlib"),
            "jax_fa3": jax_fa3.__version__,
            "cudnn": _version("nvidia-cudnn-cu13", "nvidia-cudnn-cu12"),
            "tokamax": _version("tokamax"),
            "flash_attn3_jax": _version("flash-attn3-jax"),
            "dew_flash_attn": _version("dew-flash-attn-cu13", "dew-flash-attn-cu12"),
        },
    }


def _files_unlike_the_checkout():
    """Python files of the checkout that an installed jax_fa3 does not have in the same form."""
    checkout = tree_hashes.REPOSITORY / "jax_fa3"
    imported = pathlib.Path(jax_fa3.__file__).resolve().parent
    return [
        name
        for path in sorted(checkout.rglob("*.py"))
        if not (imported / (name := path.relative_to(checkout).as_posix())).is_file()
        or (imported / name).read_bytes() != path.read_bytes()
    ]


def describe_code(extension=None):
    """Which jax_fa3 ran: the trees on disk, whether the commit has them, the extension's hash.

    `extension` is the file that was measured; None: the installed one.
    """
    on_disk = tree_hashes.tree_hashes()
    if TREE_HASHES.value is None:
        committed = tree_hashes.commit_tree_hashes()
    else:
        text = TREE_HASHES.value
        committed = json.loads(text if text.startswith("{") else pathlib.Path(text).read_text())
    commit = COMMIT.value
    if commit is None and TREE_HASHES.value is None and committed is not None:
        commit = subprocess.run(
            ["git", "-C", str(tree_hashes.REPOSITORY), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
        ).stdout.strip()
    if committed is not None and committed != on_disk:
        logging.warning("The measured files are not the commit's: %s, %s", on_disk, committed)
    differing = _files_unlike_the_checkout()
    if differing:
        logging.warning("The imported jax_fa3 is not the checkout's: %s differ", differing)
    if extension is None:
        installed = importlib.util.find_spec("jax_fa3._jax_fa3")
        extension = installed.origin if installed is not None else None
    return {
        "commit": commit,
        "tree_hashes": on_disk,
        "matches_commit": None if committed is None else committed == on_disk and not differing,
        "extension_sha256": extension
        and hashlib.sha256(pathlib.Path(extension).read_bytes()).hexdigest(),
    }


# --------------------------------------------------------------------------------------------------
# The results file
# --------------------------------------------------------------------------------------------------


def _rounded(value):
    """The same with every float at 5 significant digits: more than a timing has."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value


class Results:
    """The results file; every `save` leaves a complete and readable one."""

    def __init__(self, kind, names, settings, extension=None):
        self._path = pathlib.Path(OUTPUT.value or f"build/bench/{kind}.json")
        self._begin = time.monotonic()
        self._names = names
        self._content = {
            "schema": 1,
            "kind": kind + ("_smoke" if SMOKE.value else ""),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            **describe_environment(),
            "code": describe_code(extension),
            "settings": {
                "dtype": "bfloat16",
                "rounds": ROUNDS.value,
                "min_seconds": MIN_SECONDS.value,
                "max_relative_error": MAX_RELATIVE_ERROR,
                "max_block_error": MAX_BLOCK_ERROR,
                **settings,
            },
            "rows": [],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def path(self):
        return self._path

    @property
    def elapsed(self):
        return time.monotonic() - self._begin

    def out_of_time(self):
        return bool(TIME_LIMIT.value) and self.elapsed > TIME_LIMIT.value

    def save(self, row=None, **fields):
        if row is not None:
            self._content["rows"].append(row)
        done = {row["name"] for row in self._content["rows"]}
        self._content.update(
            fields,
            missing_rows=[name for name in self._names if name not in done],
            elapsed_s=round(self.elapsed, 1),
        )
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(_rounded(self._content), indent=1) + "\n")
        partial.replace(self._path)


def chunks(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


# --------------------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------------------


def measure_all(results, measure, **first):
    """Runs measure(yardstick, clock) between the first save of `results` and the last.

    Args:
      measure: measures and saves the rows; returns the names that failed their check.
      first: fields of the results file that are known before the first row.
    Returns: (yardstick, names that failed).
    """
    yardstick = Yardstick(256 if SMOKE.value else 8192)
    yardstick.measure()
    results.save(gemm=yardstick.summary(), **first)
    clock = ClockSampler()
    try:
        failed = measure(yardstick, clock)
    finally:
        clock.stop()
    results.save(gemm=yardstick.summary(), failed_checks=failed)
    return yardstick, failed


def conclude(results, yardstick, failed):
    """Says what was written and what failed; returns the exit status."""
    gemm = yardstick.summary()
    print(f"GEMM {gemm['size']}^3: {gemm['tflops']:.3g} TFLOP/s; {results.elapsed:.0f} s in all")
    print(f"Written: {results.path}")
    if failed:
        print(f"FAILED their check, so were not timed: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0
