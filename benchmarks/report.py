"""Writes the documents' measured tables and the figures from benchmarks/results/*.json.

    python benchmarks/report.py           # rewrites the documents' blocks and docs/figures/*.svg
    python benchmarks/report.py --check   # writes nothing; exit 1 where they are out of date

A block lies between `<!-- generated: NAME -->` and `<!-- /generated -->`. Nothing but the standard
library is used, and no figure is typed by hand: the same results always give the same bytes.

    document              block               from             written by
    README.md             forward             forward.json     attention.py
                          backward_summary    backward.json    attention.py --mode=backward
                          demo_h200           demo_h200*.json  examples/train_lm.py --preset=h200
    docs/performance.md   forward_plot        forward.json     attention.py
                          backward,           backward.json    attention.py --mode=backward
                          forward_backward
                          shapes              shapes.json      attention.py --mode=shapes
                          launch              launch.json      attention.py --mode=launch
                          parallel            parallel.json    attention.py --mode=parallel
                          memory              memory.json      attention.py --mode=length
                          cpu                 cpu_xla.json     cpu_xla.py
    docs/ablation.md      ablation_paper,     ablation.json    ablation.py
                          ablation_hdim64, _hdim128, _hdim256, ablation_peaked, ablation_run
"""

import argparse
import dataclasses
import json
import math
import pathlib
import re
import statistics
import sys
from collections.abc import Callable
from xml.sax.saxutils import escape

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
RESULTS = pathlib.Path("benchmarks/results")
FIGURES = pathlib.Path("docs/figures")

# How a peer of attention.py is called in tables and figures, and its colour (Okabe and Ito's
# palette, which colour-blind readers can tell apart).
PEER_NAMES = {
    "fa3": "jax_fa3",
    "fa3_deterministic": "deterministic",
    "xla": "jax_fa3 xla",
    "cudnn": "cuDNN",
    "tokamax": "tokamax",
    "jnp": "plain jnp",
    "flash_attn3_jax": "flash-attn3-jax",
    "dew_flash_attn": "dew-flash-attn",
    "flash_attention_3": "FlashAttention-3",
}
PEER_COLOURS = {
    "fa3": "#d55e00",
    "fa3_deterministic": "#7a3600",
    "xla": "#e69f00",
    "cudnn": "#0072b2",
    "tokamax": "#009e73",
    "jnp": "#7f7f7f",
    "flash_attn3_jax": "#cc79a7",
    "dew_flash_attn": "#56b4e9",
    "flash_attention_3": "#000000",
}


DOCUMENTS = {
    "README.md": ("forward", "backward_summary", "demo_h200"),
    "docs/performance.md": (
        "forward_plot",
        "backward",
        "forward_backward",
        "shapes",
        "launch",
        "parallel",
        "memory",
        "cpu",
    ),
    "docs/ablation.md": (
        "ablation_paper",
        "ablation_hdim64",
        "ablation_hdim128",
        "ablation_hdim256",
        "ablation_peaked",
        "ablation_run",
    ),
}


class ReportError(Exception):
    """The results or the documents are not in the form that this script reads."""


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def markdown_table(header, rows):
    """A GitHub table; the first column is aligned left, the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def three_digits(value):
    """12.3, 123, 0.123: as many digits as a repeated timing has."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def bytes_text(count):
    """In MiB or GiB."""
    if count is None:
        return "–"
    mib = count / 2**20
    return f"{three_digits(mib)} MiB" if mib < 1024 else f"{three_digits(mib / 1024)} GiB"


def provenance(results):
    """One line on the device, the versions and the code behind a results file of attention.py."""
    device, versions, code = results["device"], results["versions"], results["code"]
    parts = [device["kind"]]
    if device.get("driver"):
        parts.append(f"driver {device['driver']}")
    parts.append(f"JAX {versions['jax']}")
    parts += [
        f"{name} {versions[key]}"
        for key, name in (("cudnn", "cuDNN"), ("tokamax", "tokamax"))
        if versions.get(key)
    ]
    gemm = results["gemm"]
    parts.append(f"bfloat16 GEMM {gemm['size']}³ {three_digits(gemm['tflops'])} TFLOP/s")
    clocks = sorted(row["sm_clock_mhz"] for row in results["rows"] if row.get("sm_clock_mhz"))
    if clocks:
        parts.append(f"SM clock {clocks[0]:.0f} to {clocks[-1]:.0f} MHz")
    trees = ", ".join(
        f"{name} {digest[:8]}" for name, digest in code["tree_hashes"].items() if digest
    )
    parts.append(f"{results['date']}, git trees {trees}")
    if code["matches_commit"] is False:
        parts.append("files changed since their commit")
    text = "; ".join(parts) + "."
    if results["missing_rows"]:
        text += f" The run ended before {', '.join(results['missing_rows'])}."
    if results.get("parts"):
        text += f" Measured in parts: {results['parts']}."
    if results.get("failed_checks"):
        text += f" Wrong answers, so not timed: {', '.join(results['failed_checks'])}."
    return text


def _grid_order(row):
    return row["head_dim"], row["mask"] != "full", row["seqlen"]


def _peers_of(results):
    """The peers with at least one timing, in PEER_NAMES's order, FlashAttention-3 last."""
    seen = {
        peer for row in results["rows"] for peer, entry in row["peers"].items() if "tflops" in entry
    }
    peers = [peer for peer in PEER_NAMES if peer in seen]
    if any("flash_attention_3" in row for row in results["rows"]):
        peers.append("flash_attention_3")
    return peers


def _tflops(row, peer):
    if peer == "flash_attention_3":
        return row.get(peer, {}).get("tflops")
    return row["peers"].get(peer, {}).get("tflops")


