"""pytest_test: one test file, run by pytest with the packages of the python3 on the path."""

load("@rules_python//python:defs.bzl", "py_test")

def pytest_test(name, src, deps, data = [], size = "large"):
    py_test(
        name = name,
        size = size,
        srcs = [src, "//tools/bazel:pytest_main.py"],
        main = "//tools/bazel:pytest_main.py",
        args = ["$(location %s)" % src],
        data = data,
        deps = deps,
    )
