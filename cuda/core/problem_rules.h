// What every pass asks of a Problem, and its text.
#pragma once

#include <string>

#include "cuda/core/problem.h"
#include "cuda/core/status.h"

namespace jax_fa3 {

// InvalidArgument lists every field that is out of range.
Status check_problem(const Problem& problem);

// The problem's sizes, for people.
std::string describe(const Problem& problem);

}  // namespace jax_fa3
