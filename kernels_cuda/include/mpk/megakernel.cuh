// One persistent CTA per SM. Roles: 8 consumer warps run task bodies; the loader warp keeps the ring full; the control
// warp fetches the next task's descriptor while this one runs, resolves its pointers, and polls its events (one poller
// per SM). Queues are computed at compile time and are data.
//
// Control is a task ahead of the consumers. Between them lie mbarriers, one set per Ready: `fetched` (the descriptor is
// there), `come` (so are its events), `done` (the consumers are through with it). All go one way, so that consumers who
// find them complete go on at once: a barrier between both roles took 0.4 us a task.
#pragma once
#include "mpk/flag.cuh"
#include "mpk/ring.cuh"

namespace mpk {

enum Barrier : u32 { kBarConsumers = 1 };

// Clocks of a task's record (Profile): a phase ends where the next clock is taken. Bodies without ring slots take no
// kStreamed, bodies that poll nothing no kInputs.
enum Mark : u32 { kWaits, kReady, kInputs, kStreamed, kComputed, kSignalled };

// A task ready to run: its descriptor with pointers instead of references. In shared memory, two of them, in turn.
struct Ready {
  u64 fetched, come, done;  // mbarriers: control, control, every consumer warp
  void* pointer[MAX_OPERANDS];
  Segment segment[MAX_SEGMENTS];
  u32 signal[MAX_WAITS];
  Task task;
  i32 ahead[4];  // what the body had the control warp find out, see Dispatch::ahead
  u32 stop;  // the launch is being abandoned: written before `come`, one decision for both roles

  MPK_DEVICE void init() {
    ptx::mbarrier_init(&fetched, kArrivals);
    ptx::mbarrier_init(&come, 1);
    ptx::mbarrier_init(&done, kConsumerWarps * kArrivals);
  }
};
MPK_DEVICE u32 parity_of(u32 turn) { return turn >> 1 & 1; }

template <class C>
struct alignas(128) SharedState {
  Ring<C::SLOTS, C::SLOT_BYTES> ring;
  alignas(16) char scratch[C::SCRATCH];
  Ready ready[2];
  ResolvedRun run[32];
  Wait wait[MAX_WAITS];
  u64 begun;  // mbarrier of control: the step before is over everywhere
  volatile u32 step;
  Health health;
  Profile* profile;  // records of tasks, null when off
};

template <class C>
MPK_DEVICE SharedState<C>& shared_state() {
  extern __shared__ __align__(128) char raw[];
  return *reinterpret_cast<SharedState<C>*>(raw);
}

// What a task body sees. A body may be a function of its own (see the generated Dispatch), so that ptxas gives each its
// own registers: inlined side by side large ones spill although none does alone. The ring position travels through.
template <class C>
struct Context {
  static constexpr int SLOTS = static_cast<int>(C::SLOTS);
  using Reader = RingReader<Ring<C::SLOTS, C::SLOT_BYTES>, C::SLOTS>;
  SharedState<C>& shared;
  Reader ring;
  Ready* ready;
  u32 parity;
  MPK_DEVICE Context(u32 turn, u32 position)
      : shared(shared_state<C>()), ring(shared.ring, shared.health, Cursor<C::SLOTS>::unpack(position)),
        ready(&shared.ready[turn & 1]), parity(parity_of(turn)) {}

