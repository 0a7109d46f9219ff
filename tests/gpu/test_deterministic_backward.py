"""deterministic_backward=True: dq, dk and dv have the same bits in every run, whatever runs beside.

In head dims 64 and 128 the CTAs of a head's keys wait for each other's turn to add to dq, so these
tests are also about turns that never come and turns that an earlier launch has left behind.
"""
# Options and arrays reach typed functions through ** and *.
# pyright: reportArgumentType=false, reportCallIssue=false
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backward_helpers import (
    MASKS,
    check,
    compiled,
    gradients,
    half_ulp,
    padded_yardsticks,
    problem,
    see_of,
    yardsticks,
)
from helpers import BWD_TARGET, assert_close, assert_same_bits, cuda_text, kernel_calls, normal
from kernel_helpers import DTYPES, HEAD_DIMS, see_causal

dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
head_dims = pytest.mark.parametrize("h", HEAD_DIMS)

deterministic = functools.partial(gradients, deterministic_backward=True)


def bits_apart(a, b):
    """How many numbers of two trees differ in their bits; -0 is not 0, and NaN is itself."""
    unsigned = lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16)
    return sum(jnp.sum(unsigned(x) != unsigned(y)) for x, y in zip(*map(jax.tree.leaves, (a, b))))


_bits_apart = jax.jit(bits_apart)


def repeats(f, *args, runs=5):
    """f(*args), which gives the same bits `runs` times; all are in flight before one is read."""
    first, *others = [f(*args) for _ in range(runs)]
    counts = [int(_bits_apart(x, first)) for x in others]
    assert not any(counts), f"numbers that differ from the first run's: {counts}"
    return first


# --- The same bits, and right -------------------------------------------------------------------

GROUPED, SHARED = (16, 2), (6, 1)  # groups of 8 heads; one key head for all
LONGEST = 901
CASES = [
    ("full", 333, 517, GROUPED),
    ("full", LONGEST, 77, SHARED),
    ("top_left", 517, 333, SHARED),
    ("top_left", 129, LONGEST, GROUPED),
    ("bottom_right", 333, 517, SHARED),
    ("bottom_right", 611, 401, GROUPED),
    ("full", 1, 399, GROUPED),
    ("top_left", 255, 255, SHARED),
]


@dtypes
@head_dims
def test_five_runs_have_the_same_bits_and_are_right(h, dtype):
    """Both alignments, grouped and shared heads, odd lengths, more queries than keys and fewer."""
    problems = [problem(batch=1, t=t, s=s, n=n, k=k, h=h, dtype=dtype) for _, t, s, (n, k) in CASES]

    @jax.jit
    def program(problems):
        return [deterministic(*p, **MASKS[mask]) for p, (mask, *_) in zip(problems, CASES)]

    results = repeats(program, jax.device_put(problems))
    for (mask, t, s, heads), p, got in zip(CASES, problems, results):
        both = padded_yardsticks(*p, see_of(mask, t, s), LONGEST)
        check(got, *both, epsilon=half_ulp(dtype), what=f"{mask} {t} x {s} heads {heads}")


