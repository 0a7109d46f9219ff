"""The program that reaches CUDA, read as text on any machine: the kernel's call and its neighbours.

The text is what the FFI handler was written against. A change here is a change of jax_fa3_fwd_v1.
"""
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import functools
import os
import pathlib
import re
import subprocess
import sys

import helpers
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    attributes,
    bf16,
    cuda_text,
    float_of,
    kernel_calls,
    kernel_lines,
    layouts,
    normal,
    qkv,
    signature,
)
from shapes import PLANNED_BY_THE_DIAGONAL

import jax_fa3

attend = jax_fa3.dot_product_attention


def call(args, **options):
    """The one kernel call of attend(*args, **options) lowered for CUDA, as text."""
    (line,) = kernel_lines(cuda_text(functools.partial(attend, **options), *args))
    return line


# --- The call ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", [None, "fa3", ("fa3", "xla"), ["fa3"]])
def test_target_without_side_effects(implementation):
    line = call(bf16(), implementation=implementation)
    assert "custom_call @jax_fa3_fwd_v1(" in line
    assert "has_side_effect = true" not in line


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("dtype", "name"), [(jnp.bfloat16, "bf16"), (jnp.float16, "f16")])
@pytest.mark.parametrize("h", [64, 128, 256])
def test_operands_and_results(dtype, name, h, kernels):
    operands, results = signature(call(bf16(dtype=dtype, h=h, n=6, k=3)))
    assert operands == [f"2x6x6x{h}x{name}", f"2x10x3x{h}x{name}", f"2x10x3x{h}x{name}"]
    assert results[:2] == [f"2x6x6x{h}x{name}", "2x6x6xf32"]
    n = kernels.fwd_workspace_bytes(np.dtype(dtype).name, 2, 6, 10, 6, 3, h, False)
    assert results[2:] == [f"{n}xui8"]


@pytest.mark.usefixtures("kernels")
def test_each_operand_comes_from_where_its_name_says():
    """query, key, value, query_offset. Types cannot tell key from value; the order is frozen."""
    line = call(bf16())
    names = re.findall(r"%[\w#]+", line[line.index("(") : line.index(")")])
    assert names == ["%arg0", "%arg1", "%arg2"]
    f = lambda offset, value, key, query: attend(
        query, key, value, is_causal=True, query_offset=offset
    )
    args = jnp.asarray([1, 2], jnp.int32), *reversed(bf16())
    (line,) = kernel_lines(cuda_text(f, *args))
    names = re.findall(r"%[\w#]+", line[line.index("(") : line.index(")")])
    assert names[:3] == ["%arg3", "%arg2", "%arg1"]
    assert len(names) == 4


# What a program exported today must still find in a jax_fa3 of next year. A change of a line here
# is another version of the target: a new name, beside the old one, and not an edit.
FROZEN = {
    "jax_fa3_fwd_v1": {
        "operands": ["query", "key", "value", "query_offset, when has_query_offset"],
        "results": ["out", "lse", "workspace"],
        "attributes": {
            "scale": "f32",
            "is_causal": "bool",
            "diagonal": "i64",
            "has_query_offset": "bool",
        },
    },
    "jax_fa3_bwd_v1": {
        "operands": [
            *["query", "key", "value", "out", "lse", "dout", "dlse"],
            "query_offset, when has_query_offset",
        ],
        "results": ["dquery", "dkey", "dvalue", "workspace"],
        "attributes": {
            "scale": "f32",
            "is_causal": "bool",
            "diagonal": "i64",
            "has_query_offset": "bool",
            "deterministic": "bool",
        },
    },
}
TYPES = {  # at 2 x 6 x 4 x 64 queries, 2 x 10 x 2 x 64 keys and values
    **dict.fromkeys(["query", "out", "dout", "dquery"], "2x6x4x64xbf16"),
    **dict.fromkeys(["key", "value", "dkey", "dvalue"], "2x10x2x64xbf16"),
    **dict.fromkeys(["lse", "dlse"], "2x4x6xf32"),
    "query_offset, when has_query_offset": "2xi32",
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("offset", [False, True], ids=["static", "query_offset"])
@pytest.mark.parametrize("target", FROZEN)
def test_operands_results_and_attributes_of_a_versioned_target_are_frozen(target, offset):
    options = {"is_causal": True, "query_offset": 3} if offset else {}
    text = cuda_text(jax.grad(functools.partial(loss, **options), (0, 1, 2)), *bf16())
    (line,) = kernel_lines(text, target)
    operands, results = signature(line)
    frozen = FROZEN[target]
    wanted = frozen["operands"] if offset else frozen["operands"][:-1]
    assert operands == [TYPES[name] for name in wanted]
    assert results[:-1] == [TYPES[name] for name in frozen["results"][:-1]]
    assert re.fullmatch(r"\d+xui8", results[-1])
    kinds = {
        name: "bool" if value in ("true", "false") else value.split(" : ")[1]
        for name, value in attributes(line).items()
    }
    assert kinds == frozen["attributes"]


@pytest.mark.usefixtures("kernels")
def test_the_frozen_targets_are_all_there_are():
    checks = " ".join(map(str, jax_fa3.export_disabled_checks()))
    assert set(re.findall(r"jax_fa3_\w+", checks)) == set(FROZEN)


@pytest.mark.usefixtures("kernels")
def test_lse_is_laid_out_by_head():
    _, results = signature(call(bf16(batch=(3,), t=5, n=4)))
    assert results[1] == "3x4x5xf32"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_number_of_batch_dimensions(batch):
    operands, results = signature(call(bf16(batch=batch)))
    lead = "".join(f"{b}x" for b in batch)
    assert operands[0] == f"{lead}6x4x64xbf16"
    assert results[1] == f"{lead}4x6xf32"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "query_offset": 3}], ids=["plain", "offset"]
)
def test_layouts_are_row_major(options):
    line = call(bf16(), **options)
    operands, results = signature(line)
    assert len(layouts(line)) == len(operands) + len(results)
    for order, rank in layouts(line):
        assert order == list(reversed(range(rank)))


