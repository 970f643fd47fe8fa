// The CUDA kernels under emulation, without Python: small shapes against a plain loop in double, with threads in order
// and in random orders. Arrays end where they end, so that a sanitizer sees any access past them. tests/run_cuda_on_cpu
// builds it under sanitizers, and with bugs planted. Exits non-zero with a line for each failure.
#include "cuda/exit_stats.h"

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "core/params.h"
#include "cuda_runtime.h"
#include "expect.h"
#include "random_values.h"

using namespace exeunt;

namespace {

// n rows, of which all but the last are live, against a head [v, d] whose rows lie `stride` elements apart.
template <class T>
void matches_a_plain_loop(DType dtype, int64_t n, int64_t v, int64_t d, int64_t stride) {
  std::mt19937 random(static_cast<unsigned>(n * 1009 + v * 31 + d));
  // Sixteen-byte aligned, as an allocator of device memory would have it: malloc's alignment.
  const std::vector<T> hidden = random_values<T>(n * d, 1.0f, random);
  const std::vector<T> head = random_values<T>((v - 1) * stride + d, 1.0f / std::sqrt(static_cast<float>(d)), random);
  const int64_t live = n > 1 ? n - 1 : 1;
  const int64_t topk = n > 64 ? 1 : 2;  // short lists and no draws leave Hopper's widest blocks their room
  std::vector<int64_t> argmax(n), ids(n * topk), seeds(n), sample(n);
  std::vector<float> top1(n), top2(n), sumexp(n), weighted(n), best(n * topk), logits(n * v, -7.0f);
  ExitStatsParams p{};
  p.hidden = hidden.data();
  p.hidden_dtype = dtype;
  p.hidden_stride = d;
  p.hidden_rows = p.rows = n;
  p.head.data = head.data();
  p.head.dtype = dtype;
  p.head.row_stride = stride * element_bytes(dtype);
  p.head_rows = p.vocab = v;
  p.width = d;
  p.count = &live;
  p.count_64 = true;
  p.norm.kind = Norm::rms;
  p.scale = p.temperature = 1.0f;
  p.logits_out = logits.data();
  p.logits_stride = v;
  p.entropy = true;
  p.topk = static_cast<int32_t>(topk);
  p.topk_logits = best.data();
  p.topk_ids = ids.data();
  if (n <= 64) {
    p.seeds = seeds.data();
    p.sample = sample.data();
  }
  p.argmax = argmax.data();
  p.top1 = top1.data();
  p.top2 = top2.data();
  p.sumexp = sumexp.data();
  p.weighted = weighted.data();
  std::vector<uint4> workspace(cuda::exit_stats_workspace(dtype, n, v, d, p.topk, true) / 16 + 1, {~0u, ~0u, ~0u, ~0u});
  p.workspace = workspace.data();
  const std::string where = "n=" + std::to_string(n) + " v=" + std::to_string(v) + " d=" + std::to_string(d) +
                            " dtype=" + std::to_string(static_cast<int>(dtype)) +
                            " schedule=" + std::to_string(emu::schedule) + " sm_" + std::to_string(emu::capability);
  try {
    cuda::exit_stats(p, 0, nullptr);
  } catch (const std::exception& e) {
    return expect(false, where + ": " + e.what());
  }
  for (int64_t r = 0; r < live; ++r) {
    double power = 0.0, top = -1e300, sum = 0.0;
    for (int64_t i = 0; i < d; ++i) power += std::pow(to_float(hidden[r * d + i]), 2.0);
    const double rstd = 1.0 / std::sqrt(power / static_cast<double>(d));
    std::vector<double> z(v, 0.0);
    for (int64_t j = 0; j < v; ++j) {
      for (int64_t i = 0; i < d; ++i)
        z[j] +=
            rounded_to(dtype, static_cast<float>(rstd * to_float(hidden[r * d + i]))) * to_float(head[j * stride + i]);
      top = std::max(top, z[j]);
    }
    bool close = true;
    for (int64_t j = 0; j < v; ++j) {
      sum += std::exp(z[j] - top);
      close = close && std::fabs(logits[r * v + j] - z[j]) < 1e-4;
    }
    expect(close, where + ": logits of row " + std::to_string(r));
    expect(std::fabs(top1[r] - top) < 1e-4 && std::fabs(best[topk * r] - top) < 1e-4, where + ": the largest logit");
    expect(std::fabs(sumexp[r] / sum - 1.0) < 1e-3, where + ": sumexp of row " + std::to_string(r));
    expect(argmax[r] >= 0 && z[argmax[r]] > top - 1e-4 && ids[topk * r] == argmax[r], where + ": argmax");
  }
  for (int64_t r = live; r < n; ++r)
    expect(argmax[r] == -1 && logits[r * v] == -7.0f, where + ": a row that is not live");
}

}  // namespace

int main() {
  for (unsigned schedule : {0u, 1u}) {
    emu::schedule = schedule;
    matches_a_plain_loop<BFloat16>(DType::bfloat16, 3, 300, 328, 328);
    matches_a_plain_loop<Float16>(DType::float16, 12, 450, 72, 80);
    matches_a_plain_loop<float>(DType::float32, 17, 130, 200, 200);
    matches_a_plain_loop<BFloat16>(DType::bfloat16, 34, 129, 65, 67);
    matches_a_plain_loop<float>(DType::float32, 1, 3, 31, 31);
    emu::capability = 90;  // unaligned heads and float32 take the kernels above on Hopper too
    matches_a_plain_loop<BFloat16>(DType::bfloat16, 3, 650, 328, 328);
    matches_a_plain_loop<Float16>(DType::float16, 12, 450, 72, 80);
    matches_a_plain_loop<BFloat16>(DType::bfloat16, 20, 129, 65, 72);
    matches_a_plain_loop<BFloat16>(DType::bfloat16, 66, 800, 72, 72);
    emu::capability = 80;
  }
  return ended();
}
