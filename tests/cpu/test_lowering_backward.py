"""The gradient's program that reaches CUDA, read as text on any machine.

The text is what the FFI handler was written against. A change here is a change of jax_fa3_bwd_v1.
"""
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import functools
import re

import helpers
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    BWD_TARGET,
    attributes,
    bf16,
    cuda_text,
    float_of,
    kernel_calls,
    kernel_lines,
    layouts,
    normal,
    signature,
)

import jax_fa3
from jax_fa3 import _support

attend = jax_fa3.dot_product_attention

# A test holds this list to the extension's.
DIMS = _support.KERNEL_HEAD_DIMS


def loss(*args, **options):
    out, lse = attend(*args, return_residual=True, **options)
    return out.astype(jnp.float32).sum() + lse.sum()


def gradients(**options):
    return jax.grad(functools.partial(loss, **options), (0, 1, 2))


def pullback(args, cotangents, **options):
    """Gradients for given cotangents of out and lse."""
    attend_both = functools.partial(attend, return_residual=True, **options)
    return jax.vjp(attend_both, *args)[1](cotangents)


def cotangents_of(args):
    q = args[0]
    return normal(q.shape, q.dtype), normal(q.shape[:-1])


def call(args, **options):
    """The one backward call of the gradient of attend(*args, **options), as text."""
    (line,) = kernel_lines(cuda_text(gradients(**options), *args), BWD_TARGET)
    return line


def backward_calls(text):
    return kernel_calls(text, BWD_TARGET)


# --- The call ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", [None, "fa3", ("fa3", "xla")])
def test_target_without_side_effects(implementation):
    line = call(bf16(), implementation=implementation)
    assert "custom_call @jax_fa3_bwd_v1(" in line
    assert "has_side_effect = true" not in line


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("dtype", "name"), [(jnp.bfloat16, "bf16"), (jnp.float16, "f16")])
@pytest.mark.parametrize("h", DIMS)
def test_operands_and_results(dtype, name, h, kernels):
    """query, key, value, out, lse, dout, dlse; dq, dk, dv, workspace. The order is frozen."""
    operands, results = signature(call(bf16(dtype=dtype, h=h, n=6, k=3)))
    queries, keys, stats = f"2x6x6x{h}x{name}", f"2x10x3x{h}x{name}", "2x6x6xf32"
    assert operands == [queries, keys, keys, queries, stats, queries, stats]
    n = kernels.bwd_workspace_bytes(np.dtype(dtype).name, 2, 6, 10, 6, 3, h, False)
    assert results == [queries, keys, keys, f"{n}xui8"]


@pytest.mark.usefixtures("kernels")
def test_lse_and_its_cotangent_are_laid_out_by_head():
    operands, _ = signature(call(bf16(batch=(3,), t=5, n=4)))
    assert operands[4] == operands[6] == "3x4x5xf32"


