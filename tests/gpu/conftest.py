"""Every test in this folder runs kernels."""

import os
import pathlib

import jax
import pytest

HERE = pathlib.Path(__file__).parent


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def two_gpus():
    """The first two GPUs of this host; JAX_FA3_REQUIRE_GPU=2 promises that there are as many."""
    gpus = jax.local_devices(backend="cuda")
    if len(gpus) < 2:
        reason = f"needs two GPUs of one host, sees {len(gpus)}"
        if os.environ.get("JAX_FA3_REQUIRE_GPU") == "2":
            pytest.fail(f"JAX_FA3_REQUIRE_GPU is 2, but the test {reason}", pytrace=False)
        pytest.skip(reason)
    return gpus[:2]
