"""Who takes a call, who refuses it and with which words."""
# Options and arrays reach typed functions through ** and *.
# pyright: reportArgumentType=false, reportCallIssue=false
# ruff: noqa: E731  (one-line functions of a test read best where they are used)

import functools
import itertools
import logging as std_logging

import absl.logging
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, bf16, error_of, integers, normal, oracle, qkv

import jax_fa3

attend = jax_fa3.dot_product_attention


def uses_primitive(f, *args) -> bool:
    """Whether tracing chose the kernels' primitive."""
    return "jax_fa3_fwd" in str(jax.make_jaxpr(f)(*args))


# What the kernels refuse today: options, then the word its reason must hold.
REFUSED = {
    "float32": (qkv(h=64), {}, "float32"),
    "head dim 96": (bf16(h=96), {}, "96"),
    "value head dim": (bf16(h=128, d=64), {}, "64"),
    "bias": (bf16(), {"bias": jnp.zeros((6, 10))}, "bias"),
    "mask": (bf16(), {"mask": jnp.ones((6, 10), bool)}, "mask"),
    "query lengths": (bf16(), {"query_seq_lengths": jnp.asarray([3, 4])}, "query_seq_lengths"),
    "key lengths": (
        bf16(),
        {"key_value_seq_lengths": jnp.asarray([3, 4])},
        "key_value_seq_lengths",
    ),
    "window": (bf16(), {"local_window_size": (2, 0)}, "local_window_size"),
    "segments": (
        bf16(s=6),
        {"query_segment_ids": jnp.zeros((2, 6), int)},
        "query_segment_ids",
    ),
    "soft cap": (bf16(), {"logits_soft_cap": 9.0}, "logits_soft_cap"),
    "sinks": (bf16(), {"sinks": jnp.zeros(4)}, "sinks"),
    "float8": (tuple(x.astype(jnp.float8_e4m3fn) for x in bf16()), {}, "float8"),
}
refused = pytest.mark.parametrize(("args", "options", "word"), REFUSED.values(), ids=REFUSED)


@refused
def test_fa3_raises_unsupported_with_the_reason(args, options, word):
    """A NotImplementedError, while tracing."""
    call = lambda: jax.eval_shape(functools.partial(attend, **options, implementation="fa3"), *args)
    error_of(jax_fa3.UnsupportedError, call, "fa3", word)
    assert issubclass(jax_fa3.UnsupportedError, NotImplementedError)
    assert not issubclass(jax_fa3.UnsupportedError, ValueError)


@refused
def test_none_takes_the_xla_path_for_what_fa3_refuses(args, options, word):
    assert not uses_primitive(functools.partial(attend, **options), *args)
    assert attend(*args, **options).shape == args[0].shape[:-1] + args[2].shape[-1:]


@refused
def test_is_supported_and_explain_say_so_too(args, options, word):
    assert not jax_fa3.is_supported(*args, **options, implementation="fa3")
    assert jax_fa3.is_supported(*args, **options, implementation=None)
    assert jax_fa3.is_supported(*args, **options, implementation="xla")
    text = str(jax_fa3.explain(*args, **options))
    assert "xla" in text
    assert word in text


def test_unsupported_error_lists_every_reason():
    call = lambda: attend(
        *qkv(h=40),
        bias=jnp.zeros((5, 7)),
        logits_soft_cap=3.0,
        local_window_size=2,
        sinks=jnp.zeros(4),
        key_value_seq_lengths=jnp.asarray([1, 2]),
        implementation="fa3",
    )
    words = ("float32", "40", "bias", "logits_soft_cap", "local_window_size", "sinks")
    error_of(jax_fa3.UnsupportedError, call, *words, "key_value_seq_lengths", "xla")


def test_what_the_kernels_take_is_bound_to_the_primitive():
    for dtype, h, options in itertools.product(
        (jnp.bfloat16, jnp.float16),
        (64, 128, 256),
        (
            {},
            {"is_causal": True},
            {"is_causal": True, "causal_alignment": "bottom_right"},
            {"is_causal": True, "query_offset": jnp.asarray([1, 2])},
            {"query_offset": 3},
            {"scale": -0.5},
            {"scale": jnp.float32(2)},
            {"local_window_size": (None, None)},
            {"deterministic_backward": True},
        ),
    ):
        args = bf16(dtype=dtype, h=h)
        assert jax_fa3.is_supported(*args, **options, implementation="fa3")
        assert uses_primitive(functools.partial(attend, **options), *args)
        assert uses_primitive(functools.partial(attend, **options, implementation="fa3"), *args)


