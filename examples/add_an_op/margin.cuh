// margin: tile = arg[0], a row. Operands: 0 the input, 1 the margins. All consumers share the row: each keeps the two
// best of its own columns, then reductions in a fixed order find the largest of all, one consumer that has it, and the
// largest of what is left without that one.
// N: Value (element type in memory), COLUMNS, ROW_STRIDE and COLUMN_STRIDE (elements).
#pragma once
#include "mpk/group.cuh"

namespace mpk {

template <class N, class Ctx>
MPK_DEVICE void margin(Ctx& c) {
  if (!c.wait()) return;
  const auto* row = c.template pointer<typename N::Value>(0) + static_cast<i64>(c.arg(0)) * N::ROW_STRIDE;
  const WorkerGroup g(c.scratch());
  float best = -infinity(), second = -infinity();
#pragma unroll 8
  for (int i = g.rank; i < N::COLUMNS; i += WorkerGroup::SIZE) {
    const float v = load1(row + static_cast<i64>(i) * N::COLUMN_STRIDE);
    second = Max::apply(second, fminf(best, v));
    best = Max::apply(best, v);  // NaN wins, as in torch
  }
  const float largest = g.template reduce<Max>(best);
  const i64 owner = g.template reduce<MinInt>(best == largest ? g.rank : MinInt::identity());
  const float next = g.template reduce<Max>(g.rank == owner ? second : best);
  if (g.rank == 0) c.template pointer<float>(1)[c.arg(0)] = __fsub_rn(largest, next);
}

}  // namespace mpk
