// The backward kernels without JAX: small problems launched straight from C++ and compared with the
// definition in float64 on the host. What compute-sanitizer watches (tools/sanitize.py), two
// streams at once, and launches whose dK and dV must repeat bit for bit.
//
//   bwd_device              every case on every configuration that takes it
//   bwd_device --only=TEXT  those whose name contains the text
//   bwd_device --soak=N     N launches over shapes of every kind, each compared with its first; and
//                           deterministic ones with the L2 overloaded
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda/bwd/launch.h"
#include "cuda/bwd/plan.h"
#include "tests/cuda/device_arrays.cuh"
#include "tests/cuda/device_program.cuh"
#include "tests/cuda/problems.h"

namespace jax_fa3 {
namespace {

struct Case {
  std::string name;
  Problem problem;
  std::vector<int32_t> query_offset = {};  // one a batch row, or empty
  float query_factor = 1.0f;               // peaks the scores
};

// Unless it is deterministic, dQ is added in no fixed order: sums in float32 that round to
// neighbours in 16 bits.
template <class T>
__global__ void count_apart(const T* a, const T* b, size_t count, uint32_t* apart) {
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const float x = static_cast<float>(a[i]), y = static_cast<float>(b[i]);
    const float bound = fmaxf(fabsf(x), fabsf(y)) * 0x1p-7f + 1e-4f;
    if (!(fabsf(x - y) <= bound)) atomicAdd(apart, 1);  // NaN is apart
  }
}

// An exact gradient, and how far each of its rows may be off by rounding: the standard deviation,
// roughly, of what rounding P, dS and out to 16 bits makes of it.
struct Gradient {
  std::vector<double> exact;
  std::vector<double> noise;  // a row of head_dim

