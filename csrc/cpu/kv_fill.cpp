// kv_fill on CPU: keys and values of the layers that rows skipped, in one pass over those layers' weights.
//
//   standardise   each row once: all its layers see the same hidden state
//   deal          heads of keys, then of values, layer by layer, in the order in which the weights lie: long runs of
//                 them first, then ever shorter ones, so that a thread changes its layer seldom and none waits at the
//                 end
//   pack          as a thread comes to a layer: its rows times the layer's norm weight, into memory of its own, which
//                 stays in its cache (a copy that threads share would travel between the cores)
//   product       a head at a time
//
//   workspace: | standard rows [N, D] double | per thread: packed rows of a layer, their scales, panel, head, one row |
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
#include "cpu/runs.h"

namespace exeunt::cpu {
namespace {

constexpr double kSerialWork = 65536;  // multiply-adds below which a parallel region costs more than it saves
constexpr int64_t kBlockRows = 64;     // rows of a head that are finished together

struct Layout {
  int64_t scale, panel, head, row, thread, threads_at, total;  // the first four: within a thread's part
  Layout(DType dtype, WeightForm form, int64_t rows, int64_t width, int64_t head_size, int32_t threads) {
    const auto floats = [](int64_t count) { return round_up(count * static_cast<int64_t>(sizeof(float)), 64); };
    scale = round_up(selected_isa().rows_bytes(dtype, form, rows, width), 64);
    panel = scale + floats(rows);
    head = panel + panel_bytes(dtype, width);
    row = head + floats(kBlockRows * round_up(head_size, 16));
    thread = row + floats(width);
    threads_at = round_up(rows * width * static_cast<int64_t>(sizeof(double)), 64);
    total = threads_at + std::max(1, threads) * thread;
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

int64_t kv_fill_workspace(DType dtype, WeightForm form, int64_t rows, int64_t width, int64_t head_size,
                          int32_t threads) {
  return Layout(dtype, form, rows, width, head_size, threads).total;
}

void kv_fill(const KvFillParams& p) {
  if (p.rows == 0) return;
  const Isa& isa = selected_isa();
  const int64_t first = p.from_layer[0];
  const Layout layout(p.dtype, p.form, p.rows, p.width, p.head_size, p.threads);
  char* workspace = static_cast<char*>(p.workspace);
  double* standard = reinterpret_cast<double*>(workspace);
  const auto rows_of = [&](int64_t layer) {
    return std::upper_bound(p.from_layer, p.from_layer + p.rows, layer) - p.from_layer;
  };
  struct Unit {
    int64_t layer, head;
    bool keys;
  };
  const int64_t units = (p.until - first) * 2 * p.heads;
  const auto unit = [&](int64_t i) {
    return Unit{first + i / (2 * p.heads), i % p.heads, i % (2 * p.heads) < p.heads};
  };
  const double work = static_cast<double>(p.rows * p.width) * static_cast<double>(units / 2);
  const int threads = work * static_cast<double>(p.head_size) < kSerialWork ? 1 : std::max(1, p.threads);
  Runs runs(units, threads);

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    char* own = workspace + layout.threads_at + omp_get_thread_num() * layout.thread;
    PackedRows packed{own, reinterpret_cast<float*>(own + layout.scale), 0};
    int64_t packed_layer = -1;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < p.rows; ++n)
      isa.standardise(p.hidden, p.hidden_dtype, p.source[n] * p.hidden_stride, p.width, p.norm, p.eps,
                      standard + n * p.width);
    for (int64_t i, end; runs.next(i, end);)
      for (; i < end; ++i) {
        const auto [layer, h, keys] = unit(i);
        if (layer != packed_layer) {
          packed_layer = layer;
          packed.rows = rows_of(layer);
          for (int64_t n = 0; n < packed.rows; ++n)
            isa.kv_fill_pack(p, p.layers[layer], standard + n * p.width, reinterpret_cast<float*>(own + layout.row), n,
                             packed);
        }
        const Unit next = unit(std::min(i + 1, units - 1));
        isa.kv_fill_head({&p, p.layers + layer, p.places + layer,
                          p.tables ? p.tables[p.one_table ? 0 : layer] : KvRotary{}, h, keys, packed,
                          head_of(p.layers[next.layer], next.keys, next.head), own + layout.panel,
                          reinterpret_cast<float*>(own + layout.head)});
      }
  }
}

}  // namespace exeunt::cpu
