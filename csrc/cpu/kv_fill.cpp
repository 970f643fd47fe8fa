// kv_fill on CPU: keys and values of the layers that rows skipped, in one pass over those layers' weights.
//
//   standardise   each row once: all its layers see the same hidden state
//   pack          for some layers at a time, as many as kPacked bytes hold: times the layer's norm weight, packed
//   product       a head of keys or of values at a time, in the order in which the weights lie
//
//   workspace: | standard rows [N, D] double | packed rows, RowScale of G layers | per thread: panel, head, one row |
//
// A head's rows are computed whole by one thread, so the bits do not depend on the number of threads.
#include "cpu/kv_fill.h"

#include <omp.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/isa.h"
#include "cpu/rows.h"

namespace exeunt::cpu {
namespace {

constexpr int64_t kPacked = 1 << 21;   // bytes of packed rows that still stay close to the cores
constexpr double kSerialWork = 65536;  // multiply-adds below which a parallel region costs more than it saves
constexpr int64_t kBlockRows = 64;     // rows of a head that are finished together

struct Layout {
  int64_t layer_bytes, group, packed, scale, thread, panel_bytes, head_bytes, thread_bytes, total;
  Layout(DType dtype, int64_t rows, int64_t width, int64_t layers, int64_t head_size, int32_t threads) {
    layer_bytes = round_up(selected_isa().rows_bytes(dtype, rows, width), 64);
    group = std::clamp<int64_t>(kPacked / std::max<int64_t>(layer_bytes, 1), 1, std::max<int64_t>(layers, 1));
    packed = round_up(rows * width * static_cast<int64_t>(sizeof(double)), 64);
    // Room for the group; in this form fewer rows or layers never need more, which kv_fill_workspace promises.
    scale = packed + std::min(std::max<int64_t>(layers, 1) * layer_bytes, std::max(kPacked, layer_bytes));
    thread = scale + round_up(rows * static_cast<int64_t>(sizeof(RowScale)), 64);
    panel_bytes = 16 * round_up(width * element_bytes(dtype), 64) + 64;
    head_bytes = kBlockRows * round_up(head_size, 16) * static_cast<int64_t>(sizeof(float));
    thread_bytes = panel_bytes + head_bytes + round_up(width * static_cast<int64_t>(sizeof(float)), 64);
    total = thread + std::max(1, threads) * thread_bytes;
  }
};

const char* head_of(const KvLayer& layer, bool keys, int64_t head) {
  return static_cast<const char*>(keys ? layer.key : layer.value) + head * (keys ? layer.key_head : layer.value_head);
}

}  // namespace

KvRows kv_rows(const KvRowsArg& arg) {
  const auto refuse = [](const std::string& sentence) { throw std::invalid_argument("kv_fill: " + sentence); };
  std::vector<int64_t> order;
  for (int64_t n = 0; n < arg.count; ++n) {
    if (arg.from_layer[n] < 0 || arg.from_layer[n] > arg.layers)
      refuse("from_layer must lie in 0.." + std::to_string(arg.layers) + ", got " + std::to_string(arg.from_layer[n]));
    if (arg.slots[n] >= 0 && arg.from_layer[n] < arg.until) order.push_back(n);
  }
  const auto by = [&](auto key) {
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return key(a) < key(b); });
  };
  const auto place = [&](int64_t n) { return std::tuple(arg.batch_rows[n], arg.slots[n]); };
  by(place);
  const auto twice =
      std::adjacent_find(order.begin(), order.end(), [&](int64_t a, int64_t b) { return place(a) == place(b); });
  if (twice != order.end())
    refuse("expected each (row, slot) of the cache at most once, got row " + std::to_string(arg.batch_rows[*twice]) +
           ", slot " + std::to_string(arg.slots[*twice]) + " twice");
  by([&](int64_t n) { return std::tuple(arg.from_layer[n], n); });
  if (order.empty()) return {};
  const int64_t room = *std::min_element(arg.capacities + arg.from_layer[order[0]], arg.capacities + arg.until);
  KvRows rows;
  for (int64_t n : order) {
    if (arg.batch_rows[n] < 0 || arg.batch_rows[n] >= arg.batch || arg.slots[n] >= room)
      refuse("expected places within a cache of " + std::to_string(arg.batch) + " rows by " + std::to_string(room) +
             " slots, got row " + std::to_string(arg.batch_rows[n]) + ", slot " + std::to_string(arg.slots[n]));
    rows.source.push_back(n);
    rows.from_layer.push_back(arg.from_layer[n]);
    rows.batch_rows.push_back(arg.batch_rows[n]);
    rows.slots.push_back(arg.slots[n]);
  }
  return rows;
}

