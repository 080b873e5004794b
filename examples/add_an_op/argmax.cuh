// argmax: tile = arg[0], a row. Operands: 0 the input, 1 the indices. All consumers share the row: each keeps the best of
// its own columns, then two reductions in a fixed order find the largest value and the first column that has it.
// N: Value (element type in memory), COLUMNS, ROW_STRIDE and COLUMN_STRIDE (elements).
#pragma once
#include "mpk/group.cuh"

namespace mpk {

template <class N, class Ctx>
MPK_DEVICE void argmax(Ctx& c) {
  if (!c.wait()) return;
  const auto* row = c.template pointer<typename N::Value>(0) + static_cast<i64>(c.arg(0)) * N::ROW_STRIDE;
  const WorkerGroup g(c.scratch());
  float best = -infinity();
  i64 at = MinInt::identity();
#pragma unroll 8
  for (int i = g.rank; i < N::COLUMNS; i += WorkerGroup::SIZE) {
    const float v = load1(row + static_cast<i64>(i) * N::COLUMN_STRIDE);
    const bool larger = v > best || (v != v && best == best);  // NaN wins, as in torch; an equal one comes too late
    if (larger || i == g.rank) {
      best = v;
      at = i;
    }
  }
  const float largest = g.template reduce<Max>(best);
  const bool mine = best == largest || (best != best && largest != largest);
  const i64 first = g.template reduce<MinInt>(mine ? at : MinInt::identity());
  if (g.rank == 0) c.template pointer<i64>(1)[c.arg(0)] = first;
}

}  // namespace mpk
