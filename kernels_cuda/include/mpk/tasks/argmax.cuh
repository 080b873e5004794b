// argmax_part: tile = arg[0] a row, arg[1], arg[2] a range of columns, arg[3] the part. Operands: 0 x, 1 candidates.
// argmax: tile = arg[0] a row, arg[1] parts. Operands: 0 candidates, 1 indices.
// A candidate is the sort key of a value above the inverted column: the largest is the first of the largest values.
// N: Value (element type in memory), COLUMNS, ROW_STRIDE and COLUMN_STRIDE (elements), PARTS.
#pragma once
#include "mpk/group.cuh"

namespace mpk {

// fp32 as an unsigned integer of the same order; -0 is 0. NaN: as given.
MPK_DEVICE u32 sort_key(float v, u32 nan) {
  const u32 bits = __float_as_uint(__fadd_rn(v, 0.0f));
  if (v != v) return nan;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
MPK_DEVICE float value_of_key(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

struct MaxCandidate : MaxInt {
  MPK_DEVICE static i64 identity() { return 0; }
};

template <class N, class Ctx>
MPK_DEVICE void argmax_part(Ctx& c) {
  if (!c.wait()) return;
  const auto* row = c.template pointer<typename N::Value>(0) + static_cast<i64>(c.arg(0)) * N::ROW_STRIDE;
  const WorkerGroup g(c.scratch());
  i64 best = 0;
  const int stop = c.arg(2);
#pragma unroll 8
  for (int i = c.arg(1) + g.rank; i < stop; i += WorkerGroup::SIZE) {
    const u32 key = sort_key(load1(row + static_cast<i64>(i) * N::COLUMN_STRIDE), ~0u);
    best = MaxInt::apply(best, static_cast<i64>(key) << 31 | (0x7fffffff - i));
  }
  best = g.template reduce<MaxCandidate>(best);
  if (g.rank == 0) c.template pointer<i64>(1)[c.arg(0) * N::PARTS + c.arg(3)] = best;
}

template <class N, class Ctx>
MPK_DEVICE void argmax(Ctx& c) {
  if (!c.wait()) return;
  const i64* parts = c.template pointer<i64>(0) + c.arg(0) * N::PARTS;
  const WorkerGroup g(c.scratch());
  i64 best = 0;
  for (int i = g.rank; i < N::PARTS; i += WorkerGroup::SIZE) best = MaxInt::apply(best, parts[i]);
  best = g.template reduce<MaxCandidate>(best);
  if (g.rank == 0) c.template pointer<i64>(1)[c.arg(0)] = 0x7fffffff - (best & 0x7fffffff);
}

}  // namespace mpk
