// row_map: tile = arg[0], arg[1]: a range of flattened rows (of flattened elements when nothing is reduced).
// N: element(context, e) for element-wise maps; row(context, group, row) for maps with row reductions;
// N::ROW_THREADS: 0 (element-wise), 32 (a warp per row) or 256 (all consumers per row).
#pragma once
#include "mpk/group.cuh"

namespace mpk {

template <class N, class Ctx>
MPK_DEVICE void row_map(Ctx& c) {
  if (!c.wait()) return;
  const int start = c.arg(0), stop = c.arg(1);
  if constexpr (N::ROW_THREADS == 0) {
    for (int e = start + static_cast<int>(threadIdx.x); e < stop; e += kConsumers) N::element(c, e);
  } else if constexpr (N::ROW_THREADS == 32) {
    const WarpGroup g;
    for (int r = start + static_cast<int>(threadIdx.x / 32); r < stop; r += kConsumerWarps) N::row(c, g, r);
  } else {
    const WorkerGroup g(c.scratch());
    for (int r = start; r < stop; ++r) N::row(c, g, r);
  }
}

}  // namespace mpk
