// Input of linear_mma: x of a chunk of columns as fragments of mma.sync, held in registers by the warps that own the
// columns.
//
// Warp w owns the 64-column groups w, w + 8, ... of a chunk. Within 32 columns a lane takes 8 consecutive ones, of its
// tokens and of its weight row alike: a permutation of k that both operands share, so that every operand is one
// 16-byte load.
//
// N (generated): Column: what the prologue reads that depends on k alone and that nothing writes (weights of norms);
// Row: the rest of what it reads 8 columns at a time; load_column, load_row, poll_row (loads again what is flagged and
// was missing, false if so); FLAGGED: whether poll_row does anything; PLAIN: x is Row's one vector as it is in memory;
// otherwise x(c, t, k, column, row, red, out), with REDUCTIONS over k as in linear.cuh.
#pragma once
#include "mpk/group.cuh"

namespace mpk {

template <class N>
struct MmaInput {
  using Column = typename N::Column;
  static constexpr int CHUNKS = (N::K + N::CHUNK - 1) / N::CHUNK;
  static constexpr int WARPS = static_cast<int>(kConsumerWarps);
  static constexpr int GROUPS = (N::CHUNK + 64 * WARPS - 1) / (64 * WARPS);  // of 64 columns, of a warp
  static constexpr int HALVES = N::T > 8 ? 2 : 1;                            // 8 tokens each
  // Every chunk is whole and every warp has all its groups: no bounds to check.
  static constexpr bool WHOLE = N::K % N::CHUNK == 0 && N::CHUNK % (64 * WARPS) == 0;
  // Pollers that load all they miss again and again slow down what they wait for: with many tokens they first wait for
  // one vector of theirs.
  static constexpr bool SCOUT = N::FLAGGED && N::T > 2;
  using Rows = typename N::Row[GROUPS][2][HALVES];
  // The tokens share columns, so each lane loads some, and the warp reads them from shared memory.
  static constexpr bool COLUMNS = !__is_empty(Column);
  static constexpr int LANE_COLUMNS = (GROUPS * 2 + 7) / 8;
  static constexpr int COLUMN_BYTES = COLUMNS ? WARPS * GROUPS * 8 * static_cast<int>(sizeof(Column)) : 0;
  static constexpr int SUM_BYTES = N::REDUCTIONS ? 2 * WARPS * 16 * 4 : 0;
  static constexpr int SCRATCH = COLUMN_BYTES + SUM_BYTES;
  static_assert(N::REDUCTIONS == 0 || CHUNKS == 1, "what is reduced must be held as a whole");

  u32 word[GROUPS][2][HALVES][4];
  Column own[LANE_COLUMNS];
  Column* columns;  // of this warp and lane: [GROUPS][2], 4 apart
  float* sums;
  int lane, first;

  MPK_DEVICE explicit MmaInput(char* scratch)
      : columns(reinterpret_cast<Column*>(scratch) + static_cast<int>(threadIdx.x) / 32 * GROUPS * 8 + threadIdx.x % 4),
        sums(reinterpret_cast<float*>(scratch + COLUMN_BYTES)), lane(threadIdx.x & 31),
        first(static_cast<int>(threadIdx.x) / 32 * 64 + lane % 4 * 8) {}

  MPK_DEVICE int at(int i, int s) const { return first + i * 64 * WARPS + s * 32; }  // column within the chunk
  MPK_DEVICE static int width(int chunk) { return WHOLE ? N::CHUNK : min(N::CHUNK, N::K - chunk * N::CHUNK); }

  // visit(group, half of its columns, half of the tokens, token, k) for what this lane owns. Lanes beyond the last
  // token take the last one again: nobody reads their sums.
  template <int FROM, int TO, class F> MPK_DEVICE void each(int chunk, F&& visit) const {
#pragma unroll
    for (int h = FROM; h < TO; ++h)
#pragma unroll
      for (int i = 0; i < GROUPS; ++i)
#pragma unroll
        for (int s = 0; s < 2; ++s)
          if (WHOLE || at(i, s) < width(chunk)) visit(i, s, h, min(lane / 4 + h * 8, N::T - 1), chunk * N::CHUNK + at(i, s));
  }

