#include "cuda/core/problem_rules.h"

#include <cstdint>
#include <sstream>

namespace jax_fa3 {
namespace {

// Row and key positions, their sums with the diagonal, and byte strides of tensor maps (< 2^40) all
// stay in range below this.
constexpr int64_t kMaxSeqlen = int64_t{1} << 29;

}  // namespace

Status check_problem(const Problem& p) {
  std::ostringstream why;
  const auto refuse = [&](const char* name, int64_t got, const std::string& wanted) {
    why << (why.tellp() > 0 ? "; " : "") << name << " is " << got << ", expected " << wanted;
  };
  if (p.batch < 0) refuse("batch", p.batch, "at least 0");
  if (p.seqlen_q < 0 || p.seqlen_q >= kMaxSeqlen) refuse("seqlen_q", p.seqlen_q, "[0, 2^29)");
  if (p.seqlen_k < 0 || p.seqlen_k >= kMaxSeqlen) refuse("seqlen_k", p.seqlen_k, "[0, 2^29)");
  if (p.heads_q < 0) refuse("heads_q", p.heads_q, "at least 0");
  if (p.heads_k <= 0 ? p.heads_q != 0 : p.heads_q % p.heads_k != 0) {
    refuse("heads_k", p.heads_k, "a divisor of heads_q = " + std::to_string(p.heads_q));
  }
  if (p.diagonal < -kMaxSeqlen || p.diagonal > kMaxSeqlen) {
    refuse("diagonal", p.diagonal, "[-2^29, 2^29]");
  }
  if (!(p.scale > 0)) {
    why << (why.tellp() > 0 ? "; " : "") << "scale is " << p.scale << ", expected above 0";
  }
  if (why.tellp() > 0) return Status::invalid_argument(why.str());
  return {};
}

std::string describe(const Problem& p) {
  std::ostringstream text;
  text << name(p.dtype) << ", batch " << p.batch << ", seqlen " << p.seqlen_q << " x " << p.seqlen_k
       << ", heads " << p.heads_q << " over " << p.heads_k << ", head_dim " << p.head_dim << ", "
       << name(p.mask);
  return text.str();
}

}  // namespace jax_fa3