@pytest.mark.usefixtures("kernels")
def test_each_operand_comes_from_where_its_name_says():
    """Types cannot tell out from dout or lse from dlse: who made them can."""
    args = bf16(n=4, k=4, t=10, s=10)
    text = cuda_text(lambda a, c: pullback(a, c), args, cotangents_of(args))
    (line,) = kernel_lines(text, BWD_TARGET)
    names = re.findall(r"%[\w#]+", line[line.index("(") : line.index(")")])
    assert len(names) == 7
    # %arg0-2 are query, key and value, %arg3 is dout, %arg4 dlse by token.
    assert names[:3] == ["%arg0", "%arg1", "%arg2"]
    assert names[5] == "%arg3"
    (forward,) = kernel_lines(text)
    made = forward.split(":")[0].split(" ")[0]
    assert [names[3], names[4]] == [f"{made}#0", f"{made}#1"]
    (dlse,) = [x for x in text.splitlines() if x.strip().startswith(f"{names[6]} = ")]
    assert "stablehlo.transpose %arg4" in dlse


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("options", "silenced"),
    [
        ({}, False),
        ({"is_causal": True}, False),
        ({"is_causal": True, "causal_alignment": "bottom_right"}, True),
        ({"is_causal": True, "query_offset": 3}, True),
    ],
    ids=str,
)
def test_dout_is_looked_at_only_where_rows_may_see_nothing(options, silenced):
    """NaN in the cotangent of a row that saw no key must not reach its products with 0."""
    args = bf16(t=10, s=6)
    text = cuda_text(lambda a, c: pullback(a, c, **options), args, cotangents_of(args))
    (line,) = kernel_lines(text, BWD_TARGET)
    dout = re.findall(r"%[\w#]+", line[line.index("(") : line.index(")")])[5]
    assert (dout != "%arg3") == silenced


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_any_number_of_batch_dimensions(batch):
    operands, results = signature(call(bf16(batch=batch)))
    lead = "".join(f"{b}x" for b in batch)
    assert operands[0] == operands[3] == operands[5] == results[0] == f"{lead}6x4x64xbf16"
    assert operands[4] == operands[6] == f"{lead}4x6xf32"
    assert results[1] == results[2] == f"{lead}10x2x64xbf16"


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
def test_attributes_have_the_forwards_names_and_types():
    """The handler checks types: 3 and np.float32(3) must not differ."""
    for scale in (0.5, np.float32(0.5), np.float64(0.5)):
        found = attributes(call(bf16(), scale=scale))
        shared = {"scale", "is_causal", "diagonal", "has_query_offset"}
        assert set(found) == {*shared, "deterministic"}
        assert float_of(found["scale"]) == 0.5
        assert found["is_causal"] == found["has_query_offset"] == "false"
        assert found["diagonal"] == "0 : i64"
    for scale in (1, np.float32(1), 1.0):
        found = attributes(call(bf16(), scale=scale, is_causal=True))
        assert float_of(found["scale"]) == 1
        assert found["is_causal"] == "true"
    assert float_of(attributes(call(bf16()))["scale"]) == np.float32(1 / np.sqrt(64))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"is_causal": True, "causal_alignment": "bottom_right"},
        {"is_causal": True, "query_offset": 3},
        {"scale": -0.5},
    ],
    ids=["full", "top_left", "bottom_right", "offset", "negative scale"],
)
def test_the_backward_is_told_what_the_forward_was(options):
    text = cuda_text(gradients(**options), *bf16(t=6, s=10))
    (forward,), (backward,) = kernel_lines(text), kernel_lines(text, BWD_TARGET)
    assert attributes(backward) == {**attributes(forward), "deterministic": "false"}
    if "causal_alignment" in options:
        assert attributes(backward)["diagonal"] == "4 : i64"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("implementation", [None, "fa3"])
@pytest.mark.parametrize("flag", [None, False, True])
@pytest.mark.parametrize("h", DIMS)
def test_a_deterministic_backward_is_an_attribute_and_its_workspace(
    h, flag, implementation, kernels
):
    """The gradient's alone: the forward is deterministic anyway."""
    options = {"deterministic_backward": flag, "implementation": implementation}
    text = cuda_text(gradients(**options), *bf16(h=h, n=6, k=3))
    (forward,), (backward,) = kernel_lines(text), kernel_lines(text, BWD_TARGET)
    assert "deterministic" not in attributes(forward)
    assert attributes(backward)["deterministic"] == ("true" if flag else "false")
    _, results = signature(backward)
    n = kernels.bwd_workspace_bytes(
        "bfloat16", 2, 6, 10, 6, 3, h, False, deterministic=flag is True
    )
    assert results[3] == f"{n}xui8"


@pytest.mark.usefixtures("kernels")
def test_the_configuration_makes_every_backward_deterministic(monkeypatch, kernels):
    monkeypatch.setattr(jax_fa3.config, "deterministic_backward", True)
    line = call(bf16())
    assert attributes(line)["deterministic"] == "true"
    n = kernels.bwd_workspace_bytes("bfloat16", 2, 6, 10, 4, 2, 64, False, deterministic=True)
    assert signature(line)[1][3] == f"{n}xui8"
    # The argument wins.
    line = call(bf16(), deterministic_backward=False)
    assert attributes(line)["deterministic"] == "false"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "offset", [3, np.int64(-2), jnp.asarray([1, 2])], ids=["int", "numpy", "row"]
)
def test_query_offset_is_the_last_operand_int32_of_the_full_batch(offset):
    line = call(bf16(), is_causal=True, query_offset=offset)
    operands, _ = signature(line)
    assert len(operands) == 8
    assert operands[7] == "2xi32"
    assert attributes(line)["has_query_offset"] == "true"


