"""What every test shares: eight CPU devices, strict promotion, fresh data, marks."""

import os

# Read when the CPU client is built, at the first use of a device.
_DEVICES = "--xla_force_host_platform_device_count"
if _DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}=8".strip()
# Several xdist workers share one GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# The package must not lean on implicit promotion: its users may have switched it off.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")

import helpers  # noqa: E402  (after the environment)
import jax  # noqa: E402
import pytest  # noqa: E402
from helpers import missing_extension, missing_gpu, required  # noqa: E402


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs kernels on a GPU of compute capability 9.0")
    config.addinivalue_line("markers", "extension: needs the compiled extension, no GPU")
    config.addinivalue_line("markers", "optimised: compiled as users compile, not quickly")
    config.addinivalue_line("markers", "big: takes gigabytes of GPU memory or several seconds")


def pytest_report_header(config):
    return [
        f"jax {jax.__version__}, test data seed {helpers.SESSION_SEED} (JAX_FA3_TEST_SEED)",
        f"kernels: {missing_gpu() or 'a GPU of compute capability 9.0'}",
        f"extension: {missing_extension() or 'present'}",
    ]


def pytest_runtest_setup(item):
    needs_gpu = item.get_closest_marker("gpu") is not None
    needs = [(missing_gpu, "JAX_FA3_REQUIRE_GPU")] if needs_gpu else []
    if needs_gpu or item.get_closest_marker("extension") is not None:
        needs.append((missing_extension, "JAX_FA3_REQUIRE_EXTENSION"))
    for missing, variable in needs:
        if (reason := missing()) is None:
            continue
        # A run that was promised the hardware must not turn green by skipping.
        if required(variable) or (needs_gpu and required("JAX_FA3_REQUIRE_GPU")):
            pytest.fail(f"{variable} is set, but {reason}", pytrace=False)
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _fresh_data(request):
    """Each test draws its own numbers, the same in every run and on every worker."""
    helpers.seed_from(request.node.nodeid)
