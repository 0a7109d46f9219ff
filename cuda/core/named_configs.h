// What the plans of all passes do with their list of named configurations. Plain C++.
#pragma once

#include <cstddef>
#include <sstream>
#include <string>

#include "cuda/core/problem_rules.h"

namespace jax_fa3 {

// Heads that share the L2 fill about this much of its 50 MB with what each pass keeps there: more
// would evict each other, fewer leave CTAs without work. 32 MB measured best of 16, 32, 50 in the
// prototypes (forward, batch 2, seq 8192, head dim 128, H200).
constexpr int64_t kSharedL2Bytes = 32 * 1024 * 1024;

// Groups of at most `room` pairs, of equal size: a last group of one or two would have fewer tiles
// than there are multiprocessors, and everything would wait for the longest of them.
constexpr int64_t equal_groups(int64_t pairs, int64_t room) {
  if (pairs <= 0) return 1;
  const int64_t groups = ceil_div(pairs, room < 1 ? int64_t{1} : room);
  return ceil_div(pairs, groups);
}

// Index of the configuration with this name, -1 where there is none.
template <class Named, size_t kCount>
int find_config(const Named (&configs)[kCount], const std::string& name) {
  for (size_t i = 0; i < kCount; ++i) {
    if (name == configs[i].name) return static_cast<int>(i);
  }
  return -1;
}

template <class Config>
bool takes(const Config& config, const Problem& p) {
  return config.dtype == p.dtype && config.head_dim == p.head_dim && config.mask == p.mask;
}

// The configuration that the problem names, or the best of the first `shipped` ones that take it:
// better(a, b) says whether a is better than b; of equals the first is taken.
template <class Named, size_t kCount, class Better>
Status choose_config(const Named (&configs)[kCount], size_t shipped, const char* pass,
                     const Problem& problem, const Better& better, const Named*& found) {
  if (problem.config >= 0) {
    found = &configs[problem.config];
    if (takes(found->config, problem)) return {};
    return Status::invalid_argument(std::string("config ") + found->name + " is not for " +
                                    describe(problem));
  }
  found = nullptr;
  for (size_t i = 0; i < shipped; ++i) {
    if (!takes(configs[i].config, problem)) continue;
    if (found == nullptr || better(configs[i].config, found->config)) found = &configs[i];
  }
  if (found != nullptr) return {};
  std::ostringstream why;
  why << "no " << pass << " kernel for " << name(problem.dtype) << ", head_dim " << problem.head_dim
      << ", " << name(problem.mask) << "; there are:";
  for (const Named& named : configs) why << " " << named.name;
  return Status::unimplemented(why.str());
}

}  // namespace jax_fa3
