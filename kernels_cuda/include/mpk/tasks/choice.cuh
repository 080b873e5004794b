// choice_part: tile = arg[0] a row, arg[1], arg[2] a range of groups of 64 columns. Operands: 0 x, 1 largest of each group.
// choice_mass: tile as choice_part, where top-k is off. Operands: 0 x, 1 largest of each group, 2 numbers, 3 mass of each group.
// choice: tile = arg[0] a row. Operands: 0 x, 1 largest of each group, 2 numbers, 3 key, 4 step, 5 sequences, 6 chosen, and
// 7 mass of each group where top-k is off.
// What is drawn says mpk_dynamo/ops/draw.py; each result here is bit for bit the same. A draw is code that one SM runs once
// a step, so that fetching instructions costs more than running them: loops stay rolled, and what is rare is a function.
// N: Value (element type in memory), COLUMNS, ROW_STRIDE and COLUMN_STRIDE (elements), TOP_K, TOP_P, MIN_P.
#pragma once
#include "mpk/tasks/argmax.cuh"

namespace mpk {

constexpr int kGroup = 64;
constexpr u32 kLowest = 0x007fffffu;  // sort key of -inf
constexpr int kWeightBits = 44;

template <class N> constexpr int kGroups = (N::COLUMNS + kGroup - 1) / kGroup;
template <class N> constexpr int kGroupsEach = (kGroups<N> + static_cast<int>(kConsumers) - 1) / static_cast<int>(kConsumers);

template <class N, class Ctx>
MPK_DEVICE void choice_part(Ctx& c) {
  if (!c.wait()) return;
  const auto* row = c.template pointer<typename N::Value>(0) + static_cast<i64>(c.arg(0)) * N::ROW_STRIDE;
  float* largest = c.template pointer<float>(1) + static_cast<i64>(c.arg(0)) * kGroups<N>;
  const int lane = threadIdx.x & 31, stop = c.arg(2);
#pragma unroll 2
  for (int group = c.arg(1) + static_cast<int>(threadIdx.x / 32); group < stop; group += kConsumerWarps) {
    float best = -infinity();
#pragma unroll
    for (int half = 0; half < kGroup; half += 32) {
      const int i = group * kGroup + half + lane;
      if (i < N::COLUMNS) best = fmaxf(best, load1(row + static_cast<i64>(i) * N::COLUMN_STRIDE));  // passes over NaN
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) best = fmaxf(best, __shfl_xor_sync(~0u, best, d));
    if (lane == 0) largest[group] = best;
  }
}

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

// A key that at least `wanted` columns reach, near the highest one.
template <class N>
__device__ __noinline__ u32 high_bound(DrawScratch& s, const float* largest, u32 wanted) {
  Sums sums{s};
  return highest_key<14>(sums, GroupSource<N>{largest}, wanted, [](u32, int) { return 1ull; });
}
constexpr u32 kStripes = kConsumers * 3 / 4;

// The same from what each thread saw as its largest, which is nearly as high when few are wanted. The thread's number
// takes the place of the last bits, so that no two are equal. Counters of the list are cleared on the way.
MPK_DEVICE u32 bound_of_stripes(DrawScratch& s, u32 best, u32 wanted) {
  const u32 mine = (best & ~(kConsumers - 1)) | threadIdx.x;
  s.stripe[threadIdx.x] = mine;
  ptx::barrier(kBarConsumers, kConsumers);
  u32 rank = 0;
#pragma unroll 4
  for (u32 i = 0; i < kConsumers; i += 4) {
    const uint4 other = *reinterpret_cast<const uint4*>(&s.stripe[i]);
    rank += (other.x > mine) + (other.y > mine) + (other.z > mine) + (other.w > mine);
  }
  if (rank == wanted - 1) s.bound = mine & ~(kConsumers - 1);
  ptx::barrier(kBarConsumers, kConsumers);
  return s.bound;
}

// Columns whose key is at least `bound` into the list; false when there are too many.
template <class N>
MPK_DEVICE bool gather_candidates(DrawScratch& s, const u32 (&key)[kGroupsEach<N>], const RowSource<N>& row, u32 bound, float top) {
#pragma unroll
  for (int j = 0; j < kGroupsEach<N>; ++j) {
    const u32 i = j * kConsumers + threadIdx.x;
    if (i >= kGroups<N> || key[j] < bound) continue;
    const u32 at = atomicAdd(&s.groups, 1);
    if (at < DrawScratch::GROUPS) s.group[at] = static_cast<u16>(i);
  }
  ptx::barrier(kBarConsumers, kConsumers);
  const u32 found = s.groups;
  if (found > DrawScratch::GROUPS) return false;
  constexpr u32 BATCH = 8;  // loads under way together
#pragma unroll 1
  for (u32 first = threadIdx.x; first < found * kGroup; first += BATCH * kConsumers) {
    u32 k[BATCH];
    int column[BATCH];
#pragma unroll
    for (u32 b = 0; b < BATCH; ++b) {
      const u32 i = first + b * kConsumers;
      column[b] = i < found * kGroup ? s.group[i / kGroup] * kGroup + static_cast<int>(i % kGroup) : N::COLUMNS;
      k[b] = column[b] < N::COLUMNS ? row.key(column[b]) : 0;
    }
#pragma unroll
    for (u32 b = 0; b < BATCH; ++b) {
      if (column[b] >= N::COLUMNS || k[b] < bound) continue;
      const u32 at = atomicAdd(&s.candidates, 1);
      if (at < DrawScratch::CANDIDATES) s.list[at].order = static_cast<u64>(k[b]) << 32 | static_cast<u32>(column[b]);
    }
  }
  ptx::barrier(kBarConsumers, kConsumers);
  if (s.candidates > DrawScratch::CANDIDATES) return false;
#pragma unroll 1
  for (u32 e = threadIdx.x; e < s.candidates; e += kConsumers)
    s.list[e].weight = weight_of(value_of_key(static_cast<u32>(s.list[e].order >> 32)), top);
  ptx::barrier(kBarConsumers, kConsumers);
  return true;
}

// From the list, which holds every column that is no smaller than one of it. What is kept, and where a running sum ends,
// follows from comparisons of all with all: a few hundred are cheaper than rounds of sums. `total`: the sum of all
// weights, unless top-k changes it. -1 when the nucleus may reach beyond the list.
template <class N>
MPK_DEVICE int draw_from_list(DrawScratch& s, const double* numbers, u64 uniform, u64 total) {
  Sums sums{s};
  const u32 count = s.candidates;
  const u64 wanted = N::TOP_K ? wanted_of(numbers, N::COLUMNS) : 0;
  u64 v[1] = {0};
#pragma unroll 1
  for (u32 e = threadIdx.x; e < count; e += kConsumers) {
    const Candidate mine = s.list[e];
    u64 above = 0;
    u32 larger = 0;
#pragma unroll 4
    for (u32 i = 0; i < count; ++i) {
      const Candidate other = s.list[i];
      if (other.order > mine.order) above += other.weight;
      if (other.order >> 32 > mine.order >> 32) ++larger;
    }
    const bool kept = !N::TOP_K || larger < wanted;
    s.above[e] = kept ? above : ~0ull;
    if (kept) v[0] += mine.weight;
  }
  sums(v);
  if (N::TOP_K) total = v[0];
  u64 dropped = 0;
  if constexpr (N::TOP_P) {
    dropped = total ? dropped_of(numbers, total) : 0;
    if (v[0] < total - dropped) return -1;
  }
  v[0] = 0;
#pragma unroll 1
  for (u32 e = threadIdx.x; e < count; e += kConsumers) {
    u64 weight = s.list[e].weight;
    if (s.above[e] >= total - dropped) weight = 0;
    if (N::MIN_P && static_cast<double>(weight) < least_weight(numbers)) weight = 0;
    s.list[e].weight = weight;
    v[0] += weight;
  }
  sums(v);
  const u64 rest = __umul64hi(uniform, v[0]);
#pragma unroll 1
  for (u32 e = threadIdx.x; e < count; e += kConsumers) {
    const Candidate mine = s.list[e];
    u64 before = 0;
#pragma unroll 4
    for (u32 i = 0; i < count; ++i) {
      const Candidate other = s.list[i];
      if (static_cast<u32>(other.order) < static_cast<u32>(mine.order)) before += other.weight;
    }
    if (before <= rest && rest - before < mine.weight) s.drawn = static_cast<int>(static_cast<u32>(mine.order));
  }
  ptx::barrier(kBarConsumers, kConsumers);
  return s.drawn;
}

// Without top-k and top-p, the mass of each group says which one holds what is drawn.
template <class N>
MPK_DEVICE bool kept_by_min_p(const double* numbers, u64 weight) {
  return !N::MIN_P || static_cast<double>(weight) >= least_weight(numbers);
}
template <class N>
MPK_DEVICE int draw_from_groups(DrawScratch& s, const RowSource<N>& row, float top, const u64* mass, const double* numbers, u64 uniform) {
  constexpr int EACH = kGroupsEach<N>;
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, first = static_cast<int>(threadIdx.x) * EACH;
  u64 m[EACH], own = 0;
#pragma unroll
  for (int j = 0; j < EACH; ++j) own += m[j] = first + j < kGroups<N> ? mass[first + j] : 0;
  const auto before_in_warp = [&](u64 v) {
    u64 sum = v;
#pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
      const u64 other = __shfl_up_sync(~0u, sum, d);
      if (lane >= d) sum += other;
    }
    return sum - v;
  };
  u64 before = before_in_warp(own), total = 0;
  if (lane == 31) s.sums[0][warp][0] = before + own;
  ptx::barrier(kBarConsumers, kConsumers);
#pragma unroll
  for (int w = 0; w < static_cast<int>(kConsumerWarps); ++w) {
    if (w == warp) before += total;
    total += s.sums[0][w][0];
  }
  const u64 rest = __umul64hi(uniform, total);
  if (before <= rest && rest - before < own) {
    int at = 0;
#pragma unroll
    for (int j = 0; j < EACH - 1; ++j)
      if (at == j && rest - before >= m[j]) {
        before += m[j];
        ++at;
      }
    s.groups = first + at;
    s.rest = rest - before;
  }
  ptx::barrier(kBarConsumers, kConsumers);
  if (total && warp == 0) {
    const int column = static_cast<int>(s.groups) * kGroup + 2 * lane;
    u64 w[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      w[j] = column + j < N::COLUMNS ? weight_of(value_of_key(row.key(column + j)), top) : 0;
      if (!kept_by_min_p<N>(numbers, w[j])) w[j] = 0;
    }
    const u64 left = before_in_warp(w[0] + w[1]);
    if (left <= s.rest && s.rest - left < w[0] + w[1]) s.drawn = column + (s.rest - left >= w[0]);
  }
  ptx::barrier(kBarConsumers, kConsumers);
  return s.drawn;
}

