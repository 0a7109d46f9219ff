"""Under XLA's runtime: many calls in one program, donation, threads, command buffers, export."""

import functools
import pathlib
import threading

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, cotangents, normal, pullback_of, qkv
from kernel_helpers import attend, captured_step, check, run_with_dump, see_causal, thunks_of

import jax_fa3


def test_many_calls_in_one_program():
    """Thirty calls of five shapes that share XLA's buffers, workspaces among them."""
    shapes = [(70, 90, 64), (64, 64, 128), (33, 130, 256), (129, 1, 64), (1, 200, 128)]
    sets = [qkv(t=t, s=s, n=2, k=1, h=h, dtype=jnp.bfloat16) for t, s, h in shapes]

    @jax.jit
    def program(sets):
        results = []
        for i in range(30):
            q, k, v = sets[i % 5]
            if i >= 5:  # each round depends on the one before, so none can be merged
                q = q + results[i - 5][0]
            results.append(attend(q, k, v, is_causal=i % 2 == 0))
        return results

    results = program(sets)
    for i, got in enumerate(results):
        q, k, v = sets[i % 5]
        if i >= 5:
            q = q + results[i - 5][0]
        see = see_causal(q.shape[1], k.shape[1], 0) if i % 2 == 0 else None
        check(got, q, k, v, see=see, what=f"call {i}")


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donated_inputs():
    """The output may take the query's memory only after the query was read."""
    q, k, v = qkv(batch=(2,), t=500, s=300, n=4, k=2, h=128, dtype=jnp.bfloat16)
    keep = [np.asarray(x) for x in (q, k, v)]
    plain = jax.jit(attend)(q, k, v)
    donating = jax.jit(lambda q, k, v: attend(q, k, v), donate_argnums=(0, 1, 2))
    for _ in range(5):
        args = [jnp.asarray(x) for x in keep]
        assert_same_bits(donating(*args), plain)


def forward(*args, **options):
    return attend(*args, **options)


def gradient(*args, **options):
    """dq, dk and dv, for cotangents that come from the inputs."""
    attention = functools.partial(attend, deterministic_backward=True, **options)
    (out, lse), pullback = jax.vjp(attention, *args)
    return pullback((args[0] - out, jnp.sin(lse)))


@pytest.mark.parametrize("second", [forward, gradient])
@pytest.mark.parametrize("first", [forward, gradient])
def test_two_programs_dispatched_in_turn(first, second):
    """Both in flight: neither may find the other's workspace, counters or recorded buffers."""
    programs = [jax.jit(functools.partial(first, is_causal=True)), jax.jit(second)]
    sizes = [
        {"batch": (2,), "t": 333, "s": 333, "n": 4, "k": 2, "h": 128},
        {"batch": (1,), "t": 257, "s": 411, "n": 6, "k": 1, "h": 64},
    ]
    # Three inputs each: what a turn leaves behind is not what the next one should give.
    inputs = [[qkv(**size, dtype=jnp.bfloat16) for _ in range(3)] for size in sizes]
    wanted = [
        [jax.tree.map(np.asarray, program(*args)) for args in sets]
        for program, sets in zip(programs, inputs)
    ]
    started = [
        (which, i % 3, programs[which](*inputs[which][i % 3]))
        for i in range(100)
        for which in (0, 1)
    ]
    for dispatch, (which, index, got) in enumerate(started):
        assert_same_bits(got, wanted[which][index], message=f"dispatch {dispatch}")


@pytest.mark.parametrize("function", [forward, gradient])
def test_two_threads_dispatch_at_once(function):
    problems = [
        qkv(batch=(2,), t=t, s=s, n=4, k=2, h=h, dtype=jnp.bfloat16)
        for t, s, h in ((300, 300, 128), (257, 411, 64))
    ]
    f = jax.jit(functools.partial(function, is_causal=True))
    wanted = [tuple(np.asarray(x) for x in f(*args)) for args in problems]
    failures = []

    def work(index):
        try:
            for _ in range(100):
                for x, y in zip(f(*problems[index]), wanted[index]):
                    np.testing.assert_array_equal(np.asarray(x), y)
        except Exception as error:
            failures.append((index, error))

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_an_exported_program_gives_the_bits_of_the_jitted_one():
    """Values and gradients of what was written as bytes and read again."""
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    args = qkv(t=333, s=411, n=4, k=2, h=128, dtype=jnp.bfloat16)
    attention = functools.partial(attend, is_causal=True, deterministic_backward=True)
    inputs = args, cotangents(attention, args)
    step = pullback_of(attention)
    exported = jax.export.export(
        step, platforms=["cuda"], disabled_checks=jax_fa3.export_disabled_checks()
    )(*inputs)
    restored = jax.export.deserialize(exported.serialize())
    assert_same_bits(restored.call(*inputs), step(*inputs))


def test_a_step_replays_with_changing_inputs():
    """What a command buffer captured must read the new buffers, not the recorded ones."""
    k, v = (normal((2, 130, 2, 64), jnp.bfloat16) for _ in range(2))

    @jax.jit
    def step(q):
        for i in range(6):
            out, _ = attend(q, k, v, is_causal=i % 2 == 0)
            q = q + out
        return q

    def by_hand(q):
        for i in range(6):
            q = q + single(q, i % 2 == 0)
        return q

    single = jax.jit(lambda q, causal: attend(q, k, v, is_causal=causal)[0], static_argnums=1)
    inputs = [normal((2, 100, 4, 64), jnp.bfloat16) for _ in range(8)]
    wanted = [np.asarray(by_hand(q)) for q in inputs]
    for _ in range(10):
        for q, right in zip(inputs, wanted):
            # XLA may fuse q + out without rounding in between; bf16 rounds it here all the same.
            np.testing.assert_allclose(
                np.asarray(step(q), np.float32), right.astype(np.float32), atol=0.04, rtol=0.04
            )