def test_a_sequence_is_tried_in_order():
    takes, refuses = bf16(), qkv()
    assert not uses_primitive(functools.partial(attend, implementation=("xla", "fa3")), *takes)
    assert uses_primitive(functools.partial(attend, implementation=("fa3", "xla")), *takes)
    assert not uses_primitive(functools.partial(attend, implementation=["fa3", "xla"]), *refuses)
    error_of(
        jax_fa3.UnsupportedError,
        lambda: attend(*refuses, implementation=("fa3",)),
        "fa3",
        "float32",
    )


@pytest.mark.parametrize("args", [bf16(), qkv()], ids=["bfloat16", "float32"])
def test_none_means_fa3_then_xla(args):
    jaxprs = [
        str(jax.make_jaxpr(functools.partial(attend, implementation=i))(*args))
        for i in (None, ("fa3", "xla"))
    ]
    assert jaxprs[0] == jaxprs[1]


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_every_door_gives_the_same_answer_and_gradient(implementation):
    args = bf16()
    f = lambda attention: jax.value_and_grad(
        lambda *a: (attention(*a) ** 2).astype(jnp.float32).sum(), (0, 1, 2)
    )
    got = jax.jit(f(functools.partial(attend, is_causal=True, implementation=implementation)))(
        *args
    )
    wide = tuple(x.astype(jnp.float32) for x in args)
    wanted = jax.jit(f(lambda *a: oracle(*a, is_causal=True)[0]))(*wide)
    np.testing.assert_allclose(got[0], wanted[0], rtol=0.02)
    assert_close(got[1], jax.tree.map(lambda g: g.astype(jnp.bfloat16), wanted[1]), scale=4)


def test_the_primitives_default_lowering_is_the_xla_path():
    args = bf16()
    for options in ({}, {"is_causal": True, "query_offset": jnp.asarray([0, 3])}):
        f = functools.partial(attend, return_residual=True, **options)
        got = jax.jit(f)(*args)
        assert_close(got, jax.jit(functools.partial(f, implementation="xla"))(*args))


# --- is_supported, explain and dispatch cannot disagree -----------------------------------------


def random_call(seed):
    rng = np.random.default_rng(seed)
    pick = lambda *xs: xs[rng.integers(len(xs))]
    dtype = pick(jnp.bfloat16, jnp.bfloat16, jnp.float16, jnp.float32)
    h = pick(64, 128, 256, 64, 128, 96)
    d = pick(h, h, h, 64)
    n, k = pick((4, 4), (4, 2), (3, 1))
    t, s = pick((4, 4), (1, 6), (5, 3), (0, 4))
    args = qkv(t=t, s=s, n=n, k=k, h=h, d=d, dtype=dtype)
    # Most calls ask for few options, so that both answers occur often.
    options = {
        "is_causal": True,
        "scale": pick(0.3, -1.0, jnp.float32(0.2)),
        "causal_alignment": pick("top_left", "bottom_right"),
        "bias": normal((t, s)),
        "mask": jnp.ones((n, 1, s), bool),
        "query_seq_lengths": integers(0, t, (2,)),
        "key_value_seq_lengths": integers(0, s, (2,)),
        "local_window_size": pick(2, (None, None), (1, None)),
        "logits_soft_cap": 4.0,
        "sinks": normal((n,)),
        "deterministic_backward": True,
        "return_residual": True,
        "checkpoint_name": "here",
    }
    names = [name for name in options if rng.random() < 0.07]
    return args, {name: options[name] for name in names}


