// What a race detector for shared memory makes of mbarriers: one warp writes a buffer, another adds it up, round after
// round, handed over as the kernel hands over ring slots and descriptors. All are ordered by the PTX memory model but
// the last two. `wrong` counts the values that the reader should not have seen.
#pragma once
#include "mpk/ptx.cuh"

namespace mpk {

enum Handover : int {
  kNamedBarrier,     // bar.sync both ways
  kEachLaneArrives,  // mbarriers, on which every lane arrives for itself
  kOneLaneArrives,   // mbarriers, on which one lane arrives for its warp, after __syncwarp: descriptors
  kBulkCopy,         // filled by a bulk copy that completes on the mbarrier, released by one lane: ring slots
  kBulkEachLane,     // the same, released by every lane for itself
  kStoresUnordered,  // the writer does not wait until the reader is done
  kBulkUnordered,    // the same with a bulk copy
};

constexpr u32 kHandedWords = 128;

template <int HOW>
MPK_DEVICE void hand_over(const u32* from, u32* wrong, u32 rounds) {
  __shared__ alignas(128) u32 buffer[kHandedWords];
  __shared__ u64 full, empty;
  constexpr bool bulk = HOW == kBulkCopy || HOW == kBulkEachLane || HOW == kBulkUnordered;
  constexpr bool ordered = HOW != kStoresUnordered && HOW != kBulkUnordered;
  constexpr bool each = HOW == kEachLaneArrives || HOW == kBulkEachLane;
  const u32 lane = threadIdx.x & 31;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&full, each && !bulk ? 32 : 1);
    ptx::mbarrier_init(&empty, each ? 32 : 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const auto arrive = [&](u64* bar) {
    if (!each) __syncwarp();
    if (each || lane == 0) ptx::mbarrier_arrive(bar);
  };
  for (u32 round = 0; round < rounds; ++round) {
    if (HOW == kNamedBarrier) {
      if (threadIdx.x < 32)
        for (u32 i = lane; i < kHandedWords; i += 32) buffer[i] = from[round * kHandedWords + i];
      ptx::barrier(1, 64);
    } else if (threadIdx.x < 32) {
      if (ordered) while (!ptx::mbarrier_test(&empty, (round & 1) ^ 1)) {}
      if (bulk) {
        if (lane == 0) {
          ptx::mbarrier_expect(ptx::shared_address(&full), sizeof(buffer));
          ptx::bulk_copy(ptx::shared_address(buffer), from + round * kHandedWords, sizeof(buffer), ptx::shared_address(&full),
                         ptx::policy_evict_first());
        }
      } else {
        for (u32 i = lane; i < kHandedWords; i += 32) buffer[i] = from[round * kHandedWords + i];
        arrive(&full);
      }
      // otherwise a writer that does not wait would be phases ahead, and the reader wait for ever
      if (!ordered) while (!ptx::mbarrier_test(&full, round & 1)) {}
    }
    if (threadIdx.x >= 32) {
      if (HOW != kNamedBarrier && ordered) while (!ptx::mbarrier_test(&full, round & 1)) {}
      for (u32 i = lane; i < kHandedWords; i += 32)
        if (const u32 other = kHandedWords - 1 - i; buffer[other] != round * kHandedWords + other) atomicAdd(wrong, 1);
      if (HOW != kNamedBarrier && ordered) arrive(&empty);
    }
    if (HOW == kNamedBarrier) ptx::barrier(1, 64);
  }
}

}  // namespace mpk