def _median(values):
    values = sorted(values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def _geomean(values):
    return math.exp(sum(map(math.log, values)) / len(values))


def _ours_over(row, peer):
    """jax_fa3's speed over that peer's in a row of the grid; None where one of them has none."""
    return row.get("fa3_over", {}).get(peer)


def _deterministic(row):
    """Speed of the deterministic backward over the default's; None where it was not timed."""
    over = _ours_over(row, "fa3_deterministic")
    return over and 1 / over


LONG = 2048  # sequences from here on count in the summaries


def _long(results):
    return [row for row in results["rows"] if row["seqlen"] >= LONG]


def grid_block(results, what):
    """The grid, one line a problem, with the ratios that matter; `what` is the pass."""
    peers = _peers_of(results)
    against = [peer for peer in ("cudnn", "flash_attention_3") if peer in peers and "fa3" in peers]
    deterministic = "fa3" in peers and "fa3_deterministic" in peers
    names = {**PEER_NAMES, "flash_attention_3": "FA3*"}
    header = ["head dim, mask", "seq", *(names[peer] for peer in peers)]
    header += [f"jax_fa3 / {names[peer]}" for peer in against]
    header += ["deterministic / default"] * deterministic
    table = []
    for row in sorted(results["rows"], key=_grid_order):
        ratios = [_ours_over(row, peer) for peer in against] + [_deterministic(row)] * deterministic
        cells = [f"{row['head_dim']} {row['mask']}", row["seqlen"]]
        cells += [three_digits(_tflops(row, peer)) for peer in peers]
        table.append([*cells, *map(_ratio_text, ratios)])
    lines = [f"TFLOP/s, {what}, bfloat16, 16k tokens, hidden size 2048; higher is better."]
    for peer in against:
        if ratios := [x for row in results["rows"] if (x := _ours_over(row, peer))]:
            lines.append(
                f"jax_fa3 / {names[peer]}: median {_median(ratios):.2f}, "
                f"{min(ratios):.2f} to {max(ratios):.2f}."
            )
    if deterministic:
        lines.append(_deterministic_text(results))
    text = " ".join(lines) + "\n\n" + markdown_table(header, table) + "\n\n" + provenance(results)
    return text + (f"\n\n{FLASH_ATTENTION_3_NOTE}" if "flash_attention_3" in peers else "")


FLASH_ATTENTION_3_NOTE = (
    "\\* The original FlashAttention-3 did not run beside the others: it is this run's cuDNN "
    "figure times the ratio of the two, measured once on an H200 (`benchmarks/peers.py` has the "
    "ratios and how they were measured)."
)


def _ratio_text(ratio):
    return f"{ratio:.2f}" if ratio else "–"


def _deterministic_text(results):
    """How `deterministic_backward=True` does at long sequences, and where it was not timed."""
    ratios = [(x, row["name"]) for row in _long(results) if (x := _deterministic(row))]
    text = ""
    if ratios:
        text = (
            f"`deterministic_backward=True` over the default at seq ≥ {LONG}: geometric mean "
            f"{_geomean([x for x, _ in ratios]):.2f}, lowest {min(ratios)[0]:.2f} "
            f"(`{min(ratios)[1]}`)."
        )
    why = {}
    for row in sorted(results["rows"], key=_grid_order):
        if reason := row["peers"].get("fa3_deterministic", {}).get("skipped"):
            why.setdefault(reason, []).append(row["head_dim"])
    for reason, head_dims in why.items():
        text += f" Not timed for head dim {_listed(head_dims)}: {reason}."
    return text.strip()


def _listed(values):
    return ", ".join(map(str, dict.fromkeys(values)))


def together(results):
    """The results of mode backward with the forward and the backward pass in one function.

    None where the file has none.
    """
    rows = [
        {key: x for key, x in row.items() if key not in ("flash_attention_3", "fa3_over")}
        | row["step"]
        for row in results["rows"]
        if "step" in row
    ]
    return {**results, "rows": rows} if rows else None


def forward_backward_block(results):
    """The grid with both passes in one jitted function; `results` as together gives them."""
    return (
        grid_block(results, "forward and backward in one jitted function, 3.5 forward passes' work")
        + "\n\nFA3\\* here takes both passes' ratios, weighted by cuDNN's time for each."
    )


def summary_block(results):
    """The backward in one line a head dim and mask: ratios at long sequences."""
    both = together(results)
    columns = []
    for name, source in (("", results), ("forward + backward ", both)):
        peers = _peers_of(source) if source else []
        for peer in ("flash_attention_3", "cudnn", "tokamax"):
            if peer in peers and "fa3" in peers:
                short = {**PEER_NAMES, "flash_attention_3": "FA3*"}[peer]
                columns.append((f"{name}/ {short}", source, _over(peer), _geomean))
                if peer == "flash_attention_3":
                    columns.append(("lowest", source, _over(peer), min))
        if "fa3_deterministic" in peers:
            columns.append(("deterministic / default", source, _deterministic, _geomean))
    speeds = ("TFLOP/s at the longest", results, lambda row: _tflops(row, "fa3"), _last)
    columns = [speeds, *columns]
    table = []
    groups = {(row["head_dim"], row["mask"]) for row in results["rows"]}
    for group in sorted(groups, key=lambda group: (group[0], group[1] != "full")):
        cells: list[str] = ["{} {}".format(*group)]
        for _, source, value_of, reduce in columns:
            rows = sorted(_long(source), key=_grid_order)
            values = [
                x
                for row in rows
                if (row["head_dim"], row["mask"]) == group and (x := value_of(row))
            ]
            form = three_digits if reduce is _last else _ratio_text
            cells.append(form(reduce(values)) if values else "–")
        table.append(cells)
    header = ["head dim, mask", *(name for name, *_ in columns)]
    text = (
        f"jax_fa3's backward over its peers: geometric means over the sequences of {LONG} to 16384 "
        "of the same grid, the lowest of them, and the same for forward and backward in one jitted "
        "function; higher is better."
    )
    if any("fa3_deterministic" in row["peers"] for row in results["rows"]):
        text += f" {_deterministic_text(results)}"
    text += f"\n\n{markdown_table(header, table)}\n\n{provenance(results)}"
    return text + (f"\n\n{FLASH_ATTENTION_3_NOTE}" if "FA3*" in str(header) else "")


def _over(peer):
    return lambda row: _ours_over(row, peer)


def _last(values):
    return values[-1]


def _nearest_of_the_grid(row, grid):
    """The grid's row of the same head dim and mask whose length is nearest, as a ratio; or None."""
    seqlen = math.sqrt(row["seqlen"] * row.get("seqlen_k", row["seqlen"]))
    alike = [
        other
        for other in (grid or {"rows": []})["rows"]
        if (other["head_dim"], other["mask"]) == (row["head_dim"], row["mask"])
        and "cudnn" in other.get("fa3_over", {})
    ]
    return min(alike, key=lambda other: abs(math.log(other["seqlen"] / seqlen)), default=None)


def _problem_text(row):
    """Such as `4 x 4096, 16 heads over 2` or `4 x 512 on 8192, 16 heads`."""
    lengths = f"{row['seqlen']}" + (f" on {row['seqlen_k']}" if "seqlen_k" in row else "")
    heads = f"{row['heads']} heads" + (f" over {row['heads_k']}" if "heads_k" in row else "")
    return f"{row['batch']} × {lengths}, {heads}"


def shapes_block(results, grid):
    """Problems beyond the grid, beside the ratio to cuDNN that the grid's nearest row has."""
    peers = _peers_of(results)
    peers = [peer for peer in peers if peer != "flash_attention_3"]
    ours = [row for row in results["rows"] if "cudnn" in row.get("fa3_over", {})]
    expected = {row["name"]: _nearest_of_the_grid(row, grid) for row in ours}
    table = []
    for row in sorted(results["rows"], key=lambda row: (row["head_dim"], row["mask"] != "full")):
        cells = [_problem_text(row), f"{row['head_dim']} {row['mask']}"]
        cells += [three_digits(_tflops(row, peer)) for peer in peers]
        ratio = row.get("fa3_over", {}).get("cudnn")
        near = expected.get(row["name"])
        cells.append(f"{ratio:.2f}" if ratio else "–")
        cells.append(f"{near['fa3_over']['cudnn']:.2f}" if near else "–")
        table.append(cells)
    header = ["batch × queries (on keys), heads", "head dim, mask"]
    header += [*(PEER_NAMES[peer] for peer in peers), "jax_fa3 / cuDNN", "the grid's"]

    def listed(chosen):
        return ", ".join(f"`{row['name']}`" for row in chosen) or "none"

    behind = [row for row in ours if row["fa3_over"]["cudnn"] < 1]
    below = [
        row
        for row in ours
        if (near := expected[row["name"]])
        and row["fa3_over"]["cudnn"] < 0.95 * near["fa3_over"]["cudnn"]
    ]
    return (
        "TFLOP/s, forward, bfloat16; higher is better. The last column is jax_fa3 / cuDNN in the "
        "grid's row of that head dim and mask whose length is nearest.\n\n"
        f"{markdown_table(header, table)}\n\n"
        f"Behind cuDNN: {listed(behind)}. More than 5 % below the grid's ratio: {listed(below)}."
        f"\n\n{provenance(results)}"
    )


def launch_block(results):
    """What one call takes inside a jitted loop."""
    peers = [
        peer
        for peer in PEER_NAMES
        if any("seconds" in row["peers"].get(peer, {}) for row in results["rows"])
    ]
    table = []
    for row in sorted(results["rows"], key=_grid_order):
        seconds = {peer: row["peers"].get(peer, {}).get("seconds") for peer in peers}
        cells = [f"{row['head_dim']} {row['mask']}", row["seqlen"]]
        cells += [f"{three_digits(1e6 * s)} µs" if s else "–" for s in seconds.values()]
        both = seconds.get("fa3") and seconds.get("cudnn")
        cells.append(f"{seconds['fa3'] / seconds['cudnn']:.2f}" if both else "–")
        table.append(cells)
    first = results["rows"][0]
    header = ["head dim, mask", "seq", *(PEER_NAMES[peer] for peer in peers), "jax_fa3 / cuDNN"]
    return (
        f"Time of one call inside a jitted loop of {first['calls']}, batch {first['batch']}, "
        f"{first['heads']} heads, bfloat16; lower is better.\n\n"
        f"{markdown_table(header, table)}\n\n{provenance(results)}"
    )


WAY_NAMES = {
    "one": "one GPU",
    "heads shard_map": "heads, shard_map",
    "heads auto": "heads, Auto mesh",
    "batch shard_map": "batch, shard_map",
    "batch auto": "batch, Auto mesh",
}


def parallel_block(results):
    """A training step's time on one GPU and on two."""
    table = []
    for row in results["rows"]:
        for way, name in WAY_NAMES.items():
            entry = row["ways"].get(way, {})
            seconds, ratio = entry.get("seconds"), row.get("over_one", {}).get(way)
            cells = [_problem_text(row), f"{row['head_dim']} {row['mask']}", name]
            cells.append(f"{three_digits(1e3 * seconds)} ms" if seconds else "–")
            table.append([*cells, three_digits(entry.get("tflops")), _ratio_text(ratio)])
    header = ["batch × queries, heads", "head dim, mask", "split", "time", "TFLOP/s", "one / this"]
    return (
        "Forward and backward in one jitted function, bfloat16, on one GPU and on two of one host: "
        "time of a call, TFLOP/s of the two together, and one GPU's time over this one.\n\n"
        f"{markdown_table(header, table)}\n\n{provenance(results)}"
    )


# --------------------------------------------------------------------------------------------------
# The ablation
# --------------------------------------------------------------------------------------------------

TENSOR_FLOPS_PER_CYCLE = 4096  # 16-bit, dense, of a Hopper multiprocessor


def _ablation_rows(results, study):
    """The study's rows, the long one first."""
    rows = [
        row
        for row in results["rows"]
        if (row["head_dim"], row["mask"]) == (study["head_dim"], study["mask"])
    ]
    return sorted(rows, key=lambda row: -row["seqlen"])


def _variant_text(config, study, rows):
    """The study's words; a shipped configuration with its tile and where the plan chooses it."""
    text = study["variants"].get(config, "shipped")
    if text != "shipped":
        return text
    plan = rows[0]["variants"].get(config, {}).get("plan") or ""
    if tile := re.search(r"(\d+) queries x (\d+) keys", plan):
        text += f": {tile[1]} queries × {tile[2]} keys" + (", pingpong" * ("pingpong" in plan))
    planned = [f"{row['batch']} × {row['seqlen']}" for row in rows if row["planned"] == config]
    return text + (f" (planned at {' and '.join(planned)})" if planned else "")


def _counts(results, row, config):
    """(instructions a score, cycles over the tensor cores' least, tensor pipe active) as cells."""
    counts = results["profile"].get("metrics", {}).get(config, {})
    scores = row["flops"] / 4 / row["head_dim"]
    sms = results["device"].get("multiprocessors")
    cells = []
    if "instructions" in counts:
        cells.append(f"{32 * counts['instructions'] / scores:.2f}")
    else:
        cells.append("–")
    if "cycles" in counts and sms:
        cells.append(f"{counts['cycles'] * TENSOR_FLOPS_PER_CYCLE * sms / row['flops']:.3f}")
    else:
        cells.append("–")
    tensor = counts.get("tensor_active_percent")
    cells.append(f"{tensor:.0f} %" if tensor is not None else "–")
    stack = results["build"].get(config, {}).get("stack")
    return [*cells, "–" if stack is None else stack]


def study_table(results, study):
    """One line a configuration: speed at both lengths, over the study's first; counts; error."""
    rows = _ablation_rows(results, study)
    if not rows:
        return f"{study['title']}: the run ended before it."
    long = rows[0]
    first = next(iter(study["variants"]))
    configs = list(study["variants"])
    if study["variants"][first] == "shipped":  # the others that are, too
        configs += [c for c in long["variants"] if c.startswith("Fwd") and c not in configs]
    header = ["configuration"]
    for row in rows:
        header += [f"{row['batch']} × {row['seqlen']}", "ratio"]
    header += ["instructions", "cycles", "tensor", "stack", "error"]
    table = []
    for config in configs:
        cells = [_variant_text(config, study, rows)]
        for row in rows:
            entry = row["variants"].get(config, {})
            base = row["variants"].get(first, {}).get("tflops")
            tflops = entry.get("tflops")
            cells.append(three_digits(tflops))
            cells.append(f"{tflops / base:.3f}" if tflops and base else "–")
        cells += _counts(results, long, config)
        error = long["variants"].get(config, {}).get("relative_error")
        cells.append("–" if error is None else f"{1e3 * error:.2f}")
        table.append(cells)
    for name, speed in (
        ("cuDNN", lambda row: row["peers"]["cudnn"].get("tflops")),
        ("FA3*", _flash_attention_3_there),
    ):
        cells = [name]
        for row in rows:
            tflops, base = speed(row), row["variants"].get(first, {}).get("tflops")
            cells.append(three_digits(tflops))
            cells.append(f"{tflops / base:.3f}" if tflops and base else "–")
        table.append([*cells, *["–"] * 5])
    text = f"**{study['title']}.**\n\n{markdown_table(header, table)}"
    missing = [
        lack["text"]
        for lack in results.get("missing_variants", [])
        if lack["study"] == study["name"]
    ]
    return text + (f"\n\nNot in this build: {'; '.join(missing)}." if missing else "")


def _flash_attention_3_there(row):
    cudnn = row["peers"]["cudnn"].get("tflops")
    ratio = row.get("flash_attention_3_over_cudnn")
    return cudnn * ratio if cudnn and ratio else None


def studies_block(results, names):
    """The tables of the studies whose name begins with one of `names`."""
    chosen = [study for study in results["studies"] if study["name"].startswith(names)]
    tables = [study_table(results, study) for study in chosen]
    return "\n\n".join(tables) or "The run did not measure it."


def peaked_block(results):
    """The softmax rules on inputs that peak: errors, speed, what a redo costs."""
    rules = ("lazy", "conditional", "classical")
    rows = sorted((row for row in results["rows"] if "peaked" in row), key=_grid_order)
    if not rows:
        return "The run did not measure it."
    factors = [key for key in rows[0]["peaked"] if key != "groups"]
    header = ["head dim, mask", "rule"]
    header += [f"error, q × {factor}" for factor in factors]
    header += ["of classical, q × 8"]
    header += [f"TFLOP/s, q × {factor}" for factor in factors]
    header += [f"done again, q × {factor}" for factor in factors]
    table, worst = [], 0.0
    for row in rows:
        peaked = row["peaked"]
        for rule in rules:
            entries = [peaked[factor].get(rule, {}) for factor in factors]
            errors = [entry.get("relative_error") for entry in entries]
            cells = [f"{row['head_dim']} {row['mask']}", rule]
            cells += ["–" if error is None else f"{1e3 * error:.2f}" for error in errors]
            mine, classical = (
                peaked.get("8", {}).get(name, {}).get("relative_error")
                for name in (rule, "classical")
            )
            cells.append(f"{mine / classical:.2f}" if mine and classical else "–")
            if mine and classical and rule == "lazy":
                worst = max(worst, mine / classical)
            cells += [three_digits(entry.get("tflops")) for entry in entries]
            cells += [
                f"{100 * entry['redone'] / peaked['groups']:.0f} %" if "redone" in entry else "–"
                for entry in entries
            ]
            table.append(cells)
    text = (
        "Errors are relative, root mean square, against float32, in thousandths; a redo is "
        "counted in groups of 64 query rows."
    )
    if worst:
        text += f" With the query times 8, lazy has at most {worst:.2f} times classical's error."
    return f"{text}\n\n{markdown_table(header, table)}"


def run_block(results):
    """What the tables of the ablation were measured with."""
    text = provenance(results)
    profile, build = results["profile"], results["build"]
    if "skipped" in profile:
        text += f" No instructions and cycles: {profile['skipped']}."
    else:
        text += f" Counted by Nsight Compute, {profile['ncu']}."
    if isinstance(build.get("skipped"), str):
        text += f" No figures of the build: {build['skipped']}."
    return text


def _length_rows(results):
    """By length; those with fewer heads than the first, which are on no curve, at the end."""
    return sorted(results["rows"], key=lambda row: row["seqlen"])


def _on_the_curve(rows):
    return [row for row in rows if row["heads"] == rows[0]["heads"]]


def _scratch(entry):
    """The compiler's figure in bytes; None where it did not compile."""
    return (entry.get("memory_bytes") or {}).get("temporaries")


def gradient_bytes(row):
    """What forward and backward of the kernels keep, by formula; None for other head dims.

    The output and the log-sum-exp that the forward saves, and the backward's workspace: the
    log-sum-exp again, delta, and a float32 accumulator of dQ, all for queries in whole tiles.
    """
    if row["head_dim"] not in (64, 128):
        return None
    rows = row["batch"] * row["heads"] * row["seqlen"]
    padded = row["batch"] * row["heads"] * 128 * math.ceil(row["seqlen"] / 128)
    return rows * (2 * row["head_dim"] + 4) + padded * (4 * row["head_dim"] + 8)


def memory_block(results):
    """Time and memory against length, forward and gradient."""
    rows = _length_rows(results)
    texts = [
        f"Causal self-attention, batch 1, {rows[0]['heads']} heads of {rows[0]['head_dim']}, "
        "bfloat16: time of a call, and its scratch memory (beyond inputs and outputs) as the "
        "compiler plans it; in brackets where that is all, because the call was not run.",
        "![Time and memory against sequence length](figures/memory.svg)",
    ]
    for which, title in (("forward", "Forward"), ("gradient", "Forward and gradient")):
        peers = _length_peers(rows, which)
        formula = which == "gradient" and "fa3" in peers
        table = []
        for row in rows:
            heads = "" if row["heads"] == rows[0]["heads"] else f", {row['heads']} heads"
            cells = [f"{row['seqlen']}{heads}"]
            for peer in peers:
                entry = row[which].get(peer, {})
                memory = _scratch(entry)
                if "seconds" in entry:
                    cells.append(f"{three_digits(entry['seconds'] * 1e3)} ms, {bytes_text(memory)}")
                else:
                    cells.append("–" if memory is None else f"({bytes_text(memory)})")
            if formula:
                cells.insert(2, bytes_text(gradient_bytes(row)))
            table.append(cells)
        header = [f"{title}, seq", *(PEER_NAMES[peer] for peer in peers)]
        if formula:
            header.insert(2, "by formula")
        texts.append(markdown_table(header, table))
        if formula:
            texts.append(
                "By formula: jax_fa3's saved output and log-sum-exp, B · N · T · (2 · H + 4) "
                "bytes, and its backward's workspace, B · N · T · (4 · H + 8), T up to the next "
                "128."
            )
    texts.append(provenance(results))
    return "\n\n".join(texts)


def _length_peers(rows, which):
    """The peers with a figure."""
    return [
        peer
        for peer in PEER_NAMES
        for entries in [[row[which].get(peer, {}) for row in rows]]
        if any("seconds" in entry or _scratch(entry) is not None for entry in entries)
    ]


def cpu_block(results):
    """jax_fa3's xla path against jax.nn on a CPU, one line a problem and pass."""
    table = [
        [
            f"{row['pass']}, {row['dtype']}, {row['mask']}",
            row["seqlen"],
            f"{three_digits(row['wall_ms']['jax_fa3'])} ms",
            f"{three_digits(row['wall_ms']['jax.nn'])} ms",
            f"{row['wall_ratio']:.2f}",
            f"{three_digits(row['temporary_mib']['jax_fa3'])} MiB",
            f"{three_digits(row['temporary_mib']['jax.nn'])} MiB",
        ]
        for row in results["rows"]
    ]
    header = ["pass, dtype, mask", "T = S", "jax_fa3 xla", "jax.nn", "ratio"]
    header += ["jax_fa3 scratch", "jax.nn scratch"]
    environment = results["environment"]
    shape = environment["shape"]
    return (
        f"Time of a call, lower is better: batch {shape['batch']}, {shape['heads']} heads of "
        f"{shape['head_dim']}; the ratio is the median over {environment['rounds']} interleaved "
        "rounds of jax_fa3's time over jax.nn's.\n\n"
        + markdown_table(header, table)
        + f"\n\n{environment['cpu']}, {environment['cores']} cores; JAX "
        f"{environment['versions']['jax']}."
    )


def demo_block(runs):
    """One line a run of examples/train_lm.py, and the sample of the first."""
    table = [
        [
            run["attention"],
            f"{run['steps']:,}",
            f"{run['tokens_per_second']:,.0f}",
            f"{run['train_seconds']:.0f} s",
            f"{run['first_loss']:.3f}",
            f"{run['final_validation_loss']:.3f}",
            _first_steps_text(run["comparison"]),
        ]
        for run in runs
    ]
    first = runs[0]
    settings = first["settings"]
    text = (
        f"`python examples/train_lm.py --preset=h200` on one {first['device']['kind']}: "
        f"{first['parameters'] / 1e6:.0f} M parameters, {settings['layers']} layers, model dim "
        f"{settings['model_dim']}, {settings['query_heads']} query and "
        f"{settings['key_value_heads']} key/value heads of {settings['head_dim']}, "
        f"{settings['dtype']}, context {settings['seq_len']}, "
        f"{settings['batch_size'] * settings['seq_len']:,} tokens a step. Losses in nats a byte, "
        f"the last one on held-out files; the unigram entropy is "
        f"{first['unigram_entropy']:.3f}.\n\n"
    )
    header = ["`--attention`", "steps", "tokens/s", "training", "first loss", "held-out loss"]
    text += markdown_table([*header, "first losses, off jax.nn's"], table)
    others = same_schedule(runs)
    for run in others:
        apart = [
            abs(ours - theirs) for ours, theirs in zip(first["losses"], run["losses"], strict=False)
        ]
        text += (
            f"\n\nThe same {len(apart)} steps, `{first['attention']}` against "
            f"`{run['attention']}`: training losses differ by {statistics.median(apart):.4f} in "
            f"the median step and by {max(apart):.4f} at most."
        )
    if others:
        text += f"\n\n![Training loss against the step, by attention]({FIGURES}/demo.svg)"
    return text


def same_schedule(runs):
    """The runs whose losses may be set beside the first one's, step by step.

    One that its time limit ended was annealed earlier: its learning rates are its own.
    """
    first = runs[0]
    whole = first["steps"] == first["settings"]["steps"]
    return [
        run
        for run in runs[1:]
        if whole and run["steps"] == first["steps"] and run["settings"] == first["settings"]
    ]


def _first_steps_text(comparison):
    """How far apart a run's first losses and jax.nn's are, relative; each trained by itself."""
    if not comparison:
        return "–"
    ours, theirs = comparison["losses"]
    apart = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    return f"{apart:.0e} ({len(ours)} steps)"


def demo_figure(runs):
    """Training loss against the step, a curve a run; drawn in the order given."""
    losses = [loss for run in runs for loss in run["losses"]]
    low, high = math.floor(min(losses)), math.ceil(max(losses))
    steps = max(len(run["losses"]) for run in runs)
    left, above, width, height = 70, 80, 560, 260
    svg = Svg(left + width + 40, above + height + 50)
    svg.text(left, 24, "Training loss, nats a byte, against the step", "start", 15, bold=True)
    panel = Panel(
        left,
        above,
        width,
        height,
        [(steps * tick / 4, f"{steps * tick // 4}") for tick in range(5)],
        [(float(tick), str(tick)) for tick in range(low, high + 1)],
    )
    panel.draw(svg, "")
    label_at = left
    for run, colour in zip(runs, PEER_COLOURS.values(), strict=False):
        svg.series([(label_at, 46), (label_at + 24, 46)], colour)
        svg.text(label_at + 31, 50, f"--attention={run['attention']}", anchor="start")
        label_at += 200
        points = [(panel.x(step), panel.y(loss)) for step, loss in enumerate(run["losses"], 1)]
        svg.series(points, colour, hollow=True)
    return svg.document()


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------


class Svg:
    """An SVG drawing, built shape by shape; coordinates in pixels from the top left."""

    def __init__(self, width, height):
        self._shapes = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" '
            'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" '
            'font-size="12">',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]

    def line(self, x1, y1, x2, y2, colour="#d0d0d0", width=1.0):
        self._shapes.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke="{colour}" stroke-width="{width}"/>'
        )

    def text(self, x, y, text, anchor="middle", size=12, bold=False, turned=False):
        weight = ' font-weight="bold"' if bold else ""
        turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
        self._shapes.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
            f'{weight}{turn} fill="#202020">{escape(str(text))}</text>'
        )

    def series(self, points, colour, dashed=False, hollow=False):
        """A line with a mark at each of the points [(x, y)]."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self._shapes.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'
        )
        fill = "#ffffff" if hollow else colour
        self._shapes += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}" stroke="{colour}"/>'
            for x, y in points
        ]

    def document(self):
        return "\n".join([*self._shapes, "</svg>"]) + "\n"


@dataclasses.dataclass
class Panel:
    """A plot's frame: where it lies, and how values become coordinates."""

    left: float
    top: float
    width: float
    height: float
    x_ticks: list[tuple[float, str]]  # (value, label)
    y_ticks: list[tuple[float, str]]
    scale: Callable[[float], float] = float  # of y; math.log10 for a logarithmic axis

    def x(self, value):
        first, last = self.x_ticks[0][0], self.x_ticks[-1][0]
        share = (value - first) / ((last - first) or 1)
        return self.left + self.width * (0.05 + 0.9 * share)

    def y(self, value):
        low, high = self.scale(self.y_ticks[0][0]), self.scale(self.y_ticks[-1][0])
        return self.top + self.height * (1 - (self.scale(value) - low) / ((high - low) or 1))

    def draw(self, svg, title):
        svg.text(self.left + self.width / 2, self.top - 8, title, size=13, bold=True)
        for value, label in self.y_ticks:
            svg.line(self.left, self.y(value), self.left + self.width, self.y(value))
            svg.text(self.left - 6, self.y(value) + 4, label, anchor="end", size=11)
        for value, label in self.x_ticks:
            svg.text(self.x(value), self.top + self.height + 16, label, size=11)
        bottom = self.top + self.height
        svg.line(self.left, bottom, self.left + self.width, bottom, colour="#404040")


