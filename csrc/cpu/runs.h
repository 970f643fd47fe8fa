// Items in a row, shared out among threads in runs: long ones first, since what a thread has fetched ahead of a run is
// its own, then ever shorter ones, so that none waits long at the end. (OpenMP's guided schedule begins with all items
// over the number of threads: of two threads the first takes half, and if it is the slower one the other waits.)
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace exeunt::cpu {

class Runs {
 public:
  Runs(int64_t count, int threads) : count_(count), share_(4 * static_cast<int64_t>(threads)) {}

  // [begin, end), this thread's next run; false where nothing is left.
  bool next(int64_t& begin, int64_t& end) {
    begin = taken_.load(std::memory_order_relaxed);
    do {
      if (begin >= count_) return false;
      end = begin + std::max<int64_t>(1, (count_ - begin) / share_);
    } while (!taken_.compare_exchange_weak(begin, end, std::memory_order_relaxed));
    return true;
  }

 private:
  const int64_t count_, share_;
  std::atomic<int64_t> taken_{0};
};

}  // namespace exeunt::cpu