  Gradient() = default;
  Gradient(int64_t rows, int64_t head_dim) : exact(rows * head_dim), noise(rows) {}
};

// What the kernels read and what they should return, on the host.
struct Reference {
  std::vector<float> q, k, v, dout;   // as the device has them, rounded
  std::vector<float> out, lse, dlse;  // out rounded, lse natural
  Gradient dq, dk, dv;
};

double half_ulp(DType dtype) { return dtype == DType::kBF16 ? 0x1p-8 : 0x1p-11; }

// The definition, a query row at a time.
Reference reference(const Case& c, uint32_t seed) {
  const Problem& p = c.problem;
  const int64_t head_dim = p.head_dim;
  Reference r;
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  const auto rounded = [&](int64_t count, float factor) {
    std::vector<float> x(count);
    for (float& y : x) y = value(p.dtype, bits(p.dtype, factor * normal(generator)));
    return x;
  };
  const int64_t q_size = p.seqlen_q * p.heads_q * head_dim,
                k_size = p.seqlen_k * p.heads_k * head_dim;
  r.q = rounded(p.batch_q * q_size, c.query_factor);
  r.k = rounded(p.batch_k * k_size, 1.0f);
  r.v = rounded(p.batch_v * k_size, 1.0f);
  r.dout = rounded(p.batch * q_size, 1.0f);
  r.dlse.resize(p.batch * p.heads_q * p.seqlen_q);
  for (float& x : r.dlse) x = normal(generator);
  r.lse.resize(r.dlse.size());
  r.out.resize(p.batch * q_size);
  r.dq = Gradient(p.batch * p.seqlen_q * p.heads_q, head_dim);
  r.dk = r.dv = Gradient(p.batch * p.seqlen_k * p.heads_k, head_dim);

  const auto dot = [&](const float* a, const float* b) {
    double sum = 0;
    for (int64_t h = 0; h < head_dim; ++h) sum += double{a[h]} * b[h];
    return sum;
  };
  const auto largest = [&](const float* x) {
    double max = 0;
    for (int64_t h = 0; h < head_dim; ++h) max = std::max(max, std::abs(double{x[h]}));
    return max;
  };
  const double ulp = half_ulp(p.dtype), smallest = p.dtype == DType::kF16 ? 0x1p-25 : 0;
  std::vector<double> probs(p.seqlen_k), dprobs(p.seqlen_k), row(head_dim);
  for (int64_t b = 0; b < p.batch; ++b) {
    const OperandRows rows = operand_rows(p.batch_map, b);
    const int64_t diagonal = c.query_offset.empty() ? p.diagonal : c.query_offset[b];
    for (int64_t n = 0; n < p.heads_q; ++n) {
      const int64_t head_k = n / (p.heads_q / p.heads_k);
      const auto q_at = [&](int64_t batch, int64_t t) {
        return ((batch * p.seqlen_q + t) * p.heads_q + n) * head_dim;
      };
      const auto k_at = [&](int64_t batch, int64_t s) {
        return ((batch * p.seqlen_k + s) * p.heads_k + head_k) * head_dim;
      };
      for (int64_t t = 0; t < p.seqlen_q; ++t) {
        int64_t visible = p.seqlen_k;
        if (p.mask == MaskKind::kCausal) {
          visible = std::min<int64_t>(std::max<int64_t>(t + diagonal + 1, 0), p.seqlen_k);
        }
        const float* const query = &r.q[q_at(rows.q, t)];
        const float* const dout = &r.dout[q_at(b, t)];
        const int64_t stat = (b * p.heads_q + n) * p.seqlen_q + t;
        double max = -INFINITY, sum = 0;
        for (int64_t s = 0; s < visible; ++s) {
          probs[s] = dot(query, &r.k[k_at(rows.k, s)]) * p.scale;
          max = std::max(max, probs[s]);
        }
        for (int64_t s = 0; s < visible; ++s) sum += probs[s] = std::exp(probs[s] - max);
        r.lse[stat] = visible == 0 ? -INFINITY : static_cast<float>(max + std::log(sum));
        std::fill(row.begin(), row.end(), 0.0);
        double delta = -double{r.dlse[stat]};
        for (int64_t s = 0; s < visible; ++s) {
          probs[s] /= sum;
          const float* const values = &r.v[k_at(rows.v, s)];
          for (int64_t h = 0; h < head_dim; ++h) row[h] += probs[s] * values[h];
          dprobs[s] = dot(dout, values);
          delta += probs[s] * dprobs[s];
        }
        // delta is made of the rounded out: an error that all of the row's dS share.
        double delta_noise = 0;
        for (int64_t h = 0; h < head_dim; ++h) {
          r.out[q_at(b, t) + h] = value(p.dtype, bits(p.dtype, static_cast<float>(row[h])));
          delta_noise += std::pow(ulp * row[h] * dout[h], 2);
        }
        delta_noise = std::sqrt(delta_noise) * p.scale;
        const double q_max = largest(query), dout_max = largest(dout);
        double apart = 0, together = 0;  // what the errors of the row's dS make of dq
        for (int64_t s = 0; s < visible; ++s) {
          const double dscore = probs[s] * (dprobs[s] - delta) * p.scale;
          const float* const keys = &r.k[k_at(rows.k, s)];
          double* const dq = &r.dq.exact[q_at(b, t)];
          double* const dk = &r.dk.exact[k_at(b, s)];
          double* const dv = &r.dv.exact[k_at(b, s)];
          for (int64_t h = 0; h < head_dim; ++h) {
            dq[h] += dscore * keys[h];
            dk[h] += dscore * query[h];
            dv[h] += probs[s] * dout[h];
          }
          const double of_probs = ulp * probs[s] + smallest;
          const double of_dscore =
              ulp * std::abs(dscore) + smallest * (1 + std::abs(dprobs[s] - delta)) * p.scale;
          const double of_delta = probs[s] * delta_noise;
          const double k_max = largest(keys);
          apart += std::pow(of_dscore * k_max, 2);
          together += of_delta * k_max;
          const int64_t key_row = k_at(b, s) / head_dim;  // squares until the end
          r.dk.noise[key_row] += (std::pow(of_dscore, 2) + std::pow(of_delta, 2)) * q_max * q_max;
          r.dv.noise[key_row] += std::pow(of_probs * dout_max, 2);
        }
        r.dq.noise[q_at(b, t) / head_dim] = std::sqrt(apart) + together;
      }
    }
  }
  for (Gradient* gradient : {&r.dk, &r.dv}) {
    for (double& x : gradient->noise) x = std::sqrt(x);
  }
  return r;
}

// One problem's arrays, ready to launch any number of times. Whoever inherits fills them.
class Launches {
 public:
  // `pairs_in_flight` in place of the plan's, unless it is 0.
  Status launch(cudaStream_t stream, int32_t pairs_in_flight = 0) {
    Device device;
    if (Status status = current_device(device); !status.ok()) return status;
    BwdPlan plan;
    if (Status status = plan_bwd(problem_, device, plan); !status.ok()) return status;
    if (pairs_in_flight != 0) plan.grid.pairs_in_flight = pairs_in_flight;
    BwdBuffers buffers{};
    buffers.query = q_.get();
    buffers.key = k_.get();
    buffers.value = v_.get();
    buffers.out = out_.get();
    buffers.lse = lse_.get();
    buffers.dout = dout_.get();
    buffers.dlse = dlse_.get();
    buffers.query_offset = offset_.get();
    buffers.dq = dq_.get();
    buffers.dk = dk_.get();
    buffers.dv = dv_.get();
    buffers.workspace = workspace_.get();
    return launch_bwd(problem_, plan, buffers, stream);
  }

