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

void ragged_attention_tests();  // for the instruction set that is selected
