"""Measures what each technique of the forward kernels is worth, one configuration against another.

    cmake -S . -B build/variants/ablation -G Ninja -DCMAKE_BUILD_TYPE=Release -DJAX_FA3_ABLATION=ON
    cmake --build build/variants/ablation
    python benchmarks/ablation.py --extension=build/variants/ablation/_jax_fa3.abi3.so \
        --output=benchmarks/results/ablation.json
    python benchmarks/ablation.py --smoke --output=/tmp/smoke.json     # any machine, seconds

The variants (cuda/fwd/ablation/variants.h) exist only in such a build; none is in a wheel. STUDIES
below says what is compared. Each head dim and mask is measured at two problems, (2, 8192) and
(16, 1024) batch x sequence with a hidden size of 2048: all its variants, all configurations that
are shipped for it and cuDNN in the same interleaved rounds (harness.py says how). Beside the speed:

  errors        relative, root mean square, against float32: on standard normal inputs and, at 8192,
                on the same with the query times 8, whose softmax is dominated by few keys
  peaked        speed, errors and rows done again for the three softmax rules, query times 1, 8, 30
  instructions  and cycles, one launch a variant under Nsight Compute (ncu), which needs the right
                to read the GPU's counters; cycles are the steadiest figure there is, since the card
                gives back part of a saved cycle as a lower clock
  build         registers a thread at launch and bytes of stack, from cuobjdump
"""

import csv
import dataclasses
import fnmatch
import functools
import importlib
import importlib.util
import io
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import fwd_workspace
import harness
import jax
import peers
import tree_hashes
from absl import app, flags, logging
from harness import Row

import jax_fa3

_EXTENSION = flags.DEFINE_string(
    "extension", None, "The extension of a build with -DJAX_FA3_ABLATION=ON."
)
_STUDIES = flags.DEFINE_list("studies", ["*"], "Patterns of study names, such as 'hdim64-*'.")
_PROFILE = flags.DEFINE_bool("profile", True, "Count instructions and cycles with ncu.")
_PROFILE_SECONDS = flags.DEFINE_integer("profile_seconds", 240, "Time limit of ncu's run.")
_PROFILE_CHILD = flags.DEFINE_bool(
    "profile_child", False, "Launch each configuration once and end: what ncu watches."
)

# The handler of the build under test, beside the one that jax_fa3 has registered.
TARGET = "jax_fa3_fwd_ablation"


# --------------------------------------------------------------------------------------------------
# What is compared
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Study:
    """Configurations of one head dim and mask.

    variants: {configuration: what it is, in words}; the others are compared with the first.
    """

    name: str
    title: str
    head_dim: int
    mask: str
    variants: dict[str, str]


def _paper(mask, keys):
    """Table 2 of the FlashAttention-3 paper, in its own structure."""
    stem = f"Fa3Hdim128{mask.capitalize()}"
    return Study(
        f"paper-{mask}",
        f"FlashAttention-3's structure, head dim 128, {mask}: 2 consumer warpgroups, 128 queries x "
        f"{keys} keys, a maximum in every block",
        128,
        mask,
        {
            stem: "overlap and pingpong",
            f"{stem}Overlap": "overlap inside a warpgroup only",
            f"{stem}Pingpong": "pingpong between warpgroups only",
            f"{stem}Neither": "neither",
            # Without a producer nobody draws tiles from a counter either.
            f"{stem}Unspecialised": "no warp specialisation"
            + (", static schedule" if mask == "causal" else ""),
        },
    )


def _ours(head_dim, mask, variants):
    """Changes of the first configuration that is shipped for a head dim and mask."""
    stem = f"Hdim{head_dim}{mask.capitalize()}"
    return Study(
        f"hdim{head_dim}-{mask}",
        f"jax_fa3, head dim {head_dim}, {mask}",
        head_dim,
        mask,
        {f"FwdBf16{stem}": "shipped"} | {stem + name: text for name, text in variants.items()},
    )


_LAZY = {
    "Conditional": "conditional rescale in place of the lazy reference",
    "Classical": "a rescale in every block in place of the lazy reference",
}
_IN_ORDER = {"InOrder": "conditional, and no overlap of products and softmax"}
_PINGPONG = {"Pingpong": "warpgroups take turns (pingpong)"}
_NO_SPLIT = {"NoSplit": "last wave not cut along the keys"}
_STATIC = {"Static": "static schedule in place of the tile counter"}

