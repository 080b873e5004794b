// The paged shared-memory ring. It lives for the whole launch: the loader fills slots with weights far ahead of the
// consumers, over task and operator boundaries; a slot is released as soon as its last consumer warp has read it.
//
// Every consumer warp passes every slot. (A warp that skipped slots could arrive a revolution early and take the
// parity of two uses ago for its own: mbarriers show one bit of phase.)
//
// Bytes in flight are bounded by `flight` slots, fewer while the worker waits for an event: what the loader has in
// flight is what an event's polls and stores queue behind.
#pragma once
#include "mpk/fault.cuh"

namespace mpk {

constexpr u32 kConsumerWarps = 8;
constexpr u32 kConsumers = kConsumerWarps * 32;
constexpr u32 kLoaderWarp = kConsumerWarps, kControlWarp = kConsumerWarps + 1;
constexpr u32 kTileRows = 8;  // rows that linear_mma takes together; a tiled run begins a slot with each tile

// A warp arrives on an mbarrier by one of its lanes, behind __syncwarp. racecheck does not know that this orders the
// other lanes' accesses; in kernels built for it (tests/gpu/sanitize.py) each lane arrives, and waits, for itself, and
// hints are atomics, so that what it then reports is wrong in either.
#ifdef MPK_EACH_LANE_ARRIVES
constexpr u32 kArrivals = 32;
struct Hint {
  u32 value;
  MPK_DEVICE void operator=(u32 v) { atomicExch(&value, v); }
  MPK_DEVICE operator u32() { return atomicOr(&value, 0); }
};
#else
constexpr u32 kArrivals = 1;
using Hint = volatile u32;
#endif
MPK_DEVICE bool arrives() { return kArrivals == 32 || (threadIdx.x & 31) == 0; }

template <u32 SLOTS, u32 SLOT_BYTES>
struct Ring {
  alignas(128) char slot[SLOTS][SLOT_BYTES];
  u64 full[SLOTS], empty[SLOTS];
  static constexpr u32 BYTES = SLOT_BYTES, FULL = SLOTS * BYTES, EMPTY = FULL + SLOTS * 8;  // where they are
  Hint waiting;  // the consumers have nothing to do but wait for an event

  MPK_DEVICE void init() {
    for (u32 i = 0; i < SLOTS; ++i) {
#if __CUDA_ARCH__ >= 900
      ptx::mbarrier_init(&full[i], 1);
#else
      ptx::mbarrier_init(&full[i], 32);
#endif
      ptx::mbarrier_init(&empty[i], kConsumerWarps * kArrivals);
    }
    waiting = 0;
  }
};

template <class R>
MPK_DEVICE bool wait_barrier(R&, u64* bar, u32 parity, Health& h, u32 kind, u32 slot) {
  Patience patience{kind == kRingRelease ? 2u : 1u};
  bool expired;
  while (!ptx::mbarrier_test(bar, parity)) {
    if (h.ended) return false;
    if (patience.give_up(h, expired)) {
      if (expired) report(h, kind, ~0u, slot, parity, 0);
      return false;
    }
  }
  return true;
}

// A role's position in the ring.
template <u32 SLOTS>
struct Cursor {
  u32 index = 0, phase = 0;
  MPK_DEVICE u32 pack() const { return index | phase << 16; }
  MPK_DEVICE static Cursor unpack(u32 packed) { return {packed & 0xffff, packed >> 16}; }
  MPK_DEVICE void next() {
    if (++index == SLOTS) {
      index = 0;
      phase ^= 1;
    }
  }
};

// Consumer side: `wait` returns the slot's bytes, `release` (one lane per warp counts) hands it back.
template <class R, u32 SLOTS>
struct RingReader {
  R& ring;
  Health& health;
  Cursor<SLOTS> at;
  MPK_DEVICE RingReader(R& r, Health& h, Cursor<SLOTS> c) : ring(r), health(h), at(c) {}
  MPK_DEVICE const char* wait() { return wait(at); }
  MPK_DEVICE const char* bytes() const { return ring.slot[at.index]; }
  // Whether the slot is there, without waiting. The answer takes 0.1 us: ask early.
  MPK_DEVICE bool full() const { return ptx::mbarrier_look(&ring.full[at.index], at.phase); }
  MPK_DEVICE const char* wait(Cursor<SLOTS> which) {  // a slot ahead; the ones before it come first
    while (!ptx::mbarrier_test(&ring.full[which.index], which.phase) && !health.aborted) {}
    return ring.slot[which.index];
  }
  MPK_DEVICE void release(int slots = 1) {
    __syncwarp();
    for (int i = 0; i < slots; ++i, at.next())
      if (arrives()) ptx::mbarrier_arrive(&ring.empty[at.index]);
  }
};

// Loader side.
template <class R, u32 SLOTS>
struct RingWriter {
  R& ring;
  Health& health;
  u32 flight, flight_waiting;
  Cursor<SLOTS> at, landed;
  u32 in_flight = 0;
  u32 waiting = 0;  // read a copy ahead: looking just before the copy cost 13 % of the stream
  ptx::Address base;  // of the ring
  // More slots in flight than the ring has would let `landed` fall a revolution behind: one bit of phase.
  MPK_DEVICE RingWriter(R& r, Health& h, u32 f, u32 fw)
      : ring(r), health(h), flight(max(1u, min(f, SLOTS))), flight_waiting(max(1u, min(fw, SLOTS))),
        base(ptx::opaque(ptx::shared_address(&r))) {}

