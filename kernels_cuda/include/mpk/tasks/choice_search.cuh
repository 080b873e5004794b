// What a draw is made of: weights, random numbers, sums over all consumers, and the search of a whole row in rounds, which
// draws from any row. choice.cuh says what is drawn and has the quicker ways.
#pragma once
#include "mpk/tasks/argmax.cuh"

namespace mpk {

constexpr int kGroup = 64;
constexpr u32 kLowest = 0x007fffffu;  // sort key of -inf
constexpr int kWeightBits = 44;

template <class N> constexpr int kGroups = (N::COLUMNS + kGroup - 1) / kGroup;
template <class N> constexpr int kGroupsEach = (kGroups<N> + static_cast<int>(kConsumers) - 1) / static_cast<int>(kConsumers);

// 2^44 exp(x - top), each step rounded by itself as on the host.
MPK_DEVICE u64 weight_of(float x, float top) {
  const float t = __fmul_rn(__fsub_rn(x, top), 1.4426950408889634f);
  const float whole = floorf(__fadd_rn(t, 0.5f));
  if (!(whole >= -static_cast<float>(kWeightBits))) return 0;
  const float f = __fsub_rn(t, whole);
  float v = 0.00015403530393381608f;
  v = __fadd_rn(__fmul_rn(v, f), 0.0013333558146428441f);
  v = __fadd_rn(__fmul_rn(v, f), 0.009618129107628477f);
  v = __fadd_rn(__fmul_rn(v, f), 0.05550410866482158f);
  v = __fadd_rn(__fmul_rn(v, f), 0.2402265069591007f);
  v = __fadd_rn(__fmul_rn(v, f), 0.6931471805599453f);
  v = __fadd_rn(__fmul_rn(v, f), 1.0f);
  const u64 mantissa = static_cast<u64>(__fmul_rn(v, 16777216.0f));
  const int shift = static_cast<int>(whole) + kWeightBits - 24;
  return shift >= 0 ? mantissa << shift : mantissa >> -shift;
}

// Philox4x32-10, the first two words.
MPK_DEVICE u64 uniform64(u64 key, u64 step, u64 sequence) {
  u32 c0 = static_cast<u32>(step), c1 = static_cast<u32>(step >> 32);
  u32 c2 = static_cast<u32>(sequence), c3 = static_cast<u32>(sequence >> 32);
  u32 k0 = static_cast<u32>(key), k1 = static_cast<u32>(key >> 32);
#pragma unroll 1
  for (int round = 0; round < 10; ++round) {
    const u64 a = static_cast<u64>(0xD2511F53u) * c0, b = static_cast<u64>(0xCD9E8D57u) * c2;
    c0 = static_cast<u32>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<u32>(b);
    c2 = static_cast<u32>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<u32>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<u64>(c1) << 32 | c0;
}

// A column that may be drawn: its sort key above its index, and its weight.
struct alignas(16) Candidate {
  u64 order, weight;
};

// Shared memory of one draw.
struct DrawScratch {
  static constexpr int CANDIDATES = 512, GROUPS = 1024;
  Candidate list[CANDIDATES];
  union {
    struct {
      u32 stripe[kConsumers];
      u16 group[GROUPS];
    };
    u64 above[CANDIDATES];  // weight of what is larger, of each candidate
  };
  i64 reduce[2 * kConsumerWarps];
  u64 sums[2][kConsumerWarps][3];
  u64 rest;
  u32 largest[kConsumerWarps];
  u32 candidates, groups, bound;
  int drawn;
};
static_assert(sizeof(DrawScratch) <= 13312, "ops/choice.py: SCRATCH");

// Sums of up to three integers over all consumers.
struct Sums {
  DrawScratch& s;
  u32 turn = 0;
  template <int J> MPK_DEVICE void operator()(u64 (&v)[J]) {
#pragma unroll
    for (int d = 16; d; d >>= 1)
#pragma unroll
      for (int j = 0; j < J; ++j) v[j] += __shfl_xor_sync(~0u, v[j], d);
    auto& slots = s.sums[turn & 1];  // two buffers: the next sum may start before every warp has read this one
    ++turn;
    if ((threadIdx.x & 31) == 0)
#pragma unroll
      for (int j = 0; j < J; ++j) slots[threadIdx.x / 32][j] = v[j];
    ptx::barrier(kBarConsumers, kConsumers);
#pragma unroll
    for (int j = 0; j < J; ++j) {
      v[j] = slots[0][j];
#pragma unroll
      for (u32 w = 1; w < kConsumerWarps; ++w) v[j] += slots[w][j];
    }
  }
};

// A source calls f(key, index) for its elements with indices in [from, to), shared out over the consumers.
template <class N>
struct RowSource {
  const typename N::Value* row;
  MPK_DEVICE u32 key(int i) const { return sort_key(load1(row + static_cast<i64>(i) * N::COLUMN_STRIDE), kLowest); }
  template <class F> MPK_DEVICE void each(int from, int to, F&& f) const {
    to = min(to, N::COLUMNS);
#pragma unroll 8
    for (int i = from + static_cast<int>(threadIdx.x); i < to; i += kConsumers) f(key(i), i);
  }
};
template <class N>
struct GroupSource {  // the largest of each group
  const float* largest;
  template <class F> MPK_DEVICE void each(int, int, F&& f) const {
#pragma unroll 4
    for (int i = static_cast<int>(threadIdx.x); i < kGroups<N>; i += kConsumers) f(sort_key(largest[i], kLowest), i);
  }
};

// This thread's keys of `largest`; 0 past the end.
template <class N>
MPK_DEVICE void load_largest(const float* largest, u32 (&key)[kGroupsEach<N>]) {
#pragma unroll
  for (int j = 0; j < kGroupsEach<N>; ++j) {
    const int i = j * static_cast<int>(kConsumers) + static_cast<int>(threadIdx.x);
    key[j] = i < kGroups<N> ? sort_key(largest[i], kLowest) : 0;
  }
}
template <int EACH>
MPK_DEVICE u32 best_of(const u32 (&key)[EACH]) {
  u32 best = 0;
#pragma unroll
  for (int j = 0; j < EACH; ++j) best = max(best, key[j]);
  return best;
}
// The largest value of the row. `best`: largest key of this thread.
MPK_DEVICE void post_largest(DrawScratch& s, u32 best) {
  best = __reduce_max_sync(~0u, best);
  if ((threadIdx.x & 31) == 0) s.largest[threadIdx.x / 32] = best;
}
MPK_DEVICE float largest_posted(const DrawScratch& s) { return value_of_key(best_of(s.largest)); }

// The largest t, a multiple of 1 << LOW, such that the measures of the elements with key >= t add up to `need`, two bits
// at a time; 0 when all together do not.
template <int LOW, class S, class F>
MPK_DEVICE u32 highest_key(Sums& sums, const S& source, u64 need, F&& measure) {
  u32 found = 0;
#pragma unroll 1
  for (int shift = 30; shift >= LOW; shift -= 2) {
    u64 v[3] = {0, 0, 0};
    const u32 step = 1u << shift;
    source.each(0, 0x7fffffff, [&](u32 key, int i) {
      if (key < found + step) return;
      const u64 m = measure(key, i);
      v[0] += m;
      if (key >= found + 2 * step) v[1] += m;
      if (key >= found + 3 * step) v[2] += m;
    });
    sums(v);
    found += v[2] >= need ? 3 * step : v[1] >= need ? 2 * step : v[0] >= need ? step : 0;
  }
  return found;
}

// The smallest index such that the measures of the elements up to and with it add up to more than `rest`.
template <int COLUMNS, class S, class F>
MPK_DEVICE int first_index_beyond(Sums& sums, const S& source, u64 rest, F&& measure) {
  int shift = 0;
  while ((1 << shift) < COLUMNS) shift += 2;
  int found = 0;
  while (shift > 0) {
    shift -= 2;
    const int step = 1 << shift;
    u64 v[3] = {0, 0, 0};
    source.each(found, found + 3 * step, [&](u32 key, int i) {
      const u64 m = measure(key, i);
      v[2] += m;
      if (i < found + 2 * step) v[1] += m;
      if (i < found + step) v[0] += m;
    });
    sums(v);
    const int skipped = v[2] <= rest ? 3 : v[1] <= rest ? 2 : v[0] <= rest ? 1 : 0;
    rest -= skipped == 3 ? v[2] : skipped == 2 ? v[1] : skipped ? v[0] : 0;
    found += skipped * step;
  }
  return found;
}

// What is kept: key at least `key`, of equal ones indices of at least `index`, and a weight of at least `weight`.
struct Kept {
  u32 key;
  int index;
  double weight;
};

// What top-p may drop of the weights that are left, from the smallest.
MPK_DEVICE u64 dropped_of(const double* numbers, u64 total) {
  const double share = __dsub_rn(1.0, numbers[2]);
  if (!(share > 0.0)) return 0;
  const u64 dropped = static_cast<u64>(__dmul_rn(share < 1.0 ? share : 1.0, static_cast<double>(total)));
  return dropped > total - 1 ? total - 1 : dropped;
}
MPK_DEVICE u64 wanted_of(const double* numbers, int columns) {
  const double wanted = numbers[1];
  return !(wanted >= 1.0) ? 1 : wanted < columns ? static_cast<u64>(wanted) : columns;
}
MPK_DEVICE double least_weight(const double* numbers) { return __dmul_rn(numbers[3], static_cast<double>(1ull << kWeightBits)); }

template <class N, class S>
MPK_DEVICE Kept filter(Sums& sums, const S& source, float top, const double* numbers, u32 key, u64 total) {
  Kept kept{key, 0, 0.0};
  if constexpr (N::TOP_P) {
    const u64 dropped = dropped_of(numbers, total);
    const auto mass = [&](u32 k, int) { return k >= key ? weight_of(value_of_key(k), top) : 0; };
    const u32 cut = highest_key<0>(sums, source, total - dropped, mass);
    u64 v[3] = {0, 0, 0};
    source.each(0, 0x7fffffff, [&](u32 k, int i) {
      if (k >= cut) v[0] += mass(k, i);
    });
    sums(v);
    const u64 below = total - v[0];
    kept.key = cut;
    kept.index = first_index_beyond<N::COLUMNS>(sums, source, dropped - below, [&](u32 k, int i) { return k == cut ? mass(k, i) : 0; });
  }
  if constexpr (N::MIN_P) kept.weight = least_weight(numbers);
  return kept;
}

template <class N, class S>
MPK_DEVICE int draw_kept(Sums& sums, const S& source, float top, const Kept& kept, u64 uniform) {
  const auto mass = [&](u32 k, int i) -> u64 {
    if (k < kept.key || (k == kept.key && i < kept.index)) return 0;
    const u64 w = weight_of(value_of_key(k), top);
    if constexpr (N::MIN_P) return static_cast<double>(w) >= kept.weight ? w : 0;
    return w;
  };
  u64 v[3] = {0, 0, 0};
  source.each(0, 0x7fffffff, [&](u32 k, int i) { v[0] += mass(k, i); });
  sums(v);
  if (v[0] == 0) return 0;
  return first_index_beyond<N::COLUMNS>(sums, source, __umul64hi(uniform, v[0]), mass);
}

// Any row, by searching it in rounds. `total`: the sum of all weights, unless top-k changes it.
template <class N>
__device__ __noinline__ int draw_from_row(DrawScratch& s, const typename N::Value* values, float top, const double* numbers, u64 uniform, u64 total) {
  Sums sums{s};
  const RowSource<N> row{values};
  u32 key = 0;
  if constexpr (N::TOP_K) {
    key = highest_key<0>(sums, row, wanted_of(numbers, N::COLUMNS), [](u32, int) { return 1ull; });
    u64 v[1] = {0};
    row.each(0, 0x7fffffff, [&](u32 x, int) { if (x >= key) v[0] += weight_of(value_of_key(x), top); });
    sums(v);
    total = v[0];
  }
  if (N::TOP_P && total == 0) return 0;
  return draw_kept<N>(sums, row, top, filter<N>(sums, row, top, numbers, key, total), uniform);
}

}  // namespace mpk
