// wgmma: a warpgroup's matrix product, D[64, N] (+)= A[64, 16] B[16, N], asynchronous.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-instructions
#pragma once

#include <cstdint>

#include "cuda/core/types.h"

namespace jax_fa3::ptx {

// Before the first wgmma of a sequence, and whenever ordinary instructions touched the registers
// that it reads or accumulates into.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Returns when at most kPending of the newest groups are still running.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// An empty statement that claims to change the registers. `asm volatile` without operands does not
// order plain uses of the accumulators; this does. Needed after each wait and before the fence.
template <int kCount>
__device__ __forceinline__ void fence_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void fence_registers(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// A shared-memory operand: 64-bit matrix descriptor whose high word (stride, swizzle) never
// changes and whose low word (address) is stepped by adding constants. Kept apart because adding
// to 64-bit descriptors costs instructions (measured: 643 against 611 a tile).
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout-matrix-descriptor
struct SmemOperand {
  uint32_t low;
  uint32_t high;

  __device__ __forceinline__ uint64_t descriptor(int byte_offset) const {
    uint64_t value;
    asm("mov.b64 %0, {%1, %2};" : "=l"(value) : "r"(low + (byte_offset >> 4)), "r"(high));
    return value;
  }
};

inline constexpr uint32_t kSwizzle128 = 1u << 30;    // descriptor bits 62-63
inline constexpr uint32_t kAtomStride = 1024u >> 4;  // 8 rows of 128 bytes

// A tile [rows][64] of 16-bit elements with the contracted dimension contiguous (K-major). A step
// of 16 along the contraction is 32 bytes inside the swizzle atom.
__device__ __forceinline__ SmemOperand k_major_operand(uint32_t address) {
  return {((address & 0x3ffff) >> 4) | (1u << 16), kAtomStride | kSwizzle128};
}
// A tile [rows][64] with the rows contracted (MN-major); `chunk_bytes` is the distance between
// neighbouring 64-wide columns of the tile. A step of 16 along the contraction is 2048 bytes.
__device__ __forceinline__ SmemOperand mn_major_operand(uint32_t address, int chunk_bytes) {
  return {((address & 0x3ffff) >> 4) | (static_cast<uint32_t>(chunk_bytes >> 4) << 16),
          kAtomStride | kSwizzle128};
}

enum class Major { kK, kMN };

// Wgmma<dtype, N>::ss takes A and B from shared memory, ::rs takes A from registers. `accumulate`
// 0 overwrites D, which saves zeroing it.
template <DType kType, int kN>
struct Wgmma;

// clang-format off
// Register lists of the inline assembly: %0 ... and the accumulators behind them, by eights.
#define JAX_FA3_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define JAX_FA3_R16 JAX_FA3_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define JAX_FA3_R24 JAX_FA3_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define JAX_FA3_R32 JAX_FA3_R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define JAX_FA3_R40 JAX_FA3_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define JAX_FA3_R48 JAX_FA3_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define JAX_FA3_R56 JAX_FA3_R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define JAX_FA3_R64 JAX_FA3_R56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define JAX_FA3_R72 JAX_FA3_R64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define JAX_FA3_R80 JAX_FA3_R72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define JAX_FA3_R88 JAX_FA3_R80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define JAX_FA3_R96 JAX_FA3_R88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define JAX_FA3_R104 JAX_FA3_R96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define JAX_FA3_R112 JAX_FA3_R104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define JAX_FA3_R120 JAX_FA3_R112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define JAX_FA3_R128 JAX_FA3_R120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define JAX_FA3_E(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define JAX_FA3_D8 JAX_FA3_E(0), JAX_FA3_E(4)
#define JAX_FA3_D16 JAX_FA3_D8, JAX_FA3_E(8), JAX_FA3_E(12)
#define JAX_FA3_D24 JAX_FA3_D16, JAX_FA3_E(16), JAX_FA3_E(20)
#define JAX_FA3_D32 JAX_FA3_D24, JAX_FA3_E(24), JAX_FA3_E(28)
#define JAX_FA3_D40 JAX_FA3_D32, JAX_FA3_E(32), JAX_FA3_E(36)
#define JAX_FA3_D48 JAX_FA3_D40, JAX_FA3_E(40), JAX_FA3_E(44)
#define JAX_FA3_D56 JAX_FA3_D48, JAX_FA3_E(48), JAX_FA3_E(52)
#define JAX_FA3_D64 JAX_FA3_D56, JAX_FA3_E(56), JAX_FA3_E(60)
#define JAX_FA3_D72 JAX_FA3_D64, JAX_FA3_E(64), JAX_FA3_E(68)
#define JAX_FA3_D80 JAX_FA3_D72, JAX_FA3_E(72), JAX_FA3_E(76)
#define JAX_FA3_D88 JAX_FA3_D80, JAX_FA3_E(80), JAX_FA3_E(84)
#define JAX_FA3_D96 JAX_FA3_D88, JAX_FA3_E(88), JAX_FA3_E(92)
#define JAX_FA3_D104 JAX_FA3_D96, JAX_FA3_E(96), JAX_FA3_E(100)
#define JAX_FA3_D112 JAX_FA3_D104, JAX_FA3_E(104), JAX_FA3_E(108)
#define JAX_FA3_D120 JAX_FA3_D112, JAX_FA3_E(112), JAX_FA3_E(116)
#define JAX_FA3_D128 JAX_FA3_D120, JAX_FA3_E(120), JAX_FA3_E(124)

// One specialisation. `regs` is N / 2 accumulators; i0... are the operand numbers after them.
#define JAX_FA3_WGMMA(dtype, type, n, regs, i0, i1, i2, i3, i4, i5, i6)                          \
  template <>                                                                                    \
  struct Wgmma<dtype, n> {                                                                       \
    template <Major kMajorA, Major kMajorB>                                                      \
    static __device__ __forceinline__ void ss(float (&d)[regs], uint64_t a, uint64_t b,          \
                                              int accumulate) {                                  \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\n"                             \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type               \
                   " {" JAX_FA3_R##regs "}, %" #i0 ", %" #i1 ", p, 1, 1, %" #i3 ", %" #i4 ";\n}" \
                   : JAX_FA3_D##regs                                                             \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kMajorA == Major::kMN),                \
                     "n"(kMajorB == Major::kMN));                                                \
    }                                                                                            \
    template <Major kMajorB>                                                                     \
    static __device__ __forceinline__ void rs(float (&d)[regs], uint32_t a0, uint32_t a1,        \
                                              uint32_t a2, uint32_t a3, uint64_t b,              \
                                              int accumulate) {                                  \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i5 ", 0;\n"                             \
                   "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type               \
                   " {" JAX_FA3_R##regs "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4     \
                   ", p, 1, 1, %" #i6 ";\n}"                                                     \
                   : JAX_FA3_D##regs                                                             \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate),                \
                     "n"(kMajorB == Major::kMN));                                                \
    }                                                                                            \
  };
