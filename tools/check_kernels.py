"""The kernel gate: fails when the compiler did to a kernel what only a benchmark would notice.

    python tools/check_kernels.py [--build-dir build/cp312-abi3-linux_x86_64]

Needs no GPU. It reads two things of one build: what ptxas said (OBJECT.ptxas, which
keep_ptxas_log.py keeps) and the machine code in the extension, through cuobjdump and nvdisasm
(pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm).

Refused anywhere: wgmma that ptxas serialized, a wait that it put between them, a setmaxnreg that
it dropped. Refused in a main kernel (MAIN_KERNELS): no tensor-core instruction of
Hopper's, one of Ampere's (HMMA), more than 64 bytes of stack or 16 local loads and stores; fewer
than that too, unless kernel_allowlist.toml names the kernel with the measurement that shows they
are harmless.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
ALLOWLIST = pathlib.Path(__file__).with_name("kernel_allowlist.toml")

MAIN_KERNELS = ("fwd_kernel", "bwd_kernel", "bwd_two_pass_kernel")
MAX_STACK_BYTES = 64
MAX_LOCAL_ACCESSES = 16

# Words, not message numbers: those moved between releases of ptxas. "warpgroup.arrive is injected"
# is absent on purpose: it only repairs an order that is right, and FlashAttention-3's build has it.
REFUSED_MESSAGES = {
    "serialized": "the tensor cores run one wgmma at a time",
    "setmaxnreg": "the consumers do not get the producer's registers",
    "wait is injected": "the overlap of wgmma with other work ends there",
}

# nvdisasm's columns: /*address*/ [@predicate] OPCODE.MODIFIERS operands
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)", re.MULTILINE
)
_SECTION = re.compile(r"^\s*\.section\s+\.text\.(?P<kernel>[\w$]+)", re.MULTILINE)


@dataclasses.dataclass
class Kernel:
    """One kernel: its mangled name, sizes in bytes, counts in its machine code."""

    name: str
    registers: int = 0
    stack: int = 0
    spill_stores: int | None = None  # from ptxas's report; None when it has none of this kernel
    spill_loads: int | None = None
    opcodes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    wgmma_shapes: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def is_main(self) -> bool:
        return any(word in self.name for word in MAIN_KERNELS)

    @property
    def local_accesses(self) -> int:
        return self.opcodes["LDL"] + self.opcodes["STL"]

    @property
    def tensor_core_instructions(self) -> int:
        return self.opcodes["HGMMA"] + self.opcodes["QGMMA"]


def readable(mangled: str) -> str:
    """`kernel<Config>` of a mangled name: its identifiers without namespace and parameters."""
    names, at = [], 0
    while found := re.compile(r"\d+").search(mangled, at):
        end = found.end() + int(found[0])
        name = mangled[found.end() : end]
        if end > len(mangled) or not name.isidentifier():
            at = found.end()
            continue
        names.append(name)
        at = end
    kernel = next((i for i, name in enumerate(names) if "kernel" in name), None)
    if kernel is None:
        return mangled
    # The template's arguments end with E; the parameters' types follow.
    config = (
        names[kernel + 1] if f"{names[kernel]}I" in mangled and kernel + 1 < len(names) else None
    )
    return f"{names[kernel]}<{config}>" if config else names[kernel]


def read_ptxas(text: str, kernels: dict[str, Kernel]) -> list[str]:
    """Adds one object's ptxas report to `kernels` and returns the lines that are to be refused."""
    current = None
    refused = []
    for line in text.splitlines():
        if found := re.search(
            r"(?:Compiling entry function|Function properties for) '?([\w$]+)", line
        ):
            current = kernels.setdefault(found[1], Kernel(found[1]))
        elif (
            found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        ) and current:
            current.spill_stores, current.spill_loads = int(found[1]), int(found[2])
        if any(word in line for word in REFUSED_MESSAGES):
            refused.append(line.strip())
    return refused


def read_resources(text: str, kernels: dict[str, Kernel]) -> None:
    """Adds the output of `cuobjdump -res-usage` to `kernels`."""
    for name, usage in re.findall(r"^ Function ([\w$]+):\s*\n\s*(REG:.*)$", text, re.MULTILINE):
        values = dict(item.split(":", 1) for item in usage.split())
        kernel = kernels.setdefault(name, Kernel(name))
        kernel.registers, kernel.stack = int(values["REG"]), int(values["STACK"])


def read_sass(text: str, kernels: dict[str, Kernel]) -> None:
    """Counts the opcodes of the output of `nvdisasm -c`."""
    starts = [(found.start(), found["kernel"]) for found in _SECTION.finditer(text)]
    ends = [at for at, _ in starts[1:]] + [len(text)]
    for (start, name), end in zip(starts, ends, strict=False):
        kernel = kernels.setdefault(name, Kernel(name))
        for found in _INSTRUCTION.finditer(text, start, end):
            opcode = found["opcode"]
            stem = "MUFU.EX2" if opcode.startswith("MUFU.EX2") else opcode.partition(".")[0]
            kernel.opcodes[stem] += 1
            if stem in ("HGMMA", "QGMMA"):
                kernel.wgmma_shapes[opcode.split(".")[1]] += 1


