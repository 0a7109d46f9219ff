// The forward kernels without JAX: small problems launched straight from C++ and compared with a
// loop on the host. What compute-sanitizer watches (tools/sanitize.py), two streams at once, and
// launches that must repeat bit for bit. Every array is an allocation of its own, so that memcheck
// sees an access past its end.
//
//   fwd_device              every case, compared with the definition
//   fwd_device --only=TEXT  those whose name contains the text
//   fwd_device --soak=N     N launches over shapes of every kind, each compared with its first
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/fwd/launch.h"
#include "cuda/fwd/plan.h"
#include "tests/cuda/device_arrays.cuh"
#include "tests/cuda/device_program.cuh"
#include "tests/cuda/problems.h"

namespace jax_fa3 {
namespace {

struct Case {
  std::string name;
  Problem problem;
  std::vector<int32_t> query_offset;  // one a batch row, or empty
  float query_factor = 1.0f;          // peaks the scores
  int64_t spike = -1;                 // this key outweighs all others together, for every query
  int64_t infinite = -1;              // this key holds an infinity
  int64_t nan = -1;                   // this query holds a NaN
  int64_t check_every = 1;            // queries that are compared with the definition
};

// One problem with its arrays, ready to launch any number of times.
class Run {
 public:
  Run(const Case& c, uint32_t seed)
      : c_(c),
        q_(c.problem.batch_q * c.problem.seqlen_q * c.problem.heads_q * c.problem.head_dim),
        k_(c.problem.batch_k * c.problem.seqlen_k * c.problem.heads_k * c.problem.head_dim),
        v_(c.problem.batch_v * c.problem.seqlen_k * c.problem.heads_k * c.problem.head_dim),
        offset_(c.query_offset.size()),
        out_(c.problem.batch * c.problem.seqlen_q * c.problem.heads_q * c.problem.head_dim),
        lse_(c.problem.batch * c.problem.seqlen_q * c.problem.heads_q),
        workspace_(fwd_workspace_bytes(c.problem)) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    const auto draw = [&](std::vector<float>& host, size_t count, float factor) {
      host.resize(count);
      for (float& x : host) x = factor * normal(generator);
    };
    const auto send = [&](DeviceArray<uint16_t>& array, std::vector<float>& host) {
      std::vector<uint16_t> raw(host.size());
      for (size_t i = 0; i < host.size(); ++i) {
        raw[i] = bits(c.problem.dtype, host[i]);
        host[i] = value(c.problem.dtype, raw[i]);
      }
      array.copy_from(raw);
    };
    const Problem& p = c.problem;
    draw(q_host_, p.batch_q * p.seqlen_q * p.heads_q * p.head_dim, c.query_factor);
    draw(k_host_, p.batch_k * p.seqlen_k * p.heads_k * p.head_dim, 1.0f);
    draw(v_host_, p.batch_v * p.seqlen_k * p.heads_k * p.head_dim, 1.0f);
    const int64_t q_row = p.heads_q * p.head_dim, k_row = p.heads_k * p.head_dim;
    if (c.spike >= 0) {
      // Every query looks the same way, and the key is long: scores of some 200 nats.
      for (size_t i = 0; i < q_host_.size(); i += p.head_dim) q_host_[i] = 8.0f;
      for (int64_t b = 0; b < p.batch_k; ++b) {
        for (int64_t n = 0; n < p.heads_k; ++n) {
          k_host_[(b * p.seqlen_k + c.spike) * k_row + n * p.head_dim] = 25.0f / p.scale;
        }
      }
    }
    if (c.infinite >= 0) k_host_[c.infinite * k_row] = INFINITY;
    if (c.nan >= 0) q_host_[c.nan * q_row] = NAN;
    send(q_, q_host_);
    send(k_, k_host_);
    send(v_, v_host_);
    offset_.copy_from(c.query_offset);
  }

  Status launch(cudaStream_t stream) {
    Device device;
    if (Status status = current_device(device); !status.ok()) return status;
    FwdPlan plan;
    if (Status status = plan_fwd(c_.problem, device, plan); !status.ok()) return status;
    plan_ = plan;
    return launch_fwd(
        c_.problem, plan,
        {q_.get(), k_.get(), v_.get(), offset_.get(), out_.get(), lse_.get(), workspace_.get()},
        stream);
  }