@pytest.mark.usefixtures("kernels")
def test_attributes_have_one_type_each_whatever_python_gave():
    """The handler checks types: 3 and np.float32(3) must not differ."""
    for scale in (0.5, np.float32(0.5), np.float64(0.5)):
        found = attributes(call(bf16(), scale=scale))
        assert set(found) == {"scale", "is_causal", "diagonal", "has_query_offset"}
        assert float_of(found["scale"]) == 0.5
        assert found["is_causal"] == found["has_query_offset"] == "false"
        assert found["diagonal"] == "0 : i64"
    assert float_of(attributes(call(bf16(), scale=3))["scale"]) == 3
    assert float_of(attributes(call(bf16()))["scale"]) == np.float32(1 / np.sqrt(64))


@pytest.mark.usefixtures("kernels")
def test_attributes_stay_typed_whichever_call_came_first():
    """JAX caches attributes by ==, so 1, True and 1.0 must be normalised before they reach it."""
    for scale in (1, np.float32(1), 1.0):
        found = attributes(call(bf16(), scale=scale, is_causal=True))
        assert float_of(found["scale"]) == 1
        assert found["is_causal"] == "true"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("options", "diagonal"),
    [
        ({}, 0),
        ({"is_causal": True}, 0),
        ({"is_causal": True, "causal_alignment": "bottom_right"}, 4),
        ({"is_causal": True, "query_offset": 3}, 0),
    ],
    ids=["full", "top_left", "bottom_right", "offset"],
)
def test_diagonal_is_the_key_position_of_query_0(options, diagonal):
    found = attributes(call(bf16(t=6, s=10), **options))
    assert found["diagonal"] == f"{diagonal} : i64"
    assert found["has_query_offset"] == str("query_offset" in options).lower()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "offset", [3, np.int64(-2), jnp.asarray([1, 2])], ids=["int", "numpy", "row"]
)
def test_query_offset_is_an_int32_operand_of_the_full_batch(offset):
    operands, _ = signature(call(bf16(), is_causal=True, query_offset=offset))
    assert operands[3] == "2xi32"


@pytest.mark.usefixtures("kernels")
def test_query_offset_without_causal_reaches_no_kernel():
    line = call(bf16(), query_offset=3)
    assert attributes(line)["has_query_offset"] == "false"
    assert len(signature(line)[0]) == 3


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("scale", [-0.5, 0.0, "array"])
def test_a_scale_that_is_negative_zero_or_an_array_is_folded_into_the_query(scale):
    """The kernel's scale is positive and static."""
    value = jnp.float32(-0.5) if scale == "array" else scale
    text = cuda_text(
        lambda s, *args: attend(*args, scale=s if scale == "array" else value), value, *bf16()
    )
    found = attributes(kernel_lines(text)[0])
    assert float_of(found["scale"]) > 0


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("sizes", "calls"), [({"t": 0}, 0), ({"s": 0}, 1), ({"batch": (0,)}, 0)], ids=str
)
def test_empty_problems_lower(sizes, calls):
    """Queries without a key have a result, which the kernel writes."""
    text = cuda_text(functools.partial(attend, is_causal=True), *bf16(**sizes))
    assert kernel_calls(text) == calls


