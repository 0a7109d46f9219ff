"""The benchmark, the report and the tree hashes: tiny sizes, and that their checks can fail."""

import copy
import dataclasses
import functools
import importlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import types

import absl.flags
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("quick_compile")

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture(autouse=True)
def _standard_promotion():
    """jax.nn's own attention mixes dtypes, which the suite's strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def tree_hashes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("tree_hashes")


@pytest.fixture
def harness(tree_hashes):
    """benchmarks/harness.py as a module: no flag is read before a script's main runs."""
    return importlib.import_module("harness")


@pytest.fixture
def attention(tree_hashes):
    return importlib.import_module("attention")


@pytest.fixture
def peers(tree_hashes):
    return importlib.import_module("peers")


@pytest.fixture
def report(tree_hashes):
    return importlib.import_module("report")


def run_benchmark(tmp_path, *flags, script="attention.py", devices=1):
    """Runs the script as a user would, on so many CPU devices; returns (process, results)."""
    output = tmp_path / "results.json"
    command = [sys.executable, str(BENCHMARKS / script), "--smoke", f"--output={output}"]
    command += ["--min_seconds=0.001", "--rounds=2", "--compile_threads=2", *flags]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    environment["JAX_NUMPY_DTYPE_PROMOTION"] = "standard"  # as _standard_promotion
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as quick_compile
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    return process, json.loads(output.read_text()) if output.exists() else {}


def test_the_grid_checks_and_times_every_peer_that_can_run(tmp_path):
    process, results = run_benchmark(tmp_path, "--peers=xla,jnp,fa3,cudnn", "--rows=*-causal-*")

    assert process.returncode == 0, process.stderr
    assert [row["name"] for row in results["rows"]] == ["64-causal-64", "64-causal-128"]
    for row in results["rows"]:
        for peer in ("xla", "jnp"):
            entry = row["peers"][peer]
            assert entry["ok"]
            assert 0 < entry["relative_error"] < 1e-2
            assert len(entry["rounds"]) == 2
            assert entry["tflops"] == pytest.approx(
                row["flops"] / entry["seconds"] / 1e12, rel=1e-3
            )
        assert "UnsupportedError" in row["peers"]["fa3"]["skipped"]
        assert row["peers"]["cudnn"]["skipped"] == "cuDNN needs a GPU"
    assert results["missing_rows"] == []
    assert results["gemm"]["tflops"] > 0
    assert results["code"]["tree_hashes"]["jax_fa3"]


def test_mode_backward_times_the_pullback_alone_and_with_the_forward(tmp_path):
    process, results = run_benchmark(
        tmp_path, "--mode=backward", "--rows=64-causal-*", "--peers=xla,jnp,fa3_deterministic"
    )

    assert process.returncode == 0, process.stderr
    assert results["kind"] == "attention_backward_smoke"
    assert [row["seqlen"] for row in results["rows"]] == [64, 128]
    for row in results["rows"]:
        # What repeats its gradients differs from fa3 in the backward alone.
        assert set(row["peers"]) == {"xla", "jnp", "fa3_deterministic"}
        assert set(row["step"]["peers"]) == {"xla", "jnp"}
        assert "skipped" in row["peers"].pop("fa3_deterministic")
        for passes, entries in ((2.5, row["peers"]), (3.5, row["step"]["peers"])):
            for entry in entries.values():
                assert entry["ok"], entry
                assert entry["tflops"] == pytest.approx(
                    passes * row["flops"] / entry["seconds"] / 1e12, rel=1e-3
                )


def test_a_training_step_gives_the_output_and_its_gradients(attention):
    query, key, value, dout = jnp.full((4, 3), 2.0) * jnp.arange(1.0, 5)[:, None, None]

    out, *gradients = attention.training_step(lambda q, k, v: q * k + v)(query, key, value, dout)

    np.testing.assert_array_equal(out, query * key + value)
    for x, want in zip(gradients, (dout * key, dout * query, dout), strict=True):
        np.testing.assert_array_equal(x, want)


def test_wrong_gradients_fail_by_name_alone_and_in_a_step(attention, harness, monkeypatch):
    absl.flags.FLAGS(["test", "--min_seconds=0", "--rounds=1"])
    row = harness.Row(64, "causal", 64, 1, 2)
    right, wrong = _right, lambda q, k, v: _right(q, k, v * 1.1)
    monkeypatch.setattr(attention, "_attention", lambda peer, row: {"a": right, "b": wrong}[peer])
    clock = types.SimpleNamespace(median_since=lambda start: None)
    reference = harness.compile_reference_gradients(row)
    pairs = {peer: attention._compile_backward(peer, row) for peer in "ab"}
    steps = {peer: attention._compile_step(peer, row) for peer in "ab"}

    measured = attention.measure_backward_row(
        row, pairs | {"c": "not installed"}, steps, reference, clock
    )

    assert attention._report_of(measured) == ["64-causal-64 b", "64-causal-64 b step"]
    assert measured["peers"]["c"] == {"skipped": "not installed"}
    assert measured["step"]["peers"]["a"]["tflops"] > 0
    assert "tflops" not in measured["step"]["peers"]["b"]


def test_the_deterministic_peer_is_left_out_where_the_default_is_it(peers, harness, monkeypatch):
    """Head dim 256 has one backward kernel: a second timing would say nothing."""

    class Extension:
        def describe_bwd_plan(self, dtype, *sizes):
            return "BwdX: dQ in a pass of its own by 8 CTAs" if 256 in sizes else "BwdX: 2 stages"

    monkeypatch.setattr(peers, "extension", Extension)

    with pytest.raises(harness.Unavailable, match="the default's backward kernel is deterministic"):
        peers.attention("fa3_deterministic", harness.Row(256, "full", 512, 1, 2))
    attention = peers.attention("fa3_deterministic", harness.Row(128, "full", 512, 1, 2))
    assert attention.keywords["deterministic_backward"] is True
    assert attention.keywords["implementation"] == "fa3"


def test_a_peer_that_is_installed_and_cannot_be_imported_is_no_peer_left_out(
    peers, tmp_path, monkeypatch
):
    (tmp_path / "flash_attn3_jax.py").write_text("raise SystemError('another pydantic')")
    monkeypatch.syspath_prepend(tmp_path)
    assert peers.broken(["fa3", "flash_attn3_jax"]) == [
        "flash_attn3_jax is installed and cannot be imported: SystemError('another pydantic')"
    ]


