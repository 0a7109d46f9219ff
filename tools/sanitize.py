"""Runs the small GPU tests under compute-sanitizer: memcheck, racecheck, synccheck.

    python tools/sanitize.py [--tool memcheck]... [PYTEST ARGUMENTS]     # on a Hopper GPU

compute-sanitizer comes with the CUDA toolkit (or pip install nvidia-cuda-sanitizer-api). Only our
kernels are watched: others are not ours to repair, and watching them takes hours. Tests marked
`big` are left out. The exit status is 0 when no tool found anything and every test passed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND_SOMETHING = 86  # compute-sanitizer's exit status for its own findings; pytest uses 0 to 5


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


def command(sanitizer: str, tool: str, pytest_arguments: list[str]) -> list[str]:
    """The command line of one tool."""
    return [
        sanitizer,
        f"--tool={tool}",
        f"--error-exitcode={FOUND_SOMETHING}",
        "--kernel-name=kernel_substring=jax_fa3",
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu and not big",
        *(pytest_arguments or ["tests/gpu"]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs the small GPU tests under compute-sanitizer")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: all three")
    options, pytest_arguments = parser.parse_known_args()
    environment = {
        **os.environ,
        # A test that is skipped proves nothing here.
        "JAX_FA3_REQUIRE_GPU": "1",
        # One cudaMalloc an array: an access past its end is then outside every allocation, where
        # memcheck sees it. JAX's own pool would hide it.
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    sanitizer = find_sanitizer()
    verdicts = {}
    for tool in options.tool or TOOLS:
        print(f"== {tool}", flush=True)
        status = subprocess.run(
            command(sanitizer, tool, pytest_arguments), cwd=REPOSITORY, env=environment, check=False
        ).returncode
        reason = {0: "clean", FOUND_SOMETHING: "found something"}
        verdicts[tool] = reason.get(status, f"the tests failed ({status})")
    for tool, verdict in verdicts.items():
        print(f"sanitize: {tool}: {verdict}")
    return 0 if set(verdicts.values()) == {"clean"} else 1


if __name__ == "__main__":
    sys.exit(main())
