// The order in which CTAs work on query blocks. Host and device.
//
// Heads form groups whose keys and values fit in L2 together. The heaviest group comes first, and
// inside a group the heaviest query blocks, except as drawn_place says. The blocks of a group are
// numbered from the last query blocks to the first, with the query heads of one KV head side by
// side.
#pragma once

#include <cstdint>

#include "pbs/geometry.h"

namespace pbs {

struct WorkGroups {
  int32_t num_q_blocks;
  int32_t num_heads;        // batch * query heads
  int32_t heads_per_group;  // the last group may have fewer

  PBS_HOST_DEVICE constexpr int32_t num_groups() const {
    return static_cast<int32_t>(ceil_div(num_heads, heads_per_group));
  }
  PBS_HOST_DEVICE constexpr int32_t blocks_per_group() const {
    return heads_per_group * num_q_blocks;
  }
};

struct WorkTile {
  int32_t head;  // b * num_q_heads + hq; at least num_heads if the last group is short
  int32_t q_block_idx;
};

// kv_bytes: bytes of the keys and values that one query head may visit. heads_per_kv: query heads
// that share them.
PBS_HOST_DEVICE constexpr WorkGroups work_groups(int64_t num_q_blocks, int64_t num_heads,
                                                 int64_t heads_per_kv, int64_t kv_bytes,
                                                 int64_t l2_bytes) {
  const int64_t num_kv = ceil_div(num_heads, heads_per_kv);
  const int64_t fitting = larger(1, l2_bytes / larger(1, kv_bytes));
  // As few groups as possible, of about the same size.
  const int64_t num_groups = larger(1, ceil_div(num_kv, fitting));
  const int64_t kv_per_group = larger(1, ceil_div(num_kv, num_groups));
  return WorkGroups{static_cast<int32_t>(num_q_blocks), static_cast<int32_t>(num_heads),
                    static_cast<int32_t>(kv_per_group * heads_per_kv)};
}

PBS_HOST_DEVICE constexpr WorkTile work_tile(const WorkGroups& groups, int32_t group_idx,
                                             int32_t block_idx) {
  return WorkTile{group_idx * groups.heads_per_group + block_idx % groups.heads_per_group,
                  groups.num_q_blocks - 1 - block_idx / groups.heads_per_group};
}

// Query blocks are sorted into this many equal ranges of their number of keys.
constexpr int32_t kOrderBins = 1024;

// bins_per_key: kOrderBins - 1 over most_keys, the most keys that a query block visits. The
// heaviest blocks are in bin 0.
PBS_HOST_DEVICE constexpr int32_t order_bin(int32_t num_keys, int32_t most_keys,
                                            float bins_per_key) {
  const auto bin = static_cast<int32_t>(static_cast<float>(most_keys - num_keys) * bins_per_key);
  return bin < kOrderBins - 1 ? bin : kOrderBins - 1;
}

// The sorted query block that is drawn as number draw_idx.
struct DrawnPlace {
  int32_t rank;   // rank of its group; num_groups if all blocks are drawn
  int32_t place;  // place in the group
};

// The two heaviest blocks of each head are drawn first. If only they see the whole prompt, they
// would otherwise take longer than the rest of the last group.
PBS_HOST_DEVICE constexpr DrawnPlace drawn_place(const WorkGroups& groups, int32_t draw_idx) {
  const int32_t num_blocks = groups.blocks_per_group();
  const auto num_first = static_cast<int32_t>(smaller(num_blocks, 2 * groups.heads_per_group));
  const int32_t num_drawn_first = groups.num_groups() * num_first;
  if (draw_idx < num_drawn_first) return DrawnPlace{draw_idx / num_first, draw_idx % num_first};
  const int32_t num_rest = num_blocks - num_first;
  if (num_rest == 0) return DrawnPlace{groups.num_groups(), 0};
  const int32_t rest_idx = draw_idx - num_drawn_first;
  return DrawnPlace{rest_idx / num_rest, num_first + rest_idx % num_rest};
}

// A query block in the sorted order of its group.
struct OrderedBlock {
  int32_t block_idx;  // index in the group, as in work_tile
  int32_t num_selected;
};

// The parts of attend's workspace that hold the order, in ints from its start.
struct OrderLayout {
  int64_t counter;   // number of drawn query blocks
  int64_t sorted;    // OrderedBlocks of each group, heaviest first
  int64_t unsorted;  // number of selected key blocks, by group and block
  int64_t group_at;  // groups, heaviest first
  int64_t weights;   // weights of groups: the number of keys that they visit
  int64_t size;
};

PBS_HOST_DEVICE constexpr OrderLayout order_layout(const WorkGroups& groups) {
  const int64_t num_groups = groups.num_groups();
  const int64_t num_blocks = num_groups * groups.blocks_per_group();
  OrderLayout layout{};
  layout.sorted = layout.counter + 2;  // a multiple of 8 bytes
  layout.unsorted = layout.sorted + 2 * num_blocks;
  layout.group_at = layout.unsorted + num_blocks;
  layout.weights = layout.group_at + num_groups;
  layout.size = layout.weights + num_groups;
  return layout;
}

}  // namespace pbs
