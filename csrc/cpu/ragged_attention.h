#pragma once
#include <cstdint>
#include <vector>

#include "core/params.h"
#include "cpu/kernels.h"

namespace exeunt::cpu {

struct RaggedPlan {
  std::vector<RaggedTask> tasks;
  struct Split {  // a tile of which several tasks do some chunks each
    RaggedTask tile;
    int64_t chunks;
  };
  std::vector<Split> splits;
  int64_t partials;  // floats for the results of chunks
  int32_t threads;
};

// Bytes that a call over up to `room` keys a row can need, whatever its lists say.
int64_t ragged_attention_workspace(int64_t tokens, int64_t heads, int64_t room, int64_t size, int64_t value_size,
                                   int32_t threads);

// The work of a call. Throws std::invalid_argument, one sentence, where a list names what is not there.
RaggedPlan ragged_attention_plan(const RaggedAttentionParams& p);

void ragged_attention(const RaggedAttentionParams& p, const RaggedPlan& plan);

}  // namespace exeunt::cpu
