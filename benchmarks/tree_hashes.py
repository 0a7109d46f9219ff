"""Hashes of the source trees that a result depends on: which code a benchmark measured.

    python benchmarks/tree_hashes.py            # {"cuda": "...", "ffi": "...", "jax_fa3": "..."}
    python benchmarks/tree_hashes.py --check    # exit 1 unless the commit has these very trees

A hash is git's own tree hash, computed from the files on disk, so that it needs no .git where the
benchmark runs and equals `git rev-parse HEAD:cuda` where the checkout is clean.
"""

import hashlib
import json
import pathlib
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
MEASURED_TREES = ("cuda", "ffi", "jax_fa3")  # what decides speed and values

# Build products that .gitignore keeps out of the commit.
_IGNORED_NAMES = frozenset({"__pycache__", ".ruff_cache", ".pytest_cache", ".DS_Store"})
_IGNORED_SUFFIXES = (".so", ".pyc", ".pyd", ".o")


def _git_object_hash(kind, content):
    return hashlib.sha1(b"%s %d\0" % (kind, len(content)) + content).digest()


def _tree_digest(directory):
    """The 20 bytes git gives this directory, or None where it holds no file."""
    entries = []
    for path in directory.iterdir():
        if path.name in _IGNORED_NAMES or path.name.endswith(_IGNORED_SUFFIXES):
            continue
        if path.is_symlink():
            mode, digest = b"120000", _git_object_hash(b"blob", str(path.readlink()).encode())
        elif path.is_dir():
            mode, digest = b"40000", _tree_digest(path)
            if digest is None:
                continue
        else:
            mode = b"100755" if path.stat().st_mode & 0o100 else b"100644"
            digest = _git_object_hash(b"blob", path.read_bytes())
        # Git sorts a directory as if its name ended in a slash.
        order = path.name.encode() + (b"/" if mode == b"40000" else b"")
        entries.append((order, mode + b" " + path.name.encode() + b"\0" + digest))
    if not entries:
        return None
    return _git_object_hash(b"tree", b"".join(entry for _, entry in sorted(entries)))


def tree_hashes(repository=REPOSITORY):
    """{"cuda": 40 hex digits, ...} from the files on disk; None for a tree that is not there."""
    hashes = {}
    for name in MEASURED_TREES:
        directory = pathlib.Path(repository) / name
        digest = _tree_digest(directory) if directory.is_dir() else None
        hashes[name] = digest.hex() if digest else None
    return hashes


def commit_tree_hashes(repository=REPOSITORY):
    """The same from the last commit, or None without git or without a repository."""
    hashes = {}
    for name in MEASURED_TREES:
        try:
            answer = subprocess.run(
                ["git", "-C", str(repository), "rev-parse", "--verify", "-q", f"HEAD:{name}"],
                capture_output=True,
                text=True,
            )
        except FileNotFoundError:
            return None
        if answer.returncode not in (0, 1):  # 1: no such tree; 128: no repository
            return None
        hashes[name] = answer.stdout.strip() or None
    return hashes


def main(argv):
    on_disk = tree_hashes()
    print(json.dumps(on_disk))
    if "--check" in argv[1:]:
        committed = commit_tree_hashes()
        if committed != on_disk:
            print(f"the last commit has {json.dumps(committed)}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