# --- How often it runs -------------------------------------------------------------------------


def loss(*args, **options):
    out, lse = attend(*args, return_residual=True, **options)
    return out.astype(jnp.float32).sum() + lse.sum()


@pytest.mark.usefixtures("kernels")
def test_value_and_grad_runs_the_forward_once():
    text = cuda_text(jax.value_and_grad(loss, (0, 1, 2)), *bf16())
    assert kernel_calls(text) == 1


@pytest.mark.usefixtures("kernels")
def test_a_gradient_through_lse_runs_the_forward_once():
    text = cuda_text(jax.grad(lambda *a: attend(*a, return_residual=True)[1].sum()), *bf16())
    assert kernel_calls(text) == 1


def layers(policy, names=None):
    """value_and_grad of two checkpointed layers in a scan."""

    def layer(x, k, v):
        return jnp.sin(attend(x, k, v, is_causal=True, checkpoint_name=names)).astype(x.dtype)

    def f(q, k, v):
        step = jax.checkpoint(layer, policy=policy)
        x, _ = jax.lax.scan(lambda x, kv: (step(x, *kv), None), q, (k, v))
        return x.astype(jnp.float32).sum()

    q, k, v = bf16(n=2, k=2, t=6, s=6)
    stack = lambda x: jnp.stack([x, x])
    return cuda_text(jax.value_and_grad(f), q, stack(k), stack(v))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("policy", "calls"),
    [
        (jax.checkpoint_policies.save_only_these_names("jax_fa3_out", "jax_fa3_lse"), 1),
        (jax_fa3.remat_policy(), 1),
        (jax.checkpoint_policies.everything_saveable, 1),
        (jax.checkpoint_policies.nothing_saveable, 2),
        (jax.checkpoint_policies.save_only_these_names("jax_fa3_out"), 2),
        (jax.checkpoint_policies.dots_saveable, 2),
        (helpers.offload_policy("jax_fa3_out", "jax_fa3_lse"), 1),
        (
            jax.checkpoint_policies.save_from_both_policies(
                jax.checkpoint_policies.dots_saveable, jax_fa3.remat_policy()
            ),
            1,
        ),
    ],
    ids=["by name", "ours", "everything", "nothing", "only out", "dots", "offload", "dots, ours"],
)
def test_remat_policies_by_name_do_not_run_the_forward_twice(policy, calls):
    assert kernel_calls(layers(policy)) == calls


@pytest.mark.usefixtures("kernels")
def test_an_offload_policy_sends_out_and_lse_to_the_host_and_back():
    text = layers(helpers.offload_policy("jax_fa3_out", "jax_fa3_lse"))
    moves = re.findall(r'_xla_buffer_placement = "(\w+)"', text)
    assert sorted(moves) == ["device"] * 2 + ["pinned_host"] * 2


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("outside", ["vmap", "checkpoint"])
def test_a_policy_by_name_holds_under_vmap(outside):
    args = tuple(normal((3, *x.shape), x.dtype) for x in bf16())
    remat = functools.partial(jax.checkpoint, policy=jax_fa3.remat_policy())
    one = lambda *a: jnp.sin(attend(*a, is_causal=True).astype(jnp.float32))
    f = jax.vmap(remat(one)) if outside == "vmap" else remat(jax.vmap(one))
    text = cuda_text(jax.grad(lambda *a: f(*a).sum(), (0, 1, 2)), *args)
    assert kernel_calls(text) == 1


@pytest.mark.usefixtures("kernels")
def test_a_name_of_the_callers_own_covers_out_and_lse():
    policy = jax.checkpoint_policies.save_only_these_names("mine")
    assert kernel_calls(layers(policy, names="mine")) == 1
    assert kernel_calls(layers(policy)) == 2


@pytest.mark.usefixtures("kernels")
def test_an_unused_call_is_removed():
    def f(*args):
        attend(*args)
        return args[0]

    assert kernel_calls(cuda_text(f, *bf16())) == 0


