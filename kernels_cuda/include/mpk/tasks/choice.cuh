// choice_part: tile = arg[0] a row, arg[1], arg[2] a range of groups of 64 columns. Operands: 0 x, 1 largest of each group.
// choice: tile = arg[0] a row. Operands: 0 x, 1 largest of each group, 2 numbers, 3 key, 4 step, 5 sequences, 6 chosen.
// What is drawn says mpk_dynamo/ops/draw.py; each result here is bit for bit the same.
// N: Value (element type in memory), COLUMNS, ROW_STRIDE and COLUMN_STRIDE (elements), TOP_K, TOP_P, MIN_P.
#pragma once
#include "mpk/tasks/argmax.cuh"

namespace mpk {

constexpr int kGroup = 64;
constexpr u32 kLowest = 0x007fffffu;  // sort key of -inf
constexpr int kWeightBits = 44;

template <class N, class Ctx>
MPK_DEVICE void choice_part(Ctx& c) {
  if (!c.wait()) return;
  constexpr int GROUPS = (N::COLUMNS + kGroup - 1) / kGroup;
  const auto* row = c.template pointer<typename N::Value>(0) + static_cast<i64>(c.arg(0)) * N::ROW_STRIDE;
  float* largest = c.template pointer<float>(1) + static_cast<i64>(c.arg(0)) * GROUPS;
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
  i64 reduce[2 * kConsumerWarps];
  u64 sums[2][kConsumerWarps][3];
  alignas(16) u32 stripe[kConsumers];
  u16 group[GROUPS];
  u32 candidates, groups, bound;
  int drawn;
};
static_assert(sizeof(DrawScratch) <= 12288, "ops/choice.py: SCRATCH");

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
  template <class F> MPK_DEVICE void each(int from, int to, F&& f) const {
    to = min(to, N::COLUMNS);
#pragma unroll 4
    for (int i = from + static_cast<int>(threadIdx.x); i < to; i += kConsumers)
      f(sort_key(load1(row + static_cast<i64>(i) * N::COLUMN_STRIDE), kLowest), i);
  }
};
template <class N>
struct GroupSource {  // the largest of each group
  static constexpr int GROUPS = (N::COLUMNS + kGroup - 1) / kGroup, EACH = (GROUPS + static_cast<int>(kConsumers) - 1) / static_cast<int>(kConsumers);
  u32 key[EACH];
  MPK_DEVICE void load(const float* largest) {
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const int i = j * static_cast<int>(kConsumers) + static_cast<int>(threadIdx.x);
      key[j] = i < GROUPS ? sort_key(largest[i], kLowest) : 0;
    }
  }
  template <class F> MPK_DEVICE void each(int, int, F&& f) const {
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const int i = j * static_cast<int>(kConsumers) + static_cast<int>(threadIdx.x);
      if (i < GROUPS) f(key[j], i);
    }
  }
};
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

