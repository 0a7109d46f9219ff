#include "ffi/problem.h"

#include <algorithm>
#include <sstream>

#include "cuda/bwd/plan.h"
#include "cuda/fwd/plan.h"

namespace jax_fa3 {
namespace {

std::string text(const Shape& shape) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  out << "]";
  return out.str();
}

std::string dtype_text(xla::ffi::DataType dtype) {
  return "dtype " + std::to_string(static_cast<int>(dtype));
}

// Collects "name: got ..., expected ..." lines.
class Mismatches {
 public:
  void add(const std::string& name, const std::string& got, const std::string& expected) {
    if (!text_.empty()) text_ += "; ";
    text_ += name + ": got " + got + ", expected " + expected;
  }
  void expect(const char* name, const Shape& got, const Shape& expected) {
    if (got != expected) add(name, text(got), text(expected));
  }
  Status status() const { return text_.empty() ? Status{} : Status::invalid_argument(text_); }

 private:
  std::string text_;
};

int64_t product(const Shape& shape, size_t begin, size_t end) {
  int64_t result = 1;
  for (size_t i = begin; i < end; ++i) result *= shape[i];
  return result;
}

// Merges the batch dimensions into the fewest runs with one broadcasting pattern each.
Status batch_map(const Shape& batch, const Shape& query, const Shape& key, const Shape& value,
                 BatchMap& map) {
  struct Run {
    int64_t size;
    bool q, k, v;  // whether the operand varies over the run
  };
  std::vector<Run> runs;
  for (size_t i = 0; i < batch.size(); ++i) {
    if (batch[i] == 1) continue;
    const Run run{batch[i], query[i] != 1, key[i] != 1, value[i] != 1};
    if (!runs.empty() && runs.back().q == run.q && runs.back().k == run.k &&
        runs.back().v == run.v) {
      runs.back().size *= run.size;
    } else {
      runs.push_back(run);
    }
  }
  if (runs.empty()) runs.push_back({1, true, true, true});
  if (runs.size() > BatchMap::kMaxLevels) {
    return Status::unimplemented("batch " + text(batch) + " alternates between mapped and " +
                                 "broadcast operands in more than " +
                                 std::to_string(BatchMap::kMaxLevels) + " runs");
  }
  map = BatchMap{};
  map.levels = static_cast<int32_t>(runs.size());
  int64_t q = 1, k = 1, v = 1;
  for (size_t level = runs.size(); level-- > 0;) {
    const Run& run = runs[level];
    map.size[level] = static_cast<int32_t>(run.size);
    map.q_stride[level] = static_cast<int32_t>(run.q ? q : 0);
    map.k_stride[level] = static_cast<int32_t>(run.k ? k : 0);
    map.v_stride[level] = static_cast<int32_t>(run.v ? v : 0);
    if (run.q) q *= run.size;
    if (run.k) k *= run.size;
    if (run.v) v *= run.size;
  }
  return {};
}

// A buffer whose dtype and shape follow from query and key.
struct Dependent {
  enum class Kind {
    kQueries,  // [*batch, seqlen_q, heads_q, head_dim] in the query's dtype
    kKeys,     // [*batch, seqlen_k, heads_k, head_dim] in the query's dtype
    kStats,    // [*batch, heads_q, seqlen_q] in float32
  };
  const char* name;
  Kind kind;
  xla::ffi::DataType dtype;
  const Shape& shape;
};

// The rules of every pass. The first of `dependents` has the full batch.
Status problem_of(const Tensor& query, const Tensor& key, const Tensor& value,
                  const Shape& query_offset, const std::vector<Dependent>& dependents,
                  const Attributes& attributes, Problem& problem) {
  using xla::ffi::DataType;
  Mismatches wrong;
  const size_t rank = query.shape.size();
  if (rank < 3) {
    wrong.add("query", text(query.shape), "[*batch, T, N, H]");
    return wrong.status();
  }
  if (query.dtype != DataType::BF16 && query.dtype != DataType::F16) {
    wrong.add("query", dtype_text(query.dtype), "bfloat16 or float16");
  }
  for (const auto& [name, tensor] : {std::pair{"key", &key}, {"value", &value}}) {
    if (tensor->shape.size() != rank) {
      wrong.add(name, text(tensor->shape), "rank " + std::to_string(rank));
    }
    if (tensor->dtype != query.dtype) {
      wrong.add(name, dtype_text(tensor->dtype), "the query's dtype");
    }
  }
  for (const Dependent& d : dependents) {
    const bool stats = d.kind == Dependent::Kind::kStats;
    if (d.shape.size() != rank - stats) {
      wrong.add(d.name, text(d.shape), "rank " + std::to_string(rank - stats));
    }
    if (stats && d.dtype != DataType::F32) wrong.add(d.name, dtype_text(d.dtype), "float32");
    if (!stats && d.dtype != query.dtype) {
      wrong.add(d.name, dtype_text(d.dtype), "the query's dtype");
    }
  }
  if (Status status = wrong.status(); !status.ok()) return status;

  const size_t batch_rank = rank - 3;
  const Shape& full = dependents.front().shape;
  const Shape batch(full.begin(), full.begin() + batch_rank);
  const int64_t seqlen_q = query.shape[batch_rank];
  const int64_t heads_q = query.shape[batch_rank + 1];
  const int64_t head_dim = query.shape[batch_rank + 2];
  const int64_t seqlen_k = key.shape[batch_rank];
  const int64_t heads_k = key.shape[batch_rank + 1];

  const auto with_batch = [&](const Shape& operand, std::initializer_list<int64_t> rest) {
    Shape shape(operand.begin(), operand.begin() + batch_rank);
    shape.insert(shape.end(), rest);
    return shape;
  };
  wrong.expect("key", key.shape, with_batch(key.shape, {seqlen_k, heads_k, head_dim}));
  wrong.expect("value", value.shape, with_batch(value.shape, {seqlen_k, heads_k, head_dim}));
  for (const Dependent& d : dependents) {
    switch (d.kind) {
      case Dependent::Kind::kQueries:
        wrong.expect(d.name, d.shape, with_batch(full, {seqlen_q, heads_q, head_dim}));
        break;
      case Dependent::Kind::kKeys:
        wrong.expect(d.name, d.shape, with_batch(full, {seqlen_k, heads_k, head_dim}));
        break;
      case Dependent::Kind::kStats:
        wrong.expect(d.name, d.shape, with_batch(full, {heads_q, seqlen_q}));
        break;
    }
  }
  if (attributes.has_query_offset) wrong.expect("query_offset", query_offset, batch);
  for (const auto& [name, tensor] :
       {std::pair{"query", &query}, {"key", &key}, {"value", &value}}) {
    for (size_t i = 0; i < batch_rank; ++i) {
      if (tensor->shape[i] != batch[i] && tensor->shape[i] != 1) {
        wrong.add(std::string(name) + " batch dimension " + std::to_string(i),
                  std::to_string(tensor->shape[i]), std::to_string(batch[i]) + " or 1");
      }
    }
  }
  if (heads_k == 0 ? heads_q != 0 : heads_q % heads_k != 0) {
    wrong.add("key heads", std::to_string(heads_k),
              "a divisor of the query's " + std::to_string(heads_q));
  }
  if (Status status = wrong.status(); !status.ok()) return status;

  problem = Problem{};
  problem.dtype = query.dtype == DataType::BF16 ? DType::kBF16 : DType::kF16;
  problem.batch = product(batch, 0, batch_rank);
  problem.batch_q = product(query.shape, 0, batch_rank);
  problem.batch_k = product(key.shape, 0, batch_rank);
  problem.batch_v = product(value.shape, 0, batch_rank);
  problem.seqlen_q = seqlen_q;
  problem.seqlen_k = seqlen_k;
  problem.heads_q = heads_q;
  problem.heads_k = heads_k;
  problem.head_dim = head_dim;
  problem.mask = attributes.is_causal ? MaskKind::kCausal : MaskKind::kFull;
  problem.diagonal = attributes.diagonal;
  problem.has_query_offset = attributes.has_query_offset;
  problem.scale = attributes.scale;
  problem.deterministic = attributes.deterministic;
  return batch_map(batch, query.shape, key.shape, value.shape, problem.batch_map);
}

// A benchmark's choice of configuration, in the list of its pass.
Status force_config(const Attributes& attributes, int (*find)(const std::string&),
                    Problem& problem) {
  if (attributes.config.empty()) return {};
  problem.config = find(attributes.config);
  if (problem.config >= 0) return {};
  Mismatches wrong;
  wrong.add("config", attributes.config, "the name of a kernel");
  return wrong.status();
}

Status check_workspace(int64_t got, int64_t needed) {
  Mismatches wrong;
  if (got < needed) {
    wrong.add("workspace", std::to_string(got) + " bytes", "at least " + std::to_string(needed));
  }
  return wrong.status();
}

}  // namespace

