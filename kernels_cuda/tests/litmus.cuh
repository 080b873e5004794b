// Litmus kernels: the edges of docs/memory_model.md between SMs, each as the kernel makes it and weakened, to see that
// the test can fail. CTAs come in pairs, a writer and a reader on different SMs. `bad` counts what a reader should not
// have seen; a spin that takes too long counts as kStuck of them.
#pragma once
#include "mpk/flag.cuh"

namespace mpk {

constexpr u32 kElements = 1024, kLitmusThreads = 256, kStuck = 1u << 20;

enum Weakened : int { kNone, kRelaxed, kNoBarrier };

MPK_DEVICE bool spin(const u32* counter, u32 wanted, bool acquire, u32* bad) {
  const u64 start = ptx::global_timer();
  while (static_cast<i32>((acquire ? ptx::load_acquire(counter) : ptx::load_relaxed(counter)) - wanted) < 0)
    if (ptx::global_timer() - start > 2000000000ull) {
      atomicAdd(bad, kStuck);
      return false;
    }
  return true;
}

// Message passing by an event: all threads store, one signals; one thread polls, all load. The reader answers likewise,
// and only then is the data overwritten.
template <int WEAK>
MPK_DEVICE void message_by_event(u32* data, u32* counters, u32* bad, u32 rounds) {
  const u32 pair = blockIdx.x / 2, t = threadIdx.x;
  const bool writer = blockIdx.x % 2 == 0;
  u32 *mine = data + pair * kElements, *sent = counters + pair * 64, *seen = sent + 32;
  __shared__ u32 go;
  for (u32 round = 1; round <= rounds; ++round) {
    if (t == 0) go = spin(writer ? seen : sent, writer ? round - 1 : round, writer || WEAK != kRelaxed, bad);
    __syncthreads();
    if (!go) return;
    if (writer) {
      if (WEAK == kNoBarrier && t >= 32) __nanosleep(2000);
      for (u32 i = t; i < kElements; i += kLitmusThreads) mine[i] = round * kElements + i;
      if (WEAK != kNoBarrier) ptx::barrier(1, kLitmusThreads);
      if (t == 0) {
        if (WEAK == kNone) ptx::red_add_release(sent, 1);
        else atomicAdd(sent, 1);
      }
    } else {
      u32 wrong = 0;
      for (u32 i = t; i < kElements; i += kLitmusThreads) {
        u32 v;
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(v) : "l"(mine + i) : "memory");  // an ordinary load
        wrong += v != round * kElements + i;
      }
      if (wrong) atomicAdd(bad, wrong);
      ptx::barrier(1, kLitmusThreads);
      if (t == 0) ptx::red_add_release(seen, 1);
    }
    __syncthreads();
  }
}

// Flagged data: each element is its own flag, and orders nothing else. Weakened: a reader that has seen an element takes
// another one's plain data for published too.
template <bool ORDERS_OTHERS>
MPK_DEVICE void message_by_flag(float* flags, u32* plain, u32* bad, u32 rounds) {
  const u32 pair = blockIdx.x / 2, t = threadIdx.x;
  const bool writer = blockIdx.x % 2 == 0;
  for (u32 round = 0; round < rounds; ++round) {
    const u64 base = (static_cast<u64>(pair) * rounds + round) * kElements;
    for (u32 i = t * 4; i < kElements; i += kLitmusThreads * 4) {
      const float value = static_cast<float>(round * 7 + i);
      if (writer) {
        for (u32 e = 0; e < 4; ++e) {
          plain[base + i + e] = round + 1;
          publish(flags + base + i + e, value + e);
        }
        continue;
      }
      u32 early = 0;
      asm volatile("ld.global.u32 %0, [%1];" : "=r"(early) : "l"(plain + base + i) : "memory");
      FlaggedPack<float, 4> pack;  // one 16-byte load, which may tear between elements
      pack.load(flags + base + i);
      const u64 start = ptx::global_timer();
      while (!pack.poll(flags + base + i))
        if (ptx::global_timer() - start > 2000000000ull) {
          atomicAdd(bad, kStuck);
          return;
        }
      float v[4];
      pack.unpack(v);
      for (u32 e = 0; e < 4; ++e)
        if (v[e] != value + e) atomicAdd(bad, 1);
      if (ORDERS_OTHERS) {
        u32 p;
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(p) : "l"(plain + base + i) : "memory");
        if (p != round + 1) atomicAdd(bad, 1);
      }
    }
  }
}

}  // namespace mpk
