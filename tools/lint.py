"""Runs every linter over the files that git knows: ruff, clang-format, pyright, buildifier.

    python tools/lint.py [--fix]          # make lint, make format

All of them run, so one call shows everything. ruff, clang-format and pyright come from the `dev`
extra; buildifier, which has no wheel, from npm, into build/.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
BUILDIFIER = "@bazel/buildifier@8.2.1"


def tracked(*patterns: str) -> list[str]:
    """Files of the work tree that git tracks, or would: new ones count before they are added."""
    command = [
        "git",
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
        "--",
        *patterns,
    ]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    names = sorted(set(filter(None, listed.stdout.split("\0"))))
    return [name for name in names if (REPOSITORY / name).exists()]


def find(name: str) -> str:
    """A tool beside this Python or on the path. Raises: SystemExit when there is none."""
    beside = pathlib.Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise SystemExit(f"{name} is not here: pip install -e '.[dev]' (make lint does it)")
    return found


def find_buildifier() -> str | None:
    """buildifier from the path or from npm, or None with a sentence where there is neither."""
    folder = REPOSITORY / "build" / "node"
    installed = folder / "node_modules" / ".bin" / "buildifier"
    if found := shutil.which("buildifier"):
        return found
    if not installed.exists() and (npm := shutil.which("npm")):
        folder.mkdir(parents=True, exist_ok=True)
        quiet = ("--silent", "--no-audit", "--no-fund")
        subprocess.run([npm, "install", *quiet, "--prefix", str(folder), BUILDIFIER], check=True)
    if installed.exists():
        return str(installed)
    print("lint: buildifier FAILED: neither it nor npm is on this machine")
    return None


def main(fix: bool) -> int:
    python = tracked("*.py", "*.pyi")
    c_plus_plus = tracked("*.cc", "*.h", "*.cu", "*.cuh")
    bazel = tracked("BUILD", "*/BUILD", "MODULE.bazel", "WORKSPACE", "*.bzl")
    buildifier = find_buildifier()
    commands = {
        "ruff": [find("ruff"), "check", "--quiet", *(["--fix"] if fix else []), *python],
        "ruff format": [find("ruff"), "format", "--quiet", *([] if fix else ["--diff"]), *python],
        "clang-format": [
            find("clang-format"),
            *(["-i"] if fix else ["--dry-run", "-Werror"]),
            *c_plus_plus,
        ],
        "pyright": [find("pyright"), "--pythonpath", sys.executable],
    }
    if buildifier:
        mode = ["-mode=fix", "-lint=fix"] if fix else ["-mode=diff", "-lint=warn"]
        commands["buildifier"] = [buildifier, *mode, *bazel]
    failed = [] if buildifier else ["buildifier"]
    for name, command in commands.items():
        status = subprocess.run(command, cwd=REPOSITORY, check=False).returncode
        print(f"lint: {name} {'FAILED' if status else 'ok'}", flush=True)
        failed += [name] if status else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(fix="--fix" in sys.argv[1:]))