template <class N, class Ctx>
MPK_DEVICE void choice_mass(Ctx& c) {
  if (!c.wait()) return;
  DrawScratch& s = *reinterpret_cast<DrawScratch*>(c.scratch());
  const RowSource<N> row{c.template pointer<typename N::Value>(0) + static_cast<i64>(c.arg(0)) * N::ROW_STRIDE};
  u64* mass = c.template pointer<u64>(3) + static_cast<i64>(c.arg(0)) * kGroups<N>;
  u32 key[kGroupsEach<N>];
  load_largest<N>(c.template pointer<float>(1) + static_cast<i64>(c.arg(0)) * kGroups<N>, key);
  post_largest(s, best_of(key));
  ptx::barrier(kBarConsumers, kConsumers);
  const float top = largest_posted(s);
  const int lane = threadIdx.x & 31, stop = c.arg(2);
#pragma unroll 1
  for (int group = c.arg(1) + static_cast<int>(threadIdx.x / 32); group < stop; group += kConsumerWarps) {
    u64 sum = 0;
#pragma unroll
    for (int half = 0; half < kGroup; half += 32) {
      const int i = group * kGroup + half + lane;
      const u64 w = i < N::COLUMNS ? weight_of(value_of_key(row.key(i)), top) : 0;
      if (N::TOP_P || kept_by_min_p<N>(c.template pointer<double>(2), w)) sum += w;
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
    if (lane == 0) mass[group] = sum;
  }
}

template <class N, class Ctx>
MPK_DEVICE void choice(Ctx& c) {
  const int row_index = c.arg(0);
  // ahead of the wait: whoever counts the step does so after this task, which reads the count
  const u64 uniform = uniform64(static_cast<u64>(*c.template pointer<i64>(3)), static_cast<u64>(*c.template pointer<i64>(4)),
                                static_cast<u64>(c.template pointer<i64>(5)[row_index]));
  if (!c.wait()) return;
  DrawScratch& s = *reinterpret_cast<DrawScratch*>(c.scratch());
  const RowSource<N> row{c.template pointer<typename N::Value>(0) + static_cast<i64>(row_index) * N::ROW_STRIDE};
  const float* largest = c.template pointer<float>(1) + static_cast<i64>(row_index) * kGroups<N>;
  const double* numbers = c.template pointer<double>(2);
  const u64* mass = N::TOP_K ? nullptr : c.template pointer<u64>(7) + static_cast<i64>(row_index) * kGroups<N>;
  u32 key[kGroupsEach<N>];
  load_largest<N>(largest, key);
  const u32 best = best_of(key);
  post_largest(s, best);
  if (threadIdx.x == 0) s.candidates = s.groups = s.drawn = 0;
  int drawn = -1;
  if constexpr (N::TOP_K || N::TOP_P) {
    const u64 wanted = N::TOP_K ? wanted_of(numbers, N::COLUMNS) : kConsumers / 2;
    u64 v[1] = {0};
    if constexpr (!N::TOP_K) {
#pragma unroll
      for (int j = 0; j < kGroupsEach<N>; ++j) {
        const int i = j * static_cast<int>(kConsumers) + static_cast<int>(threadIdx.x);
        if (i < kGroups<N>) v[0] += mass[i];
      }
      Sums sums{s};
      sums(v);
    }
    if (wanted <= DrawScratch::CANDIDATES) {
      const u32 bound = wanted <= kStripes ? bound_of_stripes(s, best, static_cast<u32>(wanted)) : high_bound<N>(s, largest, static_cast<u32>(wanted));
      if (gather_candidates<N>(s, key, row, bound, largest_posted(s))) drawn = draw_from_list<N>(s, numbers, uniform, v[0]);
    }
    c.barrier();
    if (drawn < 0) drawn = draw_from_row<N>(s, row.row, largest_posted(s), numbers, uniform, v[0]);
  } else {
    c.barrier();
    drawn = draw_from_groups<N>(s, row, largest_posted(s), mass, numbers, uniform);
  }
  if (threadIdx.x == 0) c.template pointer<i64>(6)[row_index] = drawn;
}

}  // namespace mpk
