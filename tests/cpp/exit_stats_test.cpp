// The C++ core without Python: the merge is a monoid, and every ISA path agrees with a plain loop in double, including
// tails of D and V, strides, flagged rows and thread counts. Built natively, under sanitizers and for aarch64 by
// tests/run_cpp; exits non-zero with a line for each failure.
#include "core/exit_stats.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/exit_stats.h"
#include "cpu/isa.h"
#include "cpu/runs.h"
#include "expect.h"
#include "inputs.h"

using namespace exeunt;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

bool same_bits(const ExitStats& a, const ExitStats& b) { return __builtin_memcmp(&a, &b, sizeof a) == 0; }

ExitStats of(const std::vector<float>& z, int first) {
  ExitStats s = exit_stats_empty();
  for (size_t i = 0; i < z.size(); ++i) s = exit_stats_merge(s, {first + static_cast<int>(i), z[i], -kInf, 1.0f, 0.0f});
  return s;
}

void merge_is_a_monoid() {
  const ExitStats a = of({1.0f, 3.0f, 3.0f}, 0), b = of({3.0f, -2.0f}, 3), empty = exit_stats_empty();
  expect(same_bits(exit_stats_merge(a, empty), a) && same_bits(exit_stats_merge(empty, a), a), "empty is neutral");
  expect(exit_stats_merge(a, b).argmax == 1 && exit_stats_merge(b, a).argmax == 1, "ties go to the lowest index");
  expect(exit_stats_merge(a, b).top2 == 3.0f, "top2 of a tie");
  const ExitStats flagged = exit_stats_merge(exit_stats_flagged(), a);
  expect(flagged.argmax == -1 && flagged.sumexp != flagged.sumexp, "a flagged part flags the whole");
  expect(exit_stats_finish(empty).top1 != exit_stats_finish(empty).top1, "nothing seen is flagged in the end");
  const ExitStats far = exit_stats_merge(of({-3e38f}, 0), of({3e38f}, 1));
  expect(far.sumexp == 1.0f && far.weighted == 0.0f, "a shift that overflows contributes nothing");
}

template <class T>
T narrow(float v);
template <>
float narrow(float v) {
  return v;
}
template <>
BFloat16 narrow(float v) {
  return to_bfloat16(v);
}
template <>
Float16 narrow(float v) {
  return to_float16(v);
}

void runs_take_every_item_once() {
  for (int threads : {1, 2, 5})
    for (int64_t count : {0, 1, 7, 125, 256}) {
      cpu::Runs runs(count, threads);
      std::vector<int> taken(static_cast<size_t>(count));
#pragma omp parallel num_threads(threads)
      for (int64_t i, end; runs.next(i, end);)
        for (; i < end; ++i) {
#pragma omp atomic
          ++taken[static_cast<size_t>(i)];
        }
      expect(std::count(taken.begin(), taken.end(), 1) == count, "runs take every item once");
    }
  cpu::Runs runs(125, 2);
  int64_t begin, end, last = 0, longest = 125;
  while (runs.next(begin, end)) {
    expect(begin == last && end - begin <= longest, "runs follow one another and never grow");
    last = end, longest = end - begin;
  }
  expect(last == 125 && longest == 1, "the last run is one item");
}

void float16_is_exact() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const Float16 half{static_cast<uint16_t>(bits)};
    const float value = to_float(half);
    if (value != value) {
      expect(to_float(to_float16(value)) != to_float(to_float16(value)), "NaN stays NaN in float16");
      continue;
    }
    expect(to_float16(value).bits == half.bits, "float16 -> float32 -> float16");
    if ((bits & 0x7fff) >= 0x7bff) continue;  // halfway to the next value: ties go to the even one
    const float next = to_float(Float16{static_cast<uint16_t>(bits + 1)});
    expect(to_float16((value + next) / 2).bits == half.bits + (bits & 1), "float16 ties to even");
  }
}

