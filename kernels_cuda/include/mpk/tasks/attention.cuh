// attention: one query token of one (batch, KV head), a range of keys. arg = {b, g, split, splits, partial, stats}: the
// last two are operand indices of the partial results (unused when splits == 1).
//
// The range is found here: the live keys are cut into equal ranges, as many as `splits` allows and none below CHUNK
// keys but the last. A split that is left without keys writes nothing, and the combination reads none of it.
//
// The control warp finds the range while the task before this one runs, and has the keys brought to the L2 cache: two trips
// to memory less between the arrival of q and the result.
//
// The prologue (norms, rotary, whatever the graph has) is evaluated by every task of a (b, g): q rows of the group and
// the appended key and value go to shared memory, so that no edge separates them. Old keys are on their way meanwhile.
//
// N (generated): Cache (element type); MMA (q has the cache's 16-bit type: tensor cores); G (query heads per KV head), D,
// S, CHUNK, APPEND, MASK (0 none, 1 bool, 2 additive), MASK_PER_HEAD, SCALE, SOFTCAP (0: none); ALIKE: rows of q and the
// new key are the same function of other operands; q_row(c, group, b, h, store, key), key: the new key's where they are
// ALIKE; key_row, value_row; with store(d, value);
// position(c, b), first(c, b), last(c, b); key_at(c, b, g, s), value_at: pointers to D consecutive elements, also with the
// pointer that key_at_base(c) gives, and KEY_STRIDE elements apart where that is a constant (else 0); new_key_at,
// new_value_at: the same in the written version; mask_bool / mask_add(c, b, h, s), or mask_word(c, b, h, s) to load it
// and mask_value(word) for what it adds to a score; store(c, b, h, d, value);
// partial(pointer, value) stores a partial result; FLAGGED: whether they are their own flags.
#pragma once
#include "mpk/group.cuh"

