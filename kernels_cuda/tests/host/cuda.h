// CUDA C++ on the host, as far as the kernel uses it: so that the very text that goes to a GPU also runs without one.
//
// A CTA is an OS thread; its CUDA threads are fibers that take turns, in random order of the warps. A fiber gives up its
// turn where a CUDA thread would wait: at barriers, in collectives of a warp, and at each poll. Bulk copies land later,
// in any order, so that nobody may read a slot whose barrier does not show it.
//
// What it cannot show: weaker memory than the host's, proxies, and anything about time.
#pragma once
#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <type_traits>
#include <vector>

namespace host {

constexpr size_t kStack = 128 << 10, kShared = 232448;
struct Dim { unsigned x, y, z; };
struct Meeting { unsigned arrived = 0, generation = 0; };
struct Copy { char* to; const char* from; unsigned bytes; unsigned long long* bar; };

struct Fiber {
  Dim tid;
  ucontext_t start;
  jmp_buf at;
  bool started = false, done = false;
  std::unique_ptr<char[]> stack;
};

struct Warp {
  Meeting meeting;
  unsigned long long value[32];
  unsigned fragment[32][6];
};

struct Cta {
  Dim block;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Meeting named[16];
  unsigned either[2] = {0, 0};
  std::vector<Copy> copies;
  std::mt19937 random;
  std::function<void()> kernel;
  Fiber* current = nullptr;
  unsigned place = 0, alive = 0, polls = 0;
  jmp_buf back;
};

inline thread_local Cta* cta = nullptr;
inline Dim grid;

// An mbarrier in its 64 bits: phase, arrivals of a phase, arrivals and bytes that are still to come.
struct Mbarrier { int bytes; unsigned pending : 15, expected : 15, phase : 2; };
static_assert(sizeof(Mbarrier) == 8);
inline Mbarrier& mbarrier(unsigned long long* bar) { return *reinterpret_cast<Mbarrier*>(bar); }
inline void complete(Mbarrier& m) {
  if (m.pending || m.bytes) return;
  m.phase ^= 1;
  m.pending = m.expected;
}

inline void land_one() {
  auto& copies = cta->copies;
  const size_t i = cta->random() % copies.size();
  const Copy c = copies[i];
  copies[i] = copies.back();
  copies.pop_back();
  memcpy(c.to, c.from, c.bytes);
  Mbarrier& m = mbarrier(c.bar);
  m.bytes -= static_cast<int>(c.bytes);
  complete(m);
}

inline Fiber* next_fiber() {
  Cta& c = *cta;
  for (;;) {
    if (++c.place % 32 == 0) c.place = c.random() % c.warps.size() * 32;
    if (c.place < c.fibers.size() && !c.fibers[c.place].done) return &c.fibers[c.place];
  }
}
[[noreturn]] inline void enter(Fiber* f) {
  cta->current = f;
  if (f->started) _longjmp(f->at, 1);
  f->started = true;
  setcontext(&f->start);
  abort();
}
inline void yield() {
  Cta& c = *cta;
  if (!c.copies.empty() && c.random() % 64 == 0) land_one();
  Fiber *me = c.current, *next = next_fiber();
  if (me != next && _setjmp(me->at) == 0) enter(next);
}
inline void poll() {
  if (++cta->polls % 256 == 0) std::this_thread::yield();  // what is waited for may be another CTA's
  yield();
}
inline void body() {
  cta->kernel();
  Cta& c = *cta;
  c.current->done = true;
  if (--c.alive == 0) _longjmp(c.back, 1);
  enter(next_fiber());
}
inline void meet(Meeting& m, unsigned count) {
  const unsigned generation = m.generation;
  if (++m.arrived == count) {
    m.arrived = 0;
    ++m.generation;
  } else {
    while (m.generation == generation) yield();
  }
}

inline unsigned lane() { return cta->current->tid.x % 32; }
inline Warp& warp() { return cta->warps[cta->current->tid.x / 32]; }
inline void meet_warp() { meet(warp().meeting, 32); }
// What `make` says of all lanes' values. Between two meetings, so that none is overwritten while it is read.
template <class T, class F> auto collective(T v, F&& make) {
  static_assert(sizeof(T) <= 8);
  Warp& w = warp();
  w.value[lane()] = 0;
  memcpy(&w.value[lane()], &v, sizeof v);
  meet_warp();
  const auto result = make([&](unsigned i) {
    T of;
    memcpy(&of, &w.value[i % 32], sizeof of);
    return of;
  });
  meet_warp();
  return result;
}

inline void run(unsigned blocks, unsigned threads, unsigned seed, char* (*shared)(), const std::function<void()>& kernel) {
  grid = {blocks, 1, 1};
  std::vector<std::thread> workers;
  for (unsigned b = 0; b < blocks; ++b)
    workers.emplace_back([=, &kernel] {
      Cta c;
      cta = &c;
      c.block = {b, 0, 0};
      c.random.seed(seed * 1000003 + b);
      c.kernel = kernel;
      c.warps.resize((threads + 31) / 32);
      c.fibers = std::vector<Fiber>(threads);
      c.alive = threads;
      memset(shared(), 0xA5, kShared);
      for (unsigned t = 0; t < threads; ++t) {
        Fiber& f = c.fibers[t];
        f.tid = {t, 0, 0};
        f.stack.reset(new char[kStack]);
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = f.stack.get();
        f.start.uc_stack.ss_size = kStack;
        f.start.uc_link = nullptr;
        makecontext(&f.start, reinterpret_cast<void (*)()>(body), 0);
      }
      if (_setjmp(c.back) == 0) enter(&c.fibers[0]);
    });
  for (auto& w : workers) w.join();
}

}  // namespace host

