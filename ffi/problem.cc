#include "ffi/problem.h"

#include <algorithm>
#include <sstream>

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

}  // namespace

Status fwd_problem(const FwdShapes& shapes, const FwdAttributes& attributes, Problem& problem) {
  Mismatches wrong;
  const size_t rank = shapes.query.size();
  if (rank < 3) wrong.add("query", text(shapes.query), "[*batch, T, N, H]");
  for (const auto& [name, shape] : {std::pair{"key", &shapes.key},
                                    {"value", &shapes.value},
                                    {"out", &shapes.out},
                                    {"lse", &shapes.lse}}) {
    const size_t expected = std::string(name) == "lse" ? rank - 1 : rank;
    if (shape->size() != expected) {
      wrong.add(name, text(*shape), "rank " + std::to_string(expected));
    }
  }
  using xla::ffi::DataType;
  if (shapes.query_dtype != DataType::BF16 && shapes.query_dtype != DataType::F16) {
    wrong.add("query", "dtype " + std::to_string(static_cast<int>(shapes.query_dtype)),
              "bfloat16 or float16");
  }
  for (const auto& [name, dtype] : {std::pair{"key", shapes.key_dtype},
                                    {"value", shapes.value_dtype},
                                    {"out", shapes.out_dtype}}) {
    if (dtype != shapes.query_dtype) {
      wrong.add(name, "dtype " + std::to_string(static_cast<int>(dtype)), "the query's dtype");
    }
  }
  if (Status status = wrong.status(); !status.ok()) return status;

  const size_t batch_rank = rank - 3;
  const Shape batch(shapes.out.begin(), shapes.out.begin() + batch_rank);
  const int64_t seqlen_q = shapes.query[batch_rank];
  const int64_t heads_q = shapes.query[batch_rank + 1];
  const int64_t head_dim = shapes.query[batch_rank + 2];
  const int64_t seqlen_k = shapes.key[batch_rank];
  const int64_t heads_k = shapes.key[batch_rank + 1];

  const auto with_batch = [&](const Shape& operand, std::initializer_list<int64_t> rest) {
    Shape shape(operand.begin(), operand.begin() + batch_rank);
    shape.insert(shape.end(), rest);
    return shape;
  };
  wrong.expect("key", shapes.key, with_batch(shapes.key, {seqlen_k, heads_k, head_dim}));
  wrong.expect("value", shapes.value, with_batch(shapes.value, {seqlen_k, heads_k, head_dim}));
  wrong.expect("out", shapes.out, with_batch(shapes.out, {seqlen_q, heads_q, head_dim}));
  wrong.expect("lse", shapes.lse, with_batch(shapes.out, {heads_q, seqlen_q}));
  if (attributes.has_query_offset) wrong.expect("query_offset", shapes.query_offset, batch);
  for (const auto& [name, shape] :
       {std::pair{"query", &shapes.query}, {"key", &shapes.key}, {"value", &shapes.value}}) {
    for (size_t i = 0; i < batch_rank; ++i) {
      if ((*shape)[i] != batch[i] && (*shape)[i] != 1) {
        wrong.add(std::string(name) + " batch dimension " + std::to_string(i),
                  std::to_string((*shape)[i]), std::to_string(batch[i]) + " or 1");
      }
    }
  }
  if (heads_k == 0 ? heads_q != 0 : heads_q % heads_k != 0) {
    wrong.add("key heads", std::to_string(heads_k),
              "a divisor of the query's " + std::to_string(heads_q));
  }
  if (Status status = wrong.status(); !status.ok()) return status;

  problem = Problem{};
  problem.dtype = shapes.query_dtype == DataType::BF16 ? DType::kBF16 : DType::kF16;
  problem.batch = product(batch, 0, batch_rank);
  problem.batch_q = product(shapes.query, 0, batch_rank);
  problem.batch_k = product(shapes.key, 0, batch_rank);
  problem.batch_v = product(shapes.value, 0, batch_rank);
  problem.seqlen_q = seqlen_q;
  problem.seqlen_k = seqlen_k;
  problem.heads_q = heads_q;
  problem.heads_k = heads_k;
  problem.head_dim = head_dim;
  problem.mask = attributes.is_causal ? MaskKind::kCausal : MaskKind::kFull;
  problem.diagonal = attributes.diagonal;
  problem.has_query_offset = attributes.has_query_offset;
  problem.scale = attributes.scale;
  if (!attributes.config.empty()) {
    problem.config = find_fwd_config(attributes.config);
    if (problem.config < 0) wrong.add("config", attributes.config, "the name of a kernel");
    if (Status status = wrong.status(); !status.ok()) return status;
  }
  if (Status status = batch_map(batch, shapes.query, shapes.key, shapes.value, problem.batch_map);
      !status.ok()) {
    return status;
  }
  if (const int64_t needed = fwd_workspace_bytes(problem); shapes.workspace_bytes < needed) {
    wrong.add("workspace", std::to_string(shapes.workspace_bytes) + " bytes",
              "at least " + std::to_string(needed));
  }
  return wrong.status();
}

}  // namespace jax_fa3
