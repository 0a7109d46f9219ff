"""The machine's CUDA toolkit and Python as repositories, for MODULE.bazel."""

load("//tools/bazel:local.bzl", "local_cuda", "local_python")

def _local_impl(_module_ctx):
    local_cuda(name = "local_cuda")
    local_python(name = "local_python")

local = module_extension(implementation = _local_impl)
