"""The installed package: names, import, the command."""

import importlib.metadata
import inspect
import os
import pathlib
import re
import subprocess
import sys

import helpers
import jax
import pytest

import jax_fa3

TOP_LEVEL = (
    "dot_product_attention",
    "varlen_attention",
    "remat_policy",
    "is_supported",
    "explain",
    "reference",
    "config",
    "UnsupportedError",
)


def run(*args, env=None, check=True, **kwargs):
    """A fresh interpreter with the tests' jax_fa3 first on its path."""
    root = str(pathlib.Path(jax_fa3.__file__).parent.parent)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **(env or {})}
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("name", TOP_LEVEL)
def test_top_level_names(name):
    assert hasattr(jax_fa3, name)
    assert name in jax_fa3.__all__


def test_all_is_what_is_there_and_nothing_private():
    assert not [n for n in jax_fa3.__all__ if not hasattr(jax_fa3, n)]
    assert not [n for n in jax_fa3.__all__ if n.startswith("_") and n != "__version__"]
    public = {n for n in vars(jax_fa3) if not n.startswith("_")}
    modules = {n for n in public if inspect.ismodule(getattr(jax_fa3, n))}
    assert public - modules <= set(jax_fa3.__all__)


def test_version_is_the_distributions():
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?\S*", jax_fa3.__version__)
    try:
        installed = importlib.metadata.version("jax_fa3")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("run from a source tree: no distribution to compare with")
    assert installed == jax_fa3.__version__


def test_public_functions_have_docstrings_that_answer():
    """What, shapes, units, errors, source."""
    doc = jax_fa3.dot_product_attention.__doc__ or ""
    for word in ("[*batch, T, N, H]", "natural log", "Raises", "ValueError", "UnsupportedError"):
        assert word in doc
    for name in inspect.signature(jax_fa3.dot_product_attention).parameters:
        assert name in doc, f"{name} is not documented"
    for name in inspect.signature(jax_fa3.varlen_attention).parameters:
        assert name in (jax_fa3.varlen_attention.__doc__ or ""), f"{name} is not documented"


SIGNATURE = """query key value bias=None mask=None * scale=None is_causal=False
causal_alignment='top_left' query_offset=None query_seq_lengths=None key_value_seq_lengths=None
local_window_size=None query_segment_ids=None key_value_segment_ids=None logits_soft_cap=None
sinks=None query_descale=None key_descale=None value_descale=None out_dtype=None
deterministic_backward=None checkpoint_name=None return_residual=False implementation=None"""

VARLEN = """query key value cu_seqlens_q cu_seqlens_k=None * max_seqlen_q=None max_seqlen_k=None
scale=None is_causal=False causal_alignment='top_left' local_window_size=None logits_soft_cap=None
sinks=None deterministic_backward=None checkpoint_name=None return_residual=False
implementation=None"""


def written(function):
    """A signature as name or name=default, with * before the keywords."""
    words, star = [], False
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            words.append("*")
            star = True
        bare = parameter.default is parameter.empty
        words.append(name if bare else f"{name}={parameter.default!r}")
    return words


def test_signatures_are_the_contracts():
    assert written(jax_fa3.dot_product_attention) == SIGNATURE.split()
    assert written(jax_fa3.varlen_attention) == VARLEN.split()
    keywords = inspect.signature(jax_fa3.dot_product_attention).parameters
    theirs = inspect.signature(jax_fa3.reference.dot_product_attention).parameters
    assert list(theirs) == list(keywords)


@pytest.mark.extension
def test_supported_head_dims_are_the_extensions():
    """The list that tracing uses is written in Python, so that it needs no extension."""
    from jax_fa3 import _jax_fa3, _support

    assert sorted(_support.KERNEL_HEAD_DIMS) == sorted(_jax_fa3.supported_head_dims())
    assert sorted(_support.KERNEL_HEAD_DIMS) == sorted(_jax_fa3.bwd_head_dims())


# --- Import --------------------------------------------------------------------------------------


def test_imports_without_a_gpu_a_driver_or_a_backend():
    """Importing starts no backend: a program may still choose its platform afterwards."""
    code = (
        "import jax_fa3, jax\n"
        "from jax._src import xla_bridge\n"
        "print(len(getattr(xla_bridge, '_backends', {})))\n"
    )
    assert run("-c", code).stdout.strip() == "0"


def test_import_is_light():
    """Frameworks and plotting are imported only when asked for."""
    code = "import sys, jax_fa3; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["flax", "equinox", "matplotlib", "absl.logging", "chex", "tqdm", "optax"]
    before = run(
        "-c", "import sys, jax; print([m for m in sys.argv[1:] if m in sys.modules])", *heavy
    )
    assert run("-c", code, *heavy).stdout == before.stdout


def test_import_survives_a_missing_extension():
    """Also where a broken one lies in the package: the call falls back, the command says why."""
    code = (
        "import sys; sys.modules['jax_fa3._jax_fa3'] = None\n"
        "import jax, jax.numpy as jnp, jax_fa3\n"
        "q = jnp.ones((1, 4, 2, 64), jnp.bfloat16)\n"
        "print(jax_fa3.dot_product_attention(q, q, q).shape)\n"
        "f = lambda q: jax_fa3.dot_product_attention(q, q, q)\n"
        "print('custom_call @jax_fa3' in jax.jit(f).trace(q).lower("
        "lowering_platforms=('cuda',)).as_text())\n"
    )
    assert run("-c", code).stdout.split("\n")[:2] == ["(1, 4, 2, 64)", "False"]


