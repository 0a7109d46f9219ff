"""CPU tests stay on the CPU, also on a machine whose default device is a GPU."""

import helpers
import jax
import pytest

from jax_fa3 import _native


@pytest.fixture(autouse=True)
def _on_the_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture
def quick_compile(request):
    """Compiles in half the time, for tests whose sentence does not depend on XLA's optimiser.

    In a file that uses it throughout, the mark `optimised` takes a test out.
    """
    quick = request.node.get_closest_marker("optimised") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def kernels(monkeypatch):
    """Programs lower to the kernels: by the compiled extension, or a stand-in where it is missing.

    The stand-in lets a build without kernels check the lowering rule, which is Python.
    """
    reason = helpers.missing_extension()
    if reason is None:
        return _native.extension()
    if helpers.required("JAX_FA3_REQUIRE_EXTENSION"):
        pytest.fail(f"JAX_FA3_REQUIRE_EXTENSION is set, but {reason}", pytrace=False)
    fake = helpers.fake_extension()
    monkeypatch.setattr(_native, "_load", lambda: (fake, ""))
    return fake


@pytest.fixture
def no_extension(monkeypatch):
    """A build without kernels."""
    monkeypatch.setattr(_native, "_load", lambda: (None, "the extension is not installed"))


class FakeGpu:
    device_kind = "NVIDIA A100-SXM4-80GB"
    compute_capability = "8.0"


@pytest.fixture
def other_gpu(monkeypatch, kernels):
    """The extension is there, and the visible GPU is not a Hopper."""
    monkeypatch.setattr(_native, "visible_gpus", lambda: [FakeGpu()])


@pytest.fixture
def old_driver(monkeypatch):
    """The extension is there, and the driver supports CUDA 12.8 at most."""
    fake = helpers.fake_extension(driver=12080)
    monkeypatch.setattr(_native, "_load", lambda: (fake, ""))
