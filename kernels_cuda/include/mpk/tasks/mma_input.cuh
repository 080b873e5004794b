// Input of linear_mma: x of a chunk of columns as fragments of mma.sync, held in registers by the warps that own the
// columns.
//
// Warp w owns the 64-column groups w, w + 8, ... of a chunk. Within 32 columns a lane takes 8 consecutive ones, of its
// tokens and of its weight row alike: a permutation of k that both operands share, so that every operand is one
// 16-byte load. Where there are fewer than 8 tokens, lanes that would hold the same ones share the work of getting x, and
// hand it to each other by shuffles.
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
  // one vector of theirs. Not where x is as it is in memory: there the trip more costs more (docs/benchmarks.md).
  static constexpr bool SCOUT = N::FLAGGED && N::T > 4 && !N::PLAIN;
  static constexpr int UNITS = 2 * GROUPS;  // vectors of a token that a lane multiplies: of 32 columns in 4 lanes
  // Tokens of different lanes. Where x is as it is in memory there is no work to share, and sharing loads cost 3 to 8 %.
  static constexpr int ROWS = N::T > 4 || N::PLAIN ? 8 : N::T > 2 ? 4 : 2;
  static constexpr int SHARE = 8 / ROWS, OWN = (UNITS + SHARE - 1) / SHARE;  // lanes that share a token, units of each
  using Rows = typename N::Row[OWN][HALVES];
  // The tokens share columns, so each lane loads some, and the warp reads them from shared memory.
  static constexpr bool COLUMNS = !__is_empty(Column);
  static constexpr int LANE_COLUMNS = (UNITS + 7) / 8;
  static constexpr int COLUMN_BYTES = COLUMNS ? WARPS * UNITS * 4 * static_cast<int>(sizeof(Column)) : 0;
  static constexpr int SUM_BYTES = N::REDUCTIONS ? 2 * WARPS * 16 * 4 : 0;
  static constexpr int SCRATCH = COLUMN_BYTES + SUM_BYTES;
  static_assert(N::REDUCTIONS == 0 || CHUNKS == 1, "what is reduced must be held as a whole");

  u32 word[UNITS][HALVES][4];
  Column own[LANE_COLUMNS];
  Column* columns;  // of this warp and lane: [UNITS], 4 apart
  float* sums;
  int lane, first;

  MPK_DEVICE explicit MmaInput(char* scratch)
      : columns(reinterpret_cast<Column*>(scratch) + static_cast<int>(threadIdx.x) / 32 * UNITS * 4 + threadIdx.x % 4),
        sums(reinterpret_cast<float*>(scratch + COLUMN_BYTES)), lane(threadIdx.x & 31),
        first(static_cast<int>(threadIdx.x) / 32 * 64 + lane % 4 * 8) {}

  MPK_DEVICE int at(int i, int s) const { return first + i * 64 * WARPS + s * 32; }  // column within the chunk
  MPK_DEVICE int at(int unit) const { return at(unit / 2, unit % 2); }
  MPK_DEVICE int unit(int own) const { return SHARE == 1 ? own : own * SHARE + lane / 4 / ROWS; }
  MPK_DEVICE bool exists(int chunk, int unit) const {
    return (UNITS % SHARE == 0 || unit < UNITS) && (WHOLE || at(unit) < width(chunk));
  }
  // Its first column in x. What does not exist is the last vector: a load in a branch would be waited for at its end.
  MPK_DEVICE int place(int chunk, int unit) const {
    const int k = chunk * N::CHUNK + at(unit);
    return WHOLE && UNITS % SHARE == 0 ? k : min(k, N::K - 8);
  }
  MPK_DEVICE static int width(int chunk) { return WHOLE ? N::CHUNK : min(N::CHUNK, N::K - chunk * N::CHUNK); }

  // visit(which of this lane's own, half of the tokens, token, unit). Lanes beyond the last token take the last one again:
  // nobody reads their sums.
  template <int FROM, int TO, class F> MPK_DEVICE void each(F&& visit) const {
#pragma unroll
    for (int h = FROM; h < TO; ++h)
#pragma unroll
      for (int i = 0; i < OWN; ++i) visit(i, h, min(lane / 4 % ROWS + h * 8, N::T - 1), unit(i));
  }

  // May run before the task's events have come.
  template <class Ctx> MPK_DEVICE void load_columns(Ctx& c, int chunk) {
    if constexpr (COLUMNS)
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) N::load_column(c, place(chunk, min(j * 8 + lane / 4, UNITS - 1)), own[j]);
  }
  // Not before the scratch memory is this task's.
  MPK_DEVICE void share_columns() {
    if constexpr (COLUMNS) {
      __syncwarp();  // those of the chunk before have been read
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j)
        if (const int unit = j * 8 + lane / 4; unit < UNITS) columns[unit * 4] = own[j];
      __syncwarp();
    }
  }
  MPK_DEVICE Column column(int unit) const {
    if constexpr (COLUMNS) return columns[(UNITS % SHARE == 0 ? unit : min(unit, UNITS - 1)) * 4];
    else return {};
  }

  // Starts to load the rows of a chunk; `early`: before it is known that some have been written.
  template <int FROM, int TO, class Ctx> MPK_DEVICE void load_rows(Ctx& c, int chunk, bool early, Rows& row) const {
    if constexpr (SCOUT) {
      if (early) {
        typename N::Row scout;
        const int t = min(lane / 4 % ROWS + FROM * 8, N::T - 1), k = place(chunk, 0);
        N::load_row(c, t, k, scout);
        poll_until(c, [&] { return N::poll_row(c, t, k, scout); });
      }
    }
    each<FROM, TO>([&](int i, int h, int t, int unit) { N::load_row(c, t, place(chunk, unit), row[i][h]); });
  }

  template <int FROM, int TO, class Ctx> MPK_DEVICE void await_rows(Ctx& c, int chunk, Rows& row) const {
    if constexpr (N::FLAGGED)
      poll_until(c, [&] {
        bool complete = true;
        each<FROM, TO>([&](int i, int h, int t, int unit) { complete = N::poll_row(c, t, place(chunk, unit), row[i][h]) && complete; });
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
      each<0, HALVES>([&](int i, int h, int t, int unit) {
        float out[8], with = total[h];
        N::template term<I>(c, t, place(0, unit), column(unit), row[i][h], red[h], out);
#pragma unroll
        for (int e = 0; e < 8; ++e) with = Combine::apply(with, out[e]);
        total[h] = exists(0, unit) ? with : total[h];
      });
      float* mine = sums + (I & 1) * WARPS * 16 + lane / 4;
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        total[h] = Combine::apply(total[h], __shfl_xor_sync(~0u, total[h], 1));
        total[h] = Combine::apply(total[h], __shfl_xor_sync(~0u, total[h], 2));
#pragma unroll
        for (int bit = 4 * ROWS; bit < 32; bit <<= 1) total[h] = Combine::apply(total[h], __shfl_xor_sync(~0u, total[h], bit));
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
    if (SHARE > 1) __syncwarp();  // lanes that are apart since a poll shuffle one by one
    each<FROM, TO>([&](int i, int h, int t, int unit) {
      u32 w[4];
      if constexpr (N::PLAIN) {
        const ptx::Vec4 v = N::plain(row[i][h]);
        w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
      } else {
        float x[8];
        N::x(c, t, place(chunk, unit), column(unit), row[i][h], red[h], x);
#pragma unroll
        for (int e = 0; e < 4; ++e) w[e] = pack2<typename N::Element>(x[2 * e], x[2 * e + 1]);
      }
      const bool there = exists(chunk, unit);
#pragma unroll
      for (int e = 0; e < 4; ++e) w[e] = there ? w[e] : 0;
#pragma unroll
      for (int j = 0; j < SHARE; ++j)
        if (i * SHARE + j < UNITS)
#pragma unroll
          for (int e = 0; e < 4; ++e)
            word[i * SHARE + j][h][e] =
                SHARE == 1 ? w[e] : __shfl_sync(~0u, w[e], (j * ROWS + min(lane / 4, N::T - 1)) * 4 + lane % 4);
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