Status fwd_problem(const FwdShapes& shapes, const Attributes& attributes, Problem& problem) {
  using Kind = Dependent::Kind;
  Status status = problem_of(shapes.query, shapes.key, shapes.value, shapes.query_offset,
                             {{"out", Kind::kQueries, shapes.out.dtype, shapes.out.shape},
                              {"lse", Kind::kStats, shapes.lse.dtype, shapes.lse.shape}},
                             attributes, problem);
  if (!status.ok()) return status;
  status = force_config(attributes, &find_fwd_config, problem);
  if (!status.ok()) return status;
  return check_workspace(shapes.workspace_bytes, fwd_workspace_bytes(problem));
}

Status bwd_problem(const BwdShapes& shapes, const Attributes& attributes, Problem& problem) {
  using Kind = Dependent::Kind;
  Status status = problem_of(shapes.query, shapes.key, shapes.value, shapes.query_offset,
                             {{"out", Kind::kQueries, shapes.out.dtype, shapes.out.shape},
                              {"lse", Kind::kStats, shapes.lse.dtype, shapes.lse.shape},
                              {"dout", Kind::kQueries, shapes.dout.dtype, shapes.dout.shape},
                              {"dlse", Kind::kStats, shapes.dlse.dtype, shapes.dlse.shape},
                              {"dq", Kind::kQueries, shapes.dq.dtype, shapes.dq.shape},
                              {"dk", Kind::kKeys, shapes.dk.dtype, shapes.dk.shape},
                              {"dv", Kind::kKeys, shapes.dv.dtype, shapes.dv.shape}},
                             attributes, problem);
  if (!status.ok()) return status;
  status = force_config(attributes, &find_bwd_config, problem);
  if (!status.ok()) return status;
  return check_workspace(shapes.workspace_bytes, bwd_workspace_bytes(problem));
}

}  // namespace jax_fa3