namespace mpk {

constexpr float kLog2e = 1.4426950408889634f;
constexpr int pow2_at_least(int n) { int p = 1; while (p < n) p *= 2; return p; }
constexpr int round_up(int n, int step) { return (n + step - 1) / step * step; }

// Keys [low, high) in ranges of `chunk`, of which the first `used` hold keys (one at least).
struct KeyRanges {
  int low, high, chunk, used;
  MPK_DEVICE KeyRanges(int first, int last, int keys, int least, int splits) {
    low = min(max(first, 0), keys);
    high = max(low, min(max(last, 0), keys));
    chunk = max(least, (high - low + splits - 1) / splits);
    used = max(1, (high - low + chunk - 1) / chunk);
  }
};

// Scratch: rows of q, the new key and value as the body keeps them, then the results of GROUPS warps, or groups of warps
// that share keys, for HEADS heads: sums[(group * HEADS + h) * STRIDE + d], (maximum, sum of weights) in
// stats[(group * HEADS + h) * 2].
template <class N, class Row, int HEADS_, int GROUPS_>
struct AttentionScratch {
  static constexpr int HEADS = HEADS_, GROUPS = GROUPS_, STRIDE = N::D + 8;
  static constexpr int ROWS = round_up((N::G + 2) * N::D * static_cast<int>(sizeof(Row)), 16);
  static constexpr int BYTES = ROWS + GROUPS * HEADS * (STRIDE + 2) * 4;
};

// The rows of a task, a warp each.
template <class N, class Row, class Ctx>
MPK_DEVICE void attention_rows(Ctx& c, int b, int g, Row* rows) {
  const WarpGroup group;
  const int warp = threadIdx.x / 32;
#pragma unroll 1
  for (int r = warp; r < N::G + (N::APPEND ? 2 : 0); r += static_cast<int>(kConsumerWarps)) {
    const auto store = [&](int d, float v) { rows[r * N::D + d] = narrow<Row>(v); };
    if (r < N::G + (N::ALIKE ? 1 : 0)) {
      N::q_row(c, group, b, N::ALIKE && r == N::G ? g : g * N::G + r, store, r == N::G);
    } else if constexpr (N::APPEND) {
      if constexpr (!N::ALIKE)
        if (r == N::G) {
          N::key_row(c, group, b, g, store);
          continue;
        }
      N::value_row(c, group, b, g, store);
    }
  }
}

// Position of the appended key; a cache that is full is reported.
template <class N, class Ctx>
MPK_DEVICE int attention_position(Ctx& c, int b) {
  if constexpr (N::APPEND) {
    const i64 p = N::position(c, b);
    if (static_cast<u64>(p) < static_cast<u64>(N::S)) return static_cast<int>(p);
    if ((threadIdx.x & 31) == 0) c.fail(kCacheFull, 0, N::S, static_cast<u32>(p));
  }
  return -1;
}

// Run by the control warp when the task's events have come.
template <class N, class Ctx>
MPK_DEVICE void attention_ahead(Ctx& c) {
  const int b = c.arg(0), g = c.arg(1), split = c.arg(2), lane = threadIdx.x & 31;
  const int position = attention_position<N>(c, b);
  const KeyRanges range(N::first(c, b), N::last(c, b), N::S, N::CHUNK, c.arg(3));
  const int begin = range.low + split * range.chunk, end = min(range.high, begin + range.chunk);
  if (lane == 0) {
    c.ready->ahead[0] = position;
    c.ready->ahead[1] = begin;
    c.ready->ahead[2] = end;
    c.ready->ahead[3] = split < range.used;
  }
  constexpr int PER_LINE = 128 / static_cast<int>(sizeof(typename N::Cache)), LINES = (N::D + PER_LINE - 1) / PER_LINE;
  constexpr int FIT = (96 << 10) / (2 * N::D * static_cast<int>(sizeof(typename N::Cache)));
  for (int i = lane; i < min(end - begin, FIT < N::CHUNK ? N::CHUNK : FIT) * LINES; i += 32) {
    const int s = begin + i / LINES, d = i % LINES * PER_LINE;
    ptx::prefetch_l2(N::key_at(c, b, g, s) + d);
    ptx::prefetch_l2(N::value_at(c, b, g, s) + d);
  }
}

// The rows into the cache.
template <class N, class Row, class Ctx>
MPK_DEVICE void attention_append(Ctx& c, int b, int g, int position, const Row* rows) {
  if constexpr (N::APPEND) {
    if (position < 0) return;
    for (int d = threadIdx.x; d < N::D; d += kConsumers) {
      store1(N::new_key_at(c, b, g, position) + d, widen(rows[N::G * N::D + d]));
      store1(N::new_value_at(c, b, g, position) + d, widen(rows[(N::G + 1) * N::D + d]));
    }
  }
}

// Merges the results for heads head0 ... head0 + count and stores them. Call after a barrier, with whole warps. As many
// neighbouring lanes as there are groups have elements of one head, and each of them the scale of one group.
template <class N, class Scratch, class Ctx>
MPK_DEVICE void attention_finish(Ctx& c, const float* sums, const float* stats, int b, int head0, int count, int split, int splits) {
  constexpr int W = Scratch::GROUPS, HEADS = Scratch::HEADS, STRIDE = Scratch::STRIDE, D = N::D;
  static_assert(D % 8 == 0 && (W == 4 || W == 8), "lanes of a head, one a group");
  const int lane = threadIdx.x & 31, mine = lane % W;
#pragma unroll 1
  for (int first = threadIdx.x - lane; first < count * D; first += kConsumers) {
    const int i = min(first + lane, count * D - 1), h = i / D, d = i % D, head = head0 + h;
    const float m = stats[(mine * HEADS + h) * 2], l = stats[(mine * HEADS + h) * 2 + 1];
    float top = m;
#pragma unroll
    for (int bit = 1; bit < W; bit <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, bit));
    const float scale = l != 0.0f ? ptx::exp2_approx((m - top) * kLog2e) : 0.0f;
    float sum = l * scale, out = 0.0f;
#pragma unroll
    for (int bit = 1; bit < W; bit <<= 1) sum += __shfl_xor_sync(~0u, sum, bit);
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const float of = __shfl_sync(~0u, scale, w, W);
      if (of != 0.0f) out = fmaf(sums[(w * HEADS + h) * STRIDE + d], of, out);
    }
    if (first + lane >= count * D) continue;
    if (splits == 1) {
      N::store(c, b, head, d, sum != 0.0f ? out / sum : 0.0f);
    } else {
      const int at = (b * N::H + head) * splits + split;
      N::partial(c.template pointer<float>(c.arg(4)) + at * D + d, out);
      if (d == 0) {
        N::partial(c.template pointer<float>(c.arg(5)) + at * 2, top);
        N::partial(c.template pointer<float>(c.arg(5)) + at * 2 + 1, sum);
      }
    }
  }
}

}  // namespace mpk

#include "mpk/tasks/attention_fma.cuh"
#include "mpk/tasks/attention_mma.cuh"

namespace mpk {

template <class N, bool MMA = N::MMA> struct AttentionBody;
template <class N> struct AttentionBody<N, false> {
  static constexpr int SCRATCH = FmaAttention<N>::SCRATCH;
  template <class Ctx> MPK_DEVICE static void run(Ctx& c) { attention_fma<N>(c); }
};
template <class N> struct AttentionBody<N, true> {
  static constexpr int SCRATCH = MmaAttention<N>::SCRATCH;
  template <class Ctx> MPK_DEVICE static void run(Ctx& c) { attention_mma<N>(c); }
};
template <class N> using AttentionShape = AttentionBody<N>;

template <class N, class Ctx>
MPK_DEVICE void attention(Ctx& c) { AttentionBody<N>::run(c); }

}  // namespace mpk