@pytest.mark.usefixtures("kernels")
def test_an_array_scale_is_folded_into_the_query_and_has_a_gradient():
    f = jax.grad(lambda s, *a: loss(*a, scale=s), (0, 1))
    text = cuda_text(f, jnp.float32(-0.5), *bf16())
    (line,) = kernel_lines(text, BWD_TARGET)
    assert float_of(attributes(line)["scale"]) > 0
    assert re.search(r"-> \(tensor<f32>", text)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("sizes", "calls"), [({"t": 0}, 1), ({"s": 0}, 1), ({"batch": (0,)}, 0)], ids=str
)
def test_a_gradient_that_is_not_empty_takes_the_kernel_which_zeroes_it(sizes, calls):
    assert backward_calls(cuda_text(gradients(is_causal=True), *bf16(**sizes))) == calls


@pytest.mark.usefixtures("kernels")
def test_keys_that_no_query_head_reads_have_zero_gradients_and_no_kernel():
    args = bf16(n=0, k=2)
    f = gradients(is_causal=True)
    assert backward_calls(cuda_text(f, *args)) == 0
    for got, x in zip(jax.jit(f)(*args), args):
        assert got.shape == x.shape
        assert not got.any()


# --- What is copied, and how large things are --------------------------------------------------


def mapped(axes, args, cotangent_axes=(None, None)):
    """The backward call of vmap(pullback) with 3 rows, as text, and the whole program."""
    cts = cotangents_of(args)
    rows = lambda x, axis: x if axis is None else normal((3, *x.shape), x.dtype)
    args = tuple(rows(x, axis) for x, axis in zip(args, axes))
    cts = tuple(rows(x, axis) for x, axis in zip(cts, cotangent_axes))
    one = lambda q, k, v, dout, dlse: pullback((q, k, v), (dout, dlse))
    f = jax.vmap(one, (*axes, *cotangent_axes))
    text = cuda_text(f, *args, *cts)
    (line,) = kernel_lines(text, BWD_TARGET)
    return line, text


Q, KV, STATS = "2x6x4x64xbf16", "2x10x2x64xbf16", "2x4x6xf32"


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("axes", "cotangent_axes", "lead"),
    [
        ((0, None, None), (None, None), "311"),
        ((None, 0, 0), (0, 0), "133"),
        ((None, None, 0), (None, 0), "113"),
        ((0, 0, 0), (0, 0), "333"),
        ((None, None, None), (0, None), "111"),
    ],
    ids=["query", "keys and values", "values", "all", "cotangent of out"],
)
def test_query_key_and_value_stay_broadcast_and_the_rest_is_spread(axes, cotangent_axes, lead):
    """A vmap that maps one side copies nothing of the other; out, lse and theirs are whole."""
    line, text = mapped(axes, bf16(), cotangent_axes)
    operands, results = signature(line)
    q, k, v = (f"{n}x{rest}" for n, rest in zip(lead, (Q, KV, KV)))
    full = [f"3x{Q}", f"3x{STATS}"] * 2
    assert operands == [q, k, v, *full]
    assert results[:3] == [f"3x{Q}", f"3x{KV}", f"3x{KV}"]
    for rest, whole in ((KV, "33" in lead[1:]), (Q, True)):
        made = re.findall(rf"stablehlo.broadcast_in_dim .*-> tensor<3x{rest}>", text)
        assert whole or not made


@pytest.mark.usefixtures("kernels")
def test_a_zero_cotangent_of_lse_is_spread_over_the_mapped_axis():
    """JAX makes it of the unmapped shape; the kernel reads one value a row."""
    args = bf16()
    q = normal((3, *args[0].shape), jnp.bfloat16)
    f = jax.grad(lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum())
    text = cuda_text(jax.vmap(f, (0, None, None)), q, *args[1:])
    operands, _ = signature(kernel_lines(text, BWD_TARGET)[0])
    assert operands[6] == f"3x{STATS}"


@pytest.mark.usefixtures("kernels")
def test_jacrev_runs_the_backward_once_over_all_rows():
    args = bf16()
    f = lambda *a: attend(*a).astype(jnp.float32).sum((0, 1, 3))
    text = cuda_text(jax.jacrev(f, (0, 1, 2)), *args)
    assert backward_calls(text) == 1
    operands, results = signature(kernel_lines(text, BWD_TARGET)[0])
    assert operands[1] == f"1x{KV}"
    assert results[1] == f"4x{KV}"