def _draw_legend(svg, peers, y, left):
    for peer in peers:
        estimate = peer == "flash_attention_3"
        svg.series(
            [(left, y), (left + 24, y)], PEER_COLOURS[peer], dashed=estimate, hollow=estimate
        )
        label = PEER_NAMES[peer] + (" (from its ratio to cuDNN)" if estimate else "")
        svg.text(left + 31, y + 4, label, anchor="start")
        left += 48 + 7 * len(label)


def _length_label(seqlen):
    return f"{seqlen // 1024}k" if seqlen >= 1024 else str(seqlen)


def forward_figure(results):
    return grid_figure(results, "forward")


def backward_figure(results):
    return grid_figure(results, "backward")


def forward_backward_figure(results):
    """`results` as together gives them."""
    return grid_figure(results, "forward and backward")


def figure_of(results):
    """A drawing of any results file of attention.py, or None where there is nothing to draw.

    Modes shapes, launch and parallel have none: their problems lie on no axis.
    """
    figures = {
        "attention_grid": forward_figure,
        "attention_backward": backward_figure,
        "attention_length": memory_figure,
    }
    figure = figures.get(results["kind"].removesuffix("_smoke"))
    return figure(results) if figure and results["rows"] else None


def grid_figure(results, what):
    """TFLOP/s against sequence length: a panel for each head dim (across) and mask (down)."""
    rows = sorted(results["rows"], key=_grid_order)
    # Plain jnp is an order of magnitude slower; the table has it.
    peers = [peer for peer in _peers_of(results) if peer != "jnp"]
    head_dims = sorted({row["head_dim"] for row in rows})
    masks = [mask for mask in ("full", "causal") if any(row["mask"] == mask for row in rows)]
    seqlens = sorted({row["seqlen"] for row in rows})
    best = max((_tflops(row, peer) or 0 for row in rows for peer in peers), default=0)
    step = 10 ** math.floor(math.log10(best)) if best > 0 else 1
    top = step * math.ceil(best / step)
    y_ticks = [(top * tick / 4, f"{top * tick / 4:g}") for tick in range(5)]
    width, height, left, above = 270, 200, 70, 80
    svg = Svg(left + len(head_dims) * (width + 40), above + len(masks) * (height + 70))
    svg.text(left, 24, f"Attention {what}, bfloat16, 16k tokens, TFLOP/s", "start", 15, bold=True)
    _draw_legend(svg, peers, 46, left)
    for column, head_dim in enumerate(head_dims):
        for line, mask in enumerate(masks):
            panel = Panel(
                left + column * (width + 40),
                above + line * (height + 70),
                width,
                height,
                [(math.log2(n), _length_label(n)) for n in seqlens],
                y_ticks,
            )
            panel.draw(svg, f"head dim {head_dim}, {mask}")
            for peer in reversed(peers):  # jax_fa3 last, on top
                points = [
                    (panel.x(math.log2(row["seqlen"])), panel.y(tflops))
                    for row in rows
                    if (row["head_dim"], row["mask"]) == (head_dim, mask)
                    and (tflops := _tflops(row, peer))
                ]
                if points:
                    estimate = peer == "flash_attention_3"
                    svg.series(points, PEER_COLOURS[peer], dashed=estimate, hollow=estimate)
    return svg.document()


