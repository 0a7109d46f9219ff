"""What Bazel 4's own tools load when they look for toolchains; nothing here is Java."""

java_import = native.java_import
java_runtime = native.java_runtime
java_toolchain = native.java_toolchain