def test_flash_attention_3_of_both_passes_lies_between_its_ratios(attention, peers, harness):
    row = harness.Row(128, "causal", 8192, 2, 16)  # 1.22 forward, 1.14 backward
    assert peers.flash_attention_3_over_cudnn_together(row, 0) == pytest.approx(1.14)
    assert peers.flash_attention_3_over_cudnn_together(row, 1) == pytest.approx(1.22)
    assert peers.flash_attention_3_over_cudnn_together(harness.Row(128, "full", 9, 1, 1), 0) is None

    def entries(seconds):
        return {"cudnn": {"seconds": seconds}}

    # cuDNN's 1.22 + 1.14 ms are 1 + 1 ms of FlashAttention-3.
    together = attention._flash_attention_3_together(row, entries(1.14e-3), entries(2.36e-3))
    assert together == pytest.approx(2.36 / 2)
    assert attention._flash_attention_3_together(row, {}, entries(1e-3)) is None


@pytest.mark.parametrize("heads_k", [6, 2, 1])
def test_the_reference_gradients_are_those_of_the_reference(harness, heads_k):
    row = harness.Row(16, "causal", 96, 2, 6, heads_k=heads_k)
    inputs = harness.random_inputs(jax.random.key(0), row)
    dout = harness.random_inputs(jax.random.key(1), row)[0]
    attention = functools.partial(harness.reference_attention, causal=True)
    wide = [x.astype(jnp.float32) for x in inputs]
    expected = jax.vjp(attention, *wide)[1](dout.astype(jnp.float32))
    found = harness.reference_gradients(*inputs, dout, causal=True)
    for x, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, want, atol=1e-4)
    good = harness.check_gradients(expected, found)
    assert good["ok"]
    assert not harness.check_gradients((expected[0], expected[1] * 2, expected[2]), found)["ok"]
    assert not harness.check_gradients((expected[0], expected[1] * np.nan, expected[2]), found)[
        "ok"
    ]


def test_mode_length_gives_time_and_memory_of_both_passes(tmp_path):
    process, results = run_benchmark(tmp_path, "--mode=length")

    assert process.returncode == 0, process.stderr
    assert [row["seqlen"] for row in results["rows"]] == [128, 256, 512]
    assert [row["heads"] for row in results["rows"]] == [2, 2, 1]
    for row in results["rows"]:
        size = 64 * row["heads"] * row["seqlen"] * 2
        for which in ("forward", "gradient"):
            for peer in ("xla", "jnp"):
                assert row[which][peer]["seconds"] > 0
                assert row[which][peer]["memory_bytes"]["arguments"] == 3 * size
                assert row[which][peer]["difference_from_first"] < 2e-2


def test_mode_length_gives_the_memory_of_what_is_too_large_to_run(tmp_path):
    process, results = run_benchmark(
        tmp_path, "--mode=length", "--rows=*-256", "--jnp_max_gib=0.0001"
    )

    assert process.returncode == 0, process.stderr
    (row,) = results["rows"]
    for which in ("forward", "gradient"):
        assert "seconds" not in row[which]["jnp"]
        assert row[which]["jnp"]["skipped"] == "its scores alone are 0 GiB"
        assert row[which]["jnp"]["memory_bytes"]["temporaries"] > 2 * 256 * 256 * 2
        assert row[which]["xla"]["seconds"] > 0


def test_mode_length_ends_with_one_long_sequence(attention):
    rows = attention.length_rows()

    assert [row.seqlen for row in rows] == [4096, 8192, 16384, 32768, 131072]
    assert rows[-1].query_shape == rows[-1].key_shape == (1, 131072, 8, 128)
    assert rows[-1].name == "128-causal-131072x8"


def test_mode_shapes_takes_lengths_and_heads_that_differ(tmp_path):
    process, results = run_benchmark(
        tmp_path, "--mode=shapes", "--rows=*-gqa8,*-odd3001,*causal-*_on_*"
    )

    assert process.returncode == 0, process.stderr
    assert results["kind"] == "attention_shapes_smoke"
    rows = {row["name"]: row for row in results["rows"]}
    assert len(rows) == 6
    assert rows["64-causal-gqa8"]["heads_k"] == 2
    assert rows["64-full-odd3001"]["seqlen"] == 3001 // 64
    assert rows["64-causal-short_on_long"]["seqlen_k"] == 8192 // 64
    assert all(entry["ok"] for row in rows.values() for entry in row["peers"].values())
    assert not any("flash_attention_3" in row for row in rows.values())


def test_mode_launch_times_a_call_inside_a_loop(tmp_path):
    process, results = run_benchmark(tmp_path, "--mode=launch", "--rows=64-full-*")

    assert process.returncode == 0, process.stderr
    assert [row["seqlen"] for row in results["rows"]] == [16, 32]
    for row in results["rows"]:
        assert row["batch"] == 1
        assert all(entry["seconds"] > 0 for entry in row["peers"].values())


def test_mode_parallel_times_one_device_and_both_splits_of_two(tmp_path, attention):
    process, results = run_benchmark(tmp_path, "--mode=parallel", devices=2)

    assert process.returncode == 0, process.stderr
    assert results["kind"] == "attention_parallel_smoke"
    assert results["settings"]["peers"] == ["xla"]
    assert [row["name"] for row in results["rows"]] == ["64-causal-64", "64-causal-32"]
    for row in results["rows"]:
        assert (row["heads"], row["heads_k"], row["devices"]) == (4, 2, 2)
        assert tuple(row["ways"]) == tuple(row["over_one"]) == attention.WAYS
        for way, entry in row["ways"].items():
            assert entry["ok"], (way, entry)
            assert len(entry["rounds"]) == 2
            # Both devices' work counts, whichever way it is split.
            assert entry["tflops"] == pytest.approx(
                3.5 * row["flops"] / entry["seconds"] / 1e12, rel=1e-3
            )
            assert row["over_one"][way] == pytest.approx(
                row["ways"]["one"]["seconds"] / entry["seconds"], rel=1e-3
            )


