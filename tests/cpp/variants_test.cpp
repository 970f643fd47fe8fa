// exit_stats with all that can be asked of it, int8 heads, small heads and saturation, against plain loops in double,
// on the instruction set that is selected. Every array is exactly as long as it must be, so that a sanitizer sees what
// is read or written beside it.
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "core/exit_stats.h"
#include "cpu/exit_stats.h"
#include "cpu/isa.h"
#include "cpu/small_head.h"
#include "expect.h"
#include "inputs.h"

using namespace exeunt;

namespace {

std::mt19937 rng(7);

std::vector<float> random(int64_t count, double spread = 1.0) {
  std::normal_distribution<float> normal(0.0f, static_cast<float>(spread));
  std::vector<float> values(static_cast<size_t>(count));
  for (float& v : values) v = normal(rng);
  return values;
}

VectorArg vector(const std::vector<float>& v) { return {v.data(), DType::float32, 1}; }

WeightArg lying(const std::vector<float>& weight, int64_t width) {
  return {weight.data(), DType::float32, WeightForm::lies, 64 * width, 4 * width, 64, nullptr};
}

std::string named(const char* what, int64_t n, int64_t v, int64_t d) {
  return std::string(cpu::selected_isa().name) + " " + what + " n=" + std::to_string(n) + " v=" + std::to_string(v) +
         " d=" + std::to_string(d);
}

// Room for whatever exit_stats may report of n rows.
struct Report {
  std::vector<int64_t> argmax, topk_ids, sample;
  std::vector<float> top1, top2, sumexp, weighted, topk_logits, target;
  explicit Report(int64_t n)
      : argmax(n),
        topk_ids(8 * n),
        sample(n),
        top1(n),
        top2(n),
        sumexp(n),
        weighted(n),
        topk_logits(8 * n),
        target(n) {}
  void asked_of(ExitStatsParams& p) {
    p.argmax = argmax.data();
    p.top1 = top1.data();
    p.top2 = top2.data();
    p.sumexp = sumexp.data();
    p.weighted = weighted.data();
    p.target_out = target.data();
    p.topk = 8;
    p.topk_logits = topk_logits.data();
    p.topk_ids = topk_ids.data();
    p.sample = sample.data();
  }
};

void run(ExitStatsParams& p, int threads) {
  const auto workspace = memory(cpu::exit_stats_workspace(p.head.dtype, p.head.form, p.rows, p.vocab, p.width, p.topk,
                                                          p.seeds != nullptr, threads));
  p.workspace = workspace.get();
  p.threads = threads;
  cpu::exit_stats(p);
}

// Norm, bias, tail, listed rows of which the last are not live, 16-bit logits; and a target, or columns, one twice.
void everything_asked(int64_t n, int64_t v, int64_t d, bool columns, int threads) {
  const std::string where = named(columns ? "columns" : "target", n, v, d);
  const int64_t all = n + 3;
  const std::vector<float> hidden = random(all * d), head = random(v * d, 1.0 / std::sqrt(d)), bias = random(v),
                           scale = random(d), shift = random(d);
  std::vector<int64_t> seeds(n), listed(columns ? v + 2 : 0), target(columns ? 0 : n);
  std::vector<int32_t> rows(n);
  for (int64_t i = 0; i < n; ++i) seeds[i] = 1000 + i, rows[i] = static_cast<int32_t>(all - 1 - i);
  for (int64_t i = 0; i < n && !columns; ++i) target[i] = i % v;
  for (size_t i = 0; i < listed.size(); ++i) listed[i] = static_cast<int64_t>(i) * 7 % v;
  const int64_t live = n - n / 3, width = columns ? v + 2 : v;
  const float cap = 5.0f, gain = 1.5f, temperature = 0.7f;

  Report report(n);
  std::vector<BFloat16> logits(all * width);
  ExitStatsParams p{};
  report.asked_of(p);
  p.hidden = hidden.data();
  p.hidden_dtype = DType::float32;
  p.hidden_stride = d;
  p.head = lying(head, d);
  p.rows = n;
  p.vocab = width;
  p.width = d;
  p.hidden_rows = all;
  p.head_rows = v;
  p.row_list = rows.data();
  p.count = &live;
  p.count_64 = true;
  p.head_bias = vector(bias);
  p.norm = {Norm::layer, vector(scale), vector(shift), 1e-5f};
  p.scale = gain;
  p.softcap = cap;
  p.temperature = temperature;
  p.logits_out = logits.data();
  p.logits_dtype = DType::bfloat16;
  p.logits_stride = width;
  p.entropy = true;
  p.seeds = seeds.data();
  p.columns = columns ? listed.data() : nullptr;
  p.target = columns ? nullptr : target.data();
  run(p, threads);

  for (int64_t r = 0; r < n; ++r) {
    if (r >= live) {
      expect(report.argmax[r] == -1 && report.sample[r] == -1, where + ": a row that is not live is flagged");
      continue;
    }
    const float* x = hidden.data() + rows[r] * d;
    double mean = 0.0, power = 0.0, best = -1e300, sum = 0.0;
    for (int64_t i = 0; i < d; ++i) mean += x[i] / static_cast<double>(d);
    for (int64_t i = 0; i < d; ++i) power += (x[i] - mean) * (x[i] - mean) / static_cast<double>(d);
    std::vector<double> z(width), raw(width);
    for (int64_t j = 0; j < width; ++j) {
      const int64_t id = columns ? listed[j] : j;
      raw[j] = bias[id];
      for (int64_t i = 0; i < d; ++i)
        raw[j] += ((x[i] - mean) / std::sqrt(power + 1e-5) * scale[i] + shift[i]) * head[id * d + i];
      z[j] = cap * std::tanh(gain * raw[j] / cap) / temperature;
      best = std::max(best, z[j]);
      expect(std::fabs(to_float(logits[rows[r] * width + j]) - raw[j]) < 0.01 * (1.0 + std::fabs(raw[j])),
             where + ": logits");
    }
    for (double value : z) sum += std::exp(value - best);
    expect(std::fabs(report.top1[r] - best) < 1e-3 && std::fabs(report.sumexp[r] / sum - 1.0) < 1e-3, where + ": sums");
    expect(report.topk_ids[8 * r] == report.argmax[r] && report.topk_logits[8 * r] == report.top1[r],
           where + ": the first of the largest");
    expect(std::is_sorted(report.topk_logits.begin() + 8 * r, report.topk_logits.begin() + 8 * r + 8, std::greater<>()),
           where + ": the largest come first");
    expect(report.sample[r] >= 0 && report.sample[r] < v, where + ": a draw is an id");
    if (!columns) expect(std::fabs(report.target[r] - z[target[r]]) < 1e-3, where + ": target");
  }
}

// Weights in [-127, 127] with a scale each, in the form that the instruction set wants.
void int8_heads(int64_t n, int64_t v, int64_t d) {
  const std::string where = named("int8", n, v, d);
  const WeightForm form = std::string(cpu::selected_isa().name) == "amx" ? WeightForm::tiles : WeightForm::turned;
  const int64_t lines = (d + 63) / 64, tiles = (v + 15) / 16;
  std::vector<int8_t> weight(static_cast<size_t>(v * d));
  std::vector<float> scale(static_cast<size_t>(tiles * 16));
  for (int8_t& w : weight) w = static_cast<int8_t>(static_cast<int>(rng() % 255) - 127);
  for (int64_t j = 0; j < v; ++j) scale[j] = 0.001f + 0.0001f * static_cast<float>(j % 7);
  const std::vector<char> packed = in_form(form, weight.data(), 1, v, d, d);
  std::vector<float> hidden = random(n * d), logits(n * v);
  for (int64_t i = 0; i < d; ++i) hidden[(n - 1) * d + i] = 1e30f;  // the largest integers, all of one sign
  Report report(n);
  ExitStatsParams p{};
  report.asked_of(p);
  p.topk = 0;
  p.hidden = hidden.data();
  p.hidden_dtype = DType::float32;
  p.hidden_stride = d;
  p.head = {packed.data(), DType::int8, form, lines * 1024, 64, 1024, scale.data()};
  p.rows = n;
  p.vocab = v;
  p.width = d;
  p.scale = p.temperature = 1.0f;
  p.logits_out = logits.data();
  p.logits_dtype = DType::float32;
  p.logits_stride = v;
  for (int threads : {1, 3}) run(p, threads);
  for (int64_t r = 0; r < n; ++r) {
    double largest = 0.0;
    for (int64_t i = 0; i < d; ++i) largest = std::max(largest, std::fabs(static_cast<double>(hidden[r * d + i])));
    for (int64_t j = 0; j < v; ++j) {
      double z = 0.0, weights = 0.0, size = 0.0;
      for (int64_t i = 0; i < d; ++i) {
        const double w = static_cast<double>(weight[j * d + i]) * scale[j], x = hidden[r * d + i];
        z += w * x;
        weights += std::fabs(w);
        size += std::fabs(w * x);
      }
      expect(std::fabs(logits[r * v + j] - z) <= largest / 32512 * weights + 1e-6 * size, where + ": logits");
    }
  }
}

// Texts of tokens of which some count, a pooler, statistics and a verdict.
void small_heads(int64_t n, int64_t tokens, int64_t d, int64_t pooled, bool masked) {
  const int64_t v = 3;
  const std::string where = named("small head", n, tokens, d);
  const std::vector<float> hidden = random(n * tokens * d), pool = random(pooled * d, 1.0 / std::sqrt(d)),
                           pool_bias = random(pooled), head = random(v * (pooled ? pooled : d)), bias = random(v);
  std::vector<uint8_t> mask(masked ? n * tokens : 0), leave(n);
  for (size_t i = 0; i < mask.size(); ++i) mask[i] = i % 3 != 0;
  std::vector<float> out(n * v), statistics(4 * n);
  std::vector<int64_t> argmax(n);
  SmallHeadParams p{};
  p.hidden = hidden.data();
  p.hidden_dtype = DType::float32;
  p.hidden_stride = tokens * d;
  p.rows = n;
  p.width = d;
  p.tokens = tokens;
  p.token_stride = d;
  p.mask = masked ? mask.data() : nullptr;
  p.mask_stride = tokens;
  p.pooled = pooled > 0;
  const int64_t inner = pooled ? pooled : d;
  if (p.pooled) p.pooler = {lying(pool, d), vector(pool_bias), pooled, d, Activation::tanh};
  p.head = {lying(head, inner), vector(bias), v, inner, Activation::none};
  p.out = out.data();
  p.argmax = argmax.data();
  p.top1 = statistics.data();
  p.top2 = p.top1 + n;
  p.sumexp = p.top2 + n;
  p.weighted = p.sumexp + n;
  p.measure = Measure::margin;
  p.threshold = 0.3f;
  p.leave = leave.data();
  for (int threads : {1, 3}) {
    const auto workspace = memory(cpu::small_head_workspace(d, pooled, n, threads));
    p.workspace = workspace.get();
    p.threads = threads;
    const int64_t gone = cpu::small_head(p);
    expect(gone == -1 || gone == std::count(leave.begin(), leave.end(), 1), where + ": how many leave");
  }
  for (int64_t r = 0; r < n; ++r) {
    std::vector<double> x(d), y(inner);
    double counted = 0.0;
    for (int64_t t = 0; t < tokens; ++t) {
      if (masked && !mask[r * tokens + t]) continue;
      counted += 1.0;
      for (int64_t i = 0; i < d; ++i) x[i] += hidden[(r * tokens + t) * d + i];
    }
    for (double& value : x) value /= std::max(counted, 1.0);
    for (int64_t j = 0; j < inner; ++j) {
      if (!pooled) {
        y[j] = x[j];
        continue;
      }
      y[j] = pool_bias[j];
      for (int64_t i = 0; i < d; ++i) y[j] += pool[j * d + i] * x[i];
      y[j] = std::tanh(y[j]);
    }
    for (int64_t c = 0; c < v; ++c) {
      double z = bias[c];
      for (int64_t j = 0; j < inner; ++j) z += head[c * inner + j] * y[j];
      expect(std::fabs(out[r * v + c] - z) < 1e-4, where + ": logits");
    }
    expect(argmax[r] == std::max_element(out.begin() + r * v, out.begin() + (r + 1) * v) - (out.begin() + r * v),
           where + ": argmax");
  }
}

void saturations(int64_t n, int64_t d) {
  const std::vector<float> a = random(n * d), b = random(n * d);
  std::vector<float> out(n);
  cpu::saturation({a.data(), b.data(), DType::float32, DType::float32, d, d, n, d, out.data()});
  for (int64_t r = 0; r < n; ++r) {
    double ab = 0.0, aa = 0.0, bb = 0.0;
    for (int64_t i = r * d; i < (r + 1) * d; ++i)
      ab += static_cast<double>(a[i]) * b[i], aa += static_cast<double>(a[i]) * a[i],
          bb += static_cast<double>(b[i]) * b[i];
    expect(std::fabs(out[r] - ab / std::sqrt(aa * bb)) < 1e-6, named("saturation", n, 0, d));
  }
}

}  // namespace

void variants_tests() {
  for (int64_t n : {1, 5, 20, 66})
    for (int64_t v : {10, 35, 130})
      for (int64_t d : {1, 33, 96}) {
        for (int threads : {1, 3})
          for (bool columns : {false, true}) everything_asked(n, v, d, columns, threads);
        int8_heads(n, v, d);
      }
  everything_asked(66, 8, 500, false, 3);  // of few words threads share out the rows, some of which are not live
  int8_heads(2, 17, 2080);                 // more than a block of integer sums
  for (int64_t pooled : {0, 33})
    for (bool masked : {false, true}) {
      small_heads(1, 1, 70, pooled, masked);
      small_heads(37, 5, 70, pooled, masked);
    }
  small_heads(4, 0, 8, 0, false);
  small_heads(3, 1, 400, 400, false);  // threads share the pooler
  saturations(3, 77);
}
