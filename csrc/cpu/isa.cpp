#include "cpu/isa.h"

#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace exeunt::cpu {
namespace {

bool g_amx_refused = false;

#if defined(__x86_64__)
// __builtin_cpu_supports answers no where the operating system does not save the registers.
bool has_avx2() {
  unsigned a, b, c, d;
  constexpr unsigned kF16c = 1u << 29;  // Clang's builtin has no name for it; its registers are those of AVX
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) &&
         (c & kF16c);
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

bool cpu_has_tiles() {
#if defined(EXEUNT_AMX_EMULATED)
  return true;
#else
  unsigned a, b, c, d;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24, kInt8 = 1u << 25;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (kBf16 | kTiles | kInt8)) == (kBf16 | kTiles | kInt8);
#endif
}

// Tile registers are large, so Linux gives them only to a process that asks.
bool has_amx() {
  if (!has_avx512_bf16() || !cpu_has_tiles()) return false;
#if !defined(EXEUNT_AMX_EMULATED)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  g_amx_refused = syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0;
#endif
  return !g_amx_refused;
}

#endif

#define EXEUNT_ISA_OF(isa)     \
  {#isa,                       \
   isa::standardise,           \
   isa::normalise,             \
   isa::rows_bytes,            \
   isa::pack_row,              \
   isa::exit_stats_chunks,     \
   isa::linear_rows,           \
   isa::kv_fill_pack,          \
   isa::kv_fill_head,          \
   isa::ragged_attention_task, \
   isa::ragged_attention_merge}
constexpr Isa kBaseline = EXEUNT_ISA_OF(baseline);
#if defined(__x86_64__)
constexpr Isa kAvx2 = EXEUNT_ISA_OF(avx2), kAvx512 = EXEUNT_ISA_OF(avx512), kAvx512Vnni = EXEUNT_ISA_OF(avx512_vnni),
              kAvx512Bf16 = EXEUNT_ISA_OF(avx512_bf16), kAmx = EXEUNT_ISA_OF(amx);
#endif
#undef EXEUNT_ISA_OF

// The limits that a user may name, each allowing those before it.
enum Level { kLevelBaseline, kLevelAvx2, kLevelAvx512, kLevelAvx512Vnni, kLevelAvx512Bf16, kLevelAmx };
constexpr const char* kLimits[] = {"baseline", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};

Level level(const std::string& limit) {
  if (limit.empty()) return kLevelAmx;
  for (int i = kLevelBaseline; i <= kLevelAmx; ++i)
    if (limit == kLimits[i]) return static_cast<Level>(i);
  throw std::invalid_argument("EXEUNT_MAX_ISA must be baseline, avx2, avx512, avx512_vnni, avx512_bf16 or amx, got '" +
                              limit + "'");
}

const Isa* g_selected = &kBaseline;

}  // namespace

const Isa& selected_isa() { return *g_selected; }

bool amx_refused() { return g_amx_refused; }

// Measured (docs/kernels.md): one row of a packed head without prefetch instructions takes 0.8 of the time on Zen 4,
// and 1.3 times as long on Sapphire Rapids.
bool follows_streams() {
#if defined(__x86_64__)
  static const bool amd = __builtin_cpu_is("amd");
  return amd;
#else
  return false;
#endif
}

std::string select_isa(const std::string& limit) {
  [[maybe_unused]] const Level allowed = level(limit);
  const Isa* best = &kBaseline;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (allowed >= kLevelAvx2 && has_avx2()) best = &kAvx2;
  if (allowed >= kLevelAvx512 && has_avx512()) best = &kAvx512;
  if (allowed >= kLevelAvx512Vnni && has_avx512_vnni()) best = &kAvx512Vnni;
  // CPUs with tiles run vdpbf16ps at half the rate of float32 multiply-adds: there it must be asked for by name.
  if (has_avx512_bf16() && (allowed == kLevelAvx512Bf16 || (allowed == kLevelAmx && !cpu_has_tiles())))
    best = &kAvx512Bf16;
  if (allowed >= kLevelAmx && has_amx()) best = &kAmx;
#endif
  g_selected = best;
  return best->name;
}

}  // namespace exeunt::cpu
