"""Prints what extras of pyproject.toml ask for, one requirement a line, without the package.

    python tools/requirements.py EXTRA...      # always with the package's own dependencies

The Makefile installs these apart from the package: another extra then costs a download, not a
build of the extension.
"""

from __future__ import annotations

import pathlib
import re
import sys
import tomllib

PYPROJECT = pathlib.Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(project: dict, extras: list[str]) -> list[str]:
    """The package's dependencies and those of `extras`, with extras of extras followed.

    Raises: KeyError for an extra that pyproject.toml does not have.
    """
    found = dict.fromkeys(project["dependencies"])
    queue = list(extras)
    seen = set(queue)
    while queue:
        for line in project["optional-dependencies"][queue.pop(0)]:
            if own := re.fullmatch(rf"{re.escape(project['name'])}\[([\w,-]+)\]", line):
                new = [extra for extra in own[1].split(",") if extra not in seen]
                seen.update(new)
                queue += new
            else:
                found[line] = None
    return list(found)


if __name__ == "__main__":
    print("\n".join(requirements(tomllib.loads(PYPROJECT.read_text())["project"], sys.argv[1:])))
