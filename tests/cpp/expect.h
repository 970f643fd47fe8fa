// What the C++ tests share: a line for each failure, and the number of them as the exit status.
#pragma once
#include <cstdio>
#include <string>

inline int failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  std::printf("FAILED: %s\n", what.c_str());
  ++failures;
}

// For the instruction set that is selected.
void kv_fill_tests();
void ragged_attention_tests();
void variants_tests();
