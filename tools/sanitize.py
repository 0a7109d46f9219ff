"""Runs the kernels under compute-sanitizer: memcheck, racecheck, synccheck, initcheck.

    python tools/sanitize.py [--tool memcheck]... [--program PATH]     # on a Hopper GPU

The program is tests/cuda/fwd_device.cu, which launches the kernels straight from C++ and checks
what they return; it is built here when --program names none (nvcc on the path, about a minute).
Not the Python tests: JAX itself crashes under compute-sanitizer (signal 11 in jaxlib 0.11.2 before
the first kernel of ours). compute-sanitizer comes with the CUDA toolkit, or pip install
nvidia-cuda-sanitizer-api. The exit status is 0 when no tool found anything and every check passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
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


def build(program: pathlib.Path) -> None:
    """Compiles the device tests. Raises: CalledProcessError when nvcc fails."""
    sources = [
        REPOSITORY / "tests/cuda/fwd_device.cu",
        *sorted((REPOSITORY / "cuda").rglob("*.cu")),
        *sorted((REPOSITORY / "cuda").rglob("*.cc")),
    ]
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    subprocess.run([nvcc, *NVCC_FLAGS, "-o", program, *sources], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the kernels under compute-sanitizer")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: all four")
    parser.add_argument("--program", type=pathlib.Path, help="the device tests, already built")
    options = parser.parse_args()
    sanitizer = find_sanitizer()
    verdicts = {}
    with tempfile.TemporaryDirectory() as folder:
        program = options.program
        if program is None:
            program = pathlib.Path(folder) / "fwd_device"
            build(program)
        for tool in options.tool or TOOLS:
            print(f"== {tool}", flush=True)
            status = subprocess.run(
                [sanitizer, f"--tool={tool}", f"--error-exitcode={FOUND_SOMETHING}", program],
                check=False,
            ).returncode
            reason = {0: "clean", FOUND_SOMETHING: "found something"}
            verdicts[tool] = reason.get(status, f"the program failed ({status})")
    for tool, verdict in verdicts.items():
        print(f"sanitize: {tool}: {verdict}")
    return 0 if set(verdicts.values()) == {"clean"} else 1


if __name__ == "__main__":
    sys.exit(main())