template <class T>
void matches_a_plain_loop(DType dtype, WeightForm form, int64_t n, int64_t v, int64_t d, bool bad_row) {
  std::mt19937 rng(static_cast<unsigned>(n * 1000003 + v * 1009 + d));
  std::normal_distribution<float> normal;
  const int64_t stride = d + 3;
  // Exactly as long as the last row needs, so that a sanitizer sees any read past it.
  std::vector<T> hidden((n - 1) * stride + d), head((v - 1) * stride + d);
  for (T& t : hidden) t = narrow<T>(normal(rng));
  for (T& t : head) t = narrow<T>(normal(rng) / std::sqrt(static_cast<float>(d)));
  if (bad_row) hidden[0] = narrow<T>(std::numeric_limits<float>::quiet_NaN());

  std::vector<int64_t> argmax(n);
  std::vector<float> top1(n), top2(n), sumexp(n), weighted(n), logits(n * v);
  const auto workspace = memory(cpu::exit_stats_workspace(dtype, form, n, v, d, 0, false, 3));
  ExitStatsParams p{};
  p.hidden = hidden.data();
  const int64_t row_bytes = stride * element_bytes(dtype);
  const std::vector<char> weight = in_form(form, head.data(), element_bytes(dtype), v, d, stride);
  const int64_t tile_bytes = (d * element_bytes(dtype) + 63) / 64 * 1024;
  p.head = {weight.data(), dtype, form, tile_bytes, 64, 1024, nullptr};
  if (form == WeightForm::lies) p.head = {weight.data(), dtype, form, 16 * row_bytes, row_bytes, 64, nullptr};
  p.hidden_dtype = dtype;
  p.hidden_stride = stride;
  p.rows = n;
  p.vocab = v;
  p.width = d;
  p.norm.kind = Norm::rms;
  p.norm.eps = 1e-6f;
  p.scale = p.temperature = 1.0f;
  p.logits_out = logits.data();
  p.logits_dtype = DType::float32;
  p.logits_stride = v;
  p.argmax = argmax.data();
  p.top1 = top1.data();
  p.top2 = top2.data();
  p.sumexp = sumexp.data();
  p.weighted = weighted.data();
  p.entropy = true;
  p.workspace = workspace.get();
  std::vector<float> first;
  for (int threads : {1, 3}) {
    p.threads = threads;
    cpu::exit_stats(p);
    if (threads == 1) first = sumexp;
    expect(bad_row || first == sumexp, "bits depend on the number of threads");
  }

  const std::string where = std::string(cpu::selected_isa().name) + " n=" + std::to_string(n) +
                            " v=" + std::to_string(v) + " d=" + std::to_string(d) +
                            " form=" + std::to_string(static_cast<int>(form)) + (bad_row ? " bad" : "");
  for (int64_t r = 0; r < n; ++r) {
    if (bad_row && r == 0) {
      expect(argmax[r] == -1 && sumexp[r] != sumexp[r], where + ": NaN is flagged");
      continue;
    }
    double power = 0.0, best = -1e300, sum = 0.0;
    for (int64_t i = 0; i < d; ++i) power += std::pow(to_float(hidden[r * stride + i]), 2.0);
    const double rstd = 1.0 / std::sqrt(power / static_cast<double>(d) + 1e-6);
    std::vector<double> z(v, 0.0);
    for (int64_t j = 0; j < v; ++j) {
      for (int64_t i = 0; i < d; ++i)
        z[j] += rounded_to(dtype, static_cast<float>(rstd * to_float(hidden[r * stride + i]))) *
                to_float(head[j * stride + i]);
      best = std::max(best, z[j]);
      expect(std::fabs(logits[r * v + j] - z[j]) < 1e-4, where + ": logits");
    }
    for (double value : z) sum += std::exp(value - best);
    expect(std::fabs(top1[r] - best) < 1e-4, where + ": top1");
    expect(std::fabs(sumexp[r] / sum - 1.0) < 1e-4, where + ": sumexp");
    expect(z[argmax[r]] > best - 1e-4, where + ": argmax");
  }
}

}  // namespace

int main() {
  merge_is_a_monoid();
  runs_take_every_item_once();
  float16_is_exact();
  for (const char* isa : {"baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"}) {
    if (cpu::select_isa(isa) != isa) continue;  // not on this machine
    for (int64_t n : {1, 2, 5, 20, 66})
      for (int64_t v : {1, 3, 35, 130, 515})
        for (int64_t d : {1, 31, 33, 96}) {
          for (WeightForm form : {WeightForm::lies, WeightForm::tiles, WeightForm::turned}) {
            matches_a_plain_loop<float>(DType::float32, form, n, v, d, false);
            matches_a_plain_loop<Float16>(DType::float16, form, n, v, d, false);
            matches_a_plain_loop<BFloat16>(DType::bfloat16, form, n, v, d, false);
          }
        }
    for (WeightForm form : {WeightForm::lies, WeightForm::tiles, WeightForm::turned}) {
      // Rows that threads share out: of a few words, of one chunk.
      matches_a_plain_loop<float>(DType::float32, form, 69, 3, 1300, false);
      matches_a_plain_loop<BFloat16>(DType::bfloat16, form, 69, 3, 1300, false);
      matches_a_plain_loop<float>(DType::float32, form, 133, 35, 96, false);
      matches_a_plain_loop<BFloat16>(DType::bfloat16, form, 133, 35, 96, false);
      matches_a_plain_loop<float>(DType::float32, form, 3, 40, 64, true);
      matches_a_plain_loop<BFloat16>(DType::bfloat16, form, 3, 40, 64, true);
      matches_a_plain_loop<Float16>(DType::float16, form, 3, 40, 64, true);
    }
    variants_tests();
    ragged_attention_tests();
    kv_fill_tests();
    std::printf("%s: checked\n", isa);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
