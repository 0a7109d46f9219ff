"""Runs the kernels under compute-sanitizer: memcheck, racecheck, synccheck, initcheck.

    python tools/sanitize.py [--tool memcheck]... [--program PATH]...     # on a Hopper GPU
    python tools/sanitize.py --soak 1000     # no compute-sanitizer: launches that must repeat

The programs are tests/cuda/fwd_device.cu and bwd_device.cu, which launch the kernels straight from
C++ and check what they return; they are built here when --program names none (nvcc on the path, a
minute each). Not the Python tests: JAX itself crashes under compute-sanitizer (signal 11 in jaxlib
0.11.2 before the first kernel of ours). compute-sanitizer comes with the CUDA toolkit, or pip
install nvidia-cuda-sanitizer-api. The exit status is 0 when no tool found anything and every check
passed.

racecheck does not look at two kinds of kernel. In bwd_two_pass_kernel one warpgroup hands numbers
to another through shared memory: all lanes of a warp store, __syncwarp, lane 0 arrives at an
mbarrier, and the same lanes of the other warpgroup wait for it and read. racecheck takes the
barrier to order lane 0's own stores only and reports the other 31 of 32 lanes (95232 of 98304 bytes
a case, exactly that share); __syncwarp orders theirs before its arrival, and an arrival releases
what came before it. In bwd_kernel with dQ added in turns it reports the loads of lse and delta
(cp.async.bulk) against the key warpgroups' reads of what lay in their stage before, of all lanes,
in some of the cases. The thread that loads waits for the phase of dscores_full that comes a whole
step after those reads. racecheck orders cp.async.bulk by an mbarrier only where a bar.sync helps,
as the dQ warpgroup's does in the other kernels:
https://github.com/Dao-AILab/flash-attention/blob/main/AI/RACECHECK_TMA_HAZARD.md found the same in
a kernel of its own, and nothing to be wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PASSES = ("fwd", "bwd")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
LEFT_OUT = {
    "racecheck": [
        "--kernel-name-exclude=kernel_substring=bwd_two_pass_kernel",
        "--kernel-name-exclude=kernel_substring=InTurns",
    ]
}
FOUND_SOMETHING = 86  # compute-sanitizer's exit status for its own findings
NVCC_FLAGS = (
    "-gencode",
    "arch=compute_90a,code=sm_90a",
    "-O3",
    "--use_fast_math",
    "--expt-relaxed-constexpr",
    "-DNDEBUG",
    "-std=c++17",
    "-lineinfo",
    "--threads=0",
    f"-I{REPOSITORY}",
)


def find_sanitizer() -> str:
    """compute-sanitizer from the path, the toolkit or a wheel. Raises: SystemExit without one."""
    folders = [os.environ.get("PATH", "")]
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        folders.append(os.path.join(home, "bin") if home else "")
    if nvidia := importlib.util.find_spec("nvidia"):
        for folder in nvidia.submodule_search_locations or ():
            folders.append(os.path.join(folder, "cu13", "bin"))
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(filter(None, folders)))
    if not found:
        raise SystemExit("compute-sanitizer is not here: pip install nvidia-cuda-sanitizer-api")
    return found


def build(name: str, folder: pathlib.Path) -> pathlib.Path:
    """Compiles the device tests of a pass. Raises: CalledProcessError when nvcc fails."""
    cuda = REPOSITORY / "cuda"
    sources = [
        REPOSITORY / f"tests/cuda/{name}_device.cu",
        *sorted((cuda / "core").rglob("*.cu")),
        *sorted((cuda / name).rglob("*.cu")),
        *sorted(cuda.rglob("*.cc")),
    ]
    program = folder / f"{name}_device"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    subprocess.run([nvcc, *NVCC_FLAGS, "-o", program, *sources], check=True)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the kernels under compute-sanitizer")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--tool", action="append", choices=TOOLS, help="default: all four")
    parser.add_argument(
        "--program", action="append", type=pathlib.Path, help="device tests, already built"
    )
    what.add_argument(
        "--soak", type=int, metavar="LAUNCHES", help="instead: launches compared with their first"
    )
    options = parser.parse_args()
    if options.soak is None:
        sanitizer = find_sanitizer()
        commands = {
            tool: [
                sanitizer,
                f"--tool={tool}",
                f"--error-exitcode={FOUND_SOMETHING}",
                *LEFT_OUT.get(tool, ()),
            ]
            for tool in options.tool or TOOLS
        }
        arguments = []
    else:
        commands, arguments = {"soak": []}, [f"--soak={options.soak}"]
    verdicts = {}
    with tempfile.TemporaryDirectory() as folder:
        programs = options.program or [build(name, pathlib.Path(folder)) for name in PASSES]
        for tool, program in itertools.product(commands, programs):
            print(f"== {tool} {program.name}", flush=True)
            status = subprocess.run([*commands[tool], program, *arguments], check=False).returncode
            reason = {0: "clean", FOUND_SOMETHING: "found something"}
            verdicts[tool, program.name] = reason.get(status, f"the program failed ({status})")
    for (tool, program), verdict in verdicts.items():
        print(f"sanitize: {tool} {program}: {verdict}")
    return 0 if set(verdicts.values()) == {"clean"} else 1


if __name__ == "__main__":
    sys.exit(main())
