"""Repositories made of what this machine has, found as CMakeLists.txt finds it.

@local_cuda    nvcc (its name, in nvcc.bzl), the toolkit's headers and its static runtime
@local_python  the headers of Python, nanobind and XLA's FFI (from jaxlib), for the python3 on the path
"""

_CUDA_BUILD = """
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "cudart",
    srcs = ["libcudart_static.a"],
    hdrs = glob(["include/**"]),
    includes = ["include"],
    linkopts = ["-lpthread", "-ldl", "-lrt"],
)
"""

def _local_cuda_impl(ctx):
    nvcc = ctx.os.environ.get("CUDACXX") or ctx.which("nvcc")
    if not nvcc:
        fail("No nvcc: put it on the path or set CUDACXX")

    # A dry run prints the toolkit's folder, also where nvcc is a wrapper script.
    result = ctx.execute([nvcc, "-v", "--dryrun", "-x", "cu", "/dev/null"])
    top = [line[len("#$ TOP="):] for line in result.stderr.split("\n") if line.startswith("#$ TOP=")]
    if not top:
        fail("nvcc does not say where its toolkit is:\n" + result.stderr)
    toolkit = ctx.path(top[0])
    runtimes = [toolkit.get_child(folder).get_child("libcudart_static.a") for folder in ("lib64", "lib")]
    runtimes = [path for path in runtimes if path.exists]
    if not runtimes:
        fail("No libcudart_static.a in %s" % toolkit)
    ctx.symlink(toolkit.get_child("include"), "include")
    ctx.symlink(runtimes[0], "libcudart_static.a")
    ctx.file("nvcc.bzl", '"""The CUDA compiler of this machine."""\n\nNVCC = "%s"\n' % nvcc)
    ctx.file("BUILD", _CUDA_BUILD)

local_cuda = repository_rule(
    implementation = _local_cuda_impl,
    environ = ["CUDACXX", "PATH"],
    local = True,
    doc = "The CUDA toolkit of $CUDACXX or the nvcc on the path.",
)

_PYTHON_BUILD = """
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "python",
    hdrs = glob(["python/**"]),
    includes = ["python"],
)

cc_library(
    name = "xla_ffi",
    hdrs = glob(["xla_ffi/**"]),
    includes = ["xla_ffi"],
)

cc_library(
    name = "nanobind",
    srcs = ["nanobind/src/nb_combined.cpp"],
    hdrs = glob([
        "nanobind/include/**",
        "nanobind/src/*.h",
        "nanobind/ext/**",
    ]),
    textual_hdrs = glob(
        ["nanobind/src/*.cpp"],
        exclude = ["nanobind/src/nb_combined.cpp"],
    ),
    copts = ["-fno-strict-aliasing", "-fvisibility=hidden"],
    includes = [
        "nanobind/ext/robin_map/include",
        "nanobind/include",
    ],
    deps = [":python"],
)
"""

# The folders, without importing jaxlib.
_FIND = """
import importlib.util as util, os, sysconfig
for package in ("jaxlib", "nanobind"):
    spec = util.find_spec(package)
    print(os.path.dirname(spec.origin) if spec else "")
print(sysconfig.get_paths()["include"])
"""

def _local_python_impl(ctx):
    python = ctx.which("python3")
    if not python:
        fail("No python3 on the path")
    result = ctx.execute([python, "-c", _FIND])
    if result.return_code:
        fail("%s: %s" % (python, result.stderr))
    jaxlib, nanobind, include = result.stdout.strip("\n").split("\n")
    if not jaxlib or not nanobind:
        fail("%s has no jaxlib or no nanobind" % python)
    ctx.symlink(jaxlib + "/include", "xla_ffi")
    ctx.symlink(nanobind, "nanobind")
    ctx.symlink(include, "python")
    ctx.file("BUILD", _PYTHON_BUILD)

local_python = repository_rule(
    implementation = _local_python_impl,
    environ = ["PATH"],
    local = True,
    doc = "What the extension includes, from the packages of the python3 on the path.",
)
