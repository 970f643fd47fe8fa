#include "cpu/isa.h"

#include <stdexcept>

namespace exeunt::cpu {
namespace {

constexpr Isa kBaseline{"baseline", 4, baseline::exit_stats_chunk};
#if defined(__x86_64__)
constexpr Isa kAvx2{"avx2", 8, avx2::exit_stats_chunk};
constexpr Isa kAvx512{"avx512", 16, avx512::exit_stats_chunk};

// __builtin_cpu_supports answers no where the operating system does not save the registers.
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const Isa* g_selected = &kBaseline;

int level(const std::string& limit) {
  const char* names[] = {"baseline", "avx2", "avx512", "amx"};
  for (int i = 0; i < 4; ++i)
    if (limit == names[i]) return i;
  if (limit.empty()) return 3;
  throw std::invalid_argument("EXEUNT_MAX_ISA must be baseline, avx2, avx512 or amx, got '" + limit + "'");
}

}  // namespace

const Isa& selected_isa() { return *g_selected; }

std::string select_isa(const std::string& limit) {
  const int allowed = level(limit);
  const Isa* best = &kBaseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (allowed >= 1 && has_avx2()) best = &kAvx2;
  if (allowed >= 2 && has_avx512()) best = &kAvx512;
#else
  (void)allowed;
#endif
  g_selected = best;
  return best->name;
}

}  // namespace exeunt::cpu
