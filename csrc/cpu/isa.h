// Which instruction set the kernels run with: chosen once, by CPUID and what the operating system saves.
#pragma once
#include <string>

#include "cpu/kernels.h"

namespace exeunt::cpu {

struct Isa {
  const char* name;
  Standardise standardise;
  Normalise normalise;
  RowsBytes rows_bytes;
  PackRow pack_row;
  ExitStatsChunks exit_stats_chunks;
  LinearRows linear_rows;
  KvFillPack kv_fill_pack;
  KvFillHead kv_fill_head;
  RaggedAttentionTask ragged_attention_task;
  RaggedAttentionMerge ragged_attention_merge;
};

const Isa& selected_isa();

// Whether this machine has tile registers (AMX) and its operating system would not give them to this process.
bool amx_refused();

// Choose the best ISA of this machine that is not above `limit` ("" for no limit); returns its name.
// Throws std::invalid_argument on an unknown limit.
std::string select_isa(const std::string& limit);

}  // namespace exeunt::cpu
