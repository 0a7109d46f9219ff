// The device that a plan is made for.
#pragma once

#include "cuda/core/status.h"

namespace jax_fa3 {

struct Device {
  int sm_count = 132;  // H100 SXM, H200
};

// The current CUDA device, or why the kernels cannot run on it.
Status current_device(Device& device);

}  // namespace jax_fa3
