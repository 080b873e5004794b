// linear with weights stored [K, rows]: y[t, n] = sum_k x[t, k] * w[k, n], fp32 FMA.
//
// A task's columns are a strip of every weight row, tens of bytes each: too short to be bulk copies, so they do not pass
// through the ring. Threads load them straight to registers, AHEAD vectors each, the first ones before the task's events
// have come. Neighbouring threads hold neighbouring vectors of a weight row (`wide` of them, a power of two), and rows
// are dealt out to the 256 / wide threads that hold the same columns. x is in shared memory, a few tokens at a time;
// further tokens read the weights again, from L2.
//
// Sums meet over the lanes and then over the warps, in a fixed order: bit-identical from run to run.
//
// N (generated): as in linear.cuh but for the ring; weight(c, part, j): where a weight begins; columns(part): its rows' length.
#pragma once
#include "mpk/tasks/linear.cuh"

namespace mpk {

template <class N>
struct ColumnsShape {
  static constexpr int VECTOR = 16 / static_cast<int>(sizeof(typename N::Element));
  static constexpr int ROW_BYTES = N::K * static_cast<int>(sizeof(typename N::Element));
  static constexpr int PIECES = 1, LANES = static_cast<int>(kConsumers), VECTORS = N::K / VECTOR;  // of a row of x
  static constexpr int PER_THREAD = (VECTORS + LANES - 1) / LANES;
  static constexpr int ROOM = 32768 / ROW_BYTES;                           // tokens whose x fits
  static constexpr int REGISTERS = (PER_THREAD > 1 ? 6 / PER_THREAD : 8) / N::JOINT;  // whose sums and operands do
  static constexpr int MOST = ROOM < REGISTERS ? ROOM : REGISTERS;
  static constexpr int TOKENS = N::T < MOST ? N::T : MOST > 1 ? MOST : 1;  // at a time
  static constexpr int WIDE = TOKENS > 4 ? 4 : 8;                          // vectors of a block of columns, at most
  static constexpr int COLUMNS = WIDE * VECTOR;
  static constexpr int AHEAD = (TOKENS > 4 ? 4 : 8) / N::JOINT;
  static constexpr int X_BYTES = TOKENS * ROW_BYTES;
  static constexpr int WARPS = static_cast<int>(kConsumerWarps);
  static constexpr int SCRATCH = 128 + X_BYTES + N::JOINT * TOKENS * WARPS * COLUMNS * 4;
  static_assert(VECTORS * VECTOR == N::K, "rows of x are whole vectors");
  static_assert(COLUMNS * TOKENS <= LANES, "a thread owns one result of a block");
};

// x of tokens [first, first + count) into shared memory. Every thread computes its own vectors of each.
template <class N, class Ctx, class Group>
MPK_DEVICE void columns_input(Ctx& c, const Group& g, int first, int count, typename N::Element* x) {
  using S = ColumnsShape<N>;
  typename N::Held held[S::TOKENS][S::PER_THREAD];
  const auto each = [&](auto&& visit) {
#pragma unroll
    for (int t = 0; t < S::TOKENS; ++t)
#pragma unroll
      for (int p = 0; p < S::PER_THREAD; ++p)
        if (t < count && p * S::LANES + g.rank < S::VECTORS) visit(t, p, (p * S::LANES + g.rank) * S::VECTOR);
  };
  each([&](int t, int p, int k) {
    N::template load<true>(c, first + t, k, held[t][p]);
    N::template load<false>(c, first + t, k, held[t][p]);
  });
  poll_until(c, [&] {
    bool complete = true;
    each([&](int t, int p, int k) { complete = N::poll(c, first + t, k, held[t][p]) && complete; });
    return complete;
  });
#pragma unroll
  for (int t = 0; t < S::TOKENS; ++t) {
    if (t >= count) continue;
    float red[N::REDUCTIONS + 1];
    prologue_reductions<N, S, 0>(c, g, first + t, held[t], red);
#pragma unroll
    for (int p = 0; p < S::PER_THREAD; ++p) {
      const int k = (p * S::LANES + g.rank) * S::VECTOR;
      if (p * S::LANES + g.rank >= S::VECTORS) continue;
      float v[S::VECTOR];
      N::x(c, first + t, k, held[t][p], red, v);
#pragma unroll
      for (int i = 0; i < S::VECTOR; ++i) x[t * N::K + k + i] = narrow<typename N::Element>(v[i]);
    }
  }
}

// A block of columns as this thread sees it: its vector of the weight rows row, row + step, ...
template <class N>
struct Strip {
  using S = ColumnsShape<N>;
  const char* at[N::JOINT];
  u32 row_bytes;
  int joint, wide, row, step;
  bool mine;