@pytest.mark.parametrize("chunk", range(2))
def test_is_supported_and_explain_agree_with_dispatch(chunk):
    """A random sample; questions are asked of arrays and of their shapes."""
    answers = []
    for seed in range(chunk * 24, chunk * 24 + 24):
        args, options = random_call(seed)
        supported = jax_fa3.is_supported(*args, **options, implementation="fa3")
        answers.append(supported)
        try:
            jax.eval_shape(functools.partial(attend, **options, implementation="fa3"), *args)
            raised = None
        except jax_fa3.UnsupportedError as error:
            raised = str(error)
        assert supported == (raised is None), (options, raised)
        chosen = uses_primitive(functools.partial(attend, **options), *args)
        assert chosen == supported
        text = str(jax_fa3.explain(*args, **options))
        assert "fa3" in text
        assert "xla" in text or supported
        if raised:
            # Every line of reasons in the error stands in the explanation.
            reasons = [x.strip() for x in raised.splitlines()[1:] if x.startswith(" ")]
            assert reasons
            assert not [x for x in reasons if x not in text]
        structs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
        assert supported == jax_fa3.is_supported(*structs, **options, implementation="fa3")
        assert str(jax_fa3.explain(*structs, **options)) == text
    assert 3 < sum(answers) < 21, "the sample must hold both answers"


def test_questions_take_structs_for_every_array():
    struct = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    q, k = struct(2, 6, 4, 64), struct(2, 10, 2, 64)
    arrays = {
        "bias": struct(6, 10, dtype=jnp.float32),
        "mask": struct(2, 1, 6, 10, dtype=jnp.bool_),
        "query_seq_lengths": struct(2, dtype=jnp.int32),
        "key_value_seq_lengths": struct(2, dtype=jnp.int32),
        "query_offset": struct(dtype=jnp.int32),
        "query_segment_ids": struct(2, 6, dtype=jnp.int32),
        "key_value_segment_ids": struct(2, 10, dtype=jnp.int32),
        "sinks": struct(4, dtype=jnp.float32),
        "scale": struct(dtype=jnp.float32),
    }
    for name, x in arrays.items():
        ids = name.endswith("segment_ids")
        options = {n: y for n, y in arrays.items() if ids and n.endswith("segment_ids")}
        options = options | {name: x, "is_causal": True}
        takes = name in ("query_offset", "scale")
        assert jax_fa3.is_supported(q, k, k, **options, implementation="fa3") == takes
        assert isinstance(str(jax_fa3.explain(q, k, k, **options)), str)


@pytest.mark.parametrize("ask", [jax_fa3.is_supported, jax_fa3.explain])
def test_questions_know_the_arguments_there_are(ask):
    with pytest.raises(TypeError, match="dot_product_attention has no argument foo, problems"):
        ask(*bf16(), foo=1, problems=None)


def test_is_supported_asks_of_the_implementations_own_hardware(no_extension):
    """The answer is the same where nothing of fa3 can run."""
    assert jax_fa3.is_supported(*bf16(), implementation="fa3")
    assert not jax_fa3.is_supported(*qkv(), implementation="fa3")


def test_questions_compute_nothing_and_work_while_tracing():
    seen = []

    @jax.jit
    def f(q, k, v):
        seen.append(jax_fa3.is_supported(q, k, v, implementation="fa3"))
        seen.append(str(jax_fa3.explain(q, k, v)))
        return q

    f(*bf16())
    assert seen[0] is True
    assert "fa3" in seen[1]


def test_explain_prints_as_text_that_names_the_choice(capsys):
    print(jax_fa3.explain(*bf16()))
    assert "fa3" in capsys.readouterr().out
    print(jax_fa3.explain(*qkv(), logits_soft_cap=2.0, implementation=None))
    printed = capsys.readouterr().out
    assert "xla" in printed
    assert "logits_soft_cap" in printed
    assert "float32" in printed


# --- Saying why, once ----------------------------------------------------------------------------