  // Rows done again by the classical loop, in groups of 64.
  int redone() const {
    int sum = 0;
    const std::vector<uint8_t> workspace = workspace_.copy();
    const auto* counts =
        reinterpret_cast<const uint32_t*>(workspace.data() + FwdWorkspace::kRedoCount);
    for (int cta = 0; cta < plan_.ctas; ++cta) sum += static_cast<int>(counts[cta]);
    return sum;
  }
  bool split() const { return plan_.split.ranges > 0; }
  const FwdConfig& config() const { return plan_.named().config; }

  // Whether the results are, bit for bit, those of the last call. On the device: adds the number of
  // elements that differ to *differing, and keeps the first results. Results and workspace are
  // poisoned behind it.
  void compare_with_first(uint32_t* differing, cudaStream_t stream) {
    if (first_out_ == nullptr) {
      first_out_ = copy_of(out_, stream);
      first_lse_ = copy_of(lse_, stream);
    } else {
      count_differing(out_, *first_out_, differing, stream);
      count_differing(lse_, *first_lse_, differing, stream);
    }
    out_.poison(stream);
    lse_.poison(stream);
    workspace_.poison(stream);
  }

  // Against the definition, in double. Returns what is wrong, or nothing.
  std::string verify() const {
    const Problem& p = c_.problem;
    const std::vector<uint16_t> out = out_.copy();
    const std::vector<float> lse = lse_.copy();
    // Rounding of probabilities and output, on values of a few units.
    const double tolerance = p.dtype == DType::kBF16 ? 0.06 : 0.008;
    for (int64_t b = 0; b < p.batch; ++b) {
      const OperandRows rows = operand_rows(p.batch_map, b);
      for (int64_t n = 0; n < p.heads_q; ++n) {
        const int64_t head_k = n / (p.heads_q / p.heads_k);
        for (int64_t t = 0; t < p.seqlen_q; t += c_.check_every) {
          const int64_t diagonal = c_.query_offset.empty() ? p.diagonal : c_.query_offset[b];
          int64_t visible = p.seqlen_k;
          if (p.mask == MaskKind::kCausal) {
            visible = std::min<int64_t>(std::max<int64_t>(t + diagonal + 1, 0), p.seqlen_k);
          }
          std::vector<double> x(visible);
          double max = -INFINITY;
          for (int64_t s = 0; s < visible; ++s) {
            double dot = 0;
            for (int64_t h = 0; h < p.head_dim; ++h) {
              dot += double{q_host_[((rows.q * p.seqlen_q + t) * p.heads_q + n) * p.head_dim + h]} *
                     k_host_[((rows.k * p.seqlen_k + s) * p.heads_k + head_k) * p.head_dim + h];
            }
            x[s] = dot * p.scale;
            max = std::max(max, x[s]);
          }
          double sum = 0;
          for (double& y : x) sum += y = std::exp(y - max);
          // With an infinite score the sum is NaN, but lse is that infinity.
          const double wanted_lse = visible == 0      ? -INFINITY
                                    : max == INFINITY ? INFINITY
                                                      : max + std::log(sum);
          const float got_lse = lse[(b * p.heads_q + n) * p.seqlen_q + t];
          if (!agree(got_lse, wanted_lse, 2e-3)) {
            return at(b, n, t) + "lse is " + std::to_string(got_lse) + ", expected " +
                   std::to_string(wanted_lse);
          }
          for (int64_t h = 0; h < p.head_dim; ++h) {
            double wanted = 0;
            for (int64_t s = 0; s < visible; ++s) {
              wanted += x[s] / sum *
                        v_host_[((rows.v * p.seqlen_k + s) * p.heads_k + head_k) * p.head_dim + h];
            }
            const float got =
                value(p.dtype, out[((b * p.seqlen_q + t) * p.heads_q + n) * p.head_dim + h]);
            if (!agree(got, wanted, tolerance)) {
              return at(b, n, t) + "out[" + std::to_string(h) + "] is " + std::to_string(got) +
                     ", expected " + std::to_string(wanted);
            }
          }
        }
      }
    }
    return "";
  }