CAPTURE = """
import sys
sys.path[:0] = sys.argv[1:3]
import jax, jax.numpy as jnp, jax_fa3

def step(q):
    for i in range(6):
        q = q + jax_fa3.dot_product_attention(q, q, q, is_causal=i % 2 == 0, implementation="fa3")
    return q

f = jax.jit(step)
q = jnp.ones((1, 100, 2, 64), jnp.bfloat16)
for _ in range(3):
    q = f(q)
print(float(q.astype(jnp.float32).sum()))
"""


def test_xla_captures_the_kernel_into_a_command_buffer(tmp_path):
    """XLA's dump of the thunks that it will run shows every call inside a command buffer."""
    run_with_dump(CAPTURE, tmp_path, pathlib.Path(__file__).parent)
    captured_step(tmp_path)


TRAIN = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, jax.numpy as jnp, numpy as np, jax_fa3

BATCH, SEQLEN, HEADS, HEAD_DIM, LAYERS = 2, 300, 4, 64, 3
WIDTH = HEADS * HEAD_DIM

def model(params, x):
    for layer in params:
        q, k, v = (
            jnp.matmul(x, w).reshape(BATCH, SEQLEN, -1, HEAD_DIM)
            for w in (layer["query"], layer["key"], layer["value"])
        )
        out = jax_fa3.dot_product_attention(
            q, k, v, is_causal=True, implementation="fa3", deterministic_backward=True
        )
        x = x + jnp.matmul(out.reshape(x.shape), layer["out"])
    return x

def train_step(params, x, target):
    def loss(params):
        return jnp.square((model(params, x) - target).astype(jnp.float32)).mean()

    value, grads = jax.value_and_grad(loss)(params)
    return value, grads, jax.tree.map(lambda p, g: p - g, params, grads)

rng = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(rng.standard_normal(shape, np.float32), jnp.bfloat16)
shapes = {
    "query": (WIDTH, WIDTH), "key": (WIDTH, WIDTH // 2), "value": (WIDTH, WIDTH // 2),
    "out": (WIDTH, WIDTH),
}
params = [{name: draw(*s) / 16 for name, s in shapes.items()} for _ in range(LAYERS)]
batches = [(draw(BATCH, SEQLEN, WIDTH), draw(BATCH, SEQLEN, WIDTH)) for _ in range(6)]

captured = jax.jit(train_step).lower(params, *batches[0]).compile()

def uncaptured_step(*args):
    return train_step(*args)

# No sequence is this long, so nothing is captured.
options = {"xla_gpu_graph_min_graph_size": 1_000_000}
uncaptured = jax.jit(uncaptured_step).lower(params, *batches[0]).compile(options)

# All replays are dispatched before a result is looked at; each has its own inputs and parameters.
seen, steps = [], []
for batch in batches:
    value, grads, updated = captured(params, *batch)
    seen.append((params, batch))
    steps.append((value, grads))
    params = updated
for i, ((params, batch), step) in enumerate(zip(seen, steps)):
    found = {"captured": step, "uncaptured": uncaptured(params, *batch)[:2]}
    for name, (value, grads) in found.items():
        flat = [np.asarray(g, np.float32).ravel() for g in jax.tree.leaves(grads)]
        np.savez(f"{sys.argv[2]}/{name}{i}.npz", loss=np.asarray(value), **{
            f"grad{n}": g for n, g in enumerate(flat)
        })
"""


def test_a_captured_train_step_replays_right_with_new_inputs(tmp_path):
    """Three layers, forward and backward, against the same step that XLA may not capture."""
    # Without a search for the fastest GEMM both programs take the same ones.
    run_with_dump(TRAIN, tmp_path, tmp_path, flags="--xla_gpu_autotune_level=0", timeout=240)

    thunks, text = thunks_of(tmp_path, "train_step")
    calls = [inside for kind, inside in thunks if kind == "CustomCall"]
    assert len(calls) >= 6, f"fewer attention calls than 3 forward and 3 backward:\n{text[:3000]}"
    assert all(calls), f"a call is outside of every command buffer:\n{text[:3000]}"
    thunks, text = thunks_of(tmp_path, "uncaptured_step")
    assert not any(inside for _, inside in thunks), f"captured after all:\n{text[:3000]}"
    assert sum(kind == "CustomCall" for kind, _ in thunks) == len(calls)

    names = ("captured", "uncaptured")
    results = {n: [dict(np.load(tmp_path / f"{n}{i}.npz")) for i in range(6)] for n in names}
    for i, (got, right) in enumerate(zip(*results.values())):
        assert len(right) == 1 + 3 * 4
        before = results["uncaptured"][i - 1]
        for name, x in right.items():
            largest = np.abs(x).max()
            apart = np.abs(got[name] - x).max()
            # bfloat16's rounding, should XLA fuse the two differently ...
            assert apart <= 2e-2 * largest, f"step {i}, {name}: {apart} of {largest}"
            # ... which is far less than what buffers of another step would give.
            if name != "loss":
                assert np.abs(before[name] - x).max() > 0.2 * largest
