// What threads do together: a warp's exchange of values, on which every shuffle, vote and mma is built, and the block's
// barrier with its sum.
#pragma once

namespace softgpu {
inline uint32_t lanes_of(const Block* b, uint32_t warp) {
  uint32_t lanes = b->n - warp * 32;
  return lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
}
inline WarpSync& meeting(uint32_t mask) {
  Fiber* me = self();
  Warp& w = me->blk->w[me->warp];
  if (!((mask >> me->lane) & 1)) fail("the mask of a *_sync operation does not name the calling lane");
  for (int i = 0; i < w.count; i++)
    if (w.sync[i].mask == mask) return w.sync[i];
  if (w.count == MAX_MASKS) fail("too many distinct warp masks in one kernel");
  WarpSync& s = w.sync[w.count++];
  s.mask = mask;
  s.arrived = s.generation = 0;
  return s;
}
// Posts `value`, waits until every lane of the mask has posted, and returns the table (read it with peek, before the next
// exchange). The last lane calls `complete(table)` before the others go on.
template <class T, class Complete>
inline const Table& exchange(uint32_t mask, const T& value, const char* why, Complete complete) {
  static_assert(sizeof(T) <= MAX_PAYLOAD, "payload of a warp exchange");
  Fiber* me = self();
  mask &= lanes_of(me->blk, me->warp);
  WarpSync& s = meeting(mask);
  const uint32_t generation = s.generation;
  Table& table = s.table[generation & 1];
  memcpy(table.posted[me->lane], &value, sizeof(T));
  s.arrived |= 1u << me->lane;
  if (s.arrived == mask) {
    complete(table);
    s.arrived = 0;
    s.generation++;
  } else {
    block_on(&s.generation, generation, why);
  }
  return table;
}
template <class T> inline const Table& exchange(uint32_t mask, const T& value, const char* why) {
  return exchange(mask, value, why, [](Table&) {});
}
template <class T> inline T peek(const Table& table, int lane) {
  T value;
  memcpy(&value, table.posted[lane], sizeof(T));
  return value;
}
// Waits for every living thread of the block; returns the sum of `add` over them.
inline uint32_t bar(uint32_t add, const char* why) {
  Block* b = self()->blk;
  const uint32_t generation = b->bar_generation;
  if (b->bar_arrived == 0) b->bar_sum = 0;
  b->bar_sum += add;
  if (++b->bar_arrived == b->live) {
    b->bar_result = b->bar_sum;
    b->bar_arrived = 0;
    b->bar_generation++;
  } else {
    block_on(&b->bar_generation, generation, why);
  }
  return b->bar_result;
}
inline void* dyn_smem() { return self()->blk->smem; }
}  // namespace softgpu