// With the row as the source: top-k, then the rest. `total`: the sum of all weights, unless top-k changes it.
template <class N>
MPK_DEVICE int draw_from_row(Sums& sums, const RowSource<N>& row, float top, const double* numbers, u64 uniform, u64 total) {
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

// With the list of candidates, which holds every column that is no smaller than one of them. What is kept, and where a
// running sum ends, follows from comparisons of all with all: a few hundred are cheaper than rounds of sums. `total`
// as above. False when the nucleus may reach beyond the list.
template <class N>
MPK_DEVICE bool draw_from_list(Sums& sums, DrawScratch& s, const double* numbers, u64 uniform, u64 total, int& drawn) {
  constexpr int EACH = DrawScratch::CANDIDATES / static_cast<int>(kConsumers);
  const u32 count = s.candidates, first = threadIdx.x;
  Candidate mine[EACH];
  u64 above[EACH] = {};  // weight of what is larger
  u32 larger[EACH] = {};  // number of larger keys
#pragma unroll
  for (int e = 0; e < EACH; ++e) mine[e] = first + e * kConsumers < count ? s.list[first + e * kConsumers] : Candidate{0, 0};
  if (first / 32 * 32 < count)
#pragma unroll 4
    for (u32 i = 0; i < count; ++i) {
      const Candidate other = s.list[i];
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        if (other.order > mine[e].order) above[e] += other.weight;
        if (other.order >> 32 > mine[e].order >> 32) ++larger[e];
      }
    }
  u64 v[1] = {0};
#pragma unroll
  for (int e = 0; e < EACH; ++e) {
    if (N::TOP_K && larger[e] >= wanted_of(numbers, N::COLUMNS)) mine[e].weight = 0;
    v[0] += mine[e].weight;
  }
  if constexpr (N::TOP_P) {
    sums(v);  // also a barrier: everybody has read the list
    if (N::TOP_K) total = v[0];
    const u64 dropped = total ? dropped_of(numbers, total) : 0;
    if (v[0] < total - dropped) return false;
    v[0] = 0;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      if (above[e] >= total - dropped) mine[e].weight = 0;
      if (N::MIN_P && static_cast<double>(mine[e].weight) < least_weight(numbers)) mine[e].weight = 0;
      v[0] += mine[e].weight;
    }
  } else {
    if constexpr (N::MIN_P) {
      v[0] = 0;
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        if (static_cast<double>(mine[e].weight) < least_weight(numbers)) mine[e].weight = 0;
        v[0] += mine[e].weight;
      }
    }
    ptx::barrier(kBarConsumers, kConsumers);
  }
#pragma unroll
  for (int e = 0; e < EACH; ++e)
    if (first + e * kConsumers < count) s.list[first + e * kConsumers].weight = mine[e].weight;
  sums(v);
  const u64 rest = __umul64hi(uniform, v[0]);
  if (threadIdx.x == 0) s.drawn = 0;
  ptx::barrier(kBarConsumers, kConsumers);
  u64 before[EACH] = {};  // weight of what comes first in the order of indices
  if (first / 32 * 32 < count)
#pragma unroll 4
    for (u32 i = 0; i < count; ++i) {
      const Candidate other = s.list[i];
#pragma unroll
      for (int e = 0; e < EACH; ++e)
        if (static_cast<u32>(other.order) < static_cast<u32>(mine[e].order)) before[e] += other.weight;
    }
#pragma unroll
  for (int e = 0; e < EACH; ++e)
    if (before[e] <= rest && rest - before[e] < mine[e].weight) s.drawn = static_cast<int>(static_cast<u32>(mine[e].order));
  ptx::barrier(kBarConsumers, kConsumers);
  drawn = s.drawn;
  return true;
}

// Columns whose key is at least `bound` into the list; false when there are too many.
template <class N>
MPK_DEVICE bool gather_candidates(DrawScratch& s, const GroupSource<N>& groups, const RowSource<N>& row, u32 bound, float top) {
  if (threadIdx.x == 0) s.candidates = s.groups = 0;
  ptx::barrier(kBarConsumers, kConsumers);
  groups.each(0, 0, [&](u32 key, int i) {
    if (key < bound) return;
    const u32 at = atomicAdd(&s.groups, 1);
    if (at < DrawScratch::GROUPS) s.group[at] = static_cast<u16>(i);
  });
  ptx::barrier(kBarConsumers, kConsumers);
  const u32 found = s.groups;
  if (found > DrawScratch::GROUPS) return false;
#pragma unroll 4
  for (u32 i = threadIdx.x; i < found * kGroup; i += kConsumers) {
    const int column = s.group[i / kGroup] * kGroup + static_cast<int>(i % kGroup);
    if (column >= N::COLUMNS) continue;
    const u32 key = sort_key(load1(row.row + static_cast<i64>(column) * N::COLUMN_STRIDE), kLowest);
    if (key < bound) continue;
    const u32 at = atomicAdd(&s.candidates, 1);
    if (at < DrawScratch::CANDIDATES) s.list[at] = {static_cast<u64>(key) << 32 | static_cast<u32>(column), weight_of(value_of_key(key), top)};
  }
  ptx::barrier(kBarConsumers, kConsumers);
  return s.candidates <= DrawScratch::CANDIDATES;
}

