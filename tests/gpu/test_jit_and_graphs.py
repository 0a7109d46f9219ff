"""Under XLA's runtime: many calls in one program, donation, threads, command buffers."""

import os
import pathlib
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_same_bits, normal, qkv
from kernel_helpers import attend, check, see_causal


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


def test_two_threads_dispatch_at_once():
    problems = [
        qkv(batch=(2,), t=t, s=s, n=4, k=2, h=h, dtype=jnp.bfloat16)
        for t, s, h in ((300, 300, 128), (257, 411, 64))
    ]
    f = jax.jit(lambda *a: attend(*a, is_causal=True))
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
    """XLA's dump of the thunks that it will run shows the call inside a command buffer."""
    import jax_fa3

    here = pathlib.Path(__file__).parent
    package = str(pathlib.Path(jax_fa3.__file__).parent.parent)
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text --xla_gpu_graph_min_graph_size=1"
    done = subprocess.run(
        [sys.executable, "-c", CAPTURE, package, str(here)],
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    dumped = {p.name: p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file()}
    thunks = {n: x for n, x in dumped.items() if "thunk" in n and "jit_step" in n}
    assert thunks, f"XLA dumped no thunk sequence; there are {sorted(dumped)}"
    captured = [n for n, x in thunks.items() if re.search(r"k?command_?buffer", x, re.I)]
    assert captured, f"no command buffer in {sorted(thunks)}:\n{next(iter(thunks.values()))[:3000]}"