@pytest.mark.usefixtures("kernels")
def test_the_text_is_the_same_every_time():
    args = bf16()
    texts = {
        cuda_text(jax.value_and_grad(lambda *a: loss(*a, is_causal=True)), *args) for _ in range(3)
    }
    assert len(texts) == 1


@pytest.mark.usefixtures("kernels")
def test_the_forward_holds_nothing_of_size_t_times_s():
    text = cuda_text(functools.partial(attend, is_causal=True), *bf16(batch=(1,), t=37, s=41))
    assert not re.search(r"(37x41|41x37)x", text)


@pytest.mark.usefixtures("kernels")
def test_no_copy_of_keys_for_a_group_of_heads():
    """key is never repeated to N heads, forward or in the gradient's kernel operands."""
    operands, _ = signature(call(bf16(n=8, k=2, s=11)))
    assert operands[1] == "2x11x2x64xbf16"


# --- Where it may not run ----------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
def test_the_cpu_lowering_has_no_custom_call_of_ours():
    """Forward and backward; as_text() leaves out the locations, where the primitives are named."""
    assert "jax_fa3_" not in jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*bf16()).as_text()


@pytest.mark.usefixtures("kernels")
def test_one_trace_runs_on_the_cpu_and_lowers_for_cuda():
    args = bf16()
    traced = jax.jit(attend).trace(*args)
    on_cpu = traced.lower().compile()(*args)
    helpers.assert_close(on_cpu, helpers.oracle(*args)[0], jnp.bfloat16)
    assert kernel_calls(traced.lower(lowering_platforms=("cuda",)).as_text()) == 1


@pytest.mark.usefixtures("kernels")
def test_one_program_lowers_for_both_platforms():
    text = jax.jit(attend).trace(*bf16()).lower(lowering_platforms=("cpu", "cuda")).as_text()
    assert kernel_calls(text) == 1
    assert "stablehlo.case" in text


@pytest.mark.usefixtures("kernels")
def test_fa3_traces_anywhere_and_refuses_to_lower_for_the_cpu():
    f = functools.partial(attend, implementation="fa3")
    traced = jax.jit(f).trace(*bf16())
    with pytest.raises(jax_fa3.UnsupportedError, match="cpu"):
        traced.lower()
    with pytest.raises(jax_fa3.UnsupportedError, match="cpu"):
        f(*bf16())
    with pytest.raises(jax_fa3.UnsupportedError, match="cpu"):
        jax.jit(jax.grad(lambda *a: f(*a).astype(jnp.float32).sum()))(*bf16())


FALLBACKS = {
    "no_extension": "extension",
    "other_gpu": "8.0",
    "old_driver": "driver",
}


@pytest.mark.parametrize(("fixture", "word"), FALLBACKS.items(), ids=FALLBACKS)
def test_where_the_kernels_cannot_run_none_lowers_to_xla_and_fa3_raises(fixture, word, request):
    request.getfixturevalue(fixture)
    args = bf16()
    for implementation in (None, ("fa3", "xla")):
        text = cuda_text(functools.partial(attend, implementation=implementation), *args)
        assert kernel_calls(text) == 0
        assert "dot_general" in text
    grad = jax.grad(lambda *a: attend(*a).astype(jnp.float32).sum())
    assert kernel_calls(cuda_text(grad, *args)) == 0
    for implementation in ("fa3", ("fa3",)):
        with pytest.raises(jax_fa3.UnsupportedError, match=word):
            cuda_text(functools.partial(attend, implementation=implementation), *args)


def test_a_driver_of_zero_is_a_machine_without_one_and_lowers(monkeypatch):
    from jax_fa3 import _native

    monkeypatch.setattr(_native, "_load", lambda: (helpers.fake_extension(driver=0), ""))
    assert kernel_calls(cuda_text(attend, *bf16())) == 1


def test_lse_and_gradients_of_the_fallback_are_the_same_program_meaning(no_extension):
    """The CUDA lowering without kernels returns the same shapes and dtypes as the one with them."""
    f = jax.value_and_grad(loss, (0, 1, 2))
    lowered = jax.jit(f).trace(*bf16()).lower(lowering_platforms=("cuda",))
    value, grads = lowered.out_info
    assert value.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 3