STUDIES = (
    _paper("full", 176),
    _paper("causal", 128),
    _ours(
        128,
        "full",
        {
            "3w80s4": "3 x 64 queries, 80 keys",
            "2w128s3": "2 x 64 queries, 128 keys",
            "2w64s6": "2 x 64 queries, 64 keys",
            **_LAZY,
            **_IN_ORDER,
            **_PINGPONG,
            **_NO_SPLIT,
        },
    ),
    _ours(
        128,
        "causal",
        {
            "3w80s4": "3 x 64 queries, 80 keys",
            "2w64s6": "2 x 64 queries, 64 keys",
            **_LAZY,
            **_IN_ORDER,
            **_PINGPONG,
            **_STATIC,
        },
    ),
    _ours(
        64,
        "full",
        {
            "3w96s6": "3 x 64 queries, 96 keys",
            "2w128s6": "2 x 64 queries, 128 keys",
            **_LAZY,
            **_IN_ORDER,
            **_PINGPONG,
            **_NO_SPLIT,
        },
    ),
    _ours(
        64,
        "causal",
        {
            "3w96s6": "3 x 64 queries, 96 keys",
            "2w128s6": "2 x 64 queries, 128 keys",
            **_LAZY,
            **_STATIC,
        },
    ),
    _ours(
        256,
        "full",
        {
            "2w80s2": "2 x 64 queries, 80 keys",
            **_LAZY,
            **_IN_ORDER,
            **_PINGPONG,
            **_NO_SPLIT,
        },
    ),
    _ours(
        256,
        "causal",
        {"2w80s2": "2 x 64 queries, 80 keys", **_LAZY, **_STATIC},
    ),
)

# The softmax rules that the peaked inputs compare, as endings of a variant's name; what is shipped
# has the lazy reference.
RULES = {"lazy": "", "conditional": "Conditional", "classical": "Classical"}
PEAKED_FACTORS = (1, 8, 30)  # of the query