// A key that at least `wanted` columns reach. Of up to kStripes columns: the wanted-th largest of what each thread saw
// as its largest, which is nearly as high as that of all groups and found by comparing all with all.
constexpr u32 kStripes = kConsumers * 3 / 4;

template <class N>
MPK_DEVICE u32 bound_of(Sums& sums, DrawScratch& s, const GroupSource<N>& groups, u32 best, u32 wanted) {
  if (wanted > kStripes) return highest_key<14>(sums, groups, wanted, [](u32, int) { return 1ull; });
  s.stripe[threadIdx.x] = best;
  ptx::barrier(kBarConsumers, kConsumers);
  u32 rank = 0;
#pragma unroll 4
  for (u32 i = 0; i < kConsumers; i += 4) {
    const uint4 other = *reinterpret_cast<const uint4*>(&s.stripe[i]);
    const u32 keys[4] = {other.x, other.y, other.z, other.w};
#pragma unroll
    for (u32 j = 0; j < 4; ++j) rank += keys[j] > best || (keys[j] == best && i + j < threadIdx.x);
  }
  if (rank == wanted - 1) s.bound = best;
  ptx::barrier(kBarConsumers, kConsumers);
  return s.bound;
}

template <class N>
__device__ __noinline__ int draw(const typename N::Value* values, const float* largest, const double* numbers, u64 uniform, char* scratch) {
  DrawScratch& s = *reinterpret_cast<DrawScratch*>(scratch);
  const RowSource<N> row{values};
  GroupSource<N> groups;
  groups.load(largest);
  Sums sums{s};
  u32 best = 0;
  groups.each(0, 0, [&](u32 key, int) { best = max(best, key); });
  const WorkerGroup g(reinterpret_cast<char*>(s.reduce));
  const float top = value_of_key(static_cast<u32>(g.template reduce<MaxCandidate>(static_cast<i64>(best))));
  u64 total = 0;
  if constexpr (!N::TOP_K) {
    u64 v[1] = {0};
    row.each(0, 0x7fffffff, [&](u32 key, int) { v[0] += weight_of(value_of_key(key), top); });
    sums(v);
    total = v[0];
    if (total == 0) return 0;
  }
  if constexpr (N::TOP_K || N::TOP_P) {
    const u64 wanted = N::TOP_K ? wanted_of(numbers, N::COLUMNS) : 256;
    int drawn;
    if (wanted <= DrawScratch::CANDIDATES && gather_candidates<N>(s, groups, row, bound_of<N>(sums, s, groups, best, static_cast<u32>(wanted)), top) &&
        draw_from_list<N>(sums, s, numbers, uniform, total, drawn))
      return drawn;
  }
  return draw_from_row<N>(sums, row, top, numbers, uniform, total);
}

template <class N, class Ctx>
MPK_DEVICE void choice(Ctx& c) {
  constexpr int GROUPS = GroupSource<N>::GROUPS;
  const int row = c.arg(0);
  // ahead of the wait: whoever counts the step does so after this task, which reads the count
  const u64 uniform = uniform64(static_cast<u64>(*c.template pointer<i64>(3)), static_cast<u64>(*c.template pointer<i64>(4)),
                                static_cast<u64>(c.template pointer<i64>(5)[row]));
  if (!c.wait()) return;
  const int chosen = draw<N>(c.template pointer<typename N::Value>(0) + static_cast<i64>(row) * N::ROW_STRIDE,
                             c.template pointer<float>(1) + static_cast<i64>(row) * GROUPS, c.template pointer<double>(2), uniform, c.scratch());
  if (threadIdx.x == 0) c.template pointer<i64>(6)[row] = chosen;
}

}  // namespace mpk
