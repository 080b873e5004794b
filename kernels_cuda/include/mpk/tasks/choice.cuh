// choice_part: tile = arg[0] a row, arg[1], arg[2] a range of groups of 64 columns. Operands: 0 x, 1 largest of each group.
// choice_mass: tile as choice_part, where top-k is off. Operands: 0 x, 1 largest of each group, 2 numbers, 3 mass of each group.
// choice: tile = arg[0] a row. Operands: 0 x, 1 largest of each group, 2 numbers, 3 key, 4 step, 5 sequences, 6 chosen, and
// 7 mass of each group where top-k is off.
// What is drawn says mpk_dynamo/ops/draw.py; each result here is bit for bit the same. A draw is code that one SM runs once
// a step, so that fetching instructions costs more than running them: loops stay rolled, and what is rare is a function.
// N: Value (element type in memory), COLUMNS, ROW_STRIDE and COLUMN_STRIDE (elements), TOP_K, TOP_P, MIN_P.
#pragma once
#include "mpk/tasks/choice_search.cuh"

namespace mpk {

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
