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
  static constexpr int CHUNKS = (N::K + N::CHUNK - 1) / N::CHUNK;
  static constexpr int WARPS = static_cast<int>(kConsumerWarps);
  static constexpr int GROUPS = (N::CHUNK + 64 * WARPS - 1) / (64 * WARPS);  // of 64 columns, of a warp
  static constexpr int HALVES = N::T > 8 ? 2 : 1;                            // 8 tokens each
  // Every chunk is whole and every warp has all its groups: no bounds to check.
  static constexpr bool WHOLE = N::K % N::CHUNK == 0 && N::CHUNK % (64 * WARPS) == 0;
  // Pollers that load all they miss again and again slow down what they wait for: with many tokens they first wait for
  // one vector of theirs.
  static constexpr bool SCOUT = N::FLAGGED && N::T > 2;
  static_assert(N::REDUCTIONS == 0 || CHUNKS == 1, "what is reduced must be held as a whole");

  u32 word[GROUPS][2][HALVES][4];
  typename N::Column column[GROUPS][2];
  int lane, first;

  MPK_DEVICE MmaInput() : lane(threadIdx.x & 31), first(static_cast<int>(threadIdx.x) / 32 * 64 + lane % 4 * 8) {}

  MPK_DEVICE int at(int i, int s) const { return first + i * 64 * WARPS + s * 32; }  // column within the chunk

  // visit(group, half of its columns, half of the tokens, token, k) for what this lane owns. Lanes beyond the last
  // token take the last one again: nobody reads their sums.
  template <int FROM, int TO, class F> MPK_DEVICE void each(int chunk, F&& visit) const {
    const int columns = WHOLE ? N::CHUNK : min(N::CHUNK, N::K - chunk * N::CHUNK);
#pragma unroll
    for (int h = FROM; h < TO; ++h)
#pragma unroll
      for (int i = 0; i < GROUPS; ++i)
#pragma unroll
        for (int s = 0; s < 2; ++s)
          if (WHOLE || at(i, s) < columns) visit(i, s, h, min(lane / 4 + h * 8, N::T - 1), chunk * N::CHUNK + at(i, s));
  }

  // May run before the task's events have come.
  template <class Ctx> MPK_DEVICE void load_columns(Ctx& c, int chunk) {
    each<0, 1>(chunk, [&](int i, int s, int, int, int k) { N::load_column(c, k, column[i][s]); });
  }

  template <int FROM, int TO, class Ctx> MPK_DEVICE void load_rows(Ctx& c, int chunk, typename N::Row (&row)[GROUPS][2][HALVES]) {
    if constexpr (SCOUT) {
      const auto scout = [&](auto&& visit) {
        if (WHOLE || chunk * N::CHUNK + first < N::K) visit(min(lane / 4 + FROM * 8, N::T - 1), chunk * N::CHUNK + first);
      };
      scout([&](int t, int k) { N::load_row(c, t, k, row[0][0][FROM]); });
      poll_until(c, [&] {
        bool complete = true;
        scout([&](int t, int k) { complete = N::poll_row(c, t, k, row[0][0][FROM]); });
        return complete;
      });
    }
    each<FROM, TO>(chunk, [&](int i, int s, int h, int t, int k) {
      if (!SCOUT || i || s || h != FROM) N::load_row(c, t, k, row[i][s][h]);
    });
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
  MPK_DEVICE void reduce(Ctx& c, const typename N::Row (&row)[GROUPS][2][HALVES], float (&red)[HALVES][N::REDUCTIONS + 1]) const {
    if constexpr (I < N::REDUCTIONS) {
      using Combine = typename N::template Combine<I>;
      float total[HALVES];
#pragma unroll
      for (int h = 0; h < HALVES; ++h) total[h] = Combine::identity();
      each<0, HALVES>(0, [&](int i, int s, int h, int t, int k) {
        float out[8];
        N::template term<I>(c, t, k, column[i][s], row[i][s][h], red[h], out);
#pragma unroll
        for (int e = 0; e < 8; ++e) total[h] = Combine::apply(total[h], out[e]);
      });
      float* sums = reinterpret_cast<float*>(c.scratch()) + (I & 1) * WARPS * 16 + lane / 4;
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        total[h] = Combine::apply(total[h], __shfl_xor_sync(~0u, total[h], 1));
        total[h] = Combine::apply(total[h], __shfl_xor_sync(~0u, total[h], 2));
        if (lane % 4 == 0) sums[threadIdx.x / 32 * 16 + h * 8] = total[h];
      }
      c.barrier();
#pragma unroll
      for (int h = 0; h < HALVES; ++h) {
        red[h][I] = sums[h * 8];
#pragma unroll
        for (int w = 1; w < WARPS; ++w) red[h][I] = Combine::apply(red[h][I], sums[w * 16 + h * 8]);
      }
      reduce<I + 1>(c, row, red);
    }
  }

  template <int FROM, int TO, class Ctx>
  MPK_DEVICE void convert(Ctx& c, int chunk, const typename N::Row (&row)[GROUPS][2][HALVES], const float (&red)[HALVES][N::REDUCTIONS + 1]) {
    each<FROM, TO>(chunk, [&](int i, int s, int h, int t, int k) {
      if constexpr (N::PLAIN) {
        const ptx::Vec4 v = N::plain(row[i][s][h]);
        const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int e = 0; e < 4; ++e) word[i][s][h][e] = w[e];
      } else {
        float x[8];
        N::x(c, t, k, column[i][s], row[i][s][h], red[h], x);
#pragma unroll
        for (int e = 0; e < 4; ++e) word[i][s][h][e] = pack2<typename N::Element>(x[2 * e], x[2 * e + 1]);
      }
    });
  }

  // The fragments of a chunk; of columns that do not exist they are 0.
  template <class Ctx> MPK_DEVICE void load(Ctx& c, int chunk) {
    float red[HALVES][N::REDUCTIONS + 1];
    typename N::Row row[GROUPS][2][HALVES];
    constexpr bool TOGETHER = N::PLAIN || N::REDUCTIONS > 0 || HALVES == 1;  // else what is held of 16 tokens would not fit
    if (CHUNKS > 1) load_columns(c, chunk);
    load_rows<0, TOGETHER ? HALVES : 1>(c, chunk, row);
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
      load_rows<1, HALVES>(c, chunk, row);
      convert<1, HALVES>(c, chunk, row, red);
    }
  }
};

}  // namespace mpk