def long_row(head_dim, mask, smoke=False):
    """Where launch and last wave weigh little."""
    if smoke:
        return Row(head_dim, mask, 256, 2, 256 // head_dim)
    return Row(head_dim, mask, 8192, 2, peers.GRID_HIDDEN // head_dim)


def short_row(head_dim, mask, smoke=False):
    """Where they do not."""
    if smoke:
        return Row(head_dim, mask, 64, 2, 256 // head_dim)
    return Row(head_dim, mask, 1024, 16, peers.GRID_HIDDEN // head_dim)


# --------------------------------------------------------------------------------------------------
# The kernels
# --------------------------------------------------------------------------------------------------


class Kernels:
    """The forward kernels of one build of the extension."""

    def __init__(self, path):
        spec = importlib.util.spec_from_file_location("_jax_fa3", path)
        assert spec is not None
        assert spec.loader is not None
        self.path = path
        self._module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._module)
        handler = self._module.registrations()["jax_fa3_fwd_v1"]
        jax.ffi.register_ffi_target(TARGET, handler, platform="CUDA", api_version=1)

    def names(self):
        return self._module.kernels()

    def plan(self, row, config=""):
        """As text, the configuration's name first; "" asks for the plan's own choice.

        Raises:
          ValueError: the configuration is not for the row.
        """
        return harness.kernel_plan(self._module, row, config)

    def call(self, row, config):
        """(query, key, value) -> (out, workspace)."""
        return harness.kernel_call(self._module, TARGET, row, config)


class StandIn:
    """For a smoke run without kernels: the xla path under the name of every variant but one."""

    path = None
    missing = "Hdim64FullPingpong"

    def names(self):
        named = [name for study in STUDIES for name in study.variants]
        return ["FwdBf16Hdim64Full128Rows", *(name for name in named if name != self.missing)]

    def plan(self, row, config=""):
        stem = f"Hdim{row.head_dim}{row.mask.capitalize()}"
        name = config or f"FwdBf16{stem}"
        if stem not in name:
            raise ValueError(f"config {name} is not for {row.name}")
        return f"{name}: a stand-in, 64 queries x 64 keys; 1 tiles on 1 CTAs"

    def call(self, row, config):
        del config
        words = fwd_workspace.layout()["kRedoNext"] // 4

        def call(query, key, value):
            out = jax_fa3.dot_product_attention(
                query, key, value, is_causal=row.causal, implementation="xla"
            )
            return out, jax.numpy.zeros(4 * words, jax.numpy.uint8)

        return call


def chosen_studies(kernels):
    """([studies with the variants that the build has], [what it lacks]), both for the results."""
    names = set(kernels.names())
    studies, missing = [], []
    for study in STUDIES:
        if not any(fnmatch.fnmatch(study.name, pattern) for pattern in _STUDIES.value):
            continue
        there = {c: text for c, text in study.variants.items() if c in names}
        missing += [
            {"study": study.name, "config": c, "text": text}
            for c, text in study.variants.items()
            if c not in there
        ]
        if there:
            studies.append(dataclasses.replace(study, variants=there))
    return studies, missing


def groups_of(studies):
    """{(head dim, mask): configurations to measure}."""
    groups: dict[tuple[int, str], list[str]] = {}
    for study in studies:
        group = groups.setdefault((study.head_dim, study.mask), [])
        group += [config for config in study.variants if config not in group]
    return groups


def with_shipped(kernels, row, configs):
    """`configs` and all configurations that are shipped for such rows.

    The plan chooses one of them; the others show whether it chose well.
    """
    others = []
    for name in kernels.names():
        if name.startswith("Fwd"):
            try:
                kernels.plan(row, name)
            except ValueError:
                continue
            others.append(name)
    return configs + [name for name in others if name not in configs]


def name_of(plan):
    return plan.partition(":")[0]


# --------------------------------------------------------------------------------------------------
# Speed and errors
# --------------------------------------------------------------------------------------------------


def first_of(call):
    return lambda *inputs: call(*inputs)[0]


def times_query(inputs, factor):
    query, key, value = inputs
    return query * factor, key, value  # 8 and 30 times a bfloat16 round at most once


def measure_row(row, configs, kernels, rules, clock):
    """One entry of the results file. `rules` is {rule: configuration} where peaked inputs count."""
    jobs: dict = {(row, "reference"): functools.partial(harness.compile_reference, row)}
    jobs[row, "check"] = functools.partial(harness.warm_up, row)
    for config in configs:
        jobs[row, config] = lambda config=config: harness.compile_for(
            first_of(kernels.call(row, config)), row
        )
    jobs[row, "cudnn"] = lambda: harness.compile_for(peers.attention("cudnn", row), row)
    for rule, config in rules.items():
        jobs[row, "with workspace", rule] = lambda config=config: harness.compile_for(
            kernels.call(row, config), row
        )
    compiled = harness.compile_all(jobs)
    reference = compiled[row, "reference"]
    if isinstance(reference, str):
        raise RuntimeError(f"the reference of {row.name} does not compile: {reference}")

    inputs = harness.random_inputs(jax.random.key(row.seqlen + row.head_dim), row)
    functions = {config: compiled[row, config] for config in [*configs, "cudnn"]}
    entries, runs = harness.check_all(functions, inputs, reference(*inputs))
    start = time.monotonic()
    harness.time_all(row, entries, runs, inputs)
    for config in configs:
        entries[config] = {"plan": _plan_or_none(kernels, row, config)} | entries[config]
    measured = row.fields() | {
        "sm_clock_mhz": clock.median_since(start),
        "planned": name_of(kernels.plan(row)),
        "peers": {"cudnn": entries.pop("cudnn")},
        "variants": entries,
    }
    if x := peers.flash_attention_3_over_cudnn(row):
        measured["flash_attention_3_over_cudnn"] = x
    if rules:
        again = times_query(inputs, 8)
        expected = reference(*again)
        for config in [*runs]:
            entry = measured["peers"]["cudnn"] if config == "cudnn" else entries[config]
            error, _ = harness.errors_against(runs[config](*again), expected)
            entry["relative_error_times_8"] = float(error)
        measured["peaked"] = measure_peaked(row, rules, kernels, compiled, inputs, reference)
    return measured


def _plan_or_none(kernels, row, config):
    try:
        return kernels.plan(row, config)
    except ValueError:
        return None  # and the call says why


def measure_peaked(row, rules, kernels, compiled, inputs, reference):
    """{factor of the query: {rule: {"seconds", "tflops", "relative_error", "redone"}}}."""
    measured = {"groups": fwd_workspace.groups(row.batch, row.seqlen, row.heads)}
    for factor in PEAKED_FACTORS:
        peaked = times_query(inputs, factor)
        expected = reference(*peaked)
        entries, runs = {}, {}
        for rule, config in rules.items():
            run = compiled[row, "with workspace", rule]
            if isinstance(run, str):
                entries[rule] = {"skipped": run}
                continue
            out, workspace = run(*peaked)
            error, _ = harness.errors_against(out, expected)
            plan = kernels.plan(row, config)
            entries[rule] = {"config": name_of(plan), "relative_error": float(error)}
            if rule == "lazy":
                entries[rule]["redone"] = fwd_workspace.redone(workspace, plan)
            runs[rule] = compiled[row, config]
        timed = harness.time_interleaved(
            runs, peaked, harness.ROUNDS.value, harness.MIN_SECONDS.value
        )
        for rule, seconds in timed.items():
            median = statistics.median(seconds)
            entries[rule] |= {"seconds": median, "tflops": row.flops / median / 1e12}
        measured[str(factor)] = entries
    return measured


def rules_for(head_dim, mask, configs):
    """{rule: configuration} of the softmax rules that this build has."""
    stem = f"Hdim{head_dim}{mask.capitalize()}"
    named = {rule: stem + end if end else f"FwdBf16{stem}" for rule, end in RULES.items()}
    return {rule: config for rule, config in named.items() if config in configs}


def measure_all(groups, kernels, results, yardstick, clock):
    """Measures every row; returns the names that failed their check."""
    failed = []
    smoke = harness.SMOKE.value
    for (head_dim, mask), configs in groups.items():
        rules = rules_for(head_dim, mask, configs)
        for row, row_rules in (
            (long_row(head_dim, mask, smoke), rules),
            (short_row(head_dim, mask, smoke), {}),
        ):
            if results.out_of_time():
                return failed
            configs_here = with_shipped(kernels, row, configs)
            measured = measure_row(row, configs_here, kernels, row_rules, clock)
            yardstick.measure()
            results.save(measured, gemm=yardstick.summary())
            failed += [
                f"{row.name} {config}"
                for config, entry in measured["variants"].items()
                if not entry.get("ok", True)
            ]
            print(_row_text(measured), flush=True)
    return failed


def _row_text(measured):
    variants, planned = measured["variants"], measured["planned"]
    base = variants.get(planned, {}).get("tflops")
    parts = [f"{planned} {base:.4g}" if base else f"{planned} –"]
    for config, entry in variants.items():
        if config != planned:
            ratio = f"{entry['tflops'] / base:.3f}" if base and "tflops" in entry else None
            why = "WRONG" if not entry.get("ok", True) else entry.get("skipped", "")[:60]
            parts.append(f"{config} {ratio or why}")
    return f"{measured['name']:>16}  " + "  ".join(parts)


# --------------------------------------------------------------------------------------------------
# Instructions and cycles
# --------------------------------------------------------------------------------------------------

REQUIRED_METRICS = {
    "instructions": "smsp__inst_executed.sum",  # warp instructions
    "cycles": "sm__cycles_elapsed.max",
}
OPTIONAL_METRICS = {
    "tensor_instructions": "smsp__inst_executed_pipe_tensor_op_gmma.sum",
    "tensor_active_percent": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "issue_active_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
}


def profile(kernels):
    """{"metrics": {configuration: {...}}} or {"skipped": why}: one launch each, at 8192."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return {"skipped": "ncu (Nsight Compute) is not on this machine's path"}
    why = ""
    for metrics in (REQUIRED_METRICS | OPTIONAL_METRICS, REQUIRED_METRICS):
        with tempfile.TemporaryDirectory() as folder:
            log = pathlib.Path(folder) / "ncu.csv"
            command = [ncu, "--clock-control", "none", "--kernel-name", "regex:fwd_kernel"]
            command += ["--metrics", ",".join(metrics.values()), "--csv", "--page", "raw"]
            command += ["--print-units", "base", "--log-file", str(log)]
            command += [sys.executable, __file__, "--profile_child"]
            command += [f"--extension={kernels.path}", f"--studies={','.join(_STUDIES.value)}"]
            # The parent holds most of the device's memory.
            environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            try:
                child = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    env=environment,
                    timeout=_PROFILE_SECONDS.value,
                )
            except subprocess.TimeoutExpired:
                return {"skipped": f"ncu took more than {_PROFILE_SECONDS.value} s"}
            text = log.read_text() if log.exists() else ""
        found = read_profile(text, metrics)
        if found:
            version = subprocess.run([ncu, "--version"], capture_output=True, text=True).stdout
            return {"ncu": version.strip().splitlines()[-1], "metrics": found}
        said = [line for line in (text + child.stderr).splitlines() if "ERROR" in line]
        why = said[0] if said else f"ncu ended with {child.returncode} and no figures"
        logging.warning("ncu with %s: %s", ", ".join(metrics.values()), why)
    return {"skipped": why}


def read_profile(text, metrics):
    """{configuration: {name: number}} of ncu's raw CSV page; {} where it has no kernel's figures.

    Two header lines, names and units; a kernel that was launched twice counts once.
    """
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith('"ID"')]
    if not starts:
        return {}
    rows = csv.DictReader(io.StringIO("\n".join(lines[starts[0] :])))
    found = {}
    for row in rows:
        config = re.search(r"fwd_kernel<(?:\w+::)*(\w+)", row.get("Kernel Name") or "")
        if not config:
            continue  # the units
        numbers = {}
        for name, metric in metrics.items():
            try:
                numbers[name] = float((row.get(metric) or "").replace(",", ""))
            except ValueError:
                continue  # n/a
        if REQUIRED_METRICS.keys() <= numbers.keys():
            found[config[1]] = numbers
    return found


def run_profile_child(groups, kernels):
    """Launches each configuration once, on the long row of its group."""
    for (head_dim, mask), configs in groups.items():
        row = long_row(head_dim, mask)
        inputs = harness.random_inputs(jax.random.key(row.seqlen + row.head_dim), row)
        for config in with_shipped(kernels, row, configs):
            call = jax.jit(first_of(kernels.call(row, config)))
            jax.block_until_ready(call(*inputs))


# --------------------------------------------------------------------------------------------------
# The build
# --------------------------------------------------------------------------------------------------


def build_resources(path):
    """{configuration: {"registers", "stack"}} of an extension, or {"skipped": why}."""
    if path is None:
        return {"skipped": "no extension"}
    tools = str(tree_hashes.REPOSITORY / "tools")
    if tools not in sys.path:
        sys.path.append(tools)
    check_kernels = importlib.import_module("check_kernels")
    try:
        cuobjdump = check_kernels.find_tool("cuobjdump")
    except SystemExit as reason:
        return {"skipped": str(reason)}
    done = subprocess.run([cuobjdump, "-res-usage", path], capture_output=True, text=True)
    if done.returncode:
        return {"skipped": f"cuobjdump: {done.stderr.strip()[:200]}"}
    kernels: dict = {}
    check_kernels.read_resources(done.stdout, kernels)
    named = {check_kernels.readable(name): kernel for name, kernel in kernels.items()}
    return {
        found[1]: {"registers": kernel.registers, "stack": kernel.stack}
        for name, kernel in sorted(named.items())
        if (found := re.fullmatch(r"fwd_kernel<(\w+)>", name))
    }


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if _EXTENSION.value:
        kernels = Kernels(str(pathlib.Path(_EXTENSION.value).resolve()))
    elif harness.SMOKE.value:
        kernels = StandIn()
    else:
        raise app.UsageError("--extension: expected a build with -DJAX_FA3_ABLATION=ON")
    studies, missing = chosen_studies(kernels)
    if not studies:
        raise app.UsageError(f"--studies={','.join(_STUDIES.value)} names no study of this build")
    groups = groups_of(studies)
    if _PROFILE_CHILD.value:
        run_profile_child(groups, kernels)
        return 0
    for lacking in missing:
        print(f"This build has no {lacking['config']}: {lacking['study']} goes without.")

    smoke = harness.SMOKE.value
    rows = [make(*group, smoke) for group in groups for make in (long_row, short_row)]
    results = harness.Results(
        "ablation",
        [row.name for row in rows],
        {},
        extension=kernels.path,
    )

    def measure(yardstick, clock):
        return measure_all(groups, kernels, results, yardstick, clock)

    yardstick, failed = harness.measure_all(
        results,
        measure,
        studies=[dataclasses.asdict(study) for study in studies],
        missing_variants=missing,
        build=build_resources(kernels.path),
        profile={"skipped": "the run ended before it"},
    )
    if _PROFILE.value and kernels.path:
        counts = profile(kernels)
        results.save(profile=counts)
        if "skipped" in counts:
            print(f"No instruction counts: {counts['skipped']}")
    else:
        results.save(profile={"skipped": "not asked for"})
    return harness.conclude(results, yardstick, failed)


if __name__ == "__main__":
    app.run(main)