 private:
  static bool agree(double got, double wanted, double tolerance) {
    if (std::isnan(wanted)) return std::isnan(got);
    if (std::isinf(wanted)) return got == wanted;
    return std::abs(got - wanted) < tolerance;
  }
  static std::string at(int64_t b, int64_t n, int64_t t) {
    return "batch " + std::to_string(b) + ", head " + std::to_string(n) + ", query " +
           std::to_string(t) + ": ";
  }

  Case c_;
  DeviceArray<uint16_t> q_, k_, v_;
  DeviceArray<int32_t> offset_;
  DeviceArray<uint16_t> out_;
  DeviceArray<float> lse_;
  DeviceArray<uint8_t> workspace_;
  std::unique_ptr<DeviceArray<uint16_t>> first_out_;
  std::unique_ptr<DeviceArray<float>> first_lse_;
  std::vector<float> q_host_, k_host_, v_host_;
  FwdPlan plan_;
};

Case make(std::string name, DType dtype, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
          int64_t heads_q, int64_t heads_k, int64_t head_dim, MaskKind mask) {
  Case c;
  c.name = std::move(name);
  c.problem = problem(dtype, batch, seqlen_q, seqlen_k, heads_q, heads_k, head_dim, mask);
  return c;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (int head_dim : {64, 128, 256}) {
    for (DType dtype : {DType::kBF16, DType::kF16}) {
      for (MaskKind mask : {MaskKind::kFull, MaskKind::kCausal}) {
        const std::string what =
            std::string(name(dtype)) + " d" + std::to_string(head_dim) + " " + name(mask);
        all.push_back(make(what + " odd lengths", dtype, 2, 67, 131, 4, 2, head_dim, mask));
        Case peaked = make(what + " peaked", dtype, 1, 130, 259, 2, 1, head_dim, mask);
        peaked.query_factor = 40.0f;
        all.push_back(peaked);
      }
    }
    Case offset = make("query_offset d" + std::to_string(head_dim), DType::kBF16, 4, 70, 90, 2, 2,
                       head_dim, MaskKind::kCausal);
    offset.problem.has_query_offset = true;
    offset.query_offset = {-70, -5, 20, 90};
    all.push_back(offset);
    Case bottom_right = make("bottom right d" + std::to_string(head_dim), DType::kBF16, 1, 300, 77,
                             2, 2, head_dim, MaskKind::kCausal);
    bottom_right.problem.diagonal = 77 - 300;
    all.push_back(bottom_right);
    all.push_back(make("no keys d" + std::to_string(head_dim), DType::kBF16, 1, 9, 0, 2, 2,
                       head_dim, MaskKind::kFull));
    // More tiles than multiprocessors: persistence, the dynamic counter, the rings' wrap.
    all.push_back(make("many tiles d" + std::to_string(head_dim), DType::kBF16, 40, 65, 70, 8, 8,
                       head_dim, MaskKind::kCausal));
  }
  Case broadcast = make("keys broadcast", DType::kBF16, 6, 65, 65, 2, 2, 64,
                        MaskKind::kFull);  // [3, 2] x [1, 2]
  broadcast.problem.batch_k = broadcast.problem.batch_v = 2;
  broadcast.problem.batch_map.levels = 2;
  broadcast.problem.batch_map.size[0] = 3;
  broadcast.problem.batch_map.size[1] = 2;
  broadcast.problem.batch_map.q_stride[0] = 2;
  broadcast.problem.batch_map.q_stride[1] = 1;
  for (int32_t* stride :
       {broadcast.problem.batch_map.k_stride, broadcast.problem.batch_map.v_stride}) {
    stride[0] = 0;
    stride[1] = 1;
  }
  all.push_back(broadcast);
  return all;
}

// Few tiles or an incomplete last wave of them, and keys enough to cut them into pieces.
std::vector<Case> split_cases() {
  std::vector<Case> all;
  const auto add = [&](Case c, int64_t check_every) {
    c.check_every = check_every;
    all.push_back(c);
  };
  const MaskKind full = MaskKind::kFull;
  for (int head_dim : {64, 128, 256}) {
    const std::string d = " d" + std::to_string(head_dim);
    for (DType dtype : {DType::kBF16, DType::kF16}) {
      const std::string what = std::string(" ") + name(dtype) + d;
      // A range that covers parts of two tiles, a last block of a few keys, a last row of a few.
      add(make("few tiles" + what, dtype, 1, 400, 4099, 3, 1, head_dim, full), 31);
      Case spike = make("one piece is redone" + what, dtype, 1, 300, 4096, 2, 1, head_dim, full);
      spike.spike = 3;  // in the first piece, which the others know nothing of
      add(spike, 29);
      spike.name = "a middle piece is redone" + what;
      spike.spike = 1700;
      add(spike, 29);
      Case peaked = make("peaked few tiles" + what, dtype, 1, 257, 3001, 2, 2, head_dim, full);
      peaked.query_factor = 40.0f;
      add(peaked, 17);
    }
    add(make("one tile in many pieces" + d, DType::kBF16, 1, 5, 20000, 1, 1, head_dim, full), 1);
    // Whole waves, then a part of one.
    add(make("last wave" + d, DType::kBF16, 5, 250, 2050, 30, 1, head_dim, full), 97);
    // So many left over that a range covers the end of one tile and the beginning of the next.
    add(make("two tiles a range" + d, DType::kBF16, 1, 40, 8200, 90, 1, head_dim, full), 39);
    Case infinite = make("an infinite key" + d, DType::kBF16, 1, 200, 4096, 1, 1, head_dim, full);
    infinite.infinite = 2222;
    add(infinite, 7);
    Case nan = make("a NaN query" + d, DType::kBF16, 1, 200, 4096, 1, 1, head_dim, full);
    nan.nan = 70;
    add(nan, 7);
  }
  return all;
}

int run_all(const std::string& only) {
  Report report;
  int redone_cases = 0;
  uint32_t seed = 0;
  for (const Case& c : on_every_config(kFwdConfigs, cases(), only)) {
    Run run(c, ++seed);
    const Status status = run.launch(nullptr);
    CHECK_CUDA(cudaDeviceSynchronize());
    report(c.name, status.ok() ? run.verify() : status.message);
    if (c.query_factor > 1 && run.config().softmax == Softmax::kLazy) {
      redone_cases += run.redone() > 0;
    }
  }
  // Peaked scores are there to leave the range of a lazy reference: that must have happened.
  if (only.empty()) {
    report("rows are redone", redone_cases > 0 ? "" : "no peaked case was done again");
  }

  // Cut into pieces, and the same bits whichever piece is done last.
  DeviceArray<uint32_t> differing(1);
  for (const Case& c : on_every_config(kFwdConfigs, split_cases(), only)) {
    Run run(c, ++seed);
    const Status status = run.launch(nullptr);
    CHECK_CUDA(cudaDeviceSynchronize());
    report(c.name, status.ok() ? run.verify() : status.message);
    if (run.config().split_tail) report(c.name, run.split() ? "" : "was not split");
    const bool leaves_range = c.query_factor > 1 || c.spike >= 0 || c.nan >= 0 || c.infinite >= 0;
    if (leaves_range && run.config().softmax == Softmax::kLazy) {
      report(c.name, run.redone() > 0 ? "" : "was not done again");
    }
    differing.zero(nullptr);
    for (int i = 0; i < 20; ++i) {
      run.compare_with_first(differing.get(), nullptr);
      report(c.name, run.launch(nullptr).message);
    }
    run.compare_with_first(differing.get(), nullptr);
    const uint32_t elements = differing.copy()[0];
    report(c.name, elements == 0 ? "" : std::to_string(elements) + " elements did not repeat");
  }

  Run left(make("", DType::kBF16, 4, 257, 257, 4, 4, 128, MaskKind::kCausal), 1001);
  Run right(make("", DType::kBF16, 4, 321, 129, 4, 2, 64, MaskKind::kCausal), 1002);
  run_on_two_streams(left, right, report);
  return report.finish();
}

// Static and dynamic schedules, split and whole.
int soak(int launches) {
  std::vector<Case> shapes = cases();
  for (const Case& c : split_cases()) shapes.push_back(c);
  return soak_shapes<Run>(on_every_config(kFwdConfigs, shapes, ""), launches, false);
}

}  // namespace
}  // namespace jax_fa3

int main(int argc, char** argv) {
  return jax_fa3::device_main(argc, argv, "fwd_device", jax_fa3::run_all, jax_fa3::soak);
}
