"""Times jax_fa3's attention beside its peers, in one process on one device.

    python benchmarks/attention.py --output=benchmarks/results/forward.json
    python benchmarks/attention.py --mode=length --output=benchmarks/results/memory.json
    python benchmarks/attention.py --rows='128-*' --peers=fa3,cudnn --rounds=5
    python benchmarks/attention.py --smoke --output=/tmp/smoke.json       # any machine, seconds

mode grid    forward, the FlashAttention-3 paper's grid: 16k tokens, hidden size 2048, head dims
             64, 128 and 256, full and causal, sequences of 512 to 16384.
mode length  time and memory against sequence length, forward and gradient, batch 1, causal.

Method. Every implementation of a row is compiled first, then checked against a dense float32
reference on random normal inputs (NaN never passes), then timed: each round times every
implementation once, in an order that turns from round to round, and the median of the rounds
counts. One timing is as many back-to-back calls as fill --min_seconds, ended by
block_until_ready, so that the host's dispatch overlaps the device's work; the result holds what a
call costs the host alone. A square bfloat16 matrix product, timed between the rows in the same
way, says how fast the device was. The results file is rewritten after each row: what a time limit
cuts off is named in it, and nothing measured is lost.

TFLOP/s count 4 * B * N * T * T * H operations forward, half of it when causal.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import fnmatch
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
import unittest.mock

import jax
import jax.numpy as jnp
import tree_hashes
from absl import app, flags, logging

sys.path.append(str(tree_hashes.REPOSITORY))  # last: an installed jax_fa3 has the extension

import jax_fa3

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
GRID_SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)

_MODE = flags.DEFINE_enum("mode", "grid", ["grid", "length"], "What to measure; see the module.")
_ROWS = flags.DEFINE_list(
    "rows",
    ["*"],
    "Patterns of row names, HEAD_DIM-MASK-SEQLEN, such as '128-*' or '*-causal-8192'.",
)
_PEERS = flags.DEFINE_list(
    "peers",
    None,
    "Implementations, jax_fa3's own first; default: all that can run. See PEERS in the source.",
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Timings of each implementation; the median counts.")
_MIN_SECONDS = flags.DEFINE_float("min_seconds", 0.03, "Least length of one timing.")
_TIME_LIMIT = flags.DEFINE_float("time_limit_s", 0, "Start no row after this long; 0 is no limit.")
_JNP_MAX_GIB = flags.DEFINE_float(
    "jnp_max_gib", 20, "Leave plain jnp out where its float32 scores alone are larger."
)
_MAX_SEQLEN = flags.DEFINE_integer("max_seqlen", 32768, "Longest sequence of mode length.")
_COMPILE_THREADS = flags.DEFINE_integer(
    "compile_threads", min(16, os.cpu_count() or 1), "Functions compiled at a time."
)
_SMOKE = flags.DEFINE_bool("smoke", False, "Tiny sizes that show only that the script works.")
_TREE_HASHES = flags.DEFINE_string(
    "tree_hashes",
    None,
    "What benchmarks/tree_hashes.py printed for the commit, or a file that holds it; for a machine "
    "without .git. Default: asks git.",
)
_COMMIT = flags.DEFINE_string("commit", None, "Commit, where git cannot tell. Only recorded.")
_OUTPUT = flags.DEFINE_string(
    "output", None, "Results file, JSON; default: build/bench/attention_MODE.json."
)

# Relative errors allowed against the float32 reference. Rounding the probabilities and the output
# to bfloat16 leaves 2e-3 to 4e-3; a wrong or unwritten block of rows leaves about 1.
MAX_RELATIVE_ERROR = 1e-2
MAX_BLOCK_ERROR = 2e-2
ERROR_BLOCK = 64  # rows


# --------------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One problem: self-attention, as many key/value heads as query heads, bfloat16."""

    head_dim: int
    mask: str  # "full" or "causal"
    seqlen: int
    batch: int
    heads: int

    @property
    def name(self):
        return f"{self.head_dim}-{self.mask}-{self.seqlen}"

    @property
    def causal(self):
        return self.mask == "causal"

    @property
    def shape(self):
        """Of query, key, value and out: [B, T, N, H]."""
        return (self.batch, self.seqlen, self.heads, self.head_dim)

    @property
    def flops(self):
        """Forward, as the FlashAttention papers count."""
        full = 4 * self.batch * self.heads * self.seqlen**2 * self.head_dim
        return full // 2 if self.causal else full

    @property
    def scores_bytes(self):
        """Of one float32 [B, N, T, T]."""
        return 4 * self.batch * self.heads * self.seqlen**2