  template <class Ctx>
  MPK_DEVICE Strip(Ctx& c, const Segment& seg, int column) {
    const int vectors = min(S::WIDE, (static_cast<int>(seg.rows) - column) / S::VECTOR);
    wide = vectors > 4 ? 8 : vectors > 2 ? 4 : vectors;
    const int vector = threadIdx.x & (wide - 1);
    mine = vector < vectors;
    row = threadIdx.x / wide;
    step = S::LANES / wide;
    row_bytes = N::columns(seg.part) * sizeof(typename N::Element);
    joint = N::joint(seg.part);
#pragma unroll
    for (int j = 0; j < N::JOINT; ++j) {
      const auto* base = N::weight(c, seg.part, j < joint ? j : 0) + seg.row + column + (mine ? vector : 0) * S::VECTOR;
      at[j] = reinterpret_cast<const char*>(base);
    }
  }
  // Its u-th vector; rows past the end are some row again, and count nothing.
  MPK_DEVICE ptx::Vec4 load(int j, int u) const {
    const int k = min(row + u * step, N::K - 1);
    return ptx::load_weight(at[j] + static_cast<u64>(k) * row_bytes);
  }
};

template <class N, class Ctx>
MPK_DEVICE void linear_columns(Ctx& c) {
  using S = ColumnsShape<N>;
  using E = typename N::Element;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const WorkerGroup g(c.scratch());
  E* x = reinterpret_cast<E*>(c.scratch() + 128);
  float* partial = reinterpret_cast<float*>(c.scratch() + 128 + S::X_BYTES);
  const int segments = c.arg(7);

  ptx::Vec4 w[S::AHEAD][N::JOINT];
  const auto begin = [&](const Strip<N>& strip) {
#pragma unroll
    for (int u = 0; u < S::AHEAD; ++u)
#pragma unroll
      for (int j = 0; j < N::JOINT; ++j) w[u][j] = strip.load(j, u);
  };
  begin(Strip<N>(c, c.ready->segment[0], 0));
  bool begun = true;
  if (!c.wait()) return;
#pragma unroll 1
  for (int first = 0; first < N::T; first += S::TOKENS) {
    const int tokens = min(S::TOKENS, N::T - first);
    columns_input<N>(c, g, first, tokens, x);
    c.barrier();
    if (first == 0) c.streaming();
#pragma unroll 1
    for (int s = 0; s < segments; ++s) {
      const Segment seg = c.ready->segment[s];
#pragma unroll 1
      for (int column = 0; column < static_cast<int>(seg.rows); column += S::COLUMNS) {
        const Strip<N> strip(c, seg, column);
        const int columns = min(S::COLUMNS, static_cast<int>(seg.rows) - column);
        const int n = seg.row + column + threadIdx.x % columns, t = threadIdx.x / columns;  // of the result it owns
        u32 kept[N::HOLD];
        if (t < tokens) N::hold(c, seg.part, first + t, n, kept);
        float acc[N::JOINT][S::TOKENS][S::VECTOR];
#pragma unroll
        for (int j = 0; j < N::JOINT; ++j)
#pragma unroll
          for (int i = 0; i < S::TOKENS * S::VECTOR; ++i) acc[j][i / S::VECTOR][i % S::VECTOR] = 0.0f;
        if (!begun) begin(strip);
        begun = false;
#pragma unroll 1
        for (int batch = 0; batch * strip.step < N::K; batch += S::AHEAD) {
#pragma unroll
          for (int u = 0; u < S::AHEAD; ++u) {
            const int k = strip.row + (batch + u) * strip.step;
            float xs[S::TOKENS];
#pragma unroll
            for (int i = 0; i < S::TOKENS; ++i) xs[i] = k < N::K ? widen(x[i * N::K + k]) : 0.0f;
#pragma unroll
            for (int j = 0; j < N::JOINT; ++j) {
              Pack<E, S::VECTOR> pack;
              pack.raw[0] = w[u][j];
              float ws[S::VECTOR];
              pack.unpack(ws);
              w[u][j] = strip.load(j, batch + S::AHEAD + u);
              if (k < N::K)  // a weight that does not count may be infinite
#pragma unroll
                for (int t0 = 0; t0 < S::TOKENS; ++t0)
#pragma unroll
                  for (int i = 0; i < S::VECTOR; ++i) acc[j][t0][i] = fmaf(ws[i], xs[t0], acc[j][t0][i]);
            }
          }
        }
        if (s == segments - 1 && column + S::COLUMNS >= static_cast<int>(seg.rows) && first + S::TOKENS >= N::T)
          c.last_slot_consumed();
        c.barrier();  // the sums of the block before have been read
#pragma unroll
        for (int j = 0; j < N::JOINT; ++j)
#pragma unroll
          for (int t0 = 0; t0 < S::TOKENS; ++t0) {
            for (int bit = 16; bit >= strip.wide; bit >>= 1)
#pragma unroll
              for (int i = 0; i < S::VECTOR; ++i) acc[j][t0][i] += __shfl_xor_sync(~0u, acc[j][t0][i], bit);
            if (lane < strip.wide && strip.mine) {
              float* to = partial + ((j * S::TOKENS + t0) * S::WARPS + warp) * S::COLUMNS + lane * S::VECTOR;
#pragma unroll
              for (int i = 0; i < S::VECTOR; ++i) to[i] = acc[j][t0][i];
            }
          }
        c.barrier();
        if (t < tokens) {
          float y[N::JOINT];
#pragma unroll
          for (int j = 0; j < N::JOINT; ++j) {
            const float* from = partial + (j * S::TOKENS + t) * S::WARPS * S::COLUMNS + threadIdx.x % columns;
            y[j] = 0.0f;
            if (j < strip.joint)
#pragma unroll
              for (int i = 0; i < S::WARPS; ++i) y[j] += from[i * S::COLUMNS];
          }
          N::epilogue(c, seg.part, first + t, n, y, kept);
        }
      }
    }
  }
}

}  // namespace mpk