@pytest.fixture
def warnings_logged(monkeypatch):
    """The absl warnings of a test; the record of what was said already starts empty."""
    from jax_fa3 import _support

    monkeypatch.setattr(_support, "_logged", set())
    records = []

    class Keep(std_logging.Handler):
        def emit(self, record):
            records.append((record.levelno, record.getMessage()))

    logger = absl.logging.get_absl_logger()
    handler = Keep()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(std_logging.DEBUG)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_each_reason_is_logged_once_on_a_gpu(warnings_logged, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for _ in range(3):
        attend(*qkv())
    attend(*bf16(), logits_soft_cap=3.0)
    attend(*qkv(), logits_soft_cap=3.0)
    texts = [text for level, text in warnings_logged if level == std_logging.WARNING]
    assert len([t for t in texts if "float32" in t]) == 1
    assert len([t for t in texts if "logits_soft_cap" in t]) == 1
    assert all("jax_fa3" in t for t in texts)


def test_nothing_is_logged_where_there_is_no_gpu(warnings_logged):
    attend(*qkv())
    attend(*bf16(), logits_soft_cap=3.0)
    assert warnings_logged == []


def test_nothing_is_logged_for_a_choice_that_was_asked_for(warnings_logged, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attend(*qkv(), implementation="xla")
    attend(*bf16(), implementation=("xla", "fa3"))
    jax.eval_shape(attend, *bf16())
    jax_fa3.is_supported(*qkv(), logits_soft_cap=1.0)
    jax_fa3.explain(*qkv(), logits_soft_cap=1.0)
    assert warnings_logged == []


def test_a_gpu_that_is_no_hopper_is_logged_once_while_lowering(warnings_logged, other_gpu):
    gradient = jax.grad(lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum())
    for f in (attend, attend, gradient):
        helpers.cuda_text(f, *bf16())
    texts = [text for _, text in warnings_logged]
    assert len(texts) == 1
    assert "8.0" in texts[0]
    assert "A100" in texts[0]


# --- Nothing is accepted and ignored -------------------------------------------------------------


CHANGES = {
    "bias": lambda: {"bias": 3 * normal((4, 5, 7))},
    "mask": lambda: {"mask": normal((5, 7)) > 0},
    "scale": lambda: {"scale": 2.0},
    "is_causal": lambda: {"is_causal": True},
    "causal_alignment": lambda: {"is_causal": True, "causal_alignment": "bottom_right"},
    "query_offset": lambda: {"is_causal": True, "query_offset": 1},
    "query_seq_lengths": lambda: {"query_seq_lengths": jnp.asarray([2, 3])},
    "key_value_seq_lengths": lambda: {"key_value_seq_lengths": jnp.asarray([2, 3])},
    "local_window_size": lambda: {"local_window_size": 1},
    "query_segment_ids": lambda: {
        "query_segment_ids": jnp.asarray([[0, 0, 1, 1, 1]] * 2),
        "key_value_segment_ids": jnp.asarray([[0, 0, 1, 1, 1, 1, 0]] * 2),
    },
    "logits_soft_cap": lambda: {"logits_soft_cap": 0.5},
    "sinks": lambda: {"sinks": jnp.full(4, 2.0)},
}


def base_of(name):
    """What must be on for the option to mean anything."""
    return {"is_causal": True} if name in ("causal_alignment", "query_offset") else {}


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("name", CHANGES)
def test_every_option_changes_the_result(name):
    """Through the xla function and through the door that prefers the kernels."""
    options = CHANGES[name]()

    @jax.jit
    def difference(*args):
        moved = attend(*args, **options) - attend(*args, **base_of(name))
        return jnp.abs(moved.astype(jnp.float32)).max()

    for args in (qkv(), bf16(t=5, s=7)):
        assert difference(*args) > 1e-2


@pytest.mark.parametrize("name", CHANGES)
def test_fa3_names_an_option_that_it_refuses_and_binds_one_that_it_takes(name):
    args, options = bf16(t=5, s=7), CHANGES[name]()
    trace = lambda options: jax.make_jaxpr(
        functools.partial(attend, **options, implementation="fa3")
    )(*args)
    if jax_fa3.is_supported(*args, **options, implementation="fa3"):
        assert str(trace(options)) != str(trace(base_of(name)))
    else:
        error_of(jax_fa3.UnsupportedError, lambda: trace(options), name)


def test_config_sets_the_default_of_deterministic_backward(monkeypatch):
    """Read while tracing; the argument wins."""
    jaxpr = lambda **kw: str(jax.make_jaxpr(functools.partial(attend, **kw))(*bf16()))
    assert jax_fa3.config.deterministic_backward is False
    plain, on = jaxpr(), jaxpr(deterministic_backward=True)
    assert plain != on
    monkeypatch.setattr(jax_fa3.config, "deterministic_backward", True)
    assert jaxpr() == on
    assert jaxpr(deterministic_backward=False) == plain


def test_config_refuses_names_and_values_that_mean_nothing():
    with pytest.raises(AttributeError):
        setattr(jax_fa3.config, "deterministic", True)  # noqa: B010
    with pytest.raises(TypeError, match="deterministic_backward"):
        setattr(jax_fa3.config, "deterministic_backward", "yes")  # noqa: B010