def memory_figure(results):
    """Time and temporary memory against sequence length, logarithmic, forward and gradient."""
    rows = _on_the_curve(_length_rows(results))
    passes = (("forward", "forward"), ("gradient", "forward and gradient"))

    def scratch(entry):
        memory = _scratch(entry)
        return None if memory is None else max(memory, 2**10)

    quantities = (
        ("time of a call", lambda entry: entry.get("seconds"), _seconds_label),
        ("scratch memory", scratch, _power_of_two_bytes),
    )
    peers = [peer for peer in PEER_NAMES if any(peer in _length_peers(rows, p) for p, _ in passes)]
    width, height, left, above = 360, 230, 80, 80
    svg = Svg(left + 2 * (width + 60), above + 2 * (height + 70))
    head = f"Causal attention, batch 1, {rows[0]['heads']} heads of {rows[0]['head_dim']}, bfloat16"
    svg.text(left, 24, head, "start", 15, bold=True)
    _draw_legend(svg, peers, 46, left)
    for line, (quantity, value_of, label) in enumerate(quantities):
        values = [
            value
            for row in rows
            for which, _ in passes
            for entry in row[which].values()
            if (value := value_of(entry)) is not None
        ]
        if not values:
            continue
        base = 10 if quantity.startswith("time") else 32
        low = math.floor(math.log(min(values), base))
        high = max(low + 1, math.ceil(math.log(max(values), base)))
        y_ticks = [
            (float(base) ** power, label(float(base) ** power)) for power in range(low, high + 1)
        ]
        for column, (which, title) in enumerate(passes):
            panel = Panel(
                left + column * (width + 60),
                above + line * (height + 70),
                width,
                height,
                [(math.log2(row["seqlen"]), _length_label(row["seqlen"])) for row in rows],
                y_ticks,
                math.log10,
            )
            panel.draw(svg, f"{quantity}, {title}")
            for peer in reversed(peers):  # jax_fa3 last, on top
                points = [
                    (panel.x(math.log2(row["seqlen"])), panel.y(value))
                    for row in rows
                    if (value := value_of(row[which].get(peer, {}))) is not None
                ]
                if points:
                    svg.series(points, PEER_COLOURS[peer])
    return svg.document()