def test_a_newer_ffi_is_not_registered_with_an_older_jaxlib():
    """XLA would refuse the handler and disable the whole CUDA backend with it."""
    from jax_fa3 import _native

    found = _native.ffi_api_found()
    assert found is not None
    for api, usable in [(found, True), ((found[0], found[1] + 1), False), ((0, 1), True)]:
        code = (
            "import sys; sys.path.insert(0, sys.argv[1])\n"
            "import helpers\n"
            f"sys.modules['jax_fa3._jax_fa3'] = helpers.fake_extension(api={api})\n"
            "import jax, jax.numpy as jnp, jax_fa3\n"
            "q = jnp.ones((1, 4, 2, 64), jnp.bfloat16)\n"
            "f = lambda q: jax_fa3.dot_product_attention(q, q, q)\n"
            "print(helpers.kernel_calls(helpers.cuda_text(f, q)))\n"
        )
        printed = run("-c", code, str(pathlib.Path(helpers.__file__).parent)).stdout.strip()
        assert printed == str(int(usable)), api


def test_the_environment_sets_determinism():
    code = "import jax_fa3; print(jax_fa3.config.deterministic_backward)"
    for value, wanted in [("1", "True"), ("0", "False"), ("", "False"), ("true", "True")]:
        assert run("-c", code, env={"JAX_FA3_DETERMINISTIC": value}).stdout.strip() == wanted
    failed = run("-c", code, env={"JAX_FA3_DETERMINISTIC": "perhaps"}, check=False)
    assert failed.returncode != 0
    assert "JAX_FA3_DETERMINISTIC" in failed.stderr


def test_py_typed_is_shipped():
    assert (pathlib.Path(jax_fa3.__file__).parent / "py.typed").exists()


# --- python -m jax_fa3 ---------------------------------------------------------------------------


def test_the_command_prints_what_a_bug_report_needs():
    text = run("-m", "jax_fa3").stdout
    assert jax.__version__ in text
    assert jax_fa3.__version__ in text
    for word in ("jaxlib", "FFI", "driver", "device", "kernel"):
        assert word.lower() in text.lower(), f"{word} is not in:\n{text}"
    # Whether they will be used, in words; on this machine with no GPU they will not.
    assert re.search(r"will (not )?be used|not used|used: (yes|no)", text, re.I), text


def test_the_command_says_why_there_are_no_kernels():
    code = (
        "import sys, runpy; sys.modules['jax_fa3._jax_fa3'] = None\n"
        "sys.argv = ['jax_fa3']; runpy.run_module('jax_fa3', run_name='__main__')"
    )
    assert "extension" in run("-c", code).stdout


def test_explain_shows_the_choice_for_a_shape():
    shown = run(
        "-m", "jax_fa3", "explain", "--head-dim", "128", "--causal", "--heads-k", "4"
    ).stdout
    assert "fa3 takes this call" in shown
    assert "128" in shown
    if helpers.missing_extension() is None:
        assert "FwdBf16Hdim128Causal" in shown, "the plan is missing"


def test_explain_names_every_reason_against_the_kernels():
    asked = ["--head-dim", "96", "--soft-cap", "30", "--window", "128", "0", "--bias", "--lengths"]
    shown = run("-m", "jax_fa3", "explain", *asked).stdout
    for word in ("xla", "96", "logits_soft_cap", "local_window_size", "bias", "lengths"):
        assert word in shown


def test_explain_shows_a_mistake_as_one_and_fails():
    done = run("-m", "jax_fa3", "explain", "--heads-q", "6", "--heads-k", "4", check=False)
    assert done.returncode != 0
    assert "key" in done.stderr
    assert "Traceback" not in done.stderr


def test_bench_has_help():
    assert "usage" in run("-m", "jax_fa3", "bench", "--help").stdout.lower()


def test_an_unknown_command_exits_with_2_and_names_the_known_ones():
    done = run("-m", "jax_fa3", "explian", check=False)
    assert done.returncode == 2
    assert "explain" in done.stderr


def test_the_stub_of_the_extension_matches_it():
    stub = (pathlib.Path(jax_fa3.__file__).parent / "_jax_fa3.pyi").read_text()
    named = set(re.findall(r"^def (\w+)\(", stub, re.M))
    fake = {n for n, x in vars(helpers.fake_extension()).items() if callable(x)}
    assert named == fake
    if helpers.missing_extension() is None:
        real = importlib.import_module("jax_fa3._jax_fa3")
        assert not [n for n in named if not callable(getattr(real, n, None))]


def test_source_names_no_path_outside_the_repository():
    package = pathlib.Path(jax_fa3.__file__).parent
    for path in package.rglob("*.py"):
        assert "../shared" not in path.read_text(), path


@pytest.mark.parametrize("flags", [["--output=x.json"], ["--output", "x.json"], []], ids=str)
def test_the_benchmarks_results_are_drawn_where_they_are(flags, monkeypatch, tmp_path):
    """Also where --output and its file are two words."""
    main = importlib.import_module("jax_fa3.__main__")
    benchmark = tmp_path / "attention.py"
    benchmark.touch()
    commands, drawn = [], []
    monkeypatch.setattr(main, "_BENCHMARK", benchmark)
    monkeypatch.setattr(main.subprocess, "call", lambda command: commands.append(command) or 0)
    monkeypatch.setattr(main, "_draw", drawn.append)
    main._bench([*flags, "--smoke"])
    wanted = "x.json" if flags else "jax_fa3_bench.json"
    assert commands[0][1:] == [str(benchmark), f"--output={wanted}", "--smoke"]
    assert drawn == [pathlib.Path(wanted)]