  // Until a slot is free and another copy may be in flight. AT_ONCE: both barriers are asked before either answer is
  // needed, since an answer takes 0.1 us: 15 % of a step where copies are many and small (tiles), -1 to -3 % where they
  // are not (docs/benchmarks.md).
  template <bool AT_ONCE> MPK_DEVICE bool acquire() {
    const u32 limit = waiting ? flight_waiting : flight;
    const bool free = AT_ONCE && ptx::mbarrier_look(base + R::EMPTY + at.index * 8, at.phase ^ 1);
    const bool oldest = AT_ONCE && ptx::mbarrier_look(base + R::FULL + landed.index * 8, landed.phase);
    if (!free && !wait_barrier(ring, &ring.empty[at.index], at.phase ^ 1, health, kRingRelease, at.index)) return false;
    if (in_flight >= limit && oldest) pass();
    while (in_flight >= limit)
      if (!retire()) return false;
    return true;
  }
  MPK_DEVICE void pass() {
    landed.next();
    --in_flight;
  }
  MPK_DEVICE bool retire() {
    if (!wait_barrier(ring, &ring.full[landed.index], landed.phase, health, kRingFill, landed.index)) return false;
    pass();
    return true;
  }
  MPK_DEVICE ptx::Address slot() const { return base + at.index * R::BYTES; }
  MPK_DEVICE ptx::Address full() const { return base + R::FULL + at.index * 8; }
#if __CUDA_ARCH__ >= 900
  MPK_DEVICE void copy(const char* from, u32 bytes, u64 policy) {
    ptx::mbarrier_expect(full(), bytes);
    ptx::bulk_copy(slot(), from, bytes, full(), policy);
    issued();
  }
#endif
  MPK_DEVICE void issued() {
    at.next();
    ++in_flight;
    waiting = ring.waiting;
  }
  // Copies must have landed before the CTA ends: its shared memory may be another's by then. They always land.
  MPK_DEVICE void drain() {
    while (in_flight) {
      while (!ptx::mbarrier_test(&ring.full[landed.index], landed.phase)) {}
      landed.next();
      --in_flight;
    }
  }
};

// Bases of a run are resolved by the lanes of the loader warp, 32 runs at a time; see loader() in megakernel.cuh.
struct ResolvedRun {
  const char* base[2];
  u32 rows, row_bytes, copy, tiled;
};

#if __CUDA_ARCH__ >= 900
// One thread issues. Its own instructions are on the critical path: nothing here but adds and compares, on registers (a
// word of the run from shared memory takes as long as ten of them).
template <class W>
MPK_DEVICE bool load_run(W& w, const ResolvedRun run, u64 policy) {
  const char *a = run.base[0], *b = run.base[1];
  if (!run.tiled) {
    u32 left = run.rows * run.row_bytes;
    while (left) {
      const u32 n = min(left, run.copy);
      if (!w.template acquire<false>()) return false;
      w.copy(a, n, policy);
      a += n;
      if (b) {
        if (!w.template acquire<false>()) return false;
        w.copy(b, n, policy);
        b += n;
      }
      left -= n;
    }
    return true;
  }
  for (u32 column = 0; column < run.row_bytes; column += run.copy) {
    const u32 n = min(run.copy, run.row_bytes - column);
    const char* from[2] = {a + column, b ? b + column : nullptr};
    for (u32 left = run.rows; left; left -= min(left, kTileRows)) {
#pragma unroll 1
      for (u32 j = 0; j < 2; ++j) {
        const char* at = j ? from[1] : from[0];
        if (!at) break;
        for (u32 rest = min(left, kTileRows); rest;) {
          const u32 m = min(run.tiled, rest);
          if (!w.template acquire<true>()) return false;
          if (n == run.row_bytes) {  // whole rows
            w.copy(at, n * m, policy);
            at += n * m;
          } else {
            ptx::mbarrier_expect(w.full(), n * m);
            ptx::Address to = w.slot();
#pragma unroll 4
            for (u32 i = 0; i < m; ++i, at += run.row_bytes, to += run.copy) ptx::bulk_copy(to, at, n, w.full(), policy);
            w.issued();
          }
          rest -= m;
        }
        if (j) from[1] = at;
        else from[0] = at;
      }
    }
  }
  return true;
}
#else
// Targets without bulk copies: the 32 lanes share a slot's 16-byte asynchronous copies.
template <class W>
MPK_DEVICE bool load_run(W& w, const ResolvedRun& run, u64) {
  const u32 lane = threadIdx.x & 31;
  const u32 bytes = run.tiled ? run.row_bytes : run.rows * run.row_bytes;  // of a row of copies
  const u32 rows = run.tiled ? run.rows : 1, tile = run.tiled ? kTileRows : 1, step = run.tiled ? run.tiled : 1;
  for (u32 column = 0; column < bytes; column += run.copy) {
    const u32 n = min(run.copy, bytes - column);
    for (u32 row = 0; row < rows; row += tile) {
      const u32 last = min(row + tile, rows);
      // without tiles joint weights alternate slot by slot, and so they do here
      for (u32 j = 0; j < 2 && run.base[j]; ++j) {
        for (u32 r = row; r < last; r += step) {
          if (!w.template acquire<false>()) return false;
          const char* from = run.base[j] + static_cast<u64>(r) * run.row_bytes + column;
          char* to = w.ring.slot[w.at.index];
          for (u32 k = r; k < min(r + step, last); ++k, from += run.row_bytes, to += run.copy)
            for (u32 i = lane * 16; i < n; i += 512) ptx::async_copy16(to + i, from + i);
          ptx::async_copy_arrive(&w.ring.full[w.at.index]);
          w.issued();
        }
      }
    }
  }
  return true;
}
#endif

}  // namespace mpk