@pytest.mark.usefixtures("kernels")
def test_a_mapped_offset_is_one_for_every_row_of_both_batches():
    args = bf16()
    f = lambda offset: gradients(is_causal=True, query_offset=offset)(*args)
    text = cuda_text(jax.vmap(f), jnp.asarray([0, 1, 2]))
    operands, _ = signature(kernel_lines(text, BWD_TARGET)[0])
    assert operands[:2] == [f"1x{Q}", f"1x{KV}"]
    assert operands[7] == "3x2xi32"


@pytest.mark.usefixtures("kernels")
def test_keys_are_not_repeated_for_a_group_of_heads():
    """Neither the operand nor its gradient: the kernel sums over the group."""
    text = cuda_text(gradients(), *bf16(n=8, k=2, s=11))
    operands, results = signature(kernel_lines(text, BWD_TARGET)[0])
    assert operands[1] == results[1] == "2x11x2x64xbf16"
    assert not re.search(r"2x11x(8|2x4|4x2)x64x", text)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["full", "causal"])
def test_the_gradient_holds_nothing_of_size_t_times_s(options):
    text = cuda_text(gradients(**options), *bf16(batch=(1,), t=37, s=41))
    assert not re.search(r"(37x41|41x37)x", text)
    assert "dot_general" not in text


# --- How often it runs -------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("argnums", [0, 1, 2, (0, 2)], ids=str)
def test_a_gradient_of_any_operand_is_one_call(argnums):
    text = cuda_text(jax.value_and_grad(loss, argnums), *bf16())
    assert (kernel_calls(text), backward_calls(text)) == (1, 1)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("which", [0, 1], ids=["out", "lse"])
def test_a_gradient_through_one_result_is_one_call(which):
    f = lambda *a: attend(*a, return_residual=True)[which].astype(jnp.float32).sum()
    text = cuda_text(jax.grad(f, (0, 1, 2)), *bf16())
    assert (kernel_calls(text), backward_calls(text)) == (1, 1)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("policy", "forwards"),
    [(jax_fa3.remat_policy(), 1), (jax.checkpoint_policies.nothing_saveable, 2)],
    ids=["ours", "nothing"],
)
def test_checkpointed_layers_run_the_backward_once_each(policy, forwards):
    def f(q, k, v):
        layer = jax.checkpoint(
            lambda x, k, v: jnp.sin(attend(x, k, v, is_causal=True)).astype(x.dtype), policy=policy
        )
        x, _ = jax.lax.scan(lambda x, kv: (layer(x, *kv), None), q, (k, v))
        return x.astype(jnp.float32).sum()

    q, k, v = bf16(n=2, k=2, t=6, s=6)
    text = cuda_text(jax.value_and_grad(f, (0, 1, 2)), q, jnp.stack([k, k]), jnp.stack([v, v]))
    assert (kernel_calls(text), backward_calls(text)) == (forwards, 1)  # in the loops' bodies


@pytest.mark.usefixtures("kernels")
def test_the_text_is_the_same_every_time():
    args = bf16()
    texts = {cuda_text(lambda *a: gradients(is_causal=True)(*a), *args) for _ in range(3)}
    assert len(texts) == 1


# --- Where it may not run ----------------------------------------------------------------------


@pytest.mark.parametrize("fixture", ["no_extension", "other_gpu", "old_driver"])
def test_where_no_kernel_runs_there_is_none_of_the_backward(fixture, request):
    request.getfixturevalue(fixture)
    text = cuda_text(gradients(), *bf16())
    assert (kernel_calls(text), backward_calls(text)) == (0, 0)


@pytest.mark.usefixtures("kernels")
def test_one_trace_of_a_gradient_runs_on_the_cpu_and_lowers_for_cuda():
    args = bf16()
    traced = jax.jit(gradients(is_causal=True)).trace(*args)
    on_cpu = traced.lower().compile()(*args)
    wide = tuple(x.astype(jnp.float32) for x in args)
    exact = jax.grad(
        lambda *a: sum(x.sum() for x in helpers.oracle(*a, is_causal=True)), (0, 1, 2)
    )(*wide)
    helpers.assert_close(on_cpu, exact, jnp.bfloat16)
    assert backward_calls(traced.lower(lowering_platforms=("cuda",)).as_text()) == 1
    both = traced.lower(lowering_platforms=("cpu", "cuda")).as_text()
    assert backward_calls(both) == 1