def grid_rows(tokens=16384, hidden=2048, head_dims=(128, 64, 256), seqlens=GRID_SEQLENS):
    """The paper's grid; the head dim that most models use comes first, in case time runs out."""
    return [
        Row(head_dim, mask, seqlen, tokens // seqlen, hidden // head_dim)
        for head_dim in head_dims
        for mask in ("full", "causal")
        for seqlen in seqlens
    ]


def length_rows(first=4096, last=32768, heads=16, head_dim=128):
    """Sequences that double, one to the batch.

    The first is long enough that a kernel takes longer than its dispatch.
    """
    doublings = range(int(math.log2(last / first)) + 1)
    return [Row(head_dim, "causal", first * 2**n, 1, heads) for n in doublings]


class Unavailable(Exception):
    """A peer that cannot run here or cannot take a row; the message says why."""


def _jax_fa3_peer(implementation):
    def make(row):
        return functools.partial(
            jax_fa3.dot_product_attention, is_causal=row.causal, implementation=implementation
        )

    return make


def _cudnn_peer(row):
    if jax.default_backend() != "gpu":
        raise Unavailable("cuDNN needs a GPU")
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=row.causal, implementation="cudnn"
    )


def _jnp_peer(row):
    gib = row.scores_bytes / 2**30
    if gib > _JNP_MAX_GIB.value:
        raise Unavailable(f"its scores alone are {gib:.0f} GiB")
    return functools.partial(
        jax.nn.dot_product_attention, is_causal=row.causal, implementation="xla"
    )


@functools.cache
def _import_tokamax():
    if importlib.util.find_spec("tokamax") is None:
        raise Unavailable("not installed")
    # tokamax's benchmark helper imports xprof, a large package that attention does not need.
    for name in ("xprof", "xprof.cli", "xprof.cli.tools"):
        sys.modules.setdefault(name, unittest.mock.MagicMock())
    sys.modules.setdefault("xprof.cli.tools.get_kernel_stats_tool", unittest.mock.MagicMock())
    import tokamax  # pyright: ignore[reportMissingImports]

    return tokamax


def _tokamax_peer(row):
    if jax.default_backend() != "gpu":
        raise Unavailable("its mosaic kernels need a GPU")
    return functools.partial(
        _import_tokamax().dot_product_attention, is_causal=row.causal, implementation="mosaic"
    )


def _flash_mha_peer(module):
    """A wheel of the original FlashAttention-3 kernels for JAX."""

    def make(row):
        if jax.default_backend() != "gpu":
            raise Unavailable("needs a GPU")
        if importlib.util.find_spec(module) is None:
            raise Unavailable("not installed")
        return functools.partial(importlib.import_module(module).flash_mha, is_causal=row.causal)

    return make


# Name -> function of a Row that gives the attention function (query, key, value) -> out, or
# raises Unavailable. jax_fa3's own come with a fixed implementation: a silent fallback would be
# timed as the kernel.
PEERS = {
    "fa3": _jax_fa3_peer("fa3"),
    "xla": _jax_fa3_peer("xla"),
    "cudnn": _cudnn_peer,
    "jnp": _jnp_peer,  # jax.nn.dot_product_attention(implementation="xla"): jnp.einsum and softmax
    "tokamax": _tokamax_peer,
    "flash_attn3_jax": _flash_mha_peer("flash_attn3_jax"),
    "dew_flash_attn": _flash_mha_peer("dew_flash_attn"),
}


def default_peers():
    """On a GPU all but jax_fa3's xla path, which is no competitor there; elsewhere what runs."""
    if jax.default_backend() == "gpu":
        return [name for name in PEERS if name != "xla" or _MODE.value == "length"]
    return ["xla", "jnp"]


# --------------------------------------------------------------------------------------------------
# Compiling and checking
# --------------------------------------------------------------------------------------------------


