"""The kernel gate (tools/check_kernels.py) on canned reports: it sees what it is there to refuse.

The texts are nvcc 13.0's own, shortened.
"""

import importlib.util
import pathlib
import sys

import pytest

TOOLS = pathlib.Path(__file__).parents[2] / "tools"


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


gate = load("check_kernels")
keep_ptxas_log = load("keep_ptxas_log")

KERNEL = "_ZN7jax_fa310fwd_kernelINS_20FwdBf16Hdim128CausalEEEvNS_9FwdParamsE"
READABLE = "fwd_kernel<FwdBf16Hdim128Causal>"

PTXAS = f"""\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{KERNEL}' for 'sm_90a'
ptxas info    : Function properties for {KERNEL}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
RESOURCES = f"""\
Resource usage:
 Common:
  GLOBAL:0
 Function {KERNEL}:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:1152 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = f"""\
\t.section\t.text.{KERNEL},"ax",@progbits
.text.{KERNEL}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0170*/              @!P0 UTMALDG.5D [UR8], [UR4] ;
        /*0510*/                   HGMMA.64x80x16.F32.BF16 R24, gdesc[UR4], R24, !UPT ;
        /*0520*/                   HGMMA.64x128x16.F32.BF16 R64, R8, gdesc[UR8].tnspB, R64, gsb0 ;
        /*0530*/               @P1 MUFU.EX2 R4, R4 ;
        /*0540*/                   MUFU.RCP R5, R4 ;
        /*0550*/              @UP0 UIADD3 UR4, UR4, 0x1, URZ ;
"""


def read(ptxas=PTXAS, resources=RESOURCES, sass=SASS, allowlist=None):
    """The kernels that the three reports describe, and what the gate says of them."""
    kernels = {}
    messages = gate.read_ptxas(ptxas, kernels)
    gate.read_resources(resources, kernels)
    gate.read_sass(sass, kernels)
    return kernels, gate.problems(kernels, messages, allowlist or {})


def test_a_clean_kernel_passes_and_its_numbers_are_read():
    kernels, problems = read()
    assert problems == []
    (kernel,) = kernels.values()
    assert gate.readable(kernel.name) == READABLE
    assert (kernel.registers, kernel.stack, kernel.spill_stores, kernel.spill_loads) == (
        168,
        0,
        0,
        0,
    )
    assert kernel.wgmma_shapes == {"64x80x16": 1, "64x128x16": 1}
    assert kernel.opcodes["MUFU.EX2"] == 1
    assert kernel.opcodes["UTMALDG"] == 1
    assert READABLE in gate.table(kernels)


@pytest.mark.parametrize(
    "message",
    [
        "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are "
        f"serialized due to insufficient register resources for the function '{KERNEL}'",
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain "
        "minimum register requirements.",
        "ptxas info    : (C7520) warpgroup.wait is injected in around line 812 by compiler to "
        f"allow use of registers defined by GMMA in function '{KERNEL}'",
    ],
)
def test_a_remark_that_costs_speed_is_refused_and_shown_while_building(message):
    _, problems = read(ptxas=PTXAS + message + "\n")
    assert len(problems) == 1
    assert message in problems[0]
    assert not keep_ptxas_log.is_report(message)


def test_an_injected_arrive_is_not_refused():
    message = f"ptxas info    : (C7519) warpgroup.arrive is injected in function '{KERNEL}'\n"
    assert read(ptxas=PTXAS + message)[1] == []


@pytest.mark.parametrize(
    ("extra", "allowed", "refused"),
    [
        ("", None, False),
        ("STL [R1], R4", None, True),  # one spill, not listed
        ("STL [R1], R4", {"local_accesses": 1, "why": "measured"}, False),
        ("LDL.64 R4, [R1]", {"local_accesses": 0, "stack": 8, "why": "measured"}, True),
        ("STL [R1], R4", {"local_accesses": 1}, True),  # listed with no reason
    ],
)
def test_local_memory_needs_a_listed_reason(extra, allowed, refused):
    sass = SASS + (f"        /*0560*/                   {extra} ;\n" if extra else "")
    _, problems = read(sass=sass, allowlist={READABLE: allowed} if allowed else None)
    assert bool(problems) == refused
    assert all(READABLE in problem for problem in problems)


def test_the_limits_hold_for_listed_kernels_too():
    allowed = {READABLE: {"stack": 1000, "local_accesses": 1000, "why": "measured"}}
    sass = SASS + "        /*0560*/                   STL [R1], R4 ;\n" * 17
    _, problems = read(
        resources=RESOURCES.replace("STACK:0", "STACK:72"), sass=sass, allowlist=allowed
    )
    assert [problem.split(": ")[1] for problem in problems] == [
        "72 bytes of stack, 64 allowed (kernel_allowlist.toml)",
        "17 local loads and stores, 16 allowed (kernel_allowlist.toml)",
    ]


def test_spills_in_the_report_alone_are_refused():
    _, problems = read(ptxas=PTXAS.replace("0 bytes spill stores", "12 bytes spill stores"))
    assert len(problems) == 1
    assert "12 bytes spilled" in problems[0]


def test_the_tensor_cores_must_be_hoppers():
    ampere = SASS.replace("HGMMA.64x80x16.F32.BF16", "HMMA.16816.F32.BF16")
    assert ["HMMA" in problem for problem in read(sass=ampere)[1]] == [True]
    _, problems = read(sass="\n".join(line for line in SASS.splitlines() if "HGMMA" not in line))
    assert len(problems) == 1
    assert "no HGMMA or QGMMA" in problems[0]


def test_fp8_counts_as_hoppers():
    assert (
        read(sass=SASS.replace("HGMMA.64x80x16.F32.BF16", "QGMMA.64x80x32.F32.E4M3.E4M3"))[1] == []
    )


def test_helper_kernels_need_no_tensor_core_but_must_not_serialize():
    helper = KERNEL.replace("10fwd_kernel", "12delta_kernel")
    sass = SASS + SASS.replace(KERNEL, helper).replace("HGMMA", "FFMA")
    kernels, problems = read(sass=sass)
    assert problems == []
    assert [kernel.is_main for kernel in kernels.values()] == [True, False]


def test_a_build_with_no_main_kernel_or_no_report_is_refused():
    assert "no main kernel" in read(ptxas="", resources="", sass="")[1][0]
    assert "no ptxas report" in read(ptxas="")[1][0]


def test_an_allowlist_entry_for_no_kernel_is_refused():
    _, problems = read(allowlist={"fwd_kernel<Gone>": {"stack": 8, "why": "measured"}})
    assert problems == ["kernel_allowlist.toml: fwd_kernel<Gone> is not in this build"]


def test_the_launcher_keeps_the_report_and_the_exit_status(tmp_path, capfd):
    target = tmp_path / "kernel.cu.o"
    script = f"print({PTXAS!r}); print('warning: unused'); raise SystemExit(3)"
    status = keep_ptxas_log.main([sys.executable, "-c", script, "-o", str(target)])
    assert status == 3
    assert (tmp_path / "kernel.cu.o.ptxas").read_text().startswith(PTXAS)
    assert "warning: unused" in capfd.readouterr().err