  // May run before the task's events have come.
  template <class Ctx> MPK_DEVICE void load_columns(Ctx& c, int chunk) {
    if constexpr (COLUMNS)
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) {
        const int which = j * 8 + lane / 4;
        if (which < GROUPS * 2)
          if (const int k = at(which / 2, which % 2); WHOLE || k < width(chunk)) N::load_column(c, chunk * N::CHUNK + k, own[j]);
      }
  }
  // Not before the scratch memory is this task's.
  MPK_DEVICE void share_columns() {
    if constexpr (COLUMNS) {
      __syncwarp();  // those of the chunk before have been read
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j)
        if (const int which = j * 8 + lane / 4; which < GROUPS * 2) columns[which * 4] = own[j];
      __syncwarp();
    }
  }
  MPK_DEVICE Column column(int i, int s) const {
    if constexpr (COLUMNS) return columns[(i * 2 + s) * 4];
    else return {};
  }

  // Starts to load the rows of a chunk; `early`: before it is known that some have been written.
  template <int FROM, int TO, class Ctx> MPK_DEVICE void load_rows(Ctx& c, int chunk, bool early, Rows& row) const {
    if constexpr (SCOUT) {
      if (early && (WHOLE || first < width(chunk))) {
        typename N::Row scout;
        const int t = min(lane / 4 + FROM * 8, N::T - 1), k = chunk * N::CHUNK + first;
        N::load_row(c, t, k, scout);
        poll_until(c, [&] { return N::poll_row(c, t, k, scout); });
      }
    }
    each<FROM, TO>(chunk, [&](int i, int s, int h, int t, int k) { N::load_row(c, t, k, row[i][s][h]); });
  }

  template <int FROM, int TO, class Ctx> MPK_DEVICE void await_rows(Ctx& c, int chunk, Rows& row) const {
    if constexpr (N::FLAGGED)
      poll_until(c, [&] {
        bool complete = true;
        each<FROM, TO>(chunk, [&](int i, int s, int h, int t, int k) { complete = N::poll_row(c, t, k, row[i][s][h]) && complete; });
        return complete;
      });
  }

  // Sums of a token: over the lanes that share it, then over the warps in order. Two buffers, so that one barrier each
  // suffices.
  template <int I, class Ctx>
  MPK_DEVICE void reduce(Ctx& c, const Rows& row, float (&red)[HALVES][N::REDUCTIONS + 1]) const {
    if constexpr (I < N::REDUCTIONS) {
      using Combine = typename N::template Combine<I>;
      float total[HALVES];
#pragma unroll
      for (int h = 0; h < HALVES; ++h) total[h] = Combine::identity();
      each<0, HALVES>(0, [&](int i, int s, int h, int t, int k) {
        float out[8];
        N::template term<I>(c, t, k, column(i, s), row[i][s][h], red[h], out);
#pragma unroll
        for (int e = 0; e < 8; ++e) total[h] = Combine::apply(total[h], out[e]);
      });
      float* mine = sums + (I & 1) * WARPS * 16 + lane / 4;
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        total[h] = Combine::apply(total[h], __shfl_xor_sync(~0u, total[h], 1));
        total[h] = Combine::apply(total[h], __shfl_xor_sync(~0u, total[h], 2));
        if (lane % 4 == 0) mine[threadIdx.x / 32 * 16 + h * 8] = total[h];
      }
      c.barrier();
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        red[h][I] = mine[h * 8];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) red[h][I] = Combine::apply(red[h][I], mine[w * 16 + h * 8]);
      }
      reduce<I + 1>(c, row, red);
    }
  }

  template <int FROM, int TO, class Ctx>
  MPK_DEVICE void convert(Ctx& c, int chunk, const Rows& row, const float (&red)[HALVES][N::REDUCTIONS + 1]) {
    each<FROM, TO>(chunk, [&](int i, int s, int h, int t, int k) {
      if constexpr (N::PLAIN) {
        const ptx::Vec4 v = N::plain(row[i][s][h]);
        const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) word[i][s][h][e] = w[e];
      } else {
        float x[8];
        N::x(c, t, k, column(i, s), row[i][s][h], red[h], x);
#pragma unroll
        for (int e = 0; e < 4; ++e) word[i][s][h][e] = pack2<typename N::Element>(x[2 * e], x[2 * e + 1]);
      }
    });
  }

  // The fragments of a chunk, `early` as in load_rows; of columns that do not exist they are 0.
  template <class Ctx> MPK_DEVICE void load(Ctx& c, int chunk, bool early) {
    float red[HALVES][N::REDUCTIONS + 1];
    Rows row;
    constexpr bool TOGETHER = N::PLAIN || N::REDUCTIONS > 0 || HALVES == 1;  // else 16 tokens would not fit
    if (CHUNKS > 1) load_columns(c, chunk);
    share_columns();
    load_rows<0, TOGETHER ? HALVES : 1>(c, chunk, early, row);
    await_rows<0, TOGETHER ? HALVES : 1>(c, chunk, row);
    if constexpr (!WHOLE) {
#pragma unroll
      for (int i = 0; i < GROUPS; ++i)
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
          for (int h = 0; h < HALVES; ++h)
#pragma unroll
            for (int e = 0; e < 4; ++e) word[i][s][h][e] = 0;
    }
    reduce<0>(c, row, red);
    convert<0, TOGETHER ? HALVES : 1>(c, chunk, row, red);
    if constexpr (!TOGETHER) {
      load_rows<1, HALVES>(c, chunk, early, row);
      await_rows<1, HALVES>(c, chunk, row);
      convert<1, HALVES>(c, chunk, row, red);
    }
  }
};

}  // namespace mpk