#define __CUDA_ARCH__ 900
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __noinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ __thread
#define threadIdx (host::cta->current->tid)
#define blockIdx (host::cta->block)
#define gridDim (host::grid)

struct alignas(8) float2 { float x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
namespace mpk { __attribute__((aligned(128))) __thread char raw[host::kShared]; }
inline char* host_shared() { return mpk::raw; }

template <class A, class B> auto min(A a, B b) { using C = std::common_type_t<A, B>; return C(a) < C(b) ? C(a) : C(b); }
template <class A, class B> auto max(A a, B b) { using C = std::common_type_t<A, B>; return C(a) < C(b) ? C(b) : C(a); }
inline float __int_as_float(int v) { float f; memcpy(&f, &v, 4); return f; }
inline float __uint_as_float(unsigned v) { float f; memcpy(&f, &v, 4); return f; }
inline unsigned __float_as_uint(float v) { unsigned u; memcpy(&u, &v, 4); return u; }
inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = a | static_cast<unsigned long long>(b) << 32;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<unsigned>(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return r;
}
inline int __popc(unsigned v) { return __builtin_popcount(v); }
template <class T, class V> T atomicAdd(T* p, V v) { return __atomic_fetch_add(p, static_cast<T>(v), __ATOMIC_SEQ_CST); }

inline void __syncwarp(unsigned = ~0u) { host::meet_warp(); }
inline void __syncthreads() { host::meet(host::cta->named[0], static_cast<unsigned>(host::cta->fibers.size())); }
inline int __syncthreads_or(int v) {
  host::Cta& c = *host::cta;
  const unsigned turn = c.named[0].generation / 2 % 2;
  if (v) c.either[turn] = 1;
  __syncthreads();
  const int any = static_cast<int>(c.either[turn]);
  __syncthreads();
  c.either[turn] = 0;
  return any;
}
template <class T> T __shfl_xor_sync(unsigned, T v, int bits) {
  return host::collective(v, [&](auto of) { return of(host::lane() ^ static_cast<unsigned>(bits)); });
}
template <class T> T __shfl_sync(unsigned, T v, int from, int width = 32) {
  const unsigned w = static_cast<unsigned>(width), source = (host::lane() & ~(w - 1)) | (static_cast<unsigned>(from) & (w - 1));
  return host::collective(v, [&](auto of) { return of(source); });
}
template <class T> T __shfl_up_sync(unsigned, T v, unsigned distance) {
  return host::collective(v, [&](auto of) { return host::lane() >= distance ? of(host::lane() - distance) : v; });
}
inline unsigned __ballot_sync(unsigned, int v) {
  return host::collective(v, [&](auto of) {
    unsigned r = 0;
    for (unsigned i = 0; i < 32; ++i) r |= static_cast<unsigned>(of(i) != 0) << i;
    return r;
  });
}
inline int __any_sync(unsigned mask, int v) { return __ballot_sync(mask, v) != 0; }
inline int __all_sync(unsigned mask, int v) { return __ballot_sync(mask, v) == ~0u; }
template <class T> T __reduce_max_sync(unsigned, T v) {
  return host::collective(v, [&](auto of) {
    T r = of(0);
    for (unsigned i = 1; i < 32; ++i) r = std::max(r, of(i));
    return r;
  });
}
