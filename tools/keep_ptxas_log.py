"""Runs one compiler command and keeps what it printed beside the object file, as OBJECT.ptxas.

CMake puts this in front of nvcc (CMakeLists.txt). `-Xptxas -v` prints registers, spills and remarks
about wgmma on every compilation and never again; the kernel gate (check_kernels.py) needs them
after builds that compiled nothing too. Remarks that the gate would refuse are also shown at once,
so a person sees them while building.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys


def is_report(line: str) -> bool:
    """Whether a line is ptxas's ordinary report: kept, but no news to who builds."""
    return line.startswith(("ptxas info    : ", "    ")) and not any(
        word in line for word in ("serialized", "setmaxnreg", "injected")
    )


def main(command: list[str]) -> int:
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if "-o" in command:
        target = command[command.index("-o") + 1]
        pathlib.Path(target + ".ptxas").write_text(result.stdout)
    for line in result.stdout.splitlines():
        if result.returncode or not is_report(line):
            print(line, file=sys.stderr)
    return result.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