def _seconds_label(seconds):
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= unit * 0.999:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds * 1e9:.0f} ns"


def _power_of_two_bytes(count):
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.0f} {name}"
    return f"{count:.0f} B"


# --------------------------------------------------------------------------------------------------
# The documents
# --------------------------------------------------------------------------------------------------


def load(repository, name, kind=None):
    """The results file of that name, or None where it does not exist.

    Raises:
      ReportError: it holds another kind of results; a smoke run's are never published.
    """
    path = repository / RESULTS / name
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    if kind is not None and results.get("kind") != kind:
        raise ReportError(f"{path}: holds {results.get('kind')!r}, expected {kind!r}")
    return results


def generate(repository):
    """({block name: text}, {figure path: text}) from the results files that exist."""
    blocks, figures = {}, {}
    grid = load(repository, "forward.json", "attention_grid")
    if grid and grid["rows"]:
        blocks["forward"] = grid_block(grid, "forward")
        blocks["forward_plot"] = _plot("forward")
        figures[FIGURES / "forward.svg"] = forward_figure(grid)
    else:
        blocks["forward"] = _not_measured("forward.json", "benchmarks/attention.py")
        blocks["forward_plot"] = "There is no plot yet: it is drawn from the same results."
    backward = load(repository, "backward.json", "attention_backward")
    missing = _not_measured("backward.json", "benchmarks/attention.py --mode=backward")
    blocks |= dict.fromkeys(("backward", "backward_summary", "forward_backward"), missing)
    if backward and backward["rows"]:
        blocks["backward_summary"] = summary_block(backward)
        blocks["backward"] = _with_plot("backward", grid_block(backward, "backward"))
        figures[FIGURES / "backward.svg"] = backward_figure(backward)
        if both := together(backward):
            blocks["forward_backward"] = _with_plot(
                "forward_backward", forward_backward_block(both)
            )
            figures[FIGURES / "forward_backward.svg"] = forward_backward_figure(both)
    shapes = load(repository, "shapes.json", "attention_shapes")
    blocks["shapes"] = (
        shapes_block(shapes, grid)
        if shapes and shapes["rows"]
        else _not_measured("shapes.json", "benchmarks/attention.py --mode=shapes")
    )
    launch = load(repository, "launch.json", "attention_launch")
    blocks["launch"] = (
        launch_block(launch)
        if launch and launch["rows"]
        else _not_measured("launch.json", "benchmarks/attention.py --mode=launch")
    )
    parallel = load(repository, "parallel.json", "attention_parallel")
    blocks["parallel"] = (
        parallel_block(parallel)
        if parallel and parallel["rows"]
        else _not_measured("parallel.json", "benchmarks/attention.py --mode=parallel")
    )
    ablation = load(repository, "ablation.json", "ablation")
    if ablation and ablation["rows"]:
        for name in ("paper", "hdim64", "hdim128", "hdim256"):
            blocks[f"ablation_{name}"] = studies_block(ablation, name)
        blocks["ablation_peaked"] = peaked_block(ablation)
        blocks["ablation_run"] = run_block(ablation)
    else:
        for name in DOCUMENTS["docs/ablation.md"]:
            blocks[name] = _not_measured("ablation.json", "benchmarks/ablation.py")
    length = load(repository, "memory.json", "attention_length")
    if length and length["rows"]:
        blocks["memory"] = memory_block(length)
        figures[FIGURES / "memory.svg"] = memory_figure(length)
    else:
        blocks["memory"] = _not_measured("memory.json", "benchmarks/attention.py --mode=length")
    cpu = load(repository, "cpu_xla.json")
    blocks["cpu"] = (
        cpu_block(cpu) if cpu else _not_measured("cpu_xla.json", "benchmarks/cpu_xla.py")
    )
    runs = [
        json.loads(path.read_text())
        for path in sorted((repository / RESULTS).glob("demo_h200*.json"))
    ]
    if runs and same_schedule(runs):
        figures[FIGURES / "demo.svg"] = demo_figure(runs)
    blocks["demo_h200"] = (
        demo_block(runs)
        if runs
        else _not_measured("demo_h200.json", "examples/train_lm.py --preset=h200")
    )
    return blocks, figures