int64_t kv_fill_workspace(DType dtype, int64_t rows, int64_t width, int64_t layers, int64_t head_size,
                          int32_t threads) {
  return Layout(dtype, rows, width, layers, head_size, threads).total;
}

void kv_fill(const KvFillParams& p) {
  if (p.rows == 0) return;
  const Isa& isa = selected_isa();
  const int64_t first = p.from_layer[0];
  const Layout layout(p.dtype, p.rows, p.width, p.until - first, p.head_size, p.threads);
  char* workspace = static_cast<char*>(p.workspace);
  double* standard = reinterpret_cast<double*>(workspace);
  const auto packed_rows = [&](int64_t layer) {
    return PackedRows{workspace + layout.packed + (layer - first) % layout.group * layout.layer_bytes,
                      reinterpret_cast<RowScale*>(workspace + layout.scale)};
  };
  const auto rows_of = [&](int64_t layer) {
    return std::upper_bound(p.from_layer, p.from_layer + p.rows, layer) - p.from_layer;
  };
  const double work = static_cast<double>(p.rows * p.width) * static_cast<double>((p.until - first) * p.heads);
  const int threads = work * static_cast<double>(p.head_size) < kSerialWork ? 1 : std::max(1, p.threads);
  const int64_t units = 2 * p.heads;  // of a layer: its heads' keys, then their values
  // A thread takes several in a row, since it fetches the next one ahead; yet enough runs that slow threads take fewer.
  const int64_t run = std::clamp<int64_t>((p.until - first) * units / (32 * threads), 1, units);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char* panel = workspace + layout.thread + omp_get_thread_num() * layout.thread_bytes;
    float* head = reinterpret_cast<float*>(panel + layout.panel_bytes);
    float* row = reinterpret_cast<float*>(panel + layout.panel_bytes + layout.head_bytes);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.rows; ++n)
      standardise(p.hidden, p.hidden_dtype, p.source[n] * p.hidden_stride, p.width, p.norm, p.eps,
                  standard + n * p.width);
    for (int64_t begin = first; begin < p.until; begin += layout.group) {
      const int64_t end = std::min(begin + layout.group, p.until);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < (end - begin) * p.rows; ++i) {
        const int64_t layer = begin + i / p.rows, n = i % p.rows;
        if (n < rows_of(layer))
          isa.kv_fill_pack(p, p.layers[layer], standard + n * p.width, row, n, packed_rows(layer));
      }
#pragma omp for schedule(dynamic, run)
      for (int64_t i = 0; i < (end - begin) * units; ++i) {
        const auto unit = [&](int64_t at) {
          return std::tuple(begin + at / units, at % units < p.heads, at % p.heads);
        };
        const auto [layer, keys, h] = unit(i);
        const auto [next_layer, next_keys, next_head] = unit(std::min(i + 1, (end - begin) * units - 1));
        isa.kv_fill_head({&p, p.layers + layer, p.places + layer,
                          p.tables ? p.tables[p.one_table ? 0 : layer] : KvRotary{}, h, keys, packed_rows(layer),
                          rows_of(layer), head_of(p.layers[next_layer], next_keys, next_head), panel, head});
      }
    }
  }
}

}  // namespace exeunt::cpu