#define JAX_FA3_WGMMA_TYPES(n, regs, ...)                              \
  JAX_FA3_WGMMA(DType::kBF16, "bf16", n, regs, __VA_ARGS__) \
  JAX_FA3_WGMMA(DType::kF16, "f16", n, regs, __VA_ARGS__)

JAX_FA3_WGMMA_TYPES(32, 16, 16, 17, 18, 19, 20, 21, 22)
JAX_FA3_WGMMA_TYPES(64, 32, 32, 33, 34, 35, 36, 37, 38)
JAX_FA3_WGMMA_TYPES(80, 40, 40, 41, 42, 43, 44, 45, 46)
JAX_FA3_WGMMA_TYPES(96, 48, 48, 49, 50, 51, 52, 53, 54)
JAX_FA3_WGMMA_TYPES(112, 56, 56, 57, 58, 59, 60, 61, 62)
JAX_FA3_WGMMA_TYPES(128, 64, 64, 65, 66, 67, 68, 69, 70)
JAX_FA3_WGMMA_TYPES(144, 72, 72, 73, 74, 75, 76, 77, 78)
JAX_FA3_WGMMA_TYPES(160, 80, 80, 81, 82, 83, 84, 85, 86)
JAX_FA3_WGMMA_TYPES(176, 88, 88, 89, 90, 91, 92, 93, 94)
JAX_FA3_WGMMA_TYPES(192, 96, 96, 97, 98, 99, 100, 101, 102)
JAX_FA3_WGMMA_TYPES(256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef JAX_FA3_WGMMA_TYPES
#undef JAX_FA3_WGMMA
// clang-format on

}  // namespace jax_fa3::ptx