def test_mode_parallel_needs_two_devices_and_one_peer(tmp_path):
    process, results = run_benchmark(tmp_path, "--mode=parallel")
    assert process.returncode == 0, process.stderr
    assert "needs two devices of one host and sees 1: nothing is measured" in process.stdout
    assert results == {}

    process, results = run_benchmark(tmp_path, "--mode=parallel", "--peers=xla,jnp", devices=2)
    assert process.returncode == 1
    assert "--peers=xla,jnp: mode parallel takes one" in process.stderr + process.stdout
    assert results == {}


@pytest.fixture
def two_local_devices(attention, monkeypatch):
    """The suite's CPU devices, of which mode parallel takes the first two."""
    devices = jax.devices("cpu")
    assert len(devices) >= 2
    monkeypatch.setattr(attention.jax, "local_devices", lambda: devices)


@pytest.mark.usefixtures("two_local_devices")
@pytest.mark.parametrize("way", ["heads shard_map", "heads auto", "batch shard_map", "batch auto"])
def test_a_way_of_mode_parallel_halves_what_it_splits(attention, harness, monkeypatch, way):
    """Each device holds half of the heads, or of the batch, of everything that goes in and out."""
    row = harness.Row(64, "causal", 64, 2, 4, heads_k=2)
    monkeypatch.setattr(attention, "_attention", lambda peer, row: _right)

    step, sharding = attention._compile_way("a", row, way)

    axis = {"heads": 2, "batch": 0}[way.split()[0]]
    halved = [1, 1, 1, 1]
    halved[axis] = 2
    inputs = (*harness.random_inputs(jax.random.key(0), row), jnp.ones(row.query_shape, "bfloat16"))
    for x in (*jax.device_put(inputs, sharding), *step(*jax.device_put(inputs, sharding))):
        assert len(x.sharding.device_set) == 2
        assert x.sharding.shard_shape(x.shape) == tuple(np.floor_divide(x.shape, halved))


@pytest.mark.usefixtures("two_local_devices")
def test_a_wrong_way_fails_by_name_and_is_not_timed(attention, harness, monkeypatch):
    absl.flags.FLAGS(["test", "--min_seconds=0", "--rounds=1"])
    row = harness.Row(64, "causal", 64, 2, 4, heads_k=2)
    clock = types.SimpleNamespace(median_since=lambda start: None)
    reference = harness.compile_reference_gradients(row)
    compiled = {}
    for way, of_way in (("one", _right), ("heads auto", _right), ("batch auto", _not_causal)):
        monkeypatch.setattr(attention, "_attention", lambda peer, row, f=of_way: f)
        compiled[way] = attention._compile_way("a", row, way)

    measured = attention.measure_parallel_row(
        row, compiled | {"heads shard_map": "why not"}, reference, clock
    )

    assert attention._report_of(measured) == ["64-causal-64 batch auto"]
    assert measured["ways"]["heads shard_map"] == {"skipped": "why not"}
    assert set(measured["over_one"]) == {"one", "heads auto"}


def test_a_forced_configuration_needs_the_kernels_and_the_forward(tmp_path):
    for flags, why in (
        (["--mode=length", "--config=FwdBf16Hdim64Full"], "forces a forward kernel"),
        (["--config=Nonesuch"], "--config=Nonesuch: "),
    ):
        process, results = run_benchmark(tmp_path, *flags)
        assert process.returncode == 1
        assert why in process.stderr + process.stdout
        assert results == {}


def test_a_time_limit_keeps_what_was_measured_and_names_the_rest(tmp_path):
    process, results = run_benchmark(tmp_path, "--peers=jnp", "--time_limit_s=0.001")

    assert process.returncode == 0, process.stderr
    assert results["rows"] == []
    assert len(results["missing_rows"]) == 4
    assert results["gemm"]["tflops"] > 0


def test_an_unknown_peer_is_refused_by_name(tmp_path):
    process, results = run_benchmark(tmp_path, "--peers=fa3,fa5")

    assert process.returncode == 1
    assert (
        "--peers=fa5: expected some of fa3, fa3_deterministic, xla, cudnn"
        in process.stderr + process.stdout
    )
    assert results == {}


@pytest.fixture
def problem(harness):
    """Inputs of a small causal row and the float32 reference's output."""
    row = harness.Row(64, "causal", 128, 1, 2)
    inputs = harness.random_inputs(jax.random.key(0), row)
    return inputs, harness.reference_attention(*inputs, causal=True)


def _right(query, key, value):
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def _not_causal(query, key, value):
    return jax.nn.dot_product_attention(query, key, value)


def _one_block_unwritten(query, key, value):
    return _right(query, key, value).at[:, 64:, 1].set(0)


def _one_nan(query, key, value):
    return _right(query, key, value).at[0, 5, 0, 3].set(jnp.nan)


@pytest.mark.parametrize("wrong", [_not_causal, _one_block_unwritten, _one_nan])
def test_the_check_passes_right_outputs_and_no_other(harness, problem, wrong):
    inputs, reference = problem

    assert harness.check(_right, inputs, reference)["ok"]
    assert not harness.check(wrong, inputs, reference)["ok"]


@pytest.mark.parametrize("wrong", [_not_causal, _one_block_unwritten, _one_nan])
def test_the_check_sees_the_same_in_a_sample_of_rows(harness, problem, wrong):
    inputs, reference = problem
    rows = np.r_[0:64, 70:128]  # not a whole number of blocks

    assert harness.check(_right, inputs, reference[:, rows], rows)["ok"]
    assert not harness.check(wrong, inputs, reference[:, rows], rows)["ok"]


@pytest.mark.parametrize(("seqlen", "seqlen_k", "heads_k"), [(64, 64, 3), (40, 72, 1), (72, 40, 3)])
def test_the_reference_is_softmax_attention(harness, seqlen, seqlen_k, heads_k):
    for mask in ("full", "causal"):
        row = harness.Row(32, mask, seqlen, 2, 3, seqlen_k, heads_k)
        inputs = harness.random_inputs(jax.random.key(3), row)
        ours = harness.reference_attention(*inputs, causal=row.causal)
        theirs = jax.nn.dot_product_attention(
            *(x.astype(jnp.float32) for x in inputs), is_causal=row.causal
        )
        assert float(jnp.abs(ours - theirs).max()) < 1e-5


