#pragma once
#include <cstdint>
#include <vector>

#include "core/params.h"
#include "cpu/kernels.h"

namespace exeunt::cpu {

struct RaggedPlan {
  std::vector<RaggedTask> tasks;
  struct Split {  // a tile whose chunks are tasks of their own: its first task, and how many
    int64_t first, count;
  };
  std::vector<Split> splits;
  int64_t partials;   // floats for the results of chunks
  int64_t workspace;  // bytes
  int32_t threads;
};

// The work of a call. Throws std::invalid_argument, one sentence, where a list names what is not there.
RaggedPlan ragged_attention_plan(const RaggedAttentionParams& p);

// `workspace`: plan.workspace bytes, 64-byte aligned.
void ragged_attention(const RaggedAttentionParams& p, const RaggedPlan& plan, void* workspace);

}  // namespace exeunt::cpu
