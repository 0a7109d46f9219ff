"""Times jax_fa3's attention beside its peers, in one process on one device.

    python benchmarks/attention.py --output=benchmarks/results/forward.json
    python benchmarks/attention.py --mode=backward --output=benchmarks/results/backward.json
    python benchmarks/attention.py --mode=length --output=benchmarks/results/memory.json
    python benchmarks/attention.py --mode=shapes --output=benchmarks/results/shapes.json
    python benchmarks/attention.py --mode=launch --output=benchmarks/results/launch.json
    python benchmarks/attention.py --mode=parallel --output=benchmarks/results/parallel.json
    python benchmarks/attention.py --rows='128-full-*' --config=FwdBf16Hdim128Full --rounds=5
    python benchmarks/attention.py --smoke --output=/tmp/smoke.json       # any machine, seconds

mode grid    forward, the FlashAttention-3 paper's grid: 16k tokens, hidden size 2048, head dims
             64, 128 and 256, full and causal, sequences of 512 to 16384.
mode backward  the same grid, the backward pass alone, from what the forward pass saved; and under
             "step" the output and the gradients together in one jitted function.
mode length  time and memory against sequence length, forward and gradient, batch 1, causal; the
             last row is one sequence of 131072. What plain jnp cannot run is compiled all the same,
             for the memory that it would take.
mode shapes  forward beyond the grid: one long sequence, grouped heads, an odd length, fewer tiles
             than the GPU has multiprocessors, many heads, lengths that differ.
mode launch  what one call inside a jitted loop takes at sequences of 128 to 512, batch 1: launch
             and kernel, without the host.
mode parallel  forward and backward in one jitted function of a grouped causal layer, on one GPU and
             on two of one host: tensor parallel (heads) and data parallel (batch), each through
             shard_map and through an Auto mesh. With fewer than two devices it measures nothing.

How it measures is said in harness.py.
"""

import fnmatch
import functools
import math
import statistics
import time

import harness
import jax
import jax.numpy as jnp
import peers as implementations
from absl import app, flags
from harness import Row, Unavailable
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from peers import GRID_HIDDEN, GRID_SEQLENS, GRID_TOKENS, PEERS

_MODE = flags.DEFINE_enum(
    "mode",
    "grid",
    ["grid", "backward", "length", "shapes", "launch", "parallel"],
    "What to measure; see the module.",
)
_ROWS = flags.DEFINE_list(
    "rows",
    ["*"],
    "Patterns of row names, HEAD_DIM-MASK-SEQLEN (mode shapes and length's last row: "
    "HEAD_DIM-MASK-CASE), such as '128-*' or '*-causal-8192'.",
)
_PEERS = flags.DEFINE_list(
    "peers",
    None,
    "Implementations, jax_fa3's own first; default: those that a mode compares with and that can "
    "run. See peers.py.",
)
_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "Configuration of the kernels that peer fa3 takes instead of the plan's choice, such as "
    "FwdBf16Hdim128Full; forward only. An error where a row is not for it: choose --rows.",
)
_MAX_SEQLEN = flags.DEFINE_integer("max_seqlen", 32768, "Longest sequence of mode length.")
_LAUNCH_CALLS = flags.DEFINE_integer("launch_calls", 200, "Calls of mode launch's loop.")


# --------------------------------------------------------------------------------------------------
# What is measured
# --------------------------------------------------------------------------------------------------