def test_long_rows_are_checked_in_blocks_from_first_to_last(harness, monkeypatch):
    row = harness.Row(32, "causal", 1000, 1, 2, heads_k=1)
    inputs = harness.random_inputs(jax.random.key(3), row)
    whole = harness.reference_attention(*inputs, causal=True)
    assert harness.checked_rows(row) is None

    monkeypatch.setattr(harness, "MAX_CHECKED_SCORES", 1000 * 1000)  # half of it
    rows = harness.checked_rows(row)
    assert rows[0] == 0
    assert rows[-1] == 999
    assert 400 < len(rows) <= 512
    assert (np.diff(rows) > 0).all()
    part = harness.compile_reference(row)(*inputs)
    assert float(jnp.abs(part - whole[:, rows]).max()) < 1e-5


def test_scores_count_what_a_query_sees(harness):
    for seqlen, seqlen_k in ((5, 5), (3, 7), (7, 3)):
        row = harness.Row(64, "causal", seqlen, 2, 3, seqlen_k)
        seen = int(np.tril(np.ones((seqlen, seqlen_k))).sum())
        papers = seqlen**2 // 2 if seqlen == seqlen_k else seen  # theirs leave half the diagonal
        assert row.scores == 6 * papers
        assert row.flops == 4 * 64 * row.scores


def test_rounds_interleave_and_the_order_turns(harness):
    calls = []
    runs = {name: lambda *_, name=name: calls.append(name) for name in "abc"}

    seconds = harness.time_interleaved(runs, (), rounds=3, min_seconds=0)

    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert calls[-9:] == list("abcbcacab")


def test_the_grid_is_the_papers(attention, peers):
    rows = attention.grid_rows()

    assert len(rows) == 36
    assert {row.batch * row.seqlen for row in rows} == {16384}
    assert {row.heads * row.head_dim for row in rows} == {2048}
    assert {(row.head_dim, row.mask) for row in rows} == set(peers.FLASH_ATTENTION_3_OVER_CUDNN)
    for ratios in peers.FLASH_ATTENTION_3_OVER_CUDNN.values():
        assert len(ratios) == len(peers.GRID_SEQLENS)
    full, causal = (attention.Row(128, mask, 8192, 2, 16) for mask in ("full", "causal"))
    assert full.flops == 2 * causal.flops == 4 * 2 * 16 * 8192**2 * 128
    assert peers.flash_attention_3_over_cudnn(full) == 1.11
    assert not any(map(peers.flash_attention_3_over_cudnn, attention.shape_rows()))


def test_mode_shapes_goes_where_the_grid_does_not(attention):
    """Fewer tiles than multiprocessors, grouped heads, odd lengths, lengths that differ, ..."""
    rows = {row.case: row for row in attention.shape_rows() if row.head_dim == 128}

    assert len(attention.shape_rows()) == 6 * len(rows)
    assert rows["long64k"].query_shape[:2] == (1, 65536)
    assert not set(rows) & {row.name for row in attention.grid_rows()}
    assert rows["gqa8"].query_shape[2] == 8 * rows["gqa8"].key_shape[2]
    assert rows["odd3001"].seqlen == 3001
    for row in rows.values():
        tiles = row.batch * row.heads * math.ceil(row.seqlen / 128)
        assert (tiles < 132) == row.case.startswith("few")
    assert rows["short_on_long"].key_shape[1] > rows["short_on_long"].seqlen
    assert rows["long_on_short"].key_shape[1] < rows["long_on_short"].seqlen


def test_a_configuration_that_a_row_cannot_have_is_refused_by_name(attention):
    """--config must not fall back to the plan's choice in silence."""

    class Extension:
        def describe_plan(self, dtype, *sizes):
            *sizes, causal, config = sizes
            if causal:
                raise ValueError(f"config {config} is not for causal")
            return config

    rows = attention.grid_rows(head_dims=(128,), seqlens=(512,))
    why = attention.rows_not_for(Extension(), "FwdBf16Hdim128Full", rows)
    assert why == ["128-causal-512: config FwdBf16Hdim128Full is not for causal"]


def test_looped_calls_feed_each_other(attention):
    """Each call's output is the next one's query: none can be left out."""
    loop = attention.looped(lambda query, key, value: query * 2 + key, 3)
    query, key = jnp.ones(4, jnp.bfloat16), jnp.full(4, 3, jnp.bfloat16)

    assert (jax.jit(loop)(query, key, key) == ((1 * 2 + 3) * 2 + 3) * 2 + 3).all()


