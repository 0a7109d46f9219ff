"""Two processes, two CPU devices each, one mesh over all four: training steps, against one process.

A process sees only its own shards, so what a single process with eight fake devices would forgive
(an array that is made of another host's data, a collective in another order) hangs or fails here.
"""

import functools
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TOLERANCE
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_fa3

PROCESSES, DEVICES_EACH = 2, 2
SECONDS = 240  # for both processes together: start, compilation, steps; a hang ends here
STEPS = 2  # the second loss has the first step's gradients in it

BATCH, LENGTH, WIDTH = 4, 8, 16
HEADS_Q, HEADS_K = 4, 2
# float32 takes the xla function, bfloat16 of head dim 64 the primitives.
DOORS = {"xla": (jnp.float32, 8), "primitive": (jnp.bfloat16, 64)}
# Which mesh axis spans the processes, and of what kind the axes are.
MESHES = {
    "batch across processes, Auto": (("data", "heads"), AxisType.Auto),
    "batch across processes, Explicit": (("data", "heads"), AxisType.Explicit),
    "heads across processes, Auto": (("heads", "data"), AxisType.Auto),
    "heads across processes, Explicit": (("heads", "data"), AxisType.Explicit),
}
PARTITION = {"x": P("data"), "q": P(None, "heads"), "k": P(None, "heads"), "v": P(None, "heads")}


def host_data(door):
    """x [B, T, E] and weights [E, heads, H] of query, key and value: the same in every process."""
    _, h = DOORS[door]
    rng = np.random.default_rng(12)
    shapes = {"x": (BATCH, LENGTH, WIDTH), "q": (WIDTH, HEADS_Q, h)}
    shapes |= dict.fromkeys("kv", (WIDTH, HEADS_K, h))
    return {
        name: rng.standard_normal(shape, dtype=np.float32)
        / np.sqrt(shape[-1 if name == "x" else 0])
        for name, shape in shapes.items()
    }


def train(door, x, weights):
    """Losses and gradients of STEPS steps of gradient descent through attention."""
    dtype, _ = DOORS[door]

    def loss(weights):
        q, k, v = (jnp.einsum("bte,enh->btnh", x, weights[name]) for name in "qkv")
        out, lse = jax_fa3.dot_product_attention(
            *(y.astype(dtype) for y in (q, k, v)), is_causal=True, return_residual=True
        )
        return jnp.square(out.astype(jnp.float32) - 1).mean() + jnp.square(lse).mean()

    losses = []
    for _ in range(STEPS):
        value, grads = jax.value_and_grad(loss)(weights)
        losses.append(value)
        weights = jax.tree.map(lambda w, g: w - g, weights, grads)
    return {"losses": jnp.stack(losses), **grads}


def worker(address, index, folder):
    """One of the processes; the first writes what all of them computed."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_disable_most_optimizations", True)  # as quick_compile, for time
    jax.distributed.initialize(address, PROCESSES, index, initialization_timeout=SECONDS // 4)
    assert jax.process_count() == PROCESSES
    assert len(jax.local_devices()) == DEVICES_EACH
    devices = np.asarray(jax.devices()).reshape(PROCESSES, DEVICES_EACH)
    for mesh_name, (axes, kind) in MESHES.items():
        mesh = jax.sharding.Mesh(devices, axes, axis_types=(kind, kind))
        # The first axis is the one that spans them: a row of the mesh is one process's.
        assert [{d.process_index for d in row} for row in mesh.devices] == [{0}, {1}]
        for door in DOORS:
            arrays = {
                name: jax.make_array_from_callback(
                    value.shape, NamedSharding(mesh, PARTITION[name]), value.__getitem__
                )
                for name, value in host_data(door).items()
            }
            x = arrays.pop("x")
            with jax.set_mesh(mesh):
                step = jax.jit(functools.partial(train, door))
                found = step(x, arrays)
                # Gradients lie as the weights do, not replicated.
                for name, w in arrays.items():
                    assert found[name].sharding.is_equivalent_to(w.sharding, w.ndim), name
                found = jax.jit(dict, out_shardings=NamedSharding(mesh, P()))(found)
                found = {name: np.asarray(y) for name, y in found.items()}
            if index == 0:
                np.savez(folder / f"{mesh_name}, {door}.npz", **found)
    jax.distributed.shutdown()


# --- the tests' side ---


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_processes(folder):
    """None, or everything that the processes printed when one failed or the time was over."""
    tests = pathlib.Path(__file__).resolve().parents[1]
    package = pathlib.Path(jax_fa3.__file__).resolve().parents[1]
    path = [str(package), str(tests), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES_EACH}",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
    # A cluster's or a proxy's settings would redirect what is meant to stay on this machine.
    for name in list(environment):
        if name.lower().endswith("_proxy") or name.startswith(("JAX_COORDINATOR", "SLURM_")):
            del environment[name]
    address = f"localhost:{free_port()}"
    logs = [folder / f"process {i}.txt" for i in range(PROCESSES)]
    running = []
    try:
        for i, log in enumerate(logs):
            command = [sys.executable, __file__, address, str(i), str(folder)]
            with log.open("w") as out:  # a file, which no unread pipe can block
                running.append(
                    subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
                )
        deadline = time.monotonic() + SECONDS
        while any(p.poll() is None for p in running) and time.monotonic() < deadline:
            if any(p.poll() for p in running):  # the others would wait for the one that failed
                time.sleep(1)
                break
            time.sleep(0.1)
        statuses = [p.poll() for p in running]
    finally:
        for p in running:
            if p.poll() is None:
                p.kill()
            p.wait()
    if statuses == [0] * PROCESSES:
        return None
    ended = ["still running" if s is None else f"exit status {s}" for s in statuses]
    return "\n".join(
        f"--- process {i}: {ended[i]}\n{log.read_text(errors='replace')}"
        for i, log in enumerate(logs)
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder with every case's numbers: the processes run once for all tests."""
    failure = None
    for _ in range(3):
        folder = tmp_path_factory.mktemp("processes")
        failure = run_processes(folder)
        if failure is None:
            return folder
        # Another program may have taken the port between its choice and its use.
        if "address already in use" not in failure.lower():
            break
    if "Multiprocess computations aren't implemented on the CPU backend" in failure:
        pytest.skip(f"jaxlib {jax.lib.__version__} has no collectives between CPU processes")
    return pytest.fail(failure, pytrace=False)


@functools.cache
def of_one_process(door):
    data = host_data(door)
    x = data.pop("x")
    return jax.tree.map(np.asarray, jax.jit(functools.partial(train, door))(x, data))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("mesh", MESHES)
def test_training_over_two_processes_is_that_of_one(results, mesh, door):
    """Losses of both steps, and the gradient of every weight."""
    found = np.load(results / f"{mesh}, {door}.npz")
    expected = of_one_process(door)
    assert set(found) == set(expected)
    assert found["losses"][1] < found["losses"][0]
    # The same arithmetic on every device: what differs is the order of the sums over devices, and
    # in 16 bit the rounding of what they add.
    tolerance = TOLERANCE[np.dtype(DOORS[door][0]).name]
    for name, right in expected.items():
        largest = np.abs(right).max()
        np.testing.assert_allclose(
            found[name], right, rtol=0, atol=tolerance * largest, err_msg=name
        )


if __name__ == "__main__":
    worker(sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]))