@pytest.mark.parametrize(
    "options",
    [
        {"bias": normal((6, 10))},
        {"local_window_size": 3},
        {"logits_soft_cap": 5.0},
        {"key_value_seq_lengths": jnp.asarray([3, 4])},
    ],
    ids=["bias", "window", "soft cap", "lengths"],
)
def test_what_the_kernels_cannot_do_takes_the_xla_path_while_tracing(kernels, options):
    assert kernel_calls(cuda_text(functools.partial(attend, **options), *bf16())) == 0
    jaxpr = str(jax.make_jaxpr(functools.partial(attend, **options))(*bf16()))
    assert "jax_fa3_fwd" not in jaxpr


def test_custom_call_targets_begin_with_our_name(kernels):
    text = cuda_text(jax.value_and_grad(loss), *bf16())
    ours = [t for t in re.findall(r"custom_call @\"?([\w.$-]+)", text) if "fa3" in t]
    assert ours
    assert all(t.startswith("jax_fa3_") for t in ours)


def test_float32_matmuls_ask_for_full_precision_on_a_gpu():
    """Not TF32: float32 is computed in float32, forward and backward."""
    f = lambda *a: jax_fa3.dot_product_attention(*a, is_causal=True).sum()
    text = cuda_text(jax.value_and_grad(f, (0, 1, 2)), *qkv(h=64))
    matmuls = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert len(matmuls) >= 5
    assert not [line for line in matmuls if "precision = [HIGHEST, HIGHEST]" not in line]


@pytest.mark.usefixtures("kernels")
def test_export_for_cuda_from_a_machine_without_a_gpu():
    """The custom call is on no allow-list of JAX's, so the program must say that it is meant."""
    args = bf16()

    def f(*args):
        return attend(*args, is_causal=True)

    with pytest.raises(ValueError, match="jax_fa3_fwd_v1"):
        jax.export.export(jax.jit(f), platforms=["cuda"])(*args)
    checks = jax_fa3.export_disabled_checks()
    exported = jax.export.export(jax.jit(f), platforms=["cuda"], disabled_checks=checks)(*args)
    assert kernel_calls(exported.mlir_module()) == 1
    assert exported.platforms == ("cuda",)
    both = jax.export.export(jax.jit(f), platforms=["cpu", "cuda"], disabled_checks=checks)(*args)
    helpers.assert_close(both.call(*args), helpers.oracle(*args, is_causal=True)[0], jnp.bfloat16)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_export_with_a_symbolic_size_says_what_it_wants(platform):
    (batch,) = jax.export.symbolic_shape("batch")
    args = [jax.ShapeDtypeStruct((batch, 16, 2, 64), jnp.bfloat16)] * 3
    with pytest.raises(ValueError, match=r"(?s)query: got shape \(batch, 16, 2, 64\).*value: got"):
        jax.export.export(jax.jit(jax_fa3.dot_product_attention), platforms=[platform])(*args)


@pytest.mark.usefixtures("kernels")
def test_an_exported_program_survives_serialisation_with_its_gradient():
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    args = bf16()
    f = jax.jit(functools.partial(attend, is_causal=True))
    exported = jax.export.export(
        f, platforms=["cpu", "cuda"], disabled_checks=jax_fa3.export_disabled_checks()
    )(*args)
    restored = jax.export.deserialize(exported.serialize(vjp_order=1))
    assert kernel_calls(restored.mlir_module()) == 1
    assert restored.platforms == ("cpu", "cuda")
    total = lambda g: lambda *a: (g(*a).astype(jnp.float32) ** 2).sum()
    for g in (lambda h: h, lambda h: jax.grad(total(h), (0, 1, 2))):
        helpers.assert_same_bits(jax.jit(g(restored.call))(*args), jax.jit(g(f))(*args))
    assert kernel_calls(restored.vjp().mlir_module(), helpers.BWD_TARGET) == 1