def test_tree_hashes_are_gits(tree_hashes, tmp_path):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    for name in ("cuda/fwd/plan.cc", "cuda/fwd.h", "cuda/fwd-x", "ffi/a.cc", "jax_fa3/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"// {name}\n")
    (tmp_path / "cuda" / "fwd-x").chmod(0o755)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    for product in ("jax_fa3/__pycache__/a.pyc", "jax_fa3/_jax_fa3.abi3.so"):
        (tmp_path / product).parent.mkdir(exist_ok=True)
        (tmp_path / product).write_bytes(b"x")

    on_disk = tree_hashes.tree_hashes(tmp_path)
    assert on_disk == tree_hashes.commit_tree_hashes(tmp_path)
    assert all(len(digest) == 40 for digest in on_disk.values())

    (tmp_path / "cuda" / "fwd.h").write_text("// changed\n")
    assert tree_hashes.tree_hashes(tmp_path) != on_disk


# --------------------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------------------


def made_up_results(kind, rows, **more):
    """A results file with figures that no device gave, in the form that the benchmarks write."""
    return {
        "kind": kind,
        "date": "2000-01-01",
        "device": {"kind": "a test's device", "driver": None, "multiprocessors": 100},
        "versions": {"jax": "0.0", "cudnn": "9.0", "tokamax": None},
        "code": {"tree_hashes": {"cuda": "0" * 40}, "matches_commit": True},
        "gemm": {"size": 8192, "tflops": 700.0},
        "rows": rows,
        "missing_rows": [],
        "failed_checks": [],
        **more,
    }


def forward_results(rows, kind="attention_grid", cudnn=2.0):
    """jax_fa3 at 100 + head dim TFLOP/s, cuDNN `cudnn` times slower."""

    def entry(row):
        speed = 100 + row.head_dim
        peers = {
            "fa3": {"tflops": speed},
            "cudnn": {"tflops": speed / cudnn},
            "jnp": {"skipped": "no"},
        }
        measured = row.fields() | {"peers": peers, "sm_clock_mhz": 1500}
        measured["fa3_over"] = {"cudnn": cudnn}
        if kind != "attention_shapes":
            measured["flash_attention_3"] = {"tflops": speed * 0.6}
            measured["fa3_over"]["flash_attention_3"] = 1 / 0.6
        return measured

    return made_up_results(kind, [entry(row) for row in rows])


def backward_results(rows):
    """As forward_results; deterministic at 0.9 of the default below head dim 256."""
    results = forward_results(rows, "attention_backward")
    for row in results["rows"]:
        speed = row["peers"]["fa3"]["tflops"]
        row["step"] = {
            "peers": {"fa3": {"tflops": 2 * speed}, "cudnn": {"tflops": speed}},
            "flash_attention_3": {"tflops": 1.6 * speed},
            "fa3_over": {"cudnn": 2.0, "flash_attention_3": 1.25},
        }
        if row["head_dim"] == 256:
            row["peers"]["fa3_deterministic"] = {"skipped": "there is but one kernel"}
        else:
            row["peers"]["fa3_deterministic"] = {"tflops": 0.9 * speed}
            row["fa3_over"]["fa3_deterministic"] = 1 / 0.9
    return results


def length_results(rows):
    def entry(row):
        time = {"seconds": row.flops / 1e14, "memory_bytes": {"temporaries": row.seqlen * 100}}
        jnp = {"skipped": "too large", "memory_bytes": {"temporaries": row.scores_bytes}}
        return row.fields() | {
            "forward": {"fa3": time, "jnp": jnp, "tokamax": {"skipped": "no"}},
            "gradient": {"fa3": time, "xla": time},
            "sm_clock_mhz": None,
        }

    return made_up_results("attention_length", [entry(row) for row in rows])


def launch_results(rows):
    peers = {"fa3": {"seconds": 20e-6}, "cudnn": {"seconds": 25e-6}}
    entries = [row.fields() | {"calls": 200, "peers": peers, "sm_clock_mhz": None} for row in rows]
    return made_up_results("attention_launch", entries)


def parallel_results(rows):
    """Made up: a split by heads takes half of one GPU's time, and one of the ways did not run."""
    ways = {"one": 4e-3, "heads shard_map": 2e-3, "heads auto": 2e-3, "batch shard_map": 2.5e-3}

    def entry(row):
        entries = {
            way: {"seconds": s, "tflops": 3.5 * row.flops / s / 1e12} for way, s in ways.items()
        }
        over = {way: ways["one"] / s for way, s in ways.items()}
        skipped = {"batch auto": {"skipped": "no"}}
        measured = {"devices": 2, "ways": entries | skipped, "over_one": over}
        return row.fields() | measured | {"sm_clock_mhz": 1500}

    return made_up_results("attention_parallel", [entry(row) for row in rows])


@pytest.fixture
def checkout(report, tmp_path):
    """A repository with the documents, no results, and a function to add some."""
    for document, blocks in report.DOCUMENTS.items():
        (tmp_path / document).parent.mkdir(exist_ok=True)
        (tmp_path / document).write_text(
            "# Title\n"
            + "".join(
                f"before\n<!-- generated: {name} -->\n<!-- /generated -->\nafter\n"
                for name in blocks
            )
        )
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)

    def add(name, content):
        (tmp_path / "benchmarks" / "results" / name).write_text(json.dumps(content))

    return tmp_path, add


def test_the_report_says_what_is_not_measured(report, checkout):
    repository, _ = checkout

    assert report.main(["--repository", str(repository)]) == 0

    readme = (repository / "README.md").read_text()
    assert "`benchmarks/attention.py` gives `benchmarks/results/forward.json`" in readme
    assert readme.count("Not measured yet") == 3
    assert (repository / "docs/performance.md").read_text().count("Not measured yet") == 7
    assert (repository / "docs/ablation.md").read_text().count("Not measured yet") == 6
    assert not (repository / "docs" / "figures").exists()


def test_the_report_writes_tables_and_figures_once(report, attention, checkout, capsys):
    repository, add = checkout
    add("forward.json", forward_results(attention.grid_rows()))
    add("memory.json", length_results(attention.length_rows()))

    assert report.main(["--repository", str(repository), "--check"]) == 1
    assert report.main(["--repository", str(repository)]) == 0
    assert report.main(["--repository", str(repository), "--check"]) == 0

    readme = (repository / "README.md").read_text()
    assert "| 64 full | 512 | 164 | 82.0 | 98.4 | 2.00 | 1.67 |" in readme
    assert "jax_fa3 / cuDNN: median 2.00" in readme
    assert readme.count("before\n") == readme.count("after\n") == len(report.DOCUMENTS["README.md"])
    figure = (repository / "docs" / "figures" / "forward.svg").read_text()
    assert figure.count("<polyline") == 3 + 6 * 3  # the legend and six panels of three
    assert "nan" not in figure + (repository / "docs" / "figures" / "memory.svg").read_text()
    assert "(figures/forward.svg)" in (repository / "docs" / "performance.md").read_text()