def _plot(name):
    return f"![TFLOP/s against sequence length, for each head dim and mask](figures/{name}.svg)"


def _with_plot(name, text):
    return f"{_plot(name)}\n\n{text}"


def _not_measured(name, command):
    return f"Not measured yet: `{command}` gives `{RESULTS / name}`, which this is made from."


_BLOCK = re.compile(
    r"(?P<open><!-- generated: (?P<name>\w+) -->\n)(?P<text>.*?)(?P<close><!-- /generated -->)",
    re.DOTALL,
)


def fill(document, text, blocks):
    """The document's text with the content of each of `blocks` replaced.

    Raises:
      ReportError: a marker names no block, a block has no marker, or markers do not pair.
    """
    found = [match["name"] for match in _BLOCK.finditer(text)]
    problems = [f"{document}: no such block: {name}" for name in found if name not in blocks]
    problems += [
        f"{document}: no marker <!-- generated: {name} -->" for name in blocks if name not in found
    ]
    problems += [f"{document}: {name} twice" for name in set(found) if found.count(name) > 1]
    if text.count("<!-- generated: ") != len(found):
        problems.append(f"{document}: a marker is not closed by <!-- /generated -->")
    if problems:
        raise ReportError("\n".join(problems))
    return _BLOCK.sub(
        lambda match: f"{match['open']}\n{blocks[match['name']]}\n\n{match['close']}", text
    )


