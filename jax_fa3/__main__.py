"""python -m jax_fa3: what a bug report needs; `explain` for a shape; `bench` for the speed here."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_fa3
from jax_fa3 import _native

_CHECKOUT = pathlib.Path(__file__).resolve().parent.parent
_BENCHMARK = _CHECKOUT / "benchmarks" / "attention.py"


# --- info ---


def info() -> str:
    """Versions, device, kernels, and whether they will be used."""
    module = _native.extension()
    found = _native.ffi_api_found()
    lines = [
        f"jax_fa3     {jax_fa3.__version__} ({pathlib.Path(jax_fa3.__file__).parent})",
        f"jax         {jax.__version__}",
        f"jaxlib      {importlib.metadata.version('jaxlib')}",
        f"python      {platform.python_version()}, {platform.platform()}",
        f"FFI API     found {_version(found)}",
    ]
    if module is not None:
        built = tuple(module.ffi_api_version())
        lines[-1] += f", built against {_version(built)}"
        lines.append(f"CUDA        built with {_cuda(module.cuda_version())}")
        driver = module.driver_version()
        lines.append(f"driver      {_cuda(driver) if driver else 'none'}")
    else:
        lines.append("driver      not asked: there is no extension")
    lines.append(f"device      {_devices()}")
    if module is not None:
        dims = ", ".join(map(str, module.supported_head_dims()))
        lines.append(f"kernels     head dims {dims}")
        lines += [f"            {name}" for name in module.kernels()]
    else:
        lines.append("kernels     none")
    why_not = _native.why_not()
    if not why_not and not _native.visible_gpus():
        why_not = ["this process has no GPU"]
    if why_not:
        lines.append("The kernels will not be used here; the xla path runs instead:")
        lines += [f"  {reason}" for reason in why_not]
    else:
        lines.append("The kernels will be used for the calls that they can take.")
    return "\n".join(lines)


def _version(version: tuple[int, int] | None) -> str:
    return "unknown" if version is None else f"{version[0]}.{version[1]}"


def _cuda(version: int) -> str:
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def _devices() -> str:
    devices = jax.local_devices()
    kinds = {
        f"{device.device_kind}"
        + (f" (compute capability {cc})" if (cc := _capability(device)) else "")
        for device in devices
    }
    return f"{len(devices)} x {', '.join(sorted(kinds))}, backend {jax.default_backend()}"


def _capability(device: Any) -> str | None:
    return getattr(device, "compute_capability", None)


# --- explain ---


def _add_explain_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dtype", default="bfloat16", help="of query, key and value (default %(default)s)")
    add("--batch", type=int, default=2)
    add("--seqlen-q", type=int, default=8192, metavar="T")
    add("--seqlen-k", type=int, metavar="S", help="default T")
    add("--heads-q", type=int, default=16, metavar="N")
    add("--heads-k", type=int, metavar="K", help="default N")
    add("--head-dim", type=int, default=128, metavar="H")
    add("--head-dim-v", type=int, metavar="D", help="default H")
    add("--causal", action="store_true")
    add("--causal-alignment", choices=("top_left", "bottom_right"), default="top_left")
    add("--query-offset", action="store_true", help="a traced offset")
    add("--window", type=int, nargs=2, metavar=("LEFT", "RIGHT"), help="-1 is unbounded")
    add("--soft-cap", type=float)
    add("--lengths", action="store_true", help="query and key/value lengths")
    add("--segment-ids", action="store_true")
    add("--bias", action="store_true", help="dense")
    add("--mask", action="store_true", help="dense")
    add("--sinks", action="store_true")
    add("--implementation", choices=("fa3", "xla"), help="default: fa3 where it can, else xla")


def _explain(args: argparse.Namespace) -> str:
    seqlen_k = args.seqlen_q if args.seqlen_k is None else args.seqlen_k
    heads_k = args.heads_q if args.heads_k is None else args.heads_k
    head_dim_v = args.head_dim if args.head_dim_v is None else args.head_dim_v

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    dtype = jnp.dtype(args.dtype)
    options: dict[str, Any] = {}
    if args.query_offset:
        options["query_offset"] = array()
    if args.window is not None:
        options["local_window_size"] = tuple(None if w == -1 else w for w in args.window)
    if args.lengths:
        options["query_seq_lengths"] = options["key_value_seq_lengths"] = array(args.batch)
    if args.segment_ids:
        options["query_segment_ids"] = array(args.batch, args.seqlen_q)
        options["key_value_segment_ids"] = array(args.batch, seqlen_k)
    scores = (args.batch, args.heads_q, args.seqlen_q, seqlen_k)
    if args.bias:
        options["bias"] = array(*scores, dtype=dtype)
    if args.mask:
        options["mask"] = array(*scores, dtype=jnp.bool_)
    if args.sinks:
        options["sinks"] = array(args.heads_q, dtype=jnp.float32)
    return jax_fa3.explain(
        array(args.batch, args.seqlen_q, args.heads_q, args.head_dim, dtype=dtype),
        array(args.batch, seqlen_k, heads_k, args.head_dim, dtype=dtype),
        array(args.batch, seqlen_k, heads_k, head_dim_v, dtype=dtype),
        is_causal=args.causal,
        causal_alignment=args.causal_alignment,
        logits_soft_cap=args.soft_cap,
        implementation=args.implementation,
        **options,
    )


# --- bench ---


def _bench(flags: Sequence[str]) -> int:
    """The checkout's benchmark with its flags, or a small one of our own; then a drawing."""
    in_checkout = _BENCHMARK.exists()
    if flags and not in_checkout:
        print(f"jax_fa3 bench: flags {' '.join(flags)} are for a checkout", file=sys.stderr)
        return 2
    if not in_checkout or not (flags or _native.visible_gpus()):
        print(_small_bench())
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m jax_fa3 bench", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--output", "-output", default="jax_fa3_bench.json")
    ours, others = parser.parse_known_args(flags)
    output = ours.output
    command = [sys.executable, str(_BENCHMARK), f"--output={output}", *others]
    code = subprocess.call(command)
    if code == 0:
        drawing = _draw(pathlib.Path(output))
        if drawing is not None:
            print(f"Drawn: {drawing}")
    return code