def test_the_report_writes_the_backward_alone_and_with_the_forward(report, attention, checkout):
    repository, add = checkout
    results = backward_results(attention.grid_rows())
    slowest = next(row for row in results["rows"] if row["name"] == "64-causal-4096")
    slowest["peers"]["fa3_deterministic"]["tflops"] = 0.8 * 164
    slowest["fa3_over"] |= {"fa3_deterministic": 1 / 0.8, "flash_attention_3": 1.1}
    add("backward.json", results)

    assert report.main(["--repository", str(repository)]) == 0
    assert report.main(["--repository", str(repository), "--check"]) == 0

    readme = (repository / "README.md").read_text()
    assert "| 64 full | 164 | 1.67 | 1.67 | 2.00 | 0.90 | 1.25 | 1.25 | 2.00 |" in readme
    assert "| 64 causal | 164 | 1.50 | 1.10 | 2.00 | 0.87 | 1.25 | 1.25 | 2.00 |" in readme
    assert "| 256 full | 356 | 1.67 | 1.67 | 2.00 | – | 1.25 | 1.25 | 2.00 |" in readme
    assert "geometric mean 0.89, lowest 0.80 (`64-causal-4096`)" in readme
    assert "Not timed for head dim 256: there is but one kernel." in readme
    text = (repository / "docs" / "performance.md").read_text()
    assert "| 64 full | 512 | 164 | 148 | 82.0 | 98.4 | 2.00 | 1.67 | 0.90 |" in text
    assert "| 64 full | 512 | 328 | 164 | 262 | 2.00 | 1.25 |" in text
    assert text.count("TFLOP/s, backward") == text.count("TFLOP/s, forward and backward") == 1
    for name, lines in (("backward", 4 + 4 * 4 + 2 * 3), ("forward_backward", 3 + 6 * 3)):
        assert f"(figures/{name}.svg)" in text
        figure = (repository / "docs" / "figures" / f"{name}.svg").read_text()
        assert figure.count("<polyline") == lines

    figure = repository / "docs" / "figures" / "forward_backward.svg"
    figure.write_text("<svg/>")
    assert report.main(["--repository", str(repository), "--check"]) == 1
    (repository / "benchmarks" / "results" / "backward.json").unlink()
    assert report.main(["--repository", str(repository)]) == 0
    assert not figure.exists()


def test_the_report_sets_two_gpus_beside_one(report, attention, checkout):
    repository, add = checkout
    add("parallel.json", parallel_results(attention.parallel_rows()))

    assert report.main(["--repository", str(repository)]) == 0
    assert report.main(["--repository", str(repository), "--check"]) == 0

    text = (repository / "docs" / "performance.md").read_text()
    problem = "| 4 × 8192, 16 heads over 4 | 128 causal"
    assert f"{problem} | one GPU | 4.00 ms | 962 | 1.00 |" in text
    assert f"{problem} | heads, shard_map | 2.00 ms | 1,924 | 2.00 |" in text
    assert f"{problem} | batch, shard_map | 2.50 ms | 1,539 | 1.60 |" in text
    assert f"{problem} | batch, Auto mesh | – | – | – |" in text
    assert text.count("| 32 × 1024, 16 heads over 4 |") == len(report.WAY_NAMES)
    assert tuple(report.WAY_NAMES) == attention.WAYS


def test_results_without_a_step_leave_its_table_unmeasured(report, attention, checkout):
    repository, add = checkout
    add("backward.json", forward_results(attention.grid_rows(), "attention_backward"))

    assert report.main(["--repository", str(repository)]) == 0

    text = (repository / "docs" / "performance.md").read_text()
    assert text.count("`benchmarks/attention.py --mode=backward` gives") == 1
    assert "forward + backward /" not in (repository / "README.md").read_text()


def test_memory_stands_beside_the_formula_and_what_was_not_run(report, attention, checkout):
    repository, add = checkout
    add("memory.json", length_results(attention.length_rows()))

    assert report.main(["--repository", str(repository)]) == 0

    text = (repository / "docs" / "performance.md").read_text()
    assert "| Forward, seq | jax_fa3 | plain jnp |" in text
    assert "| 4096 | 0.687 ms, 0.391 MiB | (1.00 GiB) |" in text
    assert "| 131072, 8 heads | 352 ms, 12.5 MiB | (512 GiB) |" in text
    # 131072 rows of 8 heads: 260 bytes for output and log-sum-exp, 520 of workspace.
    assert "| 131072, 8 heads | 352 ms, 12.5 MiB | 780 MiB | 352 ms, 12.5 MiB |" in text
    assert ">128k</text>" not in (repository / "docs/figures/memory.svg").read_text()


def test_the_formula_counts_the_backwards_rows_in_whole_tiles(report, harness):
    row = harness.Row(64, "full", 130, 2, 3).fields()
    assert report.gradient_bytes(row) == 2 * 3 * (130 * (2 * 64 + 4) + 256 * (4 * 64 + 8))
    assert report.gradient_bytes(harness.Row(256, "full", 128, 1, 1).fields()) is None


def test_a_drawing_is_made_of_those_results_that_lie_on_an_axis(report, attention):
    rows = attention.grid_rows()
    grid, backward = forward_results(rows), backward_results(rows)
    backward["kind"] += "_smoke"
    length = length_results(attention.length_rows())
    shapes = forward_results(attention.shape_rows(), "attention_shapes")

    assert report.figure_of(grid) == report.forward_figure(grid)
    assert report.figure_of(backward) == report.backward_figure(backward)
    assert report.figure_of(length) == report.memory_figure(length)
    launch = launch_results(attention.launch_rows())
    parallel = parallel_results(attention.parallel_rows())
    for other in (shapes, launch, parallel, grid | {"rows": []}):
        assert report.figure_of(other) is None


def test_the_report_names_shapes_that_fall_behind(report, attention, checkout):
    repository, add = checkout
    add("forward.json", forward_results(attention.grid_rows(), cudnn=1.2))
    shapes = forward_results(attention.shape_rows((128,)), "attention_shapes", cudnn=1.19)
    by_name = {row["name"]: row for row in shapes["rows"]}
    by_name["128-full-odd3001"]["fa3_over"]["cudnn"] = 0.99
    by_name["128-causal-gqa8"]["fa3_over"]["cudnn"] = 1.1
    add("shapes.json", shapes)
    add("launch.json", launch_results(attention.launch_rows()))

    assert report.main(["--repository", str(repository)]) == 0

    text = (repository / "docs" / "performance.md").read_text()
    assert "| 4 × 3001, 16 heads | 128 full | 228 | 192 | 0.99 | 1.20 |" in text
    assert "| 4 × 4096, 16 heads over 2 | 128 causal | 228 | 192 | 1.10 | 1.20 |" in text
    assert "| 4 × 512 on 8192, 16 heads | 128 full |" in text
    assert "Behind cuDNN: `128-full-odd3001`." in text
    assert "below the grid's ratio: `128-full-odd3001`, `128-causal-gqa8`." in text
    assert "| 64 full | 128 | 20.0 µs | 25.0 µs | 0.80 |" in text


