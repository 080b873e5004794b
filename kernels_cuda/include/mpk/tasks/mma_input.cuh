// Input of linear_mma: x of a chunk of columns as fragments of mma.sync, held in registers by the warps that own the
// columns.
//
// Warp w owns the 64-column groups w, w + 8, ... of a chunk. Within 32 columns a lane takes 8 consecutive ones, of its
// tokens and of its weight row alike: a permutation of k that both operands share, so that every operand is one
// 16-byte load.
//
// Where what is read of 8 columns of a token is one vector (ONE), it lies in the registers of the fragment that becomes of
// it. The prologue then takes one group at a time and moves the others up, in a loop: straight-line code for all of them
// is longer than the instruction cache has room for.
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
  using Row = typename N::Row;
  using Rows = Row[GROUPS][2][HALVES];
  static constexpr bool ONE = sizeof(Row) == 16;
  static constexpr int TOKENS = N::T <= 2 ? 2 : N::T <= 4 ? 4 : 8;  // of a half that lanes stand for
  static constexpr int SHARE = ONE && !N::PLAIN && CHUNKS == 1 && GROUPS <= 4 ? 8 / TOKENS : 1;
  static constexpr int OWN = (GROUPS * 2 + SHARE - 1) / SHARE;  // vectors of a lane that shares
  static constexpr int EXCHANGED = SHARE > 1 ? TOKENS * GROUPS * 2 * 4 : 0;  // vectors of a warp, see load
  // Rows of the next chunk are under way while this one is multiplied.
  static constexpr bool PREFETCH = CHUNKS > 1 && ONE;
  // The tokens share columns, so each lane loads some, and the warp reads them from shared memory.
  static constexpr bool COLUMNS = !__is_empty(Column);
  static constexpr int LANE_COLUMNS = (GROUPS * 2 + 7) / 8;
  static constexpr int COLUMN_BYTES = COLUMNS ? WARPS * GROUPS * 8 * static_cast<int>(sizeof(Column)) : 0;
  static constexpr int SUM_BYTES = N::REDUCTIONS ? 2 * WARPS * 16 * 4 : 0;
  static constexpr int SCRATCH = COLUMN_BYTES + SUM_BYTES;
  static_assert(N::REDUCTIONS == 0 || CHUNKS == 1, "what is reduced must be held as a whole");

  using Words = u32[GROUPS][2][HALVES][4];
  Words word;
  Words ahead;  // of the next chunk
  Column own[LANE_COLUMNS];
  Column* columns;  // of this warp and lane: [GROUPS][2], 4 apart
  float* sums;
  int lane, first;

  MPK_DEVICE explicit MmaInput(char* scratch)
      : columns(reinterpret_cast<Column*>(scratch) + static_cast<int>(threadIdx.x) / 32 * GROUPS * 8 + threadIdx.x % 4),
        sums(reinterpret_cast<float*>(scratch + COLUMN_BYTES)), lane(threadIdx.x & 31),
        first(static_cast<int>(threadIdx.x) / 32 * 64 + lane % 4 * 8) {}

  MPK_DEVICE static int more(int i, int s) { return i * 64 * WARPS + s * 32; }
  MPK_DEVICE int at(int i, int s) const { return first + more(i, s); }  // column within the chunk
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

  MPK_DEVICE static void clear(Words& words) {
#pragma unroll
    for (int i = 0; i < GROUPS; ++i)
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int h = 0; h < HALVES; ++h)
#pragma unroll
          for (int e = 0; e < 4; ++e) words[i][s][h][e] = 0;
  }
  MPK_DEVICE static Row row_of(const u32 (&w)[4]) {
    Row row;
    static_assert(!ONE || alignof(Row) == 16, "one vector");
    *reinterpret_cast<ptx::Vec4*>(&row) = {w[0], w[1], w[2], w[3]};
    return row;
  }
  MPK_DEVICE static void keep(u32 (&w)[4], const Row& row) {
    const ptx::Vec4& v = reinterpret_cast<const ptx::Vec4&>(row);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  }

  // Before it is known that any have been written: wait for one vector.
  template <int FROM, class Ctx> MPK_DEVICE void scout(Ctx& c, int chunk) const {
    if constexpr (SCOUT)
      if (WHOLE || first < width(chunk)) {
        Row row;
        const int t = min(lane / 4 + FROM * 8, N::T - 1), k = chunk * N::CHUNK + first;
        N::load_row(c, t, k, 0, row);
        poll_until(c, [&] { return N::poll_row(c, t, k, 0, row); });
      }
  }
  template <int FROM, int TO, class Ctx> MPK_DEVICE void load_rows(Ctx& c, int chunk, Rows& row) const {
    const int k0 = chunk * N::CHUNK + first;
    each<FROM, TO>(chunk, [&](int i, int s, int h, int t, int) { N::load_row(c, t, k0, more(i, s), row[i][s][h]); });
  }
  template <int FROM, int TO, class Ctx> MPK_DEVICE void await_rows(Ctx& c, int chunk, Rows& row) const {
    if constexpr (N::FLAGGED)
      poll_until(c, [&] {
        bool all = true;
        const int k0 = chunk * N::CHUNK + first;
        each<FROM, TO>(chunk, [&](int i, int s, int h, int t, int) { all = N::poll_row(c, t, k0, more(i, s), row[i][s][h]) && all; });
        return all;
      });
  }
  // The same for ONE.
  template <class Ctx> MPK_DEVICE void load_words(Ctx& c, int chunk, Words& to) const {
    if constexpr (!WHOLE) clear(to);
    const int k0 = chunk * N::CHUNK + first;
    each<0, HALVES>(chunk, [&](int i, int s, int h, int t, int) {
      Row row;
      N::load_row(c, t, k0, more(i, s), row);
      keep(to[i][s][h], row);
    });
  }
  // Whether none of these vectors holds a sentinel: of 16-bit elements it is the largest.
  template <int COUNT> MPK_DEVICE static bool complete(const u32* words) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) most = __vmaxu2(most, words[i]);
    return (most & 0xffffu) != 0xffffu && most < 0xffff0000u;
  }
  // Until all of it has been published. What misses some is loaded as a whole again: code for single vectors would be long,
  // and `scout` has seen to it that little is missing.
  template <class Ctx> MPK_DEVICE void await_words(Ctx& c, int chunk, bool loaded) {
    do {
      if (!loaded) load_words(c, chunk, word);
      loaded = false;
    } while (N::FLAGGED && !complete<GROUPS * 2 * HALVES * 4>(&word[0][0][0][0]) && !c.shared.health.aborted);
  }
  // visit(half of a group's columns, half of the tokens, token, k, what is held of it) for all groups, each in its turn in
  // the first one's registers.
  template <class F> MPK_DEVICE void each_in_turn(int chunk, F&& visit) {
#pragma unroll 1
    for (int i = 0; i < GROUPS; ++i) {
      u32 mine[2][HALVES][4];
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int h = 0; h < HALVES; ++h) {
#pragma unroll
          for (int e = 0; e < 4; ++e) mine[s][h][e] = word[0][s][h][e];
          if (WHOLE || at(i, s) < width(chunk))
            visit(i, s, h, min(lane / 4 + h * 8, N::T - 1), chunk * N::CHUNK + at(i, s), mine[s][h]);
#pragma unroll
          for (int j = 0; j + 1 < GROUPS; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) word[j][s][h][e] = word[j + 1][s][h][e];
#pragma unroll
          for (int e = 0; e < 4; ++e) word[GROUPS - 1][s][h][e] = mine[s][h][e];
        }
    }
  }

  // Sums of a token: over the lanes that share it, then over the warps in order. Two buffers, so that one barrier each
  // suffices.
  template <int I, class Ctx>
  MPK_DEVICE void reduce(Ctx& c, const Rows& row, float (&red)[HALVES][N::REDUCTIONS + 1]) {
    if constexpr (I < N::REDUCTIONS) {
      using Combine = typename N::template Combine<I>;
      float total[HALVES];
#pragma unroll
      for (int h = 0; h < HALVES; ++h) total[h] = Combine::identity();
      const auto add = [&](int i, int s, int h, int t, int k, const Row& of) {
        float out[8];
        N::template term<I>(c, t, k, column(i, s), of, red[h], out);
#pragma unroll
        for (int e = 0; e < 8; ++e) total[h] = Combine::apply(total[h], out[e]);
      };
      if constexpr (ONE)
        each_in_turn(0, [&](int i, int s, int h, int t, int k, const u32 (&w)[4]) { add(i, s, h, t, k, row_of(w)); });
      else
        each<0, HALVES>(0, [&](int i, int s, int h, int t, int k) { add(i, s, h, t, k, row[i][s][h]); });
      combine<I>(c, total, red);
      reduce<I + 1>(c, row, red);
    }
  }
  template <int I, class Ctx>
  MPK_DEVICE void combine(Ctx& c, float (&total)[HALVES], float (&red)[HALVES][N::REDUCTIONS + 1]) const {
    using Combine = typename N::template Combine<I>;
    float* mine = sums + (I & 1) * WARPS * 16 + lane / 4;
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
#pragma unroll
      for (int bit = 1; bit < 32; bit <<= 1)
        if (bit < 4 || (SHARE > 1 && bit >= 4 * TOKENS)) total[h] = Combine::apply(total[h], __shfl_xor_sync(~0u, total[h], bit));
      if (lane % 4 == 0) mine[threadIdx.x / 32 * 16 + h * 8] = total[h];
    }
    c.barrier();