def grid_rows(
    tokens=GRID_TOKENS, hidden=GRID_HIDDEN, head_dims=(128, 64, 256), seqlens=GRID_SEQLENS
):
    """The paper's grid; the head dim that most models use comes first, in case time runs out."""
    return [
        Row(head_dim, mask, seqlen, tokens // seqlen, hidden // head_dim)
        for head_dim in head_dims
        for mask in ("full", "causal")
        for seqlen in seqlens
    ]


def length_rows(first=4096, last=32768, heads=16, head_dim=128, longest=131072):
    """Sequences that double, one to the batch; then one of `longest` with half the heads.

    The first is long enough that a kernel takes longer than its dispatch.
    """
    doublings = range(int(math.log2(last / first)) + 1)
    rows = [Row(head_dim, "causal", first * 2**n, 1, heads) for n in doublings]
    case = f"{longest}x{heads // 2}"
    return [*rows, Row(head_dim, "causal", longest, 1, heads // 2, case=case)]


def shape_rows(head_dims=(128, 64, 256), hidden=GRID_HIDDEN, shrink=1):
    """What the grid's rule of 16k tokens in equal sequences leaves out; lengths over `shrink`.

    (One sequence of 16k is on the grid.)
    """

    def row(head_dim, mask, case, batch, heads, seqlen, seqlen_k=None, heads_k=None):
        seqlen_k = seqlen_k and seqlen_k // shrink
        return Row(head_dim, mask, seqlen // shrink, batch, heads, seqlen_k, heads_k, case)

    rows = []
    for head_dim in head_dims:
        heads = hidden // head_dim
        for mask in ("full", "causal"):
            at = functools.partial(row, head_dim, mask)
            rows += [
                at("long64k", 1, heads, 65536),
                at("gqa8", 4, 16, 4096, heads_k=2),
                at("odd3001", 4, heads, 3001),
                # Fewer tiles of 128 to 256 rows than an H200's 132 multiprocessors.
                at("few1024x8", 1, 8, 1024),
                at("few2048x4", 1, 4, 2048),
                at("few4096x2", 1, 2, 4096),
                at("heads256", 1, 256, 2048),
                at("batch64x32", 64, 32, 512),
                at("short_on_long", 4, heads, 512, seqlen_k=8192),
                at("long_on_short", 4, heads, 8192, seqlen_k=512),
            ]
    return rows


def launch_rows(head_dims=(128, 64, 256), seqlens=(128, 256, 512), heads=16):
    """Calls so short that launching is a good part of them."""
    return [
        Row(head_dim, mask, seqlen, 1, heads)
        for head_dim in head_dims
        for mask in ("full", "causal")
        for seqlen in seqlens
    ]


def parallel_rows(seqlens=(8192, 1024), tokens=2 * GRID_TOKENS, heads=16, heads_k=4, head_dim=128):
    """A grouped causal layer: so long that the kernels are all, and so short that they are not."""
    return [
        Row(head_dim, "causal", seqlen, tokens // seqlen, heads, heads_k=heads_k)
        for seqlen in seqlens
    ]


def rows_of(mode, smoke):
    """The rows of a mode; tiny ones for a smoke run."""
    if mode in ("grid", "backward"):
        return grid_rows(256, 128, (64,), (64, 128)) if smoke else grid_rows()
    if mode == "length":
        return length_rows(128, 256, 2, 64, 512) if smoke else length_rows(last=_MAX_SEQLEN.value)
    if mode == "shapes":
        return shape_rows((64,), 128, shrink=64) if smoke else shape_rows()
    if mode == "parallel":
        return parallel_rows((64, 32), 128, 4, 2, 64) if smoke else parallel_rows()
    return launch_rows((64,), (16, 32), 2) if smoke else launch_rows()


def rows_not_for(module, config, rows):
    """Why each of `rows` that cannot have the kernel configuration `config` cannot, as lines."""
    why = []
    for row in rows:
        try:
            harness.kernel_plan(module, row, config)
        except ValueError as error:
            why.append(f"{row.name}: {error}")
    return why


def default_peers():
    """On a GPU all but jax_fa3's xla path, which is no competitor there; elsewhere what runs."""
    if _MODE.value == "parallel":  # compares ways of running one
        return ["fa3" if jax.default_backend() == "gpu" else "xla"]
    if jax.default_backend() != "gpu":
        return ["xla", "jnp"]
    if _MODE.value == "backward":
        return ["fa3", "fa3_deterministic", "cudnn", "tokamax"]
    if _MODE.value == "shapes":
        return ["fa3", "cudnn", "tokamax"]
    if _MODE.value == "launch":
        return ["fa3", "cudnn"]
    others = ("fa3_deterministic",) if _MODE.value == "length" else ("fa3_deterministic", "xla")
    return [name for name in PEERS if name not in others]


# --------------------------------------------------------------------------------------------------
# The modes
# --------------------------------------------------------------------------------------------------


def _attention(peer, row):
    return implementations.attention(peer, row, _CONFIG.value)


def _plan(row):
    """The kernel that jax_fa3 plans for the row, as text; None without the extension."""
    try:
        return harness.kernel_plan(implementations.extension(), row, _CONFIG.value or "")
    except Unavailable:
        return None


def _backward_plan(row):
    try:
        return harness.backward_plan(implementations.extension(), row)
    except Unavailable:
        return None


def _report_of(measured):
    """Names of a measured row's implementations, or ways, that failed their check."""
    passes = {"": _entries(measured), " step": measured.get("step", {"peers": {}})["peers"]}
    return [
        f"{measured['name']} {name}{which}"
        for which, entries in passes.items()
        for name, entry in entries.items()
        if not entry.get("ok", True)
    ]


def _entries(measured):
    """What a measured row compares: implementations, in mode parallel ways of running one."""
    return measured["ways"] if "ways" in measured else measured["peers"]


def _measure_in_chunks(rows, results, yardstick, jobs_of, measure):
    """Compiles, measures and saves row after row. Returns the names that failed their check.

    jobs_of(row) names what to compile; measure(row, compiled) is given that by the same names and
    returns the row's entry of the results file.
    """
    failed = []
    # A chunk compiles before any of it is timed: compiling beside a timing would disturb it.
    for chunk in harness.chunks(rows, 12):
        if results.out_of_time():
            break
        jobs = {row: jobs_of(row) for row in chunk}
        compiled = harness.compile_all(
            {(row, name): job for row in chunk for name, job in jobs[row].items()}
        )
        for row in chunk:
            if results.out_of_time():
                break
            # What a row compiled is freed after it.
            measured = measure(row, {name: compiled.pop((row, name)) for name in jobs[row]})
            yardstick.measure()
            results.save(measured, gemm=yardstick.summary())
            failed += _report_of(measured)
            print(_row_text(measured), flush=True)
    return failed


def _compile_forward(peer, row):
    return harness.compile_for(_attention(peer, row), row)


def measure_forward(rows, peers, results, yardstick, clock):
    """Forward of every row with every peer. Returns the names that failed their check."""

    def jobs_of(row):
        jobs = {
            "reference": functools.partial(harness.compile_reference, row),
            "check": functools.partial(harness.warm_up, row),
        }
        return jobs | {peer: functools.partial(_compile_forward, peer, row) for peer in peers}

    def measure(row, compiled):
        by_peer = {peer: compiled[peer] for peer in peers}
        return measure_row(row, by_peer, compiled["reference"], clock)

    return _measure_in_chunks(rows, results, yardstick, jobs_of, measure)


def _expected(row, reference, inputs):
    if isinstance(reference, str):
        raise RuntimeError(f"the reference of {row.name} does not compile: {reference}")
    return reference(*inputs)


def measure_row(row, compiled, reference, clock):
    """Checks and times one row of the grid; returns its entry of the results file."""
    inputs = harness.random_inputs(jax.random.key(row.seqlen + row.head_dim), row)
    expected = _expected(row, reference, inputs)
    entries, runs = harness.check_all(compiled, inputs, expected, harness.checked_rows(row))
    del expected
    start = time.monotonic()
    harness.time_all(row, entries, runs, inputs)
    measured = {
        **row.fields(),
        "peers": entries,
        "sm_clock_mhz": clock.median_since(start),
        "plan": _plan(row) if "fa3" in runs else None,
    }
    return _with_ratios(measured, implementations.flash_attention_3_over_cudnn(row))


def _with_ratios(measured, over_cudnn):
    """`measured` with our speed over each peer's, and over FlashAttention-3's.

    `over_cudnn` is its speed over cuDNN's; None where nobody measured it.
    """
    entries = measured["peers"]
    cudnn = entries.get("cudnn", {}).get("tflops")
    if cudnn and over_cudnn:
        measured["flash_attention_3"] = {"over_cudnn": over_cudnn, "tflops": over_cudnn * cudnn}
    ours = entries.get("fa3", {}).get("tflops")
    if ours:
        others = {peer: entry["tflops"] for peer, entry in entries.items() if "tflops" in entry}
        others["flash_attention_3"] = measured.get("flash_attention_3", {}).get("tflops")
        measured["fa3_over"] = {
            peer: ours / tflops for peer, tflops in others.items() if tflops and peer != "fa3"
        }
    return measured


def _row_text(measured):
    text = f"{measured['name']:>24}  {_speeds_text(measured)}"
    if "step" in measured:
        text += f"; with the forward  {_speeds_text(measured['step'])}"
    return text + "  TFLOP/s"


def _speeds_text(measured):
    parts = []
    for peer, entry in _entries(measured).items():
        if "tflops" in entry:
            parts.append(f"{peer} {entry['tflops']:.3g}")
        elif "skipped" not in entry:
            parts.append(f"{peer} WRONG ({entry['relative_error']:.1e})")
        elif _MODE.value in ("shapes", "parallel"):  # may refuse a shape: worth a word
            parts.append(f"{peer} no ({entry['skipped'][:60]})")
    if "flash_attention_3" in measured:
        parts.append(f"FA3~ {measured['flash_attention_3']['tflops']:.0f}")
    return "  ".join(parts)


def split_vjp(attention):
    """(forward, backward): (q, k, v) -> (out, residuals), (residuals, dout) -> (dq, dk, dv).

    Lower the first before the second: tracing it says how the residuals are put together.
    """
    structure = []

    def forward(query, key, value):
        out, pullback = jax.vjp(attention, query, key, value)
        residuals, tree = jax.tree.flatten(pullback)
        structure[:] = [tree]
        return out, residuals

    def backward(residuals, dout):
        return jax.tree.unflatten(structure[0], residuals)(dout)

    return forward, backward


def _compile_backward(peer, row):
    """(compiled forward, compiled backward) of split_vjp."""
    forward, backward = split_vjp(_attention(peer, row))
    saved = harness.compile_for(forward, row)
    out, residuals = jax.eval_shape(forward, *harness.input_types(row))
    lowered = jax.jit(backward).lower(residuals, jax.ShapeDtypeStruct(out.shape, out.dtype))
    return saved, lowered.compile()


def training_step(attention):
    """(query, key, value, dout) -> (out, dq, dk, dv): forward and backward in one function."""

    def step(query, key, value, dout):
        out, pullback = jax.vjp(attention, query, key, value)
        return out, *pullback(dout.astype(out.dtype))

    return step


def _compile_step(peer, row):
    return harness.compile_with_cotangent(training_step(_attention(peer, row)), row)


def measure_backward(rows, peers, results, yardstick, clock):
    """The backward pass of every row with every peer, alone and with the forward pass.

    Returns the names that failed their check.
    """
    # Its forward is the default's: the backward alone says what there is to say.
    with_step = [peer for peer in peers if peer != "fa3_deterministic"]

    def jobs_of(row):
        jobs = {"reference": functools.partial(harness.compile_reference_gradients, row)}
        jobs |= {peer: functools.partial(_compile_backward, peer, row) for peer in peers}
        return jobs | {
            f"{peer} step": functools.partial(_compile_step, peer, row) for peer in with_step
        }

    def measure(row, compiled):
        pairs = {peer: compiled[peer] for peer in peers}
        steps = {peer: compiled[f"{peer} step"] for peer in with_step}
        return measure_backward_row(row, pairs, steps, compiled["reference"], clock)

    return _measure_in_chunks(rows, results, yardstick, jobs_of, measure)


def measure_backward_row(row, pairs, steps, reference, clock):
    """Checks and times one row; returns its entry of the results file.

    `pairs` and `steps` are {peer: what _compile_backward and _compile_step return, or why not}.
    """
    inputs = harness.random_inputs(jax.random.key(row.seqlen + row.head_dim), row)
    dout = harness.random_inputs(jax.random.key(row.seqlen), row)[0]
    expected = _expected(row, reference, (*inputs, dout))

    def backward(pair):
        forward, pullback = pair
        out, residuals = forward(*inputs)
        run = functools.partial(pullback, residuals)
        return run, harness.check_gradients(run(dout.astype(out.dtype)), expected)

    def step(run):
        return run, harness.check_gradients(run(*inputs, dout)[1:], expected)

    entries, runs = _check_gradients_of(pairs, backward)
    step_entries, step_runs = _check_gradients_of(steps, step)
    start = time.monotonic()
    passes = harness.BACKWARD_PASSES
    harness.time_all(row, entries, runs, (dout,), passes=passes)
    harness.time_all(row, step_entries, step_runs, (*inputs, dout), passes=1 + passes)
    measured = {
        **row.fields(),
        "peers": entries,
        "sm_clock_mhz": clock.median_since(start),
        "plan": _backward_plan(row) if "fa3" in runs else None,
    }
    over_cudnn = implementations.flash_attention_3_over_cudnn(row, backward=True)
    _with_ratios(measured, over_cudnn)
    if step_entries:
        together = _flash_attention_3_together(row, entries, step_entries)
        measured["step"] = _with_ratios({"peers": step_entries}, together)
    return measured


def _check_gradients_of(compiled, prepare):
    """({peer: entry of the results file}, {peer: what may be timed}) of {peer: compiled}.

    prepare(compiled) -> (what to time, its entry); a str in place of what compiled says why not.
    """
    entries, runs = {}, {}
    for peer, built in compiled.items():
        if isinstance(built, str):
            entries[peer] = {"skipped": built}
            continue
        prepared, failure = harness.fail_or_result(prepare, built)
        if prepared is None:
            entries[peer] = {"skipped": failure}
            continue
        run, entries[peer] = prepared
        if entries[peer]["ok"]:
            runs[peer] = run
    return entries, runs


def _flash_attention_3_together(row, entries, step_entries):
    """Its speed over cuDNN's, forward and backward together; None where cuDNN was not timed."""
    alone, together = (x.get("cudnn", {}).get("seconds") for x in (entries, step_entries))
    if not alone or not together:
        return None
    forward_share = max(0.0, 1 - alone / together)
    return implementations.flash_attention_3_over_cudnn_together(row, forward_share)


def looped(attention, calls):
    """(query, key, value) -> the last of `calls` calls, each with the output before as its query.

    One program: the host takes no part, and no call can be left out or run beside the next.
    """

    def loop(query, key, value):
        def step(_, q):
            return attention(q, key, value).astype(query.dtype)

        return jax.lax.fori_loop(0, calls, step, query)

    return loop


def measure_launch(rows, peers, results, yardstick, clock):
    """Time of one call inside a jitted loop. Returns the names that failed their check."""
    calls = 3 if harness.SMOKE.value else _LAUNCH_CALLS.value
    jobs = {}
    for row in rows:
        jobs[row, "once", "reference"] = functools.partial(harness.compile_reference, row)
        jobs[row, "once", "check"] = functools.partial(harness.warm_up, row)
        for peer in peers:

            def loop(row=row, peer=peer):
                return harness.compile_for(looped(_attention(peer, row), calls), row)

            jobs[row, "once", peer] = functools.partial(_compile_forward, peer, row)
            jobs[row, "loop", peer] = loop
    compiled = harness.compile_all(jobs)
    failed = []
    for row in rows:
        if results.out_of_time():
            break
        inputs = harness.random_inputs(jax.random.key(row.seqlen), row)
        singles = {peer: compiled[row, "once", peer] for peer in peers}
        expected = _expected(row, compiled[row, "once", "reference"], inputs)
        entries, checked = harness.check_all(singles, inputs, expected)
        runs = {}
        for peer in checked:
            run = compiled[row, "loop", peer]
            if isinstance(run, str):
                entries[peer] = {"skipped": run}
            else:
                runs[peer] = run
        start = time.monotonic()
        timed = harness.time_interleaved(
            runs, inputs, harness.ROUNDS.value, harness.MIN_SECONDS.value
        )
        for peer, seconds in timed.items():
            each = [total / calls for total in seconds]
            entries[peer] |= {"seconds": statistics.median(each), "rounds": each}
        measured = row.fields() | {
            "calls": calls,
            "peers": entries,
            "sm_clock_mhz": clock.median_since(start),
            "plan": _plan(row) if "fa3" in runs else None,
        }
        yardstick.measure()
        results.save(measured, gemm=yardstick.summary())
        failed += _report_of(measured)
        text = "  ".join(
            f"{peer} {entry['seconds'] * 1e6:.2f} us"
            for peer, entry in entries.items()
            if "seconds" in entry
        )
        print(f"{row.name:>24}  {text}", flush=True)
    return failed


# What mode parallel shards over two devices, and through what.
_SPLITS = {"heads": P(None, None, "devices"), "batch": P("devices")}
WAYS = ("one", "heads shard_map", "heads auto", "batch shard_map", "batch auto")


def two_devices():
    """A mesh of the first two devices of this host."""
    devices = jax.local_devices()[:2]
    return jax.make_mesh((2,), ("devices",), axis_types=(AxisType.Auto,), devices=devices)


def _compile_way(peer, row, way):
    """(compiled training step, the sharding of all its inputs) of one of WAYS."""
    attention, sharding = _attention(peer, row), SingleDeviceSharding(jax.local_devices()[0])
    if way != "one":
        split, through = way.split()
        mesh, spec = two_devices(), _SPLITS[split]
        sharding = NamedSharding(mesh, spec)
        if through == "shard_map":
            attention = jax.shard_map(attention, mesh=mesh, in_specs=spec, out_specs=spec)
    types = harness.input_types(row)
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for x in (*types, types[0])]
    return jax.jit(training_step(attention)).lower(*types).compile(), sharding


def measure_parallel(rows, peers, results, yardstick, clock):
    """A training step on one device and on two. Returns the names that failed their check."""
    (peer,) = peers

    def jobs_of(row):
        jobs = {"reference": functools.partial(harness.compile_reference_gradients, row)}
        return jobs | {way: functools.partial(_compile_way, peer, row, way) for way in WAYS}

    def measure(row, compiled):
        reference = compiled.pop("reference")
        return measure_parallel_row(row, compiled, reference, clock)

    return _measure_in_chunks(rows, results, yardstick, jobs_of, measure)


def measure_parallel_row(row, compiled, reference, clock):
    """Checks and times one row; returns its entry of the results file.

    `compiled` is {way: what _compile_way returns, or why not}.
    """
    first = jax.local_devices()[0]
    dout = harness.random_inputs(jax.random.key(row.seqlen), row)[0]
    inputs = (*harness.random_inputs(jax.random.key(row.seqlen + row.head_dim), row), dout)
    expected = _expected(row, reference, inputs)

    def prepare(built):
        run, sharding = built
        placed = jax.device_put(inputs, sharding)
        gradients = jax.device_put(run(*placed)[1:], first)  # beside the reference's
        return functools.partial(run, *placed), harness.check_gradients(gradients, expected)

    entries, runs = _check_gradients_of(compiled, prepare)
    start = time.monotonic()
    harness.time_all(row, entries, runs, (), passes=1 + harness.BACKWARD_PASSES)
    measured = {
        **row.fields(),
        "devices": 2,
        "ways": entries,
        "sm_clock_mhz": clock.median_since(start),  # of the first device
    }
    if alone := entries["one"].get("seconds"):
        measured["over_one"] = {
            way: alone / entry["seconds"] for way, entry in entries.items() if "seconds" in entry
        }
    return measured


def with_gradient(attention):
    """(query, key, value) -> their gradients, for the cotangent that equals the query.

    A random cotangent: with the sum of the outputs XLA could fold the backward pass's first half.
    """

    def gradient(query, key, value):
        out, pullback = jax.vjp(attention, query, key, value)
        return pullback(query.astype(out.dtype))

    return gradient


def _run_once(run, inputs):
    jax.block_until_ready(run(*inputs))


def _compile_length(row, which, peer):
    """(compiled, None), or (compiled for its memory alone, why it is not to be run)."""
    options = {}
    try:
        attention, why_not = _attention(peer, row), None
    except implementations.TooLarge as reason:
        attention, why_not = implementations.jnp_of_any_size(row), str(reason)
        # A search for the fastest GEMM would allocate what the device may not have.
        options = harness.untimed_options()
    function = attention if which == "forward" else with_gradient(attention)
    return harness.compile_for(function, row, **options), why_not


def _planned_memory(run):
    """{"arguments", "outputs", "temporaries"} of a compiled function, bytes; None if unknown."""
    analysis = run.memory_analysis()
    return analysis and {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
    }


def measure_length(rows, peers, results, yardstick, clock):
    """Time and memory of forward and gradient against length. Returns the failed checks.

    Memory comes twice: from the compiler (arguments, outputs and temporaries) and, on a device
    that counts, as the allocator's peak. That peak never falls, so the functions run in the order
    of the compiler's figure and a device peak is given only where it rose.
    """
    passes = ("forward", "gradient")
    jobs = {
        (row, which, peer): functools.partial(_compile_length, row, which, peer)
        for row in rows
        for peer in peers
        for which in passes
    }
    compiled, memory, skipped = {}, {}, {}
    for key, built in harness.compile_all(jobs).items():
        if isinstance(built, str):
            skipped[key] = built
            continue
        run, why_not = built
        memory[key] = _planned_memory(run)
        if why_not is None:
            compiled[key] = run
        else:
            skipped[key] = why_not
    device = jax.devices()[0]

    def device_peak():
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    for key in sorted(compiled, key=lambda key: sum((memory[key] or {}).values())):
        if results.out_of_time():
            break
        row = key[0]
        inputs = jax.block_until_ready(harness.random_inputs(jax.random.key(1), row))
        before = device_peak()
        _, failure = harness.fail_or_result(_run_once, compiled[key], inputs)
        if failure:
            skipped[key] = failure
            del compiled[key]
        after = device_peak()
        rose = after is not None and (before is None or after > before)
        if memory[key]:
            memory[key]["device_peak"] = after if rose else None
        del inputs

    failed = []
    for row in rows:
        if results.out_of_time():
            break
        inputs = harness.random_inputs(jax.random.key(row.seqlen), row)
        start = time.monotonic()
        measured = row.fields()
        for which in passes:
            runs = {
                peer: run for peer in peers if (run := compiled.get((row, which, peer))) is not None
            }
            timed = harness.time_interleaved(
                runs, inputs, harness.ROUNDS.value, harness.MIN_SECONDS.value
            )
            outputs = {peer: runs[peer](*inputs) for peer in runs}
            measured[which] = {
                peer: {"skipped": why, "memory_bytes": memory.get((row, which, peer))}
                for peer in peers
                if (why := skipped.get((row, which, peer))) is not None
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
                if not error <= 2 * harness.MAX_RELATIVE_ERROR:
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


MEASURE = {
    "grid": measure_forward,
    "backward": measure_backward,
    "length": measure_length,
    "shapes": measure_forward,
    "launch": measure_launch,
    "parallel": measure_parallel,
}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    mode = _MODE.value
    peers = _PEERS.value or default_peers()
    unknown = [peer for peer in peers if peer not in PEERS]
    if unknown:
        raise app.UsageError(f"--peers={','.join(unknown)}: expected some of {', '.join(PEERS)}")
    if lines := implementations.broken(peers):
        raise app.UsageError("\n".join([*lines, "Repair it, or name --peers without it."]))
    if mode == "parallel" and len(peers) > 1:
        raise app.UsageError(f"--peers={','.join(peers)}: mode parallel takes one")
    if mode == "parallel" and jax.local_device_count() < 2:
        count = jax.local_device_count()
        print(f"Mode parallel needs two devices of one host and sees {count}: nothing is measured.")
        return 0
    rows = [
        row
        for row in rows_of(mode, harness.SMOKE.value)
        if any(fnmatch.fnmatch(row.name, pattern) for pattern in _ROWS.value)
    ]
    if not rows:
        raise app.UsageError(f"--rows={','.join(_ROWS.value)} names no row")
    if _CONFIG.value:
        if mode in ("backward", "length", "parallel"):
            raise app.UsageError(f"--config forces a forward kernel; mode {mode} has gradients")
        try:
            why = rows_not_for(implementations.extension(), _CONFIG.value, rows)
        except Unavailable as reason:
            why = [str(reason)]
        if why:
            raise app.UsageError(f"--config={_CONFIG.value}: " + "\n".join(why))
    settings = {"peers": peers} | ({"config": _CONFIG.value} if _CONFIG.value else {})
    results = harness.Results(f"attention_{mode}", [row.name for row in rows], settings)

    def measure(yardstick, clock):
        return MEASURE[mode](rows, peers, results, yardstick, clock)

    dispatch = harness.host_dispatch_seconds()
    yardstick, failed = harness.measure_all(results, measure, host_dispatch_s=dispatch)
    return harness.conclude(results, yardstick, failed)


if __name__ == "__main__":
    app.run(main)