def _draw(results_path: pathlib.Path) -> pathlib.Path | None:
    """Draws a results file with benchmarks/report.py, beside it; None where there is no axis."""
    spec = importlib.util.spec_from_file_location("report", _BENCHMARK.with_name("report.py"))
    assert spec is not None
    assert spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    sys.modules["report"] = report  # its dataclasses look themselves up
    spec.loader.exec_module(report)
    results = json.loads(results_path.read_text())
    figure = report.figure_of(results)
    if figure is None:
        return None
    drawing = results_path.with_suffix(".svg")
    drawing.write_text(figure)
    return drawing


def _small_bench(rounds: int = 5) -> str:
    """Forward and gradient beside jax.nn.dot_product_attention, as lines with bars."""
    on_gpu = bool(_native.visible_gpus())
    dtype = jnp.bfloat16 if on_gpu else jnp.float32
    batch, heads, head_dim = (2, 16, 128) if on_gpu else (1, 4, 64)
    rows: list[tuple[str, str, float]] = []
    for seqlen in (1024, 4096, 8192) if on_gpu else (512, 1024, 2048):
        rng = np.random.default_rng(seqlen)
        shape = (batch, seqlen, heads, head_dim)
        inputs = [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(3)]
        for direction in ("forward", "gradient"):
            runs = {
                name: _compiled(attention, direction, inputs)
                for name, attention in (
                    ("jax_fa3", jax_fa3.dot_product_attention),
                    ("jax.nn", jax.nn.dot_product_attention),
                )
            }
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(rounds):  # interleaved: both see the same clock and neighbours
                for name, run in runs.items():
                    start = time.perf_counter()
                    jax.block_until_ready(run(*inputs))
                    times[name].append(time.perf_counter() - start)
            rows += [(f"{seqlen} {direction}", n, statistics.median(t)) for n, t in times.items()]
    title = f"causal, {dtype.__name__}, batch {batch}, {heads} heads, head dim {head_dim}"
    lines = [f"{title}: median of {rounds} calls, {_devices()}"]
    longest = max(seconds for _, _, seconds in rows)
    for label, name, seconds in rows:
        bar = "#" * max(1, round(40 * seconds / longest))
        lines.append(f"{label:>14}  {name:<8} {1e3 * seconds:9.2f} ms  {bar}")
    return "\n".join(lines)


def _compiled(attention: Callable[..., Any], direction: str, inputs: Sequence[Any]) -> Any:
    def forward(q, k, v):
        return attention(q, k, v, is_causal=True)

    def loss(q, k, v):
        return forward(q, k, v).astype(jnp.float32).sum()

    function = forward if direction == "forward" else jax.grad(loss, (0, 1, 2))
    run = jax.jit(function).lower(*inputs).compile()
    jax.block_until_ready(run(*inputs))
    return run


# --- the command ---


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_fa3", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="{info,explain,bench}")
    commands.add_parser("info", help="versions, device, kernels (the default)")
    explain = commands.add_parser(
        "explain", help="which implementation takes a shape, why, and the kernels' plan"
    )
    _add_explain_flags(explain)
    commands.add_parser(
        "bench",
        help="time attention here and draw it",
        description="Time attention here and draw it. In a checkout, flags go to "
        "benchmarks/attention.py (bench --helpfull shows them); without flags and without a GPU, "
        "or outside a checkout, a small benchmark beside jax.nn runs.",
    )
    args, rest = parser.parse_known_args(argv)
    if rest and args.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if args.command == "bench":
        return _bench(rest)
    if args.command == "explain":
        try:
            print(_explain(args))
        except (TypeError, ValueError) as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    print(info())
    return 0


if __name__ == "__main__":
    sys.exit(main())