  // On the device: adds the number of elements of dK, dV and a deterministic dQ that are not, bit
  // for bit, those of the first call, and of another dQ that are not near them. Results and
  // workspace are poisoned behind it.
  void compare_with_first(uint32_t* differing, cudaStream_t stream) {
    if (first_dq_ == nullptr) {
      first_dq_ = copy_of(dq_, stream);
      first_dk_ = copy_of(dk_, stream);
      first_dv_ = copy_of(dv_, stream);
    } else {
      count_differing(dk_, *first_dk_, differing, stream);
      count_differing(dv_, *first_dv_, differing, stream);
      if (repeats_dq()) count_differing(dq_, *first_dq_, differing, stream);
      const auto near = [&](auto element) {
        using T = decltype(element);
        count_apart<<<64, 256, 0, stream>>>(reinterpret_cast<const T*>(dq_.get()),
                                            reinterpret_cast<const T*>(first_dq_->get()),
                                            dq_.count(), differing);
      };
      problem_.dtype == DType::kBF16 ? near(__nv_bfloat16{}) : near(__half{});
      CHECK_CUDA(cudaGetLastError());
    }
    for (DeviceArray<uint16_t>* array : {&dq_, &dk_, &dv_}) array->poison(stream);
    workspace_.poison(stream);
  }

  // The problem forces a configuration.
  bool repeats_dq() const { return kBwdConfigs[problem_.config].config.deterministic(); }

 protected:
  explicit Launches(const Problem& p)
      : problem_(p),
        q_(p.batch_q * p.seqlen_q * p.heads_q * p.head_dim),
        k_(p.batch_k * p.seqlen_k * p.heads_k * p.head_dim),
        v_(p.batch_v * p.seqlen_k * p.heads_k * p.head_dim),
        out_(p.batch * p.seqlen_q * p.heads_q * p.head_dim),
        dout_(out_.count()),
        lse_(p.batch * p.heads_q * p.seqlen_q),
        dlse_(lse_.count()),
        offset_(p.has_query_offset ? p.batch : 0),
        dq_(out_.count()),
        dk_(p.batch * p.seqlen_k * p.heads_k * p.head_dim),
        dv_(dk_.count()),
        workspace_(bwd_workspace_bytes(p)) {}

  Problem problem_;
  DeviceArray<uint16_t> q_, k_, v_, out_, dout_;
  DeviceArray<float> lse_, dlse_;
  DeviceArray<int32_t> offset_;
  DeviceArray<uint16_t> dq_, dk_, dv_;
  DeviceArray<uint8_t> workspace_;

 private:
  std::unique_ptr<DeviceArray<uint16_t>> first_dq_, first_dk_, first_dv_;
};

// A case, its reference's inputs on the device.
class Run : public Launches {
 public:
  Run(const Case& c, uint32_t seed) : Launches(c.problem), r_(reference(c, seed)) {
    const auto send = [&](DeviceArray<uint16_t>& array, const std::vector<float>& host) {
      std::vector<uint16_t> raw(host.size());
      for (size_t i = 0; i < host.size(); ++i) raw[i] = bits(c.problem.dtype, host[i]);
      array.copy_from(raw);
    };
    send(q_, r_.q);
    send(k_, r_.k);
    send(v_, r_.v);
    send(out_, r_.out);
    send(dout_, r_.dout);
    lse_.copy_from(r_.lse);
    dlse_.copy_from(r_.dlse);
    offset_.copy_from(c.query_offset);
  }

  // Against the definition. Returns what is wrong, or nothing.
  std::string verify() const {
    const Problem& p = problem_;
    std::string wrong = compare("dq", dq_, r_.dq, p.seqlen_q, p.heads_q);
    if (wrong.empty()) wrong = compare("dk", dk_, r_.dk, p.seqlen_k, p.heads_k);
    if (wrong.empty()) wrong = compare("dv", dv_, r_.dv, p.seqlen_k, p.heads_k);
    return wrong;
  }

