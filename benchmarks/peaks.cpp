// What the machine can do, so that a kernel's time stands beside its floor: read bandwidth and multiply-add peak.
// benchmarks/peaks.py builds this file with the machine's own compiler and calls it through ctypes.
#include <omp.h>
#include <sys/mman.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

using Line = uint64_t __attribute__((vector_size(64)));

// Reads [begin, end) as `streams` parallel streams, each line fetched ahead.
Line read(const char* begin, const char* end, int streams) {
  const int64_t part = (end - begin) / streams / 64 * 64;
  Line sum[8] = {};
  for (int64_t at = 0; at < part; at += 64)
    for (int s = 0; s < streams; ++s) {
      const char* p = begin + s * part + at;
      __builtin_prefetch(p + 2048);
      sum[s] ^= *reinterpret_cast<const Line*>(p);
    }
  for (int s = 1; s < 8; ++s) sum[0] ^= sum[s];
  return sum[0];
}

// Reads rows of `row` bytes as a product of tiles of 16 rows does that lie one after the other: a line of each in turn.
Line read_tiles(const char* begin, const char* end, int64_t row) {
  Line sum = {};
  for (; begin + 16 * row <= end; begin += 16 * row)
    for (int64_t at = 0; at < row; at += 64)
      for (int i = 0; i < 16; ++i) {
        const char* p = begin + i * row + at;
        __builtin_prefetch(p + 512, 0, 2);
        __builtin_prefetch(p + 256);
        sum ^= *reinterpret_cast<const Line*>(p);
      }
  return sum;
}

// GB/s of f over a share of the memory a thread, each a multiple of `unit`.
template <class F>
double rate_of(const char* memory, int64_t bytes, int threads, int64_t unit, F f) {
  const int64_t part = bytes / threads / unit * unit;
  const double start = now();
#pragma omp parallel num_threads(threads)
  {
    const char* begin = memory + omp_get_thread_num() * part;
    const Line sum = f(begin, begin + part);
    asm volatile("" ::"m"(sum));
  }
  return static_cast<double>(bytes) / (now() - start) / 1e9;
}

// Chains of multiply-adds in registers, enough of them to hide their latency.
constexpr int kChains = 16;

#if defined(__AVX512F__)
void fma_float(int64_t steps) {
  __m512 acc[kChains] = {}, a = _mm512_set1_ps(1e-9f), b = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < steps; ++i)
    for (int c = 0; c < kChains; ++c) asm volatile("vfmadd231ps %1, %2, %0" : "+v"(acc[c]) : "v"(a), "v"(b));
}
#endif
#if defined(__AVX512BF16__)
void fma_bfloat16(int64_t steps) {
  __m512 acc[kChains] = {}, a = _mm512_setzero_ps(), b = a;
  for (int64_t i = 0; i < steps; ++i)
    for (int c = 0; c < kChains; ++c) asm volatile("vdpbf16ps %1, %2, %0" : "+v"(acc[c]) : "v"(a), "v"(b));
}
#endif
#if defined(__AVX512VNNI__)
void fma_int8(int64_t steps) {
  __m512i acc[kChains] = {}, a = _mm512_setzero_si512(), b = a;
  for (int64_t i = 0; i < steps; ++i)
    for (int c = 0; c < kChains; ++c) asm volatile("vpdpbusd %1, %2, %0" : "+v"(acc[c]) : "v"(a), "v"(b));
}
#endif
#if defined(__AMX_TILE__)
// A constant in memory: GCC's intrinsic names 8 of the 64 bytes that it reads.
constexpr struct alignas(64) {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
} kTiles;

template <bool Int8>
void fma_tile(int64_t steps) {
  _tile_loadconfig(&kTiles);
  for (int64_t i = 0; i < steps; ++i) {
    if (Int8) {
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_release();
}
#endif

using Chains = void (*)(int64_t);
struct Peak {
  const char* name;
  Chains run;
  double flops;  // per step
};
const Peak kPeaks[] = {
#if defined(__AVX512F__)
    {"float32", fma_float, kChains * 32.0},
#endif
#if defined(__AVX512BF16__)
    {"bfloat16", fma_bfloat16, kChains * 64.0},
#endif
#if defined(__AVX512VNNI__)
    {"int8", fma_int8, kChains * 128.0},
#endif
#if defined(__AMX_TILE__)
    {"bfloat16 tiles", fma_tile<false>, 4 * 16.0 * 16 * 64},
    {"int8 tiles", fma_tile<true>, 4 * 16.0 * 16 * 128},
#endif
    {nullptr, nullptr, 0.0},
};

}  // namespace

extern "C" {

// Best of `rounds` passes over `bytes` of memory, in GB/s.
double read_bandwidth(int64_t bytes, int threads, int streams, int huge_pages, int rounds) {
  char* memory = static_cast<char*>(std::aligned_alloc(1 << 21, static_cast<size_t>(bytes)));
  madvise(memory, static_cast<size_t>(bytes), huge_pages ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  double best = 0.0;
#pragma omp parallel num_threads(threads)
  {
    const int64_t part = bytes / threads / 64 * 64;
    const char* begin = memory + omp_get_thread_num() * part;
    std::memset(memory + omp_get_thread_num() * part, 1, static_cast<size_t>(part));
    for (int round = 0; round < rounds; ++round) {
#pragma omp barrier
      const double start = now();
      const Line sum = read(begin, begin + part, streams);
      asm volatile("" ::"m"(sum));
#pragma omp barrier
      const double rate = static_cast<double>(bytes) / (now() - start) / 1e9;
#pragma omp critical
      best = rate > best ? rate : best;
    }
  }
  std::free(memory);
  return best;
}

// GB/s of one pass over memory that is there.
double read_rate(const char* memory, int64_t bytes, int threads, int streams) {
  return rate_of(memory, bytes, threads, 64, [&](auto begin, auto end) { return read(begin, end, streams); });
}

// The same in the order of a product of tiles of 16 rows, each of `row` bytes.
double read_tiles_rate(const char* memory, int64_t bytes, int threads, int64_t row) {
  return rate_of(memory, bytes, threads, 16 * row, [&](auto begin, auto end) { return read_tiles(begin, end, row); });
}

// Name of the i-th multiply-add peak that this machine has, or null.
const char* peak_name(int i) { return kPeaks[i].name; }

// Best of `rounds` of the i-th, all threads together, in GFLOP/s.
double peak_rate(int i, int threads, int rounds) {
  const int64_t steps = 200000;
  double best = 0.0;
#pragma omp parallel num_threads(threads)
  {
#if defined(__AMX_TILE__)
    syscall(SYS_arch_prctl, 0x1023, 18);  // ask for the tile registers
#endif
    for (int round = 0; round < rounds; ++round) {
#pragma omp barrier
      const double start = now();
      kPeaks[i].run(steps);
#pragma omp barrier
      const double rate = threads * static_cast<double>(steps) * kPeaks[i].flops / (now() - start) / 1e9;
#pragma omp critical
      best = rate > best ? rate : best;
    }
  }
  return best;
}
}