def with_gradient(attention):
    """(query, key, value) -> their gradients, for the cotangent that equals the query.

    A random cotangent: with the sum of the outputs XLA could fold the backward pass's first half.
    """

    def gradient(query, key, value):
        out, pullback = jax.vjp(attention, query, key, value)
        return pullback(query.astype(out.dtype))

    return gradient


def compile_for(function, row, **compiler_options):
    """`function` compiled for the row's inputs, so that no call ever compiles."""
    inputs = [jax.ShapeDtypeStruct(row.shape, jnp.bfloat16)] * 3
    return jax.jit(function).lower(*inputs).compile(compiler_options)


def compile_reference(row):
    """The reference for a row. It is never timed, so XLA need not search for its fastest GEMM."""
    options = {"xla_gpu_autotune_level": 0} if jax.default_backend() == "gpu" else {}
    return compile_for(functools.partial(reference_attention, causal=row.causal), row, **options)


def _one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def compile_all(jobs):
    """{key: compiled, or a str that says why not} of {key: thunk}, several at a time.

    A key is a tuple that ends in the peer's name; the log says how long each peer's took.
    """
    seconds: dict[str, float] = collections.defaultdict(float)
    begin = time.monotonic()

    def attempt(job):
        (*_, peer), thunk = job
        start = time.monotonic()
        try:
            return thunk()
        except Unavailable as reason:
            return str(reason)
        except Exception as error:  # A peer that fails is a result to report, not our crash.
            return _one_line(error)
        finally:
            seconds[peer] += time.monotonic() - start

    with concurrent.futures.ThreadPoolExecutor(_COMPILE_THREADS.value) as pool:
        compiled = dict(zip(jobs, pool.map(attempt, jobs.items()), strict=True))
    logging.info(
        "Compiled %d functions in %.1f s with %d threads; thread time by peer: %s",
        len(jobs),
        time.monotonic() - begin,
        _COMPILE_THREADS.value,
        ", ".join(f"{peer} {spent:.1f} s" for peer, spent in seconds.items()),
    )
    return compiled


@functools.partial(jax.jit, static_argnums=1)
def random_inputs(key, shape):
    """query, key and value, bfloat16, standard normal."""
    return tuple(jax.random.normal(k, shape, jnp.bfloat16) for k in jax.random.split(key, 3))


