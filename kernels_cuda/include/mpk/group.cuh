// Cooperating threads of the consumers, and reductions over them in a fixed order (bit-identical from run to run).
#pragma once
#include "mpk/megakernel.cuh"

namespace mpk {

struct Sum {
  MPK_DEVICE static float identity() { return 0.0f; }
  MPK_DEVICE static float apply(float a, float b) { return a + b; }
};
struct Max {
  MPK_DEVICE static float identity() { return -infinity(); }
  MPK_DEVICE static float apply(float a, float b) { return ptx::max_nan(a, b); }
};
struct Min {
  MPK_DEVICE static float identity() { return infinity(); }
  MPK_DEVICE static float apply(float a, float b) { return ptx::min_nan(a, b); }
};
// The same over integers (live key ranges and the like).
struct SumInt {
  MPK_DEVICE static i64 identity() { return 0; }
  MPK_DEVICE static i64 apply(i64 a, i64 b) { return static_cast<i64>(static_cast<u64>(a) + static_cast<u64>(b)); }
};
struct MaxInt {
  MPK_DEVICE static i64 identity() { return ~0x7fffffffffffffffll; }
  MPK_DEVICE static i64 apply(i64 a, i64 b) { return a < b ? b : a; }
};
struct MinInt {
  MPK_DEVICE static i64 identity() { return 0x7fffffffffffffffll; }
  MPK_DEVICE static i64 apply(i64 a, i64 b) { return a > b ? b : a; }
};

template <class O, class V>
MPK_DEVICE V warp_reduce(V v) {
#pragma unroll
  for (int d = 16; d; d >>= 1) v = O::apply(v, __shfl_xor_sync(~0u, v, d));
  return v;
}

// One warp; every lane gets the result.
struct WarpGroup {
  static constexpr int SIZE = 32;
  int rank;
  MPK_DEVICE WarpGroup() : rank(threadIdx.x & 31) {}
  template <class O, class V> MPK_DEVICE V reduce(V v) const { return warp_reduce<O>(v); }
};

// WARPS neighbouring consumer warps, aligned to WARPS; `buffer` holds 2 x kConsumerWarps values of 8 bytes.
// Every consumer warp must call reduce, also those outside a whole group.
template <int WARPS>
struct WarpsGroup {
  static constexpr int SIZE = WARPS * 32;
  int rank;
  i64* buffer;
  mutable u32 turn = 0;
  MPK_DEVICE explicit WarpsGroup(char* scratch) : rank(threadIdx.x % (WARPS * 32)), buffer(reinterpret_cast<i64*>(scratch)) {}
  template <class O, class V> MPK_DEVICE V reduce(V v) const {
    v = warp_reduce<O>(v);
    if constexpr (WARPS > 1) {
      V* slots = reinterpret_cast<V*>(buffer + (turn & 1) * kConsumerWarps);
      ++turn;  // two buffers: the next reduction may start before every warp has read this one
      const u32 warp = threadIdx.x / 32;
      if ((threadIdx.x & 31) == 0) slots[warp] = v;
      ptx::barrier(kBarConsumers, kConsumers);
      const u32 first = min(warp / WARPS * WARPS, kConsumerWarps - WARPS);
      v = slots[first];
#pragma unroll
      for (int i = 1; i < WARPS; ++i) v = O::apply(v, slots[first + i]);
    }
    return v;
  }
};
using WorkerGroup = WarpsGroup<kConsumerWarps>;

}  // namespace mpk