def out_of_date(repository):
    """{path: new text} of every file that differs from what the results give; None: to delete."""
    blocks, figures = generate(repository)
    wanted: dict[pathlib.Path, str | None] = {
        FIGURES / f"{name}.svg": None
        for name in ("forward", "backward", "forward_backward", "memory")
    }
    for document, names in DOCUMENTS.items():
        path = repository / document
        if not path.exists():
            raise ReportError(f"{document}: missing; it is to hold the blocks {', '.join(names)}")
        mine = {name: blocks[name] for name in names}
        wanted[pathlib.Path(document)] = fill(document, path.read_text(encoding="utf-8"), mine)
    wanted |= figures
    changes = {}
    for path, text in wanted.items():
        file = repository / path
        current = file.read_text(encoding="utf-8") if file.exists() else None
        if current != text:
            changes[path] = text
    return changes


def main(argv=None):
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if stale")
    parser.add_argument("--repository", type=pathlib.Path, default=REPOSITORY)
    args = parser.parse_args(argv)
    try:
        changes = out_of_date(args.repository)
    except ReportError as error:
        print(error, file=sys.stderr)
        return 1
    for path, text in changes.items():
        if args.check:
            print(f"{path} is out of date: run benchmarks/report.py", file=sys.stderr)
        elif text is None:
            (args.repository / path).unlink()
            print(f"deleted {path}")
        else:
            (args.repository / path).parent.mkdir(parents=True, exist_ok=True)
            (args.repository / path).write_text(text, encoding="utf-8")
            print(f"wrote {path}")
    return 1 if args.check and changes else 0


if __name__ == "__main__":
    sys.exit(main())