def reference_attention(query, key, value, *, causal):
    """Dense attention in float32, a few heads at a time; all arrays [B, T, N, H].

    It shares no code with jax_fa3 or jax.nn: each could be wrong.
    """
    batch, seqlen, heads, head_dim = query.shape

    def one_head(inputs):
        q, k, v = (x.astype(jnp.float32) for x in inputs)
        scores = jnp.matmul(q, k.T, precision="highest") / math.sqrt(head_dim)
        if causal:
            steps = jnp.arange(seqlen)
            scores = jnp.where(steps[:, None] >= steps[None, :], scores, -jnp.inf)
        weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        return jnp.matmul(weights, v, precision="highest")

    by_head = [jnp.moveaxis(x, 2, 1).reshape(-1, seqlen, head_dim) for x in (query, key, value)]
    at_once = max(1, min(batch * heads, 2**28 // seqlen**2))  # scores of at most 1 GiB
    out = jax.lax.map(one_head, tuple(by_head), batch_size=at_once)
    return jnp.moveaxis(out.reshape(batch, heads, seqlen, head_dim), 1, 2)


@jax.jit
def errors_against(out, reference):
    """(relative error of the whole, the worst of any ERROR_BLOCK rows of a head), 2-norms."""
    batch, seqlen, heads, head_dim = reference.shape
    block = math.gcd(seqlen, ERROR_BLOCK)

    def squares(x):
        return (x * x).reshape(batch, seqlen // block, block, heads, head_dim).sum(axis=(2, 4))

    wrong, right = squares(out.astype(jnp.float32) - reference), squares(reference)
    return jnp.sqrt(wrong.sum() / right.sum()), jnp.sqrt((wrong / right).max())


def check(run, inputs, reference):
    """{"relative_error", "worst_block_error", "ok"} of one implementation's output."""
    # Freed memory may still hold an earlier implementation's right answer. Fill it with NaN, so
    # that a block nobody writes shows.
    poison = [jnp.full(inputs[0].shape, jnp.nan, inputs[0].dtype) for _ in range(2)]
    jax.block_until_ready(poison)
    del poison
    error, worst = (float(x) for x in errors_against(run(*inputs), reference))
    ok = bool(error <= MAX_RELATIVE_ERROR and worst <= MAX_BLOCK_ERROR)  # False for NaN
    return {"relative_error": error, "worst_block_error": worst, "ok": ok}


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
    calls = {name: calls_to_fill(run, inputs, min_seconds) for name, run in runs.items()}
    names = list(runs)
    seconds = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(seconds_per_call(runs[name], inputs, calls[name]))
    return seconds


class Yardstick:
    """A size^3 bfloat16 matrix product on random normal inputs: how fast the device is now."""

    def __init__(self, size):
        self.size = size
        keys = jax.random.split(jax.random.key(7))
        self._inputs = [jax.random.normal(k, (size, size), jnp.bfloat16) for k in keys]
        shape = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
        self._run = jax.jit(jnp.matmul).lower(shape, shape).compile()
        self._calls = calls_to_fill(self._run, self._inputs, _MIN_SECONDS.value)
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


def describe_code():
    """Which jax_fa3 ran: the trees on disk, whether the commit has them, the extension's hash."""
    on_disk = tree_hashes.tree_hashes()
    if _TREE_HASHES.value is None:
        committed = tree_hashes.commit_tree_hashes()
    else:
        text = _TREE_HASHES.value
        committed = json.loads(text if text.startswith("{") else pathlib.Path(text).read_text())
    commit = _COMMIT.value
    if commit is None and _TREE_HASHES.value is None and committed is not None:
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
    extension = importlib.util.find_spec("jax_fa3._jax_fa3")
    path = extension.origin if extension is not None else None
    return {
        "commit": commit,
        "tree_hashes": on_disk,
        "matches_commit": None if committed is None else committed == on_disk and not differing,
        "extension_sha256": path and hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest(),
    }


def kernel_plan(row):
    """The kernel that jax_fa3 plans for the row, as text; None without the extension."""
    try:
        from jax_fa3 import _jax_fa3  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        return None
    sizes = (row.batch, row.seqlen, row.seqlen, row.heads, row.heads, row.head_dim)
    return _jax_fa3.describe_plan("bfloat16", *sizes, row.causal)


# --------------------------------------------------------------------------------------------------
# The two modes
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

    def __init__(self, path, kind, names, settings):
        self._path = pathlib.Path(path)
        self._begin = time.monotonic()
        self._names = names
        self._content = {
            "schema": 1,
            "kind": kind,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            **describe_environment(),
            "code": describe_code(),
            "settings": settings,
            "rows": [],
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def elapsed(self):
        return time.monotonic() - self._begin

    def out_of_time(self):
        return bool(_TIME_LIMIT.value) and self.elapsed > _TIME_LIMIT.value

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


def _chunks(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def measure_grid(rows, peers, results, yardstick, clock):
    """Forward of every row with every peer. Returns the names that failed their check."""
    failed = []
    # A chunk compiles before any of it is timed: compiling beside a timing would disturb it.
    for chunk in _chunks(rows, 12):
        if results.out_of_time():
            break
        jobs = {}
        for row in chunk:
            jobs[row, "reference"] = functools.partial(compile_reference, row)
            for peer in peers:
                jobs[row, peer] = lambda row=row, peer=peer: compile_for(PEERS[peer](row), row)
        compiled = compile_all(jobs)
        for row in chunk:
            if results.out_of_time():
                break
            by_peer = {peer: compiled.pop((row, peer)) for peer in peers}
            reference = compiled.pop((row, "reference"))
            if isinstance(reference, str):
                raise RuntimeError(f"the reference of {row.name} does not compile: {reference}")
            measured = measure_row(row, by_peer, reference, clock)
            yardstick.measure()
            results.save(measured, gemm=yardstick.summary())
            failed += [
                f"{row.name} {peer}"
                for peer, entry in measured["peers"].items()
                if not entry.get("ok", True)
            ]
            print(_row_text(measured), flush=True)
    return failed


def _fail_or_result(function, *args):
    """(result, None) or (None, why): a peer that fails when it runs must not end the run."""
    try:
        return function(*args), None
    except Exception as error:
        return None, _one_line(error)


def measure_row(row, compiled, reference, clock):
    """Checks and times one row of the grid; returns its entry of the results file."""
    inputs = random_inputs(jax.random.key(row.seqlen + row.head_dim), row.shape)
    expected = reference(*inputs)
    entries, runs = {}, {}
    for peer, run in compiled.items():
        if isinstance(run, str):
            entries[peer] = {"skipped": run}
            continue
        entry, failure = _fail_or_result(check, run, inputs, expected)
        entries[peer] = {"skipped": failure} if entry is None else entry
        if entry and entry["ok"]:
            runs[peer] = run
    del expected
    start = time.monotonic()
    if runs:
        timed = time_interleaved(runs, inputs, _ROUNDS.value, _MIN_SECONDS.value)
        for peer, seconds in timed.items():
            median = statistics.median(seconds)
            entries[peer] |= {
                "seconds": median,
                "rounds": seconds,
                "tflops": row.flops / median / 1e12,
            }
    measured = {
        "name": row.name,
        **dataclasses.asdict(row),
        "flops": row.flops,
        "peers": entries,
        "sm_clock_mhz": clock.median_since(start),
        "plan": kernel_plan(row) if "fa3" in runs else None,
    }
    cudnn = entries.get("cudnn", {}).get("tflops")
    over_cudnn = FLASH_ATTENTION_3_OVER_CUDNN.get((row.head_dim, row.mask))
    if cudnn and over_cudnn and row.seqlen in GRID_SEQLENS:
        x = over_cudnn[GRID_SEQLENS.index(row.seqlen)]
        measured["flash_attention_3"] = {"over_cudnn": x, "tflops": x * cudnn}
    ours = entries.get("fa3", {}).get("tflops")
    if ours:
        others = {peer: entry["tflops"] for peer, entry in entries.items() if "tflops" in entry}
        others["flash_attention_3"] = measured.get("flash_attention_3", {}).get("tflops")
        measured["fa3_over"] = {
            peer: ours / tflops for peer, tflops in others.items() if tflops and peer != "fa3"
        }
    return measured


def _row_text(measured):
    parts = []
    for peer, entry in measured["peers"].items():
        if "tflops" in entry:
            parts.append(f"{peer} {entry['tflops']:.3g}")
        elif "skipped" not in entry:
            parts.append(f"{peer} WRONG ({entry['relative_error']:.1e})")
    if "flash_attention_3" in measured:
        parts.append(f"FA3~ {measured['flash_attention_3']['tflops']:.0f}")
    return f"{measured['name']:>18}  " + "  ".join(parts) + "  TFLOP/s"


def _run_once(run, inputs):
    jax.block_until_ready(run(*inputs))


def measure_length(rows, peers, results, yardstick, clock):
    """Time and memory of forward and gradient against length. Returns the failed checks.

    Memory comes twice: from the compiler (arguments, outputs and temporaries) and, on a device
    that counts, as the allocator's peak. That peak never falls, so the functions run in the order
    of the compiler's figure and a device peak is given only where it rose.
    """
    passes = ("forward", "gradient")
    jobs = {}
    for row in rows:
        for peer in peers:
            for which in passes:

                def job(row=row, peer=peer, which=which):
                    attention = PEERS[peer](row)
                    return compile_for(
                        attention if which == "forward" else with_gradient(attention), row
                    )

                jobs[row, which, peer] = job
    compiled = compile_all(jobs)
    memory = {
        key: {
            "arguments": analysis.argument_size_in_bytes,
            "outputs": analysis.output_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
        }
        for key, run in compiled.items()
        if not isinstance(run, str) and (analysis := run.memory_analysis()) is not None
    }
    device = jax.devices()[0]

    def device_peak():
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    for key in sorted(memory, key=lambda key: sum(memory[key].values())):
        if results.out_of_time():
            break
        row = key[0]
        inputs = jax.block_until_ready(random_inputs(jax.random.key(1), row.shape))
        before = device_peak()
        _, failure = _fail_or_result(_run_once, compiled[key], inputs)
        if failure:
            compiled[key] = failure
        after = device_peak()
        rose = after is not None and (before is None or after > before)
        memory[key]["device_peak"] = after if rose else None
        del inputs

    failed = []
    for row in rows:
        if results.out_of_time():
            break
        inputs = random_inputs(jax.random.key(row.seqlen), row.shape)
        start = time.monotonic()
        measured = {"name": row.name, **dataclasses.asdict(row), "flops": row.flops}
        for which in passes:
            functions = {peer: compiled[row, which, peer] for peer in peers}
            runs = {peer: run for peer, run in functions.items() if not isinstance(run, str)}
            timed = time_interleaved(runs, inputs, _ROUNDS.value, _MIN_SECONDS.value)
            outputs = {peer: runs[peer](*inputs) for peer in runs}
            measured[which] = {
                peer: {"skipped": run} for peer, run in functions.items() if isinstance(run, str)
            }
            for peer in runs:
                # Peers against each other: the grid checks each against float32, and a dense
                # reference of the longest row would need more memory than the device has.
                error = _worst_disagreement(outputs[peer], outputs[next(iter(runs))])
                measured[which][peer] = {
                    "seconds": statistics.median(timed[peer]),
                    "rounds": timed[peer],
                    "memory_bytes": memory.get((row, which, peer)),
                    "difference_from_first": error,
                }
                if not error <= 2 * MAX_RELATIVE_ERROR:
                    failed.append(f"{row.name} {which} {peer}")
            del outputs
        measured["sm_clock_mhz"] = clock.median_since(start)
        yardstick.measure()
        results.save(measured, gemm=yardstick.summary())
        print(_length_text(measured, passes), flush=True)
        del inputs
    return failed


@jax.jit
def _worst_disagreement_jit(left, right):
    def relative(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())

    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return jnp.max(jnp.stack([relative(a, b) for a, b in pairs]))


def _worst_disagreement(left, right):
    """Largest relative 2-norm difference over the arrays of two results; NaN stays NaN."""
    return float(_worst_disagreement_jit(left, right))


def _length_text(measured, passes):
    parts = []
    for which in passes:
        for peer, entry in measured[which].items():
            if "seconds" in entry:
                temporaries = (entry["memory_bytes"] or {}).get("temporaries", math.nan)
                parts.append(
                    f"{which} {peer} {entry['seconds'] * 1e3:.3g} ms {temporaries / 2**20:.0f} MiB"
                )
    return f"{measured['name']:>18}  " + "  ".join(parts)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    peers = _PEERS.value or default_peers()
    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise app.UsageError(f"--peers={','.join(unknown)}: expected some of {', '.join(PEERS)}")
    if _SMOKE.value:
        rows = (
            grid_rows(tokens=256, hidden=128, head_dims=(64,), seqlens=(64, 128))
            if _MODE.value == "grid"
            else length_rows(first=128, last=256, heads=2, head_dim=64)
        )
    else:
        rows = grid_rows() if _MODE.value == "grid" else length_rows(last=_MAX_SEQLEN.value)
    rows = [row for row in rows if any(fnmatch.fnmatch(row.name, p) for p in _ROWS.value)]
    if not rows:
        raise app.UsageError(f"--rows={','.join(_ROWS.value)} names no row")
    output = _OUTPUT.value or f"build/bench/attention_{_MODE.value}.json"
    results = Results(
        output,
        f"attention_{_MODE.value}" + ("_smoke" if _SMOKE.value else ""),
        [row.name for row in rows],
        {
            "dtype": "bfloat16",
            "peers": peers,
            "rounds": _ROUNDS.value,
            "min_seconds": _MIN_SECONDS.value,
            "max_relative_error": MAX_RELATIVE_ERROR,
            "max_block_error": MAX_BLOCK_ERROR,
        },
    )
    yardstick = Yardstick(256 if _SMOKE.value else 8192)
    yardstick.measure()
    results.save(gemm=yardstick.summary(), host_dispatch_s=host_dispatch_seconds())
    clock = ClockSampler()
    try:
        measure = measure_grid if _MODE.value == "grid" else measure_length
        failed = measure(rows, peers, results, yardstick, clock)
    finally:
        clock.stop()
    results.save(gemm=yardstick.summary(), failed_checks=failed)
    gemm = yardstick.summary()
    print(f"GEMM {gemm['size']}^3: {gemm['tflops']:.3g} TFLOP/s; {results.elapsed:.0f} s in all")
    print(f"Written: {output}")
    if failed:
        print(f"FAILED their check, so were not timed: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    app.run(main)