@pytest.mark.usefixtures("kernels")
def test_export_names_the_backward_among_the_checks_that_it_disables():
    args = bf16()
    f = jax.jit(gradients(is_causal=True))
    checks = jax_fa3.export_disabled_checks()
    exported = jax.export.export(f, platforms=["cuda"], disabled_checks=checks)(*args)
    assert backward_calls(exported.mlir_module()) == 1
    without = [x for x in checks if BWD_TARGET not in str(x)]
    assert len(without) == len(checks) - 1
    with pytest.raises(ValueError, match=BWD_TARGET):
        jax.export.export(f, platforms=["cuda"], disabled_checks=without)(*args)


# --- What it says ------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("deterministic", [None, False, True])
@pytest.mark.parametrize("h", DIMS)
def test_explain_shows_the_backward_plan_of_the_gradient_that_will_run(h, deterministic, kernels):
    said = jax_fa3.explain(*bf16(h=h), is_causal=True, deterministic_backward=deterministic)
    problem = ("bfloat16", 2, 6, 10, 4, 2, h, True)
    plan = kernels.describe_bwd_plan(*problem, deterministic=deterministic is True)
    assert [f"  backward plan: {line}" for line in plan.splitlines()] == [
        line for line in said.splitlines() if "backward" in line
    ]


# --- The compiled extension --------------------------------------------------------------------


@pytest.mark.extension
def test_the_extension_registers_the_target_that_the_lowering_names():
    from jax_fa3 import _jax_fa3

    assert BWD_TARGET in _jax_fa3.registrations()


@pytest.mark.extension
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_plan_names_one_of_the_kernels(dtype, causal):
    from jax_fa3 import _jax_fa3

    for h in _jax_fa3.bwd_head_dims():
        plan = _jax_fa3.describe_bwd_plan(dtype, 2, 512, 512, 8, 2, h, causal)
        assert plan.split(":")[0] in _jax_fa3.kernels()
        assert plan.startswith("Bwd")
        # And when it is asked for by that name; not for the other mask.
        name = plan.split(":")[0]
        assert _jax_fa3.describe_bwd_plan(dtype, 2, 512, 512, 8, 2, h, causal, name) == plan
        with pytest.raises(ValueError, match=f"config {name} is not for"):
            _jax_fa3.describe_bwd_plan(dtype, 2, 512, 512, 8, 2, h, not causal, name)


@pytest.mark.extension
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("h", DIMS)
def test_the_workspace_is_that_of_the_documentation(h, deterministic):
    """Rows padded to 128, of two floats each; in 64 and 128 also of dQ in float32.

    To sum that in a fixed order takes one more number for 64 rows.
    """
    from jax_fa3 import _jax_fa3

    for b, t, s, n, k in [
        (1, 1, 1, 1, 1),
        (2, 65, 9, 6, 3),
        (2, 128, 9, 6, 3),
        (3, 4096, 0, 4, 1),
        (70, 191, 5, 8, 8),
        (1, 131072, 131072, 8, 8),
    ]:
        rows = b * n * -(-t // 128) * 128
        wanted = rows * 8 if h == 256 else rows * (4 * h + 8)
        wanted += 4 * rows // 64 if deterministic and h < 256 else 0
        problem = ("bfloat16", b, t, s, n, k, h, True)
        assert _jax_fa3.bwd_workspace_bytes(*problem, deterministic=deterministic) == wanted
        if not deterministic:
            assert _jax_fa3.bwd_workspace_bytes(*problem) == wanted
    for sizes in [(0, 5, 5, 2, 1), (2, 0, 7, 4, 2), (2, 5, 7, 0, 0)]:
        problem = ("float16", *sizes, h, False)
        assert _jax_fa3.bwd_workspace_bytes(*problem, deterministic=deterministic) == 0


@pytest.mark.extension
def test_the_plan_refuses_what_there_is_no_kernel_for_with_words():
    from jax_fa3 import _jax_fa3

    with pytest.raises(ValueError, match=r"no backward kernel for bfloat16, head_dim 96"):
        _jax_fa3.describe_bwd_plan("bfloat16", 1, 64, 64, 1, 1, 96, False)