 private:
  // Every element within kDeviations of its row's noise, half an ulp of its own, and float32's.
  std::string compare(const char* what, const DeviceArray<uint16_t>& array, const Gradient& wanted,
                      int64_t seqlen, int64_t heads) const {
    // A model of the kernels' rounding in NumPy stays below 2 in the cases here.
    constexpr double kDeviations = 3;
    const Problem& p = problem_;
    const std::vector<uint16_t> got = array.copy();
    for (size_t i = 0; i < got.size(); ++i) {
      const int64_t row = static_cast<int64_t>(i) / p.head_dim;
      const double x = value(p.dtype, got[i]), right = wanted.exact[i];
      // What sees nothing is zero, not small.
      const bool seen = right != 0 || wanted.noise[row] != 0;
      const double bound =
          seen ? kDeviations * wanted.noise[row] + 1.01 * half_ulp(p.dtype) * std::abs(right) + 2e-6
               : 0;
      if (std::abs(x - right) <= bound) continue;  // NaN is not
      char text[256];
      std::snprintf(text, sizeof(text),
                    "%s of batch %d, row %d, head %d, column %d is %.6g, expected %.6g +- %.2g",
                    what, static_cast<int>(row / heads / seqlen),
                    static_cast<int>(row / heads % seqlen), static_cast<int>(row % heads),
                    static_cast<int>(i % p.head_dim), x, right, bound);
      return text;
    }
    return "";
  }

  Reference r_;
};

std::vector<Case> cases() {
  std::set<int> head_dims;
  for (const NamedBwdConfig& named : kBwdConfigs) head_dims.insert(named.config.head_dim);
  const MaskKind full = MaskKind::kFull, causal = MaskKind::kCausal;
  std::vector<Case> all;
  for (int head_dim : head_dims) {
    const auto add = [&](std::string name, const Problem& problem) -> Case& {
      all.push_back({name + " d" + std::to_string(head_dim), problem});
      return all.back();
    };
    for (DType dtype : {DType::kBF16, DType::kF16}) {
      for (MaskKind mask : {full, causal}) {
        const std::string what = std::string(" ") + name(dtype) + " " + name(mask);
        const auto sized = [&](int64_t batch, int64_t t, int64_t s, int64_t n, int64_t k) {
          return problem(dtype, batch, t, s, n, k, head_dim, mask);
        };
        add("odd lengths" + what, sized(2, 67, 131, 4, 2));
        add("one query, one key" + what, sized(3, 1, 1, 2, 1));
        add("group of eight" + what, sized(1, 129, 191, 8, 1));
        add("peaked" + what, sized(1, 130, 259, 2, 1)).query_factor = 8.0f;
        // The rings go round often: many steps over one tile of keys.
        add("many steps" + what, sized(1, 1000, 65, 2, 1));
        // Many tiles of keys add to the same dQ.
        add("many key tiles" + what, sized(1, 130, 1500, 2, 1)).problem.diagonal = 1400;
      }
    }
    const auto sized = [&](int64_t batch, int64_t t, int64_t s, int64_t n, int64_t k,
                           MaskKind mask) {
      return problem(DType::kBF16, batch, t, s, n, k, head_dim, mask);
    };
    Case& offset = add("query_offset", sized(4, 70, 90, 2, 2, causal));
    offset.problem.has_query_offset = true;
    offset.query_offset = {-70, -5, 20, 90};
    // Rows that see no key, in steps of their own and beside others.
    add("bottom right, unseen rows", sized(1, 300, 77, 2, 2, causal)).problem.diagonal = 77 - 300;
    add("bottom right", sized(1, 77, 300, 2, 2, causal)).problem.diagonal = 300 - 77;
    // Tiles of keys that no query sees: not one step.
    add("unseen keys", sized(2, 70, 700, 2, 1, causal));
    add("nothing is seen", sized(1, 70, 200, 2, 2, causal)).problem.diagonal = -70;
    add("no keys", sized(1, 9, 0, 2, 2, full));
    add("no queries", sized(1, 0, 150, 2, 2, full));
    add("no queries, causal", sized(2, 0, 150, 4, 2, causal));
    // More tiles than multiprocessors, in groups of pairs.
    add("many tiles", sized(40, 65, 70, 4, 4, causal));
    Case& broadcast = add("keys broadcast", sized(6, 65, 65, 2, 2, full));  // [3, 2] x [1, 2]
    broadcast.problem.batch_k = broadcast.problem.batch_v = 2;
    BatchMap& map = broadcast.problem.batch_map;
    map.levels = 2;
    map.size[0] = 3;
    map.size[1] = 2;
    map.q_stride[0] = 2;
    map.k_stride[0] = map.v_stride[0] = 0;
    map.q_stride[1] = map.k_stride[1] = map.v_stride[1] = 1;
    Case& query = add("query broadcast", sized(3, 65, 65, 2, 1, causal));
    query.problem.batch_q = 1;
    query.problem.batch_map.q_stride[0] = 0;
  }
  return all;
}

int run_all(const std::string& only) {
  Report report;
  uint32_t seed = 0;
  DeviceArray<uint32_t> differing(1);
  for (const Case& c : on_every_config(kBwdConfigs, cases(), only)) {
    Run run(c, ++seed);
    const Status status = run.launch(nullptr);
    CHECK_CUDA(cudaDeviceSynchronize());
    report(c.name, status.ok() ? run.verify() : status.message);
    // Again over poison: what the first launch left behind was not what made it right.
    differing.zero(nullptr);
    run.compare_with_first(differing.get(), nullptr);
    report(c.name, run.launch(nullptr).message);
    CHECK_CUDA(cudaDeviceSynchronize());
    report(c.name + ", again", run.verify());
    run.compare_with_first(differing.get(), nullptr);
    const uint32_t elements = differing.copy()[0];
    report(c.name, elements == 0 ? "" : std::to_string(elements) + " elements did not repeat");
  }
  if (!only.empty() && report.count() == 0) report(only, "no case has this in its name");

  if (only.empty()) {
    const int head_dim = kBwdConfigs[0].config.head_dim;
    const MaskKind causal = MaskKind::kCausal;
    Run left({"", problem(DType::kBF16, 4, 257, 257, 4, 4, head_dim, causal)}, 1001);
    Run right({"", problem(DType::kF16, 4, 321, 129, 4, 2, head_dim, causal)}, 1002);
    run_on_two_streams(left, right, report);
  }
  return report.finish();
}

__global__ void fill_with_noise(uint16_t* x, size_t count, uint32_t seed, float factor) {
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    uint32_t z = (static_cast<uint32_t>(i) + seed) * 0x9e3779b9u;
    z = (z ^ z >> 16) * 0x85ebca6bu;
    z = (z ^ z >> 13) * 0xc2b2ae35u;
    z ^= z >> 16;
    const float sum = static_cast<float>(z & 0xffff) + static_cast<float>(z >> 16) - 65535.0f;
    x[i] = __bfloat16_as_ushort(__float2bfloat16(sum * factor * 3.7e-5f));  // deviation `factor`
  }
}

