"""cuda_library: kernels compiled by nvcc with CMakeLists.txt's flags.

rules_cuda would do it too; this needs no registry, so the build can be tried without a network.
"""

load("@local_cuda//:nvcc.bzl", "NVCC")
load("@rules_cc//cc:defs.bzl", "cc_library")

_FLAGS = [
    "-std=c++17",
    "-O3",
    "-DNDEBUG",
    "--use_fast_math",
    "--expt-relaxed-constexpr",
    "-lineinfo",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",
]

def cuda_library(name, srcs, hdrs, visibility = None):
    """One object a .cu file, and a library of them.

    Args:
      name: the library's label.
      srcs: .cu files; each is one translation unit.
      hdrs: every header that they include, by label.
      visibility: as everywhere.
    """
    objects = []
    for src in srcs:
        out = src.replace("/", "_")[:-len(".cu")] + ".o"
        native.genrule(
            name = out[:-len(".o")] + "_object",
            srcs = [src] + hdrs,
            outs = [out],
            cmd = "%s %s -I. -c $(location %s) -o $@" % (NVCC, " ".join(_FLAGS), src),
            message = "Compiling CUDA",
        )
        objects.append(out)
    cc_library(
        name = name,
        srcs = objects,
        linkstatic = True,
        visibility = visibility,
        deps = ["@local_cuda//:cudart"],
    )
