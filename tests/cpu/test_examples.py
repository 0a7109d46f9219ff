"""The training demo: it runs, it learns, and it fails when the two attentions disagree."""

import dataclasses
import importlib
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_fa3

pytestmark = pytest.mark.usefixtures("quick_compile")

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
TINY = ("--layers=1", "--model_dim=32", "--head_dim=16", "--seq_len=32", "--batch_size=4")


@pytest.fixture(autouse=True)
def _standard_promotion():
    """jax.nn's own attention mixes dtypes, which the suite's strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def train_lm(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("train_lm")


@pytest.fixture
def settings(train_lm):
    return train_lm.Settings(
        layers=2, model_dim=32, head_dim=16, seq_len=32, batch_size=2, steps=3, max_train_seconds=0
    )


@pytest.fixture
def text():
    """Bytes that are easy to predict, and long enough for windows."""
    return np.frombuffer(b"def f(x):\n    return x\n" * 200, dtype=np.uint8)


def run_demo(tmp_path, *flags):
    command = [sys.executable, str(EXAMPLES / "train_lm.py"), f"--output_dir={tmp_path}", *flags]
    # The package these tests import, also where it is not installed but found on the path.
    package = str(pathlib.Path(jax_fa3.__file__).parents[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": package}
    environment["JAX_NUMPY_DTYPE_PROMOTION"] = "standard"  # as _standard_promotion, for optax
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as quick_compile
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_demo_trains_compares_and_writes_its_files(tmp_path):
    process = run_demo(tmp_path, *TINY, "--steps=6", "--compare_steps=3", "--sample_bytes=20")

    assert process.returncode == 0, process.stdout + process.stderr
    assert "tokens/s" in process.stderr  # the progress bar
    assert (tmp_path / "train_lm.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path / "train_lm.png") in process.stdout
    results = json.loads((tmp_path / "train_lm.json").read_text())
    assert results["comparison"]["agrees"]
    assert results["comparison"]["names"] == ["jax_fa3", "jax.nn"]
    assert len(results["comparison"]["losses"][1]) == 3
    assert "xla" in results["explanation"]
    assert results["losses"][-1] < results["losses"][0]


def test_flags_that_do_not_fit_together_are_named_at_once(tmp_path):
    process = run_demo(tmp_path, "--key_value_heads=3", "--head_dim=15", "--dtype=int8")

    assert process.returncode == 1
    message = process.stdout + process.stderr
    for flag in ("--key_value_heads=3", "--head_dim=15", "--dtype=int8"):
        assert flag in message


def test_the_comparison_fails_when_an_attention_is_not_causal(
    train_lm, settings, text, monkeypatch
):
    def not_causal(query, key, value, query_offset=None, *, implementation):
        return jax.nn.dot_product_attention(query, key, value)

    def compare():
        return train_lm.compare_first_steps(settings, "xla", history, text, seed=0, steps=2)

    _, history = train_lm.train(settings, train_lm.make_attention("xla"), text, text, seed=0)

    comparison = compare()
    assert comparison.agrees
    assert comparison.names == ("jax_fa3 xla", "jax.nn")
    assert len(comparison.table().splitlines()) == 2 + 2 + 1

    monkeypatch.setattr(train_lm, "_attention_jax_nn", not_causal)
    assert not compare().agrees


def test_a_nan_never_agrees(train_lm):
    comparison = train_lm.Comparison(
        ("a", "b"), ([1.0, math.nan], [1.0, math.nan]), ([1.0, 1.0], [1.0, 1.0]), 1e-2, 1e-2
    )
    assert not comparison.agrees


@pytest.mark.parametrize("name", ["auto", "xla", "jax_nn"])
def test_decoding_with_a_cache_gives_the_logits_of_training(train_lm, settings, text, name):
    def run(parameters, tokens, cache=None, position=0):
        attention = train_lm.make_attention(name)
        return train_lm.transformer(parameters, tokens, settings, attention, cache, position)

    run = jax.jit(run)
    parameters = train_lm.initial_parameters(settings, seed=1)
    tokens = jnp.asarray(text[:12][None].astype(np.int32))
    whole, _ = run(parameters, tokens)

    shape = (settings.layers, 1, 16, settings.key_value_heads, settings.head_dim)
    cache = (jnp.zeros(shape), jnp.zeros(shape))
    logits, cache = run(parameters, tokens[:, :5], cache, 0)
    parts = [logits]
    for position in range(5, 12):
        logits, cache = run(parameters, tokens[:, position : position + 1], cache, position)
        parts.append(logits)

    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, atol=1e-4)


def test_remat_changes_no_loss(train_lm, settings, text):
    attention = train_lm.make_attention("auto")
    losses = [
        train_lm.train(dataclasses.replace(settings, remat=remat), attention, text, text, seed=0)[
            1
        ].losses
        for remat in (False, True)
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_time_limit_ends_training_with_an_annealed_rate(train_lm, settings, text, monkeypatch):
    # A clock that advances by 10 ms each time it is read, so that the machine's speed is no part.
    readings = itertools.count(0, 0.01)
    clock = types.SimpleNamespace(monotonic=lambda: next(readings))
    monkeypatch.setattr(train_lm, "time", clock)
    limited = dataclasses.replace(settings, steps=1000, max_train_seconds=2.0)

    _, history = train_lm.train(limited, train_lm.make_attention("xla"), text, text, seed=0)

    assert 20 < len(history.losses) < 200
    assert max(history.learning_rates) > 0.9 * limited.learning_rate
    assert history.learning_rates[-1] < 0.2 * limited.learning_rate
    assert history.validation[-1][0] == len(history.losses)


def test_the_split_is_deterministic_and_disjoint(train_lm):
    train, validation = train_lm.read_standard_library()
    again, _ = train_lm.read_standard_library()

    assert np.array_equal(train, again)
    assert 10 < train.size / validation.size < 40
    entropy = train_lm.unigram_entropy(train)
    assert 2.5 < entropy < 4.5  # nats; English letters have about 2.9, uniform bytes 5.5