#pragma unroll
    for (int h = 0; h < HALVES; ++h) {
      red[h][I] = mine[h * 8];
#pragma unroll
      for (int w = 1; w < WARPS; ++w) red[h][I] = Combine::apply(red[h][I], mine[w * 16 + h * 8]);
    }
  }
  template <class Ctx>
  MPK_DEVICE void convert(Ctx& c, int i, int s, int t, int k, const Row& row, const float* red, u32 (&to)[4]) const {
    float x[8];
    N::x(c, t, k, column(i, s), row, red, x);
#pragma unroll
    for (int e = 0; e < 4; ++e) to[e] = pack2<typename N::Element>(x[2 * e], x[2 * e + 1]);
  }

  // SHARE lanes a token: visit(which of the lane's vectors, group, half of its columns, token, k).
  template <class F> MPK_DEVICE void each_own(F&& visit) const {
    const int t = min(lane / 4 % TOKENS, N::T - 1);
#pragma unroll
    for (int j = 0; j < OWN; ++j) {
      const int q = j * SHARE + lane / 4 / TOKENS;
      if (GROUPS * 2 % SHARE == 0 || q < GROUPS * 2)
        if (WHOLE || at(q / 2, q % 2) < width(0)) visit(j, q / 2, q % 2, t, at(q / 2, q % 2));
    }
  }
  template <int I, class Ctx>
  MPK_DEVICE void reduce_own(Ctx& c, const Row (&row)[OWN], float (&red)[HALVES][N::REDUCTIONS + 1]) const {
    if constexpr (I < N::REDUCTIONS) {
      using Combine = typename N::template Combine<I>;
      float total[HALVES] = {Combine::identity()};
      each_own([&](int j, int i, int s, int t, int k) {
        float out[8];
        N::template term<I>(c, t, k, column(i, s), row[j], red[0], out);
#pragma unroll
        for (int e = 0; e < 8; ++e) total[0] = Combine::apply(total[0], out[e]);
      });
      combine<I>(c, total, red);
      reduce_own<I + 1>(c, row, red);
    }
  }
  template <class Ctx, class F> MPK_DEVICE void load_own(Ctx& c, F&& exchange) {
    Row row[OWN];
    float red[HALVES][N::REDUCTIONS + 1];
    each_own([&](int j, int, int, int t, int k) { N::load_row(c, t, k, 0, row[j]); });
    if constexpr (N::FLAGGED)
      poll_until(c, [&] {
        bool all = true;
        each_own([&](int j, int, int, int t, int k) { all = N::poll_row(c, t, k, 0, row[j]) && all; });
        return all;
      });
    reduce_own<0>(c, row, red);
    const auto place = [&](int q, int t) { return (t * GROUPS * 2 + q) * 4 + lane % 4; };
    each_own([&](int j, int i, int s, int t, int k) {
      u32 w[4];
      convert(c, i, s, t, k, row[j], red[0], w);
      *exchange(place(i * 2 + s, lane / 4 % TOKENS)) = {w[0], w[1], w[2], w[3]};
    });
    __syncwarp();
#pragma unroll
    for (int q = 0; q < GROUPS * 2; ++q) {
      ptx::Vec4 v = {0, 0, 0, 0};
      if (WHOLE || at(q / 2, q % 2) < width(0)) v = *exchange(place(q, lane / 4 % TOKENS));
      u32(&w)[4] = word[q / 2][q % 2][0];
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    }
    __syncwarp();  // the memory of the exchange is for sums from here on
  }

  // Starts to load a chunk, the next one that `load` is called for, if `any`.
  template <class Ctx> MPK_DEVICE void prefetch(Ctx& c, int chunk, bool any) {
    if constexpr (PREFETCH) {
      if (!any) clear(ahead);  // so that its registers are free until here
      else load_words(c, chunk, ahead);
    }
  }

  // The fragments of a chunk, `early`: the task's first; of columns that do not exist they are 0. exchange(i): shared memory
  // for EXCHANGED vectors, of this warp.
  template <class Ctx, class F> MPK_DEVICE void load(Ctx& c, int chunk, bool early, F&& exchange) {
    [[maybe_unused]] float red[HALVES][N::REDUCTIONS + 1];
    [[maybe_unused]] Rows row;
    if (CHUNKS > 1) load_columns(c, chunk);
    share_columns();
    if (early) scout<0>(c, chunk);
    if constexpr (SHARE > 1) {
      load_own(c, exchange);
    } else if constexpr (ONE) {
      if (PREFETCH && !early) {
#pragma unroll
        for (int i = 0; i < GROUPS; ++i)
#pragma unroll
          for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int h = 0; h < HALVES; ++h)
#pragma unroll
              for (int e = 0; e < 4; ++e) word[i][s][h][e] = ahead[i][s][h][e];
      }
      await_words(c, chunk, PREFETCH && !early);
      reduce<0>(c, row, red);
      if constexpr (!N::PLAIN)
        each_in_turn(chunk, [&](int i, int s, int h, int t, int k, u32 (&w)[4]) { convert(c, i, s, t, k, row_of(w), red[h], w); });
    } else {
      constexpr bool TOGETHER = N::REDUCTIONS > 0 || HALVES == 1;  // else 16 tokens would not fit
      load_rows<0, TOGETHER ? HALVES : 1>(c, chunk, row);
      await_rows<0, TOGETHER ? HALVES : 1>(c, chunk, row);
      clear(word);
      reduce<0>(c, row, red);
      const auto one = [&](int i, int s, int h, int t, int k) { convert(c, i, s, t, k, row[i][s][h], red[h], word[i][s][h]); };
      each<0, TOGETHER ? HALVES : 1>(chunk, one);
      if constexpr (!TOGETHER) {
        if (early) scout<1>(c, chunk);
        load_rows<1, HALVES>(c, chunk, row);
        await_rows<1, HALVES>(c, chunk, row);
        each<1, HALVES>(chunk, one);
      }
    }
  }
};

}  // namespace mpk