  template <class T> MPK_DEVICE T* pointer(u32 i) const { return static_cast<T*>(ready->pointer[i]); }
  MPK_DEVICE int arg(u32 i) const { return ready->task.arg[i]; }
  MPK_DEVICE char* scratch() const { return shared.scratch; }
  MPK_DEVICE void barrier() const { ptx::barrier(kBarConsumers, kConsumers); }
  // Every body calls this once: until then only operands that this step does not write may be read. False: the launch
  // is being abandoned, return.
  MPK_DEVICE bool wait() const {
    mark(kWaits);
    if (threadIdx.x == 0) shared.health.streaming = 0;
    barrier();  // the scratch memory is still the previous task's until every warp is here
    while (!ptx::mbarrier_test(&ready->come, parity)) {}
    mark(kReady);
    return !ready->stop;
  }
  // The inputs are here and the ring is being read: the loader may use its whole flight.
  MPK_DEVICE void streaming() const {
    if (threadIdx.x == 0) {
      shared.ring.waiting = 0;
      shared.health.streaming = 1;
    }
    mark(kInputs);
  }
  // Abandon the launch: something the host must hear of. The first finding counts.
  MPK_DEVICE void fail(u32 kind, u32 slot, u32 needed, u32 seen) const {
    Health& h = shared.health;
    if (h.aborted) return;
    h.kind = kind;
    h.task = ready->task.id;
    h.slot = slot;
    h.needed = needed;
    h.seen = seen;
    h.pending = 1;
    h.aborted = 1;
  }
  // Timeline: the clock of this SM, in kernels that are built for it. In others even the branch would be code.
  MPK_DEVICE void mark(Mark phase) const {
    if constexpr (C::PROFILE)
      if (shared.profile && threadIdx.x == 0) shared.profile[ready->task.id].clock[phase] = ptx::clock();
  }
  // The loader may lower its flight: this task needs no more slots.
  MPK_DEVICE void last_slot_consumed() const {
    if (threadIdx.x == 0) shared.ring.waiting = 1;
    mark(kStreamed);
  }
  // An index that comes from data: outside its tensor it is reported and clamped, never followed.
  MPK_DEVICE i64 checked(i64 i, i64 size) const {
    if (static_cast<u64>(i) < static_cast<u64>(size)) return i;
    fail(kIndex, 0, static_cast<u32>(size), static_cast<u32>(i));
    return 0;
  }
};

template <class L>
MPK_DEVICE void* resolve(const L& launch, u64 ref, u32 epoch) {
  if (ref == NO_REF) return nullptr;
  u64 base = (ref & ARENA_REF) ? launch.fixed.arena : launch.pointers[static_cast<u32>(ref >> 40)];
  if ((ref & ARENA_REF) && (ref & FLAGGED_REF) && (epoch & 1)) base += launch.fixed.flagged_bytes;
  return reinterpret_cast<void*>(base + (ref & ((1ull << 40) - 1)));
}

template <class T, class L>
MPK_DEVICE const T* table(const L& launch, u32 which) {
  return reinterpret_cast<const T*>(launch.fixed.tables[which]);
}

template <class C, class L>
MPK_DEVICE void loader(const L& launch, SharedState<C>& s, const Queue& queue) {
  const u32 lane = threadIdx.x & 31;
  RingWriter<decltype(s.ring), C::SLOTS> writer(s.ring, s.health, launch.fixed.flight, launch.fixed.flight_waiting);
  const Run* runs = table<Run>(launch, TABLE_RUNS) + queue.run;
#if __CUDA_ARCH__ >= 900
  const u64 policy = ptx::policy_evict_first();
#else
  const u64 policy = 0;
#endif
  bool fine = true;
  // Past the end of a step as past that of a task: no step writes what is streamed.
  for (u32 step = 0; step < static_cast<u32>(launch.fixed.steps) && fine; ++step) {
    for (u32 first = 0; first < queue.run_count && fine; first += 32) {
      __syncwarp();
      if (first + lane < queue.run_count) {
        const Run r = runs[first + lane];
        s.run[lane] = {{static_cast<const char*>(resolve(launch, r.base0, 0)), static_cast<const char*>(resolve(launch, r.base1, 0))},
                       r.rows, r.row_bytes, r.copy, r.tiled};
      }
      __syncwarp();
      const u32 n = min(32u, queue.run_count - first);
#if __CUDA_ARCH__ >= 900
      if (lane == 0)
        for (u32 i = 0; i < n && fine; ++i) fine = load_run(writer, s.run[i], policy);
      fine = __shfl_sync(~0u, fine, 0);
#else
      for (u32 i = 0; i < n && fine; ++i) fine = load_run(writer, s.run[i], policy);
#endif
    }
  }
#if __CUDA_ARCH__ >= 900
  if (lane == 0) writer.drain();
#else
  writer.drain();
#endif
}

// A task on its way from the tables to a Ready. Tables lie behind the stream of weights: a chain of dependent loads
// (task, then its lists) takes microseconds, longer than a small task. So the lists of the next task and the words of
// the one after it are loaded while this one runs, and are first touched a task later.
struct Fetch {
  u32 word;  // lane i: word i of the Task
  u64 operand;
  Wait wait;
  u32 signal;
  Segment segment;
  MPK_DEVICE u32 get(u32 field) const { return __shfl_sync(~0u, word, field); }
};

template <class L>
MPK_DEVICE u32 fetch_words(const L& launch, u32 index) {
  const u32 lane = threadIdx.x & 31;
  return lane < sizeof(Task) / 4 ? reinterpret_cast<const u32*>(table<Task>(launch, TABLE_TASKS) + index)[lane] : 0;
}

template <class L>
MPK_DEVICE Fetch fetch_lists(const L& launch, u32 word) {
  const u32 lane = threadIdx.x & 31;
  Fetch f{word, NO_REF, {}, 0, {}};
  const u32 operands = f.get(TASK_WORD_OPERANDS) + lane, waits = f.get(TASK_WORD_WAITS) + lane, signals = f.get(TASK_WORD_SIGNALS) + lane;
  const u32 segments = f.get(TASK_WORD_ARG + 6) + lane;
  const i32 segment_count = static_cast<i32>(f.get(TASK_WORD_ARG + 7));
  if (lane < f.get(TASK_WORD_OPERAND_COUNT)) f.operand = table<Operand>(launch, TABLE_OPERANDS)[operands].ref;
  if (lane < f.get(TASK_WORD_WAIT_COUNT)) f.wait = table<Wait>(launch, TABLE_WAITS)[waits];
  if (lane < min(f.get(TASK_WORD_SIGNAL_COUNT), MAX_WAITS)) f.signal = table<Signal>(launch, TABLE_SIGNALS)[signals].slot;
  if (static_cast<i32>(lane) < segment_count) f.segment = table<Segment>(launch, TABLE_SEGMENTS)[segments];
  return f;
}

template <class C, class L>
MPK_DEVICE void unpack(const L& launch, SharedState<C>& s, Ready& ready, const Fetch& f, u32 epoch) {
  const u32 lane = threadIdx.x & 31;
  if (lane < sizeof(Task) / 4) reinterpret_cast<u32*>(&ready.task)[lane] = f.word;
  if (lane < MAX_OPERANDS) ready.pointer[lane] = resolve(launch, f.operand, epoch);
  if (lane < MAX_WAITS) {
    s.wait[lane] = f.wait;
    ready.signal[lane] = f.signal;
  }
  if (lane < MAX_SEGMENTS) ready.segment[lane] = f.segment;
  __syncwarp();
}

// Wait until the consumers are done with a task; end the launch when that takes too long. They do come: each of their
// waits gives up once the launch is abandoned.
template <class C>
MPK_DEVICE void watch(SharedState<C>& s, u32 turn) {
  Ready& ready = s.ready[turn & 1];
  Patience patience;
  bool expired;
  while (!ptx::mbarrier_test(&ready.done, parity_of(turn)))
    if (patience.give_up(s.health, expired) && expired) report(s.health, s.health.streaming ? kRingFill : kPublish, ready.task.id, 0, 1, 0);
  report_pending(s.health);
}

// What hangs may be the task before, that the consumers are at: then it is reported.
template <class C>
MPK_DEVICE bool report_consumers(SharedState<C>& s, u32 turn) {
  Ready& before = s.ready[(turn - 1) & 1];
  if (!turn || ptx::mbarrier_test(&before.done, parity_of(turn - 1))) return false;
  report(s.health, s.health.streaming ? kRingFill : kPublish, before.task.id, 0, 1, 0);
  return true;
}

// Poll the task's events, in their order.
template <class C>
MPK_DEVICE void await_events(SharedState<C>& s, const u32* control, u32 turn) {
  const Ready& ready = s.ready[turn & 1];
  for (u32 w = 0; w < ready.task.wait_count; ++w) {
    const Wait wait = s.wait[w];
    const u32* counter = control + CONTROL_EVENTS + wait.slot * EVENT_STRIDE;
    const u32 needed = (s.health.epoch + 1) * wait.count;  // counters are never reset
    Patience patience;
    bool expired;
    u32 seen;
    while (static_cast<i32>((seen = ptx::load_acquire(counter)) - needed) < 0) {
      if (patience.give_up(s.health, expired)) {
        if (expired && !report_consumers(s, turn)) report(s.health, kEvent, ready.task.id, wait.slot, needed, seen);
        return;
      }
    }
  }
}

// Whether a step of this launch or of one before it was the last. Written when all workers have ended that step, so that
// all workers of a launch find the same at its start, however late one of them comes.
constexpr u32 kOver = 2, kStop = 4;  // words behind `done`; the host writes the second
template <class L>
MPK_DEVICE bool over(const L& launch) {
  const u32* done = reinterpret_cast<const u32*>(launch.fixed.done);
  return done && ptx::load_relaxed(done + kOver);
}

// Wait until every worker is done with the step before, and tell the consumers.
template <class C, class L>
MPK_DEVICE void begin_step(const L& launch, SharedState<C>& s, u32 turn, u32 epoch) {
  const u32* control = reinterpret_cast<const u32*>(launch.fixed.control);
  Patience patience{2};
  bool expired;
  u32 seen;
  while (static_cast<i32>((seen = ptx::load_acquire(control + CONTROL_EPOCH)) - epoch) < 0) {
    if (!patience.give_up(s.health, expired)) continue;
    if (expired && !report_consumers(s, turn)) report(s.health, kStep, ~0u, 0, epoch, seen);
    break;
  }
  report_pending(s.health);
  s.health.epoch = epoch;
  s.step = s.step + 1;
  s.health.ended = s.health.aborted || over(launch);
  ptx::mbarrier_arrive(&s.begun);
}

template <class C, class P, class L>
MPK_DEVICE void control(const L& launch, SharedState<C>& s, const Queue& queue) {
  const u32 lane = threadIdx.x & 31, count = queue.task_count, steps = static_cast<u32>(launch.fixed.steps), start = s.health.epoch;
  const u32* control = reinterpret_cast<const u32*>(launch.fixed.control);
  __syncwarp();  // every lane has read the epoch before the first lane advances it
  if (!count) {
    for (u32 step = 1; step < steps && !s.health.ended; ++step) {
      if (lane == 0) begin_step(launch, s, 0, start + step);
      __syncwarp();
    }
    return;
  }
  Fetch next = fetch_lists(launch, fetch_words(launch, queue.task));
  u32 place = count > 1, turn = 0;  // place in the queue of what is fetched: the first task of the next step follows the last
  u32 after = fetch_words(launch, queue.task + place);
  for (u32 step = 0; step < steps; ++step) {
    for (u32 i = 0; i < count; ++i, ++turn) {
      Ready& ready = s.ready[turn & 1];
      if (turn > 1 && lane == 0) watch(s, turn - 2);
      if (kArrivals > 1 && turn > 1)
        while (!ptx::mbarrier_test(&ready.done, parity_of(turn - 2))) {}
      __syncwarp();
      unpack(launch, s, ready, next, start + step);
      if (arrives()) ptx::mbarrier_arrive(&ready.fetched);
      next = fetch_lists(launch, after);
      if (++place >= count) place = 0;
      after = fetch_words(launch, queue.task + place);
      if (lane == 0) {
        if (step && i == 0) begin_step(launch, s, turn, start + step);
        if (!s.health.ended) await_events(s, control, turn);
      }
      __syncwarp();
      if (!s.health.ended) P::ahead(ready.task.op, turn);  // while the task before this one still runs
      if (lane == 0) {
        report_pending(s.health);
        ready.stop = s.health.aborted;
        ptx::mbarrier_arrive(&ready.come);
      }
      __syncwarp();
      if (ready.stop || s.health.ended) return;
    }
  }
  if (lane == 0)
    for (u32 i = turn < 2 ? 0 : turn - 2; i < turn; ++i) watch(s, i);
}

// A worker is done with a step. The last one opens the next, or ends the launch when the step said so.
template <class L>
MPK_DEVICE void end_step(const L& launch, u32 epoch) {
  u32* control = reinterpret_cast<u32*>(launch.fixed.control);
  if (ptx::atomic_add_acq_rel(control + CONTROL_DONE, 1) + 1 != (epoch + 1) * gridDim.x) return;
  u32* done = reinterpret_cast<u32*>(launch.fixed.done);
  if (done && (ptx::load_relaxed(done) | ptx::load_relaxed(done + kStop))) ptx::store_relaxed(done + kOver, 1);
  ptx::store_release(control + CONTROL_EPOCH, epoch + 1);
}

// Little lives across a task body, whose registers it would cost: what holds for a whole step is in shared memory, and
// stays until the worker has ended the step.
template <class C, class P, class L>
MPK_DEVICE void consume(const L& launch, SharedState<C>& s, u32 count) {
  u32 position = 0, turn = 0, end = count;
  u32* control = reinterpret_cast<u32*>(launch.fixed.control);
  for (;;) {
    // Sentinels into the set of flagged buffers that the next step uses; the end of this one orders them.
    ptx::Vec4* clean = reinterpret_cast<ptx::Vec4*>(launch.fixed.flagged + (s.health.epoch & 1 ? 0 : launch.fixed.flagged_bytes));
    for (u64 i = blockIdx.x * kConsumers + threadIdx.x; i < launch.fixed.flagged_bytes / 16; i += gridDim.x * kConsumers)
      clean[i] = {~0u, ~0u, ~0u, ~0u};
    for (; turn < end; ++turn) {
      Ready& ready = s.ready[turn & 1];
      while (!ptx::mbarrier_test(&ready.fetched, parity_of(turn))) {}
      position = P::run(ready.task.op, turn, position);
      if (ready.stop) return;
      const Context<C> context(turn, position);
      context.mark(kComputed);
      // All consumers' stores, then the signals: the barrier makes them observed by the signalling threads, whose
      // gpu-scope release is cumulative.
      const u32 signals = ready.task.signal_count;
      if (signals) context.barrier();
      for (u32 k = threadIdx.x; k < signals; k += kConsumers) {
        const u32 slot = k < MAX_WAITS ? ready.signal[k] : table<Signal>(launch, TABLE_SIGNALS)[ready.task.signals + k].slot;
        ptx::red_add_release(control + CONTROL_EVENTS + slot * EVENT_STRIDE, 1);
      }
      context.mark(kSignalled);
      __syncwarp();
      if (arrives()) ptx::mbarrier_arrive(&ready.done);
    }
    const u32 step = s.step;
    if (step + 1 == static_cast<u32>(launch.fixed.steps)) return;
    ptx::barrier(kBarConsumers, kConsumers);  // all consumers' stores, then the arrival, as for a signal
    if (threadIdx.x == 0) end_step(launch, s.health.epoch);
    end += table<Queue>(launch, TABLE_QUEUES)[blockIdx.x].task_count;
    while (!ptx::mbarrier_test(&s.begun, step & 1)) {}
    if (s.health.ended) {
      // the loader may be waiting for a slot that nobody will read
      if (arrives()) ptx::mbarrier_arrive(&s.ring.empty[Cursor<C::SLOTS>::unpack(position).index]);
      return;
    }
  }
}

// C: configuration (SLOTS, SLOT_BYTES, SCRATCH; CONSUMER_REGISTERS: that each consumer takes from the others, who keep
// OTHER_REGISTERS; 0: all keep what they have), P: dispatch over task bodies, L: launch parameters.
template <class C, class P, class L>
MPK_DEVICE void megakernel(const L& launch) {
  SharedState<C>& s = shared_state<C>();
  u32* control_block = reinterpret_cast<u32*>(launch.fixed.control);
  int none = 0;  // launched before the host knew that there is no further step
  if (threadIdx.x == 0) {
    s.ring.init();
    for (Ready& ready : s.ready) ready.init();
    ptx::mbarrier_init(&s.begun, 1);
    s.health.aborted = 0;
    none = over(launch);
    s.health.ended = 0;
    s.step = 0;
    s.health.pending = 0;
    s.health.streaming = 0;
    s.health.abort_flag = control_block + CONTROL_ABORT;
    s.health.record = reinterpret_cast<Fault*>(launch.fixed.fault);
    s.health.timeout_ns = launch.fixed.timeout_ns;
    s.health.worker = blockIdx.x;
    s.health.epoch = ptx::load_relaxed(control_block + CONTROL_EPOCH);
    s.profile = reinterpret_cast<Profile*>(launch.fixed.profile);
    if (s.profile) {  // one record per worker comes first: what maps its clock to the device's time
      s.profile[blockIdx.x].clock[0] = ptx::clock();
      s.profile[blockIdx.x].clock[1] = ptx::global_timer();
      s.profile += gridDim.x;
    }
    ptx::fence_mbarrier_init();
  }
  if (__syncthreads_or(none)) return;
  const Queue queue = table<Queue>(launch, TABLE_QUEUES)[blockIdx.x];
  const u32 warp = threadIdx.x / 32;
  if (warp >= kLoaderWarp) {
    if constexpr (C::CONSUMER_REGISTERS != 0) ptx::give_registers<C::OTHER_REGISTERS>();
    if (warp == kLoaderWarp) loader(launch, s, queue);
    else if (warp == kControlWarp) control<C, P>(launch, s, queue);
  } else {
    if constexpr (C::CONSUMER_REGISTERS != 0) ptx::take_registers<C::CONSUMER_REGISTERS>();
    consume<C, P>(launch, s, queue.task_count);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    if (s.profile) {
      Profile& worker = (s.profile - gridDim.x)[blockIdx.x];
      worker.clock[2] = ptx::clock();
      worker.clock[3] = ptx::global_timer();
    }
    if (!s.health.ended) end_step(launch, s.health.epoch);
  }
}

}  // namespace mpk
