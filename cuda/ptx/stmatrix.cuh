// stmatrix: a warp stores 8 x 8 matrices of 16-bit elements whose fragments its lanes hold.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-stmatrix
#pragma once

#include <cstdint>

namespace jax_fa3::ptx {

// Four matrices. Lane l gives the shared-memory address of row l % 8 of matrix l / 8; register i
// holds columns 2 (l % 4), 2 (l % 4) + 1 of row l / 4 of matrix i.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2,
                                            uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(r0), "r"(r1), "r"(r2), "r"(r3)
               : "memory");
}

}  // namespace jax_fa3::ptx