def problems(
    kernels: dict[str, Kernel], messages: list[str], allowlist: dict[str, dict]
) -> list[str]:
    """What is wrong, one sentence each; empty when the gate is open.

    `allowlist` maps a readable kernel name to {stack, local_accesses, why}: so many are accepted.
    """
    found = []
    for message in messages:
        why = next(why for word, why in REFUSED_MESSAGES.items() if word in message)
        found.append(f"ptxas: {message} ({why})")
    main = [kernel for kernel in kernels.values() if kernel.is_main]
    if not main:
        found.append(f"no main kernel (a name with {' or '.join(MAIN_KERNELS)}) in this build")
    for kernel in main:
        name = readable(kernel.name)
        allowed = allowlist.get(name, {})
        spilled = (kernel.spill_stores or 0) + (kernel.spill_loads or 0)
        if kernel.spill_stores is None:
            found.append(
                f"{name}: no ptxas report; the kernels were not compiled by this CMakeLists.txt"
            )
        for what, value, limit in (
            ("bytes of stack", kernel.stack, min(allowed.get("stack", 0), MAX_STACK_BYTES)),
            (
                "local loads and stores",
                kernel.local_accesses,
                min(allowed.get("local_accesses", 0), MAX_LOCAL_ACCESSES),
            ),
        ):
            if value > limit:
                found.append(f"{name}: {value} {what}, {limit} allowed ({ALLOWLIST.name})")
        if spilled and not allowed:
            found.append(f"{name}: {spilled} bytes spilled, 0 allowed ({ALLOWLIST.name})")
        if not kernel.tensor_core_instructions:
            found.append(
                f"{name}: no HGMMA or QGMMA: it does not use Hopper's tensor-core instructions"
            )
        if kernel.opcodes["HMMA"]:
            found.append(
                f"{name}: {kernel.opcodes['HMMA']} HMMA: an older generation's instruction"
            )
    for name, entry in allowlist.items():
        if not entry.get("why"):
            found.append(f"{ALLOWLIST.name}: {name} has no `why`, the measurement that excuses it")
        if name not in {readable(kernel.name) for kernel in main}:
            found.append(f"{ALLOWLIST.name}: {name} is not in this build")
    return found


def table(kernels: dict[str, Kernel]) -> str:
    """One line a kernel, for people."""
    head = (
        "kernel",
        "registers",
        "stack",
        "spills",
        "wgmma",
        "EX2",
        "UTMALDG",
        "UTMASTG",
        "LDL",
        "STL",
    )
    rows: list[tuple] = [head]
    for kernel in sorted(
        kernels.values(), key=lambda kernel: (not kernel.is_main, readable(kernel.name))
    ):
        spills = (
            "?" if kernel.spill_stores is None else f"{kernel.spill_stores}/{kernel.spill_loads}"
        )
        shapes = " ".join(
            f"{count}*{shape}" for shape, count in sorted(kernel.wgmma_shapes.items())
        )
        counts = (
            kernel.opcodes[opcode] for opcode in ("MUFU.EX2", "UTMALDG", "UTMASTG", "LDL", "STL")
        )
        rows.append(
            (readable(kernel.name), kernel.registers, kernel.stack, spills, shapes or "-", *counts)
        )
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def find_tool(name: str) -> str:
    """cuobjdump or nvdisasm, from the path or from a wheel of this Python's.

    Raises: SystemExit when there is none.
    """
    found = shutil.which(name)
    if not found and (nvidia := importlib.util.find_spec("nvidia")):
        for folder in nvidia.submodule_search_locations or ():
            found = found or shutil.which(name, path=os.path.join(folder, "cu13", "bin"))
    if not found:
        raise SystemExit(f"{name} is not here: pip install nvidia-cuda-{name}")
    return found


def newest_extension(build: pathlib.Path) -> pathlib.Path:
    """The extension that was built last below `build`. Raises: SystemExit when there is none."""
    found = sorted(build.glob("*/_jax_fa3*.so"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"no extension below {build}: build it first (make kernels)")
    return found[-1]


def read_build(extension: pathlib.Path) -> tuple[dict[str, Kernel], list[str], list[str]]:
    """The kernels of a build, ptxas's refused messages, and what of the build's logs is missing."""
    kernels: dict[str, Kernel] = {}
    messages, missing = [], []
    objects = extension.parent / "CMakeFiles" / "jax_fa3_kernels.dir"
    for source in sorted((REPOSITORY / "cuda").rglob("*.cu")):
        log = objects / f"{source.relative_to(REPOSITORY)}.o.ptxas"
        if not log.exists() and "ablation" in source.parts:
            continue  # in a build with JAX_FA3_ABLATION=ON only
        if not log.exists():
            missing.append(
                f"{log}: missing; {source.relative_to(REPOSITORY)} was not compiled in this build"
            )
            continue
        messages += [
            f"{source.relative_to(REPOSITORY)}: {line}"
            for line in read_ptxas(log.read_text(), kernels)
        ]

    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str) -> str:
            result = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
            return result.stdout

        # The extension is what ships; the objects might be newer.
        read_resources(run(cuobjdump, "-res-usage", str(extension.resolve())), kernels)
        run(cuobjdump, "-xelf", "all", str(extension.resolve()))
        for cubin in sorted(pathlib.Path(folder).glob("*.cubin")):
            read_sass(run(nvdisasm, "-c", cubin.name), kernels)
    return kernels, messages, missing


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks what the compiler made of the kernels.")
    parser.add_argument(
        "--build-dir",
        type=pathlib.Path,
        help="the build to check; default: the newest below build/",
    )
    options = parser.parse_args()
    if options.build_dir:
        extension = next(iter(options.build_dir.glob("_jax_fa3*.so")), None)
    else:
        extension = newest_extension(REPOSITORY / "build")
    if extension is None:
        raise SystemExit(f"no extension in {options.build_dir}")
    kernels, messages, missing = read_build(extension)
    allowlist = tomllib.loads(ALLOWLIST.read_text())
    print(f"{extension}\n{table(kernels)}")
    found = missing + problems(kernels, messages, allowlist)
    for line in found:
        print(f"kernel gate: {line}", file=sys.stderr)
    main_kernels = sum(kernel.is_main for kernel in kernels.values())
    print(f"kernel gate: {len(found)} problems in {main_kernels} main kernels of {len(kernels)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