// A problem too large for a reference on the host.
class NoisyRun : public Launches {
 public:
  explicit NoisyRun(const Problem& problem) : Launches(problem) {
    uint32_t seed = 0;
    for (DeviceArray<uint16_t>* array : {&q_, &k_, &v_, &out_, &dout_}) {
      fill_with_noise<<<512, 256>>>(array->get(), array->count(), ++seed,
                                    array == &out_ ? 0.02f : 1.0f);
      CHECK_CUDA(cudaGetLastError());
    }
    const float lse = std::log(static_cast<float>(problem.seqlen_k)) + 0.5f;  // near the truth
    lse_.copy_from(std::vector<float>(lse_.count(), lse));
    dlse_.zero(nullptr);
  }
};

// In turns, gradients must come out the same even where an addition takes longer than the way to
// the next one. The plan avoids that: here all pairs are in flight, so that a step's rows have left
// the L2 each time their next key tile comes. (With relaxed counters nearly every launch differed.)
int overload(int launches) {
  Problem p = problem(DType::kBF16, 2, 8192, 8192, 16, 16, 128, MaskKind::kFull);
  p.config = find_bwd_config("BwdBf16Hdim128FullInTurns");
  NoisyRun run(p);
  DeviceArray<uint32_t> differing(1);
  differing.zero(nullptr);
  for (int i = 0; i < launches; ++i) {
    const Status status = run.launch(nullptr, static_cast<int32_t>(p.batch * p.heads_k));
    if (!status.ok()) {
      std::printf("FAILED overload: %s\n", status.message.c_str());
      return 1;
    }
    run.compare_with_first(differing.get(), nullptr);
  }
  CHECK_CUDA(cudaDeviceSynchronize());
  const uint32_t elements = differing.copy()[0];
  std::printf("%d launches with the L2 overloaded, %u elements changed\n", launches, elements);
  return elements == 0 ? 0 : 1;
}

int soak(int launches) {
  const int failed = soak_shapes<Run>(on_every_config(kBwdConfigs, cases(), ""), launches, true);
  return overload(20) + failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_fa3

int main(int argc, char** argv) {
  return jax_fa3::device_main(argc, argv, "bwd_device", jax_fa3::run_all, jax_fa3::soak);
}
