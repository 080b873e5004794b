// Bounded waits. A wait that runs out writes one fault record to pinned host memory (the first wins) and raises the
// launch's abort flag; every other wait sees the flag and gives up, so that the kernel ends and the context lives.
//
// Consumers only look at `aborted`: a clock and a call in each of their waits would cost registers in every task body.
// The control warp watches them (see control() in megakernel.cuh); what they find wrong themselves they leave in
// `pending`, for it to report.
#pragma once
#include "mpk/ptx.cuh"

namespace mpk {

// Shared by all roles of a worker; in shared memory.
struct Health {
  volatile u32 aborted;
  volatile u32 ended;  // no step follows: all sequences are finished, or the launch is being abandoned
  volatile u32 pending, kind, task, slot, needed, seen;  // a consumer's finding, for the control warp
  volatile u32 streaming;                                // the consumers have their inputs and read the ring
  u32* abort_flag;  // device memory, one per launch stream
  Fault* record;    // pinned host memory
  u64 timeout_ns;
  u32 worker, epoch;
};

enum FaultKind : u32 { kEvent = 0, kRingFill = 1, kRingRelease = 2, kCacheFull = 3, kIndex = 4, kPublish = 5, kStep = 6 };

__device__ __noinline__ void report(Health& h, u32 kind, u32 task, u32 slot, u32 needed, u32 seen) {
  h.aborted = 1;
  ptx::store_relaxed(h.abort_flag, 1);
  if (ptx::compare_swap_system(&h.record->state, 0, 1) == 0) {
    h.record->kind = kind;
    h.record->worker = h.worker;
    h.record->task = task;
    h.record->slot = slot;
    h.record->needed = needed;
    h.record->seen = seen;
    h.record->epoch = h.epoch;
    ptx::store_release_system(&h.record->state, 2);
  }
}

__device__ __noinline__ void report_pending(Health& h) {
  if (!h.pending) return;
  h.pending = 0;
  report(h, h.kind, h.task, h.slot, h.needed, h.seen);
}

// Counts polls; looks at the clock and at the abort flag only now and then. `give_up` when the bound has passed. Waits
// that end when others do have two terms: a slot of the ring, the end of a step. Who waits for the event or the value
// itself knows what is missing, and says so first.
struct Patience {
  u32 terms = 1;
  u32 polls = 0;
  u64 start = 0;
  MPK_DEVICE bool give_up(Health& h, bool& expired) {
    expired = false;
    if (++polls & 1023) return false;
    if (h.aborted) return true;
    if (ptx::load_relaxed(h.abort_flag)) {
      h.aborted = 1;
      return true;
    }
    const u64 now = ptx::global_timer();
    if (start == 0) start = now;
    expired = now - start > terms * h.timeout_ns;
    return expired;
  }
};

}  // namespace mpk