def test_check_fails_when_readme_figure_or_results_change(report, attention, checkout, capsys):
    repository, add = checkout
    results = forward_results(attention.grid_rows())
    add("forward.json", results)
    report.main(["--repository", str(repository)])

    def check():
        status = report.main(["--repository", str(repository), "--check"])
        return status, capsys.readouterr().err

    assert check()[0] == 0
    for path in ("README.md", "docs/performance.md", "docs/figures/forward.svg"):
        file = repository / path
        original = file.read_text()
        changed = original.replace("<!-- /generated", "166\n<!-- /generated", 1)
        file.write_text(changed if path.endswith(".md") else original + "\n")
        status, message = check()
        assert status == 1
        assert path in message
        file.write_text(original)

    faster = copy.deepcopy(results)
    faster["rows"][0]["peers"]["fa3"]["tflops"] *= 1.5
    add("forward.json", faster)
    assert check()[0] == 1


def test_the_report_refuses_smoke_results_and_lost_markers(report, attention, checkout, capsys):
    repository, add = checkout
    add("forward.json", forward_results(attention.grid_rows()) | {"kind": "attention_grid_smoke"})
    assert report.main(["--repository", str(repository)]) == 1
    assert "expected 'attention_grid'" in capsys.readouterr().err

    (repository / "benchmarks" / "results" / "forward.json").unlink()
    (repository / "README.md").write_text("# no markers\n<!-- generated: cpu -->\n")
    assert report.main(["--repository", str(repository)]) == 1
    message = capsys.readouterr().err
    assert "README.md: no marker <!-- generated: forward -->" in message
    assert "not closed" in message

    (repository / "docs" / "ablation.md").unlink()
    (repository / "README.md").unlink()
    assert report.main(["--repository", str(repository)]) == 1
    assert "README.md: missing" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# The ablation
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def ablation(tree_hashes):
    return importlib.import_module("ablation")


def test_the_ablation_measures_what_the_build_has_and_names_the_rest(tmp_path):
    process, results = run_benchmark(tmp_path, "--studies=hdim64-full", script="ablation.py")

    assert process.returncode == 0, process.stderr
    assert results["kind"] == "ablation_smoke"
    assert "no Hdim64FullPingpong: hdim64-full goes without" in process.stdout
    assert [lack["config"] for lack in results["missing_variants"]] == ["Hdim64FullPingpong"]
    long, short = results["rows"]
    assert (long["name"], short["name"]) == ("64-full-256", "64-full-64")
    for row in (long, short):
        assert row["planned"] == "FwdBf16Hdim64Full"
        # The study's, and what else is shipped for such a row.
        assert set(row["variants"]) == {
            *results["studies"][0]["variants"],
            "FwdBf16Hdim64Full128Rows",
        }
        assert all(entry["ok"] and entry["tflops"] > 0 for entry in row["variants"].values())
    assert list(long["peaked"]) == ["groups", "1", "8", "30"]
    assert long["peaked"]["8"]["lazy"]["redone"] == 0
    assert set(long["peaked"]["30"]) == {"lazy", "conditional", "classical"}
    assert results["profile"] == {"skipped": "not asked for"}


def test_every_variant_of_the_build_is_in_a_study(ablation):
    """And under its own head dim and mask, or the extension would refuse it."""
    header = (REPOSITORY / "cuda/fwd/ablation/variants.h").read_text()
    built = dict(re.findall(r"JAX_FA3_VARIANT\((\w+), FwdBf16(\w+),", header))
    listed = set(re.findall(r"^  X\((\w+)\)", header, re.MULTILINE))
    assert len(built) > 40
    assert listed == set(built)

    for study in ablation.STUDIES:
        for config in study.variants:
            if config in built:
                assert built[config] == f"Hdim{study.head_dim}{study.mask.capitalize()}"
    in_a_study = {config for study in ablation.STUDIES for config in study.variants}
    assert set(built) <= in_a_study


NCU = """==PROF== Connected to process 5
==PROF== Profiling "fwd_kernel": 0%....50%....100% - 2 passes
"ID","Kernel Name","Block Size","smsp__inst_executed.sum","sm__cycles_elapsed.max","x"
"","","","inst","cycle","%"
"0","void x::fwd_kernel<x::Fa3Hdim128Full>(x::FwdParams)","384","468,000,000","2,467,000","87.1"
"1","void fwd_kernel<FwdBf16Hdim128Full>(FwdParams)","512","430000000","2155000","n/a"
"2","void fwd_kernel<Broken>(FwdParams)","512","n/a","2155000","1"
"""


def test_ncus_figures_are_found_by_the_kernels_names(ablation):
    metrics = ablation.REQUIRED_METRICS | {"tensor_active_percent": "x"}

    assert ablation.read_profile(NCU, metrics) == {
        "Fa3Hdim128Full": {
            "instructions": 468e6,
            "cycles": 2467e3,
            "tensor_active_percent": 87.1,
        },
        "FwdBf16Hdim128Full": {"instructions": 430e6, "cycles": 2155e3},
    }
    assert ablation.read_profile("==ERROR== ERR_NVGPUCTRPERM", metrics) == {}


FAKE_NCU = """#!/bin/sh
[ "$1" = --version ] && { echo NVIDIA; echo Version 0.0; exit; }
for argument; do
  [ "$previous" = --log-file ] && log=$argument
  [ "$previous" = --metrics ] && metrics=$argument
  previous=$argument
done
case "$metrics" in
  *,*,*) echo "==ERROR== Failed to find metric" > "$log"; exit 1 ;;
  *) cp "$(dirname "$0")/figures" "$log" ;;
esac
"""


def test_ncu_is_asked_again_without_the_metrics_that_it_may_lack(ablation, tmp_path, monkeypatch):
    absl.flags.FLAGS(["test"])
    kernels = types.SimpleNamespace(path="no.so")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    (tmp_path / "figures").write_text(NCU)
    (tmp_path / "ncu").write_text(FAKE_NCU)
    (tmp_path / "ncu").chmod(0o755)

    found = ablation.profile(kernels)
    assert found["ncu"] == "Version 0.0"
    assert found["metrics"]["FwdBf16Hdim128Full"] == {"instructions": 430e6, "cycles": 2155e3}

    (tmp_path / "figures").write_text("==ERROR== ERR_NVGPUCTRPERM: no permission")
    assert ablation.profile(kernels) == {"skipped": "==ERROR== ERR_NVGPUCTRPERM: no permission"}
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert "ncu (Nsight Compute) is not on" in ablation.profile(kernels)["skipped"]