def test_an_exported_program_runs_in_another_process(tmp_path):
    """That imports jax_fa3, which registers the calls, and nothing else of this one."""
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    args = bf16()
    f = jax.jit(functools.partial(attend, is_causal=True))
    exported = jax.export.export(f, disabled_checks=jax_fa3.export_disabled_checks())(*args)
    (tmp_path / "program").write_bytes(exported.serialize())
    wide = {str(i): np.asarray(x, np.float32) for i, x in enumerate(args)}  # NumPy has no bfloat16
    np.savez(tmp_path / "arguments.npz", **wide)
    script = """
import sys, jax, jax.export, jax.numpy as jnp, numpy as np, jax_fa3
folder = sys.argv[1]
with open(folder + "/program", "rb") as file:
    program = jax.export.deserialize(bytearray(file.read()))
given = np.load(folder + "/arguments.npz")
out = program.call(*(jnp.asarray(given[str(i)]).astype(jnp.bfloat16) for i in range(3)))
np.save(folder + "/out.npy", np.asarray(out, np.float32))
"""
    root = str(pathlib.Path(jax_fa3.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    helpers.assert_close(np.load(tmp_path / "out.npy"), f(*args).astype(jnp.float32), jnp.bfloat16)


@pytest.mark.parametrize(
    "f",
    [attend, jax.grad(lambda *a: attend(*a).astype(jnp.float32).sum())],
    ids=["forward", "gradient"],
)
def test_ahead_of_time_compilation(f):
    """Compiled from shapes alone; the executable refuses others and answers as jit does."""
    args = bf16()
    structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
    compiled = jax.jit(f).lower(*structs).compile()
    helpers.assert_same_bits(compiled(*args), jax.jit(f)(*args))
    assert compiled.memory_analysis() is not None
    with pytest.raises(TypeError):
        compiled(*bf16(t=7))


# --- The compiled extension --------------------------------------------------------------------


@pytest.mark.extension
def test_the_extension_registers_the_target_that_the_lowering_names():
    from jax_fa3 import _jax_fa3

    assert helpers.FWD_TARGET in _jax_fa3.registrations()
    assert all(name.startswith("jax_fa3_") for name in _jax_fa3.registrations())


@pytest.mark.extension
def test_the_extension_was_built_for_an_ffi_that_every_supported_jax_takes():
    """jaxlib 0.10 speaks 0.3; newer headers would disable its whole CUDA backend."""
    from jax_fa3 import _jax_fa3

    assert (0, 1) <= tuple(_jax_fa3.ffi_api_version()) <= (0, 3)


@pytest.mark.extension
def test_the_plan_names_one_of_the_kernels():
    from jax_fa3 import _jax_fa3

    for h in _jax_fa3.supported_head_dims():
        for causal in (False, True):
            plan = _jax_fa3.describe_plan("bfloat16", 2, 512, 512, 8, 2, h, causal)
            assert any(kernel in plan for kernel in _jax_fa3.kernels()), plan


@pytest.mark.extension
def test_the_workspace_of_any_size_is_known_on_a_machine_without_a_gpu():
    from jax_fa3 import _jax_fa3

    for args in [(1, 1, 1, 1, 1), (0, 5, 5, 2, 1), (2, 0, 0, 4, 2), (70000, 1, 3, 2, 1)]:
        assert _jax_fa3.fwd_workspace_bytes("float16", *args, 128, True) >= 0


@pytest.mark.extension
@pytest.mark.parametrize(
    "shape",
    [*PLANNED_BY_THE_DIAGONAL, (32, 64, 2048, 64, 64, 64)],  # the last: a chunk of a prefill
    ids=str,
)
def test_the_workspace_is_that_of_the_plan_where_the_diagonal_lies(shape):
    """The launch plans with the diagonal, by which the work is counted, and explain says it too."""
    from jax_fa3 import _jax_fa3

    b, t, s, n, k, h = shape
    problem = ("bfloat16", b, t, s, n, k, h, True)
    plans = [_jax_fa3.describe_plan(*problem, diagonal=d) for d in (0, s - t)]
    assert plans[0] != plans[1], "the diagonal changes nothing here: choose another shape"
    args = [jax.ShapeDtypeStruct((b, x, m, h), jnp.bfloat16) for x, m in ((t, n), (s, k), (s, k))]
    for alignment, plan, diagonal in zip(("top_left", "bottom_right"), plans, (0, s - t)):
        options = {"is_causal": True, "causal_alignment": alignment}
        (line,) = kernel_lines(cuda_text(functools.partial(attend, **options), *args))
        wanted = _jax_fa3.fwd_workspace_bytes(*problem, diagonal=diagonal)
        assert f"tensor<{wanted}xui8>" in line
        assert f"  plan: {plan}" in jax_fa3.explain(*args, **options)


@pytest.mark.extension
def test_the_plan_refuses_what_there_is_no_kernel_for_with_words():
    from jax_fa3 import _jax_fa3

    with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=r"96|head"):
        _jax_fa3.describe_plan("bfloat16", 1, 64, 64, 1, 1, 96, False)