@head_dims
def test_offsets_that_leave_keys_without_queries(h):
    """Keys that no query of a block sees must pass their turn on, in every row its own."""
    t, s = 401, 611
    edges = np.asarray([-t - 5, -t, -t // 2, -1, 0, s - t, s, 2**30], np.int32)
    args, cts = problem(batch=len(edges), t=t, s=s, n=8, k=1, h=h)
    f = jax.jit(lambda args, cts, o: deterministic(args, cts, is_causal=True, query_offset=o))
    got = repeats(f, *jax.device_put((args, cts)), edges)
    check(got, *yardsticks(args, cts, see_causal(t, s, edges)), epsilon=half_ulp(jnp.bfloat16))


@head_dims
def test_programs_hold_the_backward_kernel(h):
    """The xla path would pass every test here."""
    args, cts = problem(t=70, s=90, h=h)
    for options in MASKS.values():
        text = cuda_text(lambda a, c, o=options: deterministic(a, c, **o), args, cts)
        assert kernel_calls(text, BWD_TARGET) == 1


# --- More CTAs than run at once -----------------------------------------------------------------


def assert_as_close_as_sums_in_another_order(got, wanted):
    """By at most an ulp of the largest: a sum in float32 in another order, rounded once."""

    @jax.jit
    def figures(a, b):
        a, b = (jnp.asarray(x, jnp.float32) for x in (a, b))
        return jnp.max(jnp.abs(a - b)), jnp.max(jnp.abs(b)), jnp.isfinite(a).all()

    for name, x, y in zip(("dq", "dk", "dv"), got, wanted):
        apart, biggest, finite = figures(x, y)
        assert finite, name
        assert apart <= 2 * half_ulp(x.dtype) * biggest, f"{name}: {apart} of {biggest}"


LONG = {
    "full": ({"t": 20000, "s": 20000}, {}),
    "causal": ({"t": 20000, "s": 20000}, {"is_causal": True}),
    "bottom_right": (
        {"t": 9001, "s": 20000, "n": 4, "k": 2},
        {"is_causal": True, "causal_alignment": "bottom_right"},
    ),
    "many keys for one block of queries": ({"t": 61, "s": 40001, "n": 2, "k": 1}, {}),
    "one block of keys for many queries": ({"t": 40001, "s": 61, "n": 2, "k": 1}, {}),
}


@head_dims
@pytest.mark.parametrize(("sizes", "options"), LONG.values(), ids=LONG)
def test_more_key_tiles_than_multiprocessors(sizes, options, h):
    """A CTA that waits for one that cannot start until it ends would wait for ever.

    20000 keys are 157 tiles of 128 for one head, on 132 multiprocessors. The other mode, which
    other tests hold to its bounds, is the yardstick: a dense one would take gigabytes.
    """
    p = jax.device_put(problem(**{"batch": 1, "n": 1, "k": 1, "h": h, **sizes}))
    got = repeats(compiled(deterministic_backward=True, **options), *p, runs=3)
    assert_as_close_as_sums_in_another_order(got, compiled(**options)(*p))


# --- Under JAX's and XLA's machinery ------------------------------------------------------------

AXES = {"query": (0, None, None), "keys": (None, 0, 0), "all": (0, 0, 0)}


@head_dims
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
def test_vmap_repeats_every_bit(axes, h):
    """Operands that the map broadcasts are read by all rows; dq, dk and dv are one a row."""
    args, cts = problem(t=170, s=290, n=4, k=2, h=h)
    more = lambda x: np.asarray(normal((3, *x.shape))).astype(x.dtype)
    args = tuple(more(x) if a == 0 else x for x, a in zip(args, axes))
    cts = tuple(map(more, cts))
    f = functools.partial(deterministic, is_causal=True)
    got = repeats(jax.jit(jax.vmap(f, (axes, 0))), *jax.device_put((args, cts)))
    for row in range(3):
        one = tuple(x[row] if a == 0 else x for x, a in zip(args, axes))
        wanted = compiled(is_causal=True)(one, tuple(x[row] for x in cts))
        assert_close(tuple(x[row] for x in got), wanted)


@head_dims
def test_a_replayed_step_has_the_same_bits_for_the_same_input(h):
    """XLA captures the step: what an earlier replay left in the workspace must not matter."""
    (q, k, v), cts = problem(t=257, s=391, n=4, k=2, h=h)

    @functools.partial(jax.jit, static_argnums=1)
    def step(q, deterministic_backward):
        for i in range(6):
            options = {"is_causal": i % 2 == 0, "deterministic_backward": deterministic_backward}
            dq, dk, dv = gradients((q, k, v), cts, **options)
            q = q - dq * jnp.asarray(0.5, q.dtype)
        return q, dk, dv

    inputs = [np.asarray(normal(q.shape)).astype(q.dtype) for _ in range(5)]
    first = [step(x, True) for x in inputs]
    wanted = [np.asarray(step(x, False)[0], np.float32) for x in inputs]
    for (x, *_), right in zip(first, wanted):
        np.testing.assert_allclose(np.asarray(x, np.float32), right, atol=0.04, rtol=0.04)
    for i in [4, 0, 3, 1, 2] * 6:
        assert_same_bits(step(inputs[i], True), first[i], f"input {i}")


SOAK = [  # (mask, t, s, n, k)
    ("full", 65, 517, 3, 1),
    ("top_left", 331, 259, 2, 2),
    ("bottom_right", 131, 389, 8, 1),
]


@dtypes
@head_dims
def test_1000_launches_of_each_of_three_shapes(h, dtype):
    """In one program's loop, whose launches follow each other with nothing in between.

    Four sets of inputs take turns: XLA would move a call of constant inputs out of the loop, and a
    number that is left of the launch before would pass for the right one.
    """
    sets = 4
    # One batch row is one set.
    problems = jax.device_put(
        [problem(batch=sets, t=t, s=s, n=n, k=k, h=h, dtype=dtype) for _, t, s, n, k in SOAK]
    )

    def results(problems, i):
        row = lambda x: jax.lax.dynamic_slice_in_dim(x, i, 1)
        return [
            deterministic(*jax.tree.map(row, p), **MASKS[mask])
            for p, (mask, *_) in zip(problems, SOAK)
        ]

    @jax.jit
    def once(problems, i):
        return results(problems, i)

    first = [once(problems, i) for i in range(sets)]
    wanted = jax.tree.map(lambda *x: jnp.stack(x), *first)

    @jax.jit
    def soak(problems, wanted):
        def body(i, count):
            right = jax.tree.map(lambda x: x[i % sets], wanted)
            return count + bits_apart(results(problems, i % sets), right)

        return jax.lax.fori_loop(0, 1000, body, jnp.zeros((), jnp.int32))

    assert int(_bits_apart(first[0], first[1])) > 0
    assert int(soak(problems, wanted)) == 0