def test_rows_done_again_are_read_from_the_workspace(tree_hashes):
    fwd_workspace = importlib.import_module("fwd_workspace")
    start = fwd_workspace.layout()["kRedoCount"]
    words = np.full(start // 4 + 300, 0xFFFFFFFF, np.uint32)  # what no kernel has written
    words[start // 4 : start // 4 + 132] = np.arange(132)

    plan = "FwdBf16Hdim128Full: ...; 1376 tiles on 132 CTAs of 512 threads, 209 KiB shared"
    assert fwd_workspace.redone(words.view(np.uint8), plan) == 131 * 132 // 2
    assert fwd_workspace.groups(2, 65, 3) == 12


def ablation_results(ablation):
    """Made up: what is shipped 500 TFLOP/s, every variant 10 less than the one before."""
    rows = []
    for head_dim, mask in ((128, "full"), (128, "causal")):
        stem = f"Hdim{head_dim}{mask.capitalize()}"
        studies = [s for s in ablation.STUDIES if (s.head_dim, s.mask) == (head_dim, mask)]
        configs = dict.fromkeys(c for s in reversed(studies) for c in s.variants)
        for row in (ablation.long_row(head_dim, mask), ablation.short_row(head_dim, mask)):
            plan = f"FwdBf16{stem}: 192 queries x 64 keys, 5 stages; 1 tiles on 1 CTAs"
            variants = {
                config: {"plan": plan, "tflops": 500.0 - 10 * i, "relative_error": 2e-3}
                for i, config in enumerate(configs)
            }
            rows.append(
                row.fields()
                | {"planned": f"FwdBf16{stem}", "sm_clock_mhz": 1500, "variants": variants}
                | {"peers": {"cudnn": {"tflops": 400.0}}, "flash_attention_3_over_cudnn": 1.1}
            )
    rows[0]["variants"]["FwdBf16Hdim128Full128Rows"] = {
        "plan": "FwdBf16Hdim128Full128Rows: 128 queries x 128 keys, 3 stages, overlap, pingpong",
        "tflops": 450.0,
    }
    rows[1]["planned"] = "FwdBf16Hdim128Full128Rows"
    rule = {"relative_error": 2e-3, "tflops": 450.0}
    peaked = {"lazy": rule | {"redone": 16}, "conditional": rule, "classical": rule}
    rows[0]["peaked"] = {"groups": 64, **dict.fromkeys(("1", "8", "30"), peaked)}
    row = ablation.long_row(128, "full")
    counts = {
        "instructions": 6 * row.scores / 32,
        "cycles": 1.25 * row.flops / 4096 / 100,
        "tensor_active_percent": 80.4,
    }
    return made_up_results(
        "ablation",
        rows,
        studies=[dataclasses.asdict(study) for study in ablation.STUDIES],
        missing_variants=[{"study": "paper-full", "config": "x", "text": "no warp specialisation"}],
        profile={"ncu": "Version 2025.3", "metrics": {"FwdBf16Hdim128Full": counts}},
        build={"FwdBf16Hdim128Full": {"registers": 128, "stack": 0}},
    )


def test_the_report_writes_the_ablations_tables(report, ablation, checkout):
    repository, add = checkout
    add("ablation.json", ablation_results(ablation))

    assert report.main(["--repository", str(repository)]) == 0

    text = (repository / "docs" / "ablation.md").read_text()
    assert (
        "| shipped: 192 queries × 64 keys (planned at 2 × 8192) | 500 | 1.000 | 500 | 1.000 | 6.00 "
        "| 1.250 | 80 % | 0 | 2.00 |" in text
    )
    assert (
        "| shipped: 128 queries × 128 keys, pingpong (planned at 16 × 1024) | 450 | 0.900 | – "
        in text
    )
    assert "| overlap inside a warpgroup only | 400 | 0.976 | 400 | 0.976 |" in text
    assert "| FA3* | 440 | 0.880 | 440 | 0.880 |" in text
    assert "Not in this build: no warp specialisation." in text
    assert "| 128 full | lazy | 2.00 | 2.00 | 2.00 | 1.00 | 450 | 450 | 450 | 25 % |" in text
    assert "lazy has at most 1.00 times classical's error" in text
    assert "jax_fa3, head dim 64, full: the run ended before it." in text
    assert "Counted by Nsight Compute, Version 2025.3." in text


def test_three_digits(report):
    values = (0.01234, 1.0, 12.34, 999.6, 1234.5, None, math.nan)
    assert [report.three_digits(value) for value in values] == [
        *("0.0123", "1.00", "12.3", "1,000", "1,234"),
        *("–", "–"),
    ]


def test_the_demos_of_two_attentions_are_compared_step_by_step(report):
    run = {
        "attention": "auto",
        "steps": 3,
        "tokens_per_second": 300000.0,
        "train_seconds": 2.0,
        "first_loss": 5.5,
        "final_validation_loss": 2.5,
        "losses": [5.5, 4.0, 3.0],
        "comparison": {"losses": [[5.5, 4.0], [5.5, 4.004]]},
        "settings": {
            "steps": 3,
            "layers": 2,
            "model_dim": 64,
            "query_heads": 4,
            "key_value_heads": 2,
            "head_dim": 64,
            "dtype": "bfloat16",
            "seq_len": 128,
            "batch_size": 2,
        },
        "device": {"kind": "NVIDIA H200"},
        "parameters": 10**6,
        "unigram_entropy": 3.1,
    }
    other = {**run, "attention": "xla", "losses": [5.5, 4.01, 2.97]}
    text = report.demo_block([run, other])
    assert "differ by 0.0100 in the median step and by 0.0300 at most" in text
    assert "docs/figures/demo.svg" in text
    assert report.demo_figure([run, other]).count("<polyline") == 4  # two curves, two legends
    assert "differ" not in report.demo_block([run]), "one run has nothing to be compared with"
    assert "| 1e-03 (2 steps) |" in text
    elsewhere = {**other, "settings": {**run["settings"], "layers": 3}}
    assert "differ" not in report.demo_block([run, elsewhere])
    ended_early = {**other, "steps": 2, "losses": [5.5, 4.01]}
    assert "differ" not in report.demo_block([run, ended_early]), "another learning rate schedule"
