// In the place of include/mpk/ptx.cuh: the same functions on the host. See ../cuda.h.
#pragma once
#include "mpk/abi.h"

#define MPK_DEVICE inline

namespace mpk::ptx {

struct alignas(16) Vec4 { u32 x, y, z, w; };

using Address = u64;
inline Address shared_address(const void* p) { return reinterpret_cast<unsigned long long>(p); }
inline Address opaque(Address a) { return a; }

inline void mbarrier_init(u64* bar, u32 count) {
  host::mbarrier(reinterpret_cast<unsigned long long*>(bar)) = {0, count, count, 0};
}
inline void mbarrier_arrive(u64* bar) {
  host::Mbarrier& m = host::mbarrier(reinterpret_cast<unsigned long long*>(bar));
  --m.pending;
  host::complete(m);
}
inline void mbarrier_arrive(Address bar) { mbarrier_arrive(reinterpret_cast<u64*>(bar)); }
inline bool mbarrier_look(u64* bar, u32 parity) { return host::mbarrier(reinterpret_cast<unsigned long long*>(bar)).phase != parity; }
inline bool mbarrier_test(u64* bar, u32 parity) {
  if (mbarrier_look(bar, parity)) return true;
  host::poll();
  return false;
}
inline bool mbarrier_look(Address bar, u32 parity) { return mbarrier_look(reinterpret_cast<u64*>(bar), parity); }
inline bool mbarrier_test(Address bar, u32 parity) { return mbarrier_test(reinterpret_cast<u64*>(bar), parity); }
inline void mbarrier_expect(Address bar, u32 bytes) {
  host::mbarrier(reinterpret_cast<unsigned long long*>(bar)).bytes += static_cast<int>(bytes);
  mbarrier_arrive(bar);
}
inline u64 policy_evict_first() { return 0; }
inline void bulk_copy(Address to, const void* from, u32 bytes, Address bar, u64) {
  host::cta->copies.push_back({reinterpret_cast<char*>(to), static_cast<const char*>(from), bytes, reinterpret_cast<unsigned long long*>(bar)});
}
inline void fence_mbarrier_init() {}
template <u32> inline void give_registers() {}
template <u32> inline void take_registers() {}
inline void barrier(u32 id, u32 threads) { host::meet(host::cta->named[id], threads); }

inline void red_add_release(u32* p, u32 v) { __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline u32 atomic_add_acq_rel(u32* p, u32 v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
inline u32 load_acquire(const u32* p) {
  host::poll();
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
inline u32 load_relaxed(const u32* p) { return load_acquire(p); }
inline void store_relaxed(u32* p, u32 v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
inline void store_release(u32* p, u32 v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }
inline u32 compare_swap_system(u32* p, u32 expected, u32 desired) {
  __atomic_compare_exchange_n(p, &expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return expected;
}
inline void store_release_system(u32* p, u32 v) { store_release(p, v); }
inline u64 global_timer() { return static_cast<u64>(std::chrono::steady_clock::now().time_since_epoch().count()); }
inline u64 clock() { return global_timer(); }
inline void settle(float&) {}
inline int thread_index() { return static_cast<int>(threadIdx.x); }

inline Vec4 load_shared(const void* p) { return *static_cast<const Vec4*>(p); }
inline Vec4 load_shared(Address a) { return load_shared(reinterpret_cast<const void*>(a)); }
inline Vec4 load_global(const void* p) { return *static_cast<const Vec4*>(p); }
inline void load_global_if(bool so, const void* p, Vec4& v) {
  if (so) v = load_global(p);
}
inline Vec4 load_weight(const void* p) { return *static_cast<const Vec4*>(p); }
inline void prefetch_l2(const void*) {}

inline Vec4 load_relaxed(const Vec4* p) {
  host::poll();
  const u32* w = reinterpret_cast<const u32*>(p);
  return {__atomic_load_n(w, __ATOMIC_SEQ_CST), __atomic_load_n(w + 1, __ATOMIC_SEQ_CST), __atomic_load_n(w + 2, __ATOMIC_SEQ_CST),
          __atomic_load_n(w + 3, __ATOMIC_SEQ_CST)};
}
inline u32 load_relaxed(const unsigned short* p) {
  host::poll();
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
inline void store_relaxed(unsigned short* p, unsigned short v) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }

inline float exp2_approx(float x) { return exp2f(x); }
inline float max_nan(float a, float b) {
  return a != a || (a == b ? !signbit(a) : a > b) ? a : b;
}
inline float min_nan(float a, float b) {
  return a != a || (a == b ? signbit(a) : a < b) ? a : b;
}
inline float float_of_half(unsigned short bits) {
  _Float16 h;
  memcpy(&h, &bits, 2);
  return static_cast<float>(h);
}
inline u32 half_of(float v) {
  const _Float16 h = static_cast<_Float16>(v);
  unsigned short bits;
  memcpy(&bits, &h, 2);
  return v != v ? 0x7fffu : bits;
}
inline u32 bf16_of(float v) {
  const u32 u = __float_as_uint(v);
  return v != v ? 0x7fffu : (u + 0x7fff + (u >> 16 & 1)) >> 16;
}
inline u32 pack_bf16x2(float a, float b) { return bf16_of(a) | bf16_of(b) << 16; }
inline u32 pack_f16x2(float a, float b) { return half_of(a) | half_of(b) << 16; }

inline u32 transpose8x8(u32 v) {
  return host::collective(v, [](auto of) {
    const unsigned row = host::lane() / 4, column = host::lane() % 4 * 2;
    const auto element = [&](unsigned i, unsigned j) { return of(i * 4 + j / 2) >> (16 * (j % 2)) & 0xffffu; };
    return element(column, row) | element(column + 1, row) << 16;
  });
}

template <bool HALF>
inline void mma16816(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  host::Warp& w = host::warp();
  const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  memcpy(w.fragment[host::lane()], mine, sizeof mine);
  host::meet_warp();
  const auto number = [&](unsigned lane, unsigned which, unsigned half) {
    const u32 bits = w.fragment[lane][which] >> (16 * half) & 0xffffu;
    return HALF ? float_of_half(static_cast<unsigned short>(bits)) : __uint_as_float(bits << 16);
  };
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned row = host::lane() / 4, high = e / 2, column = host::lane() % 4 * 2 + e % 2;
    double sum = d[e];
    for (unsigned k = 0; k < 16; ++k)
      sum += static_cast<double>(number(row * 4 + k % 8 / 2, high + k / 8 * 2, k % 2)) * number(column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    d[e] = static_cast<float>(sum);
  }
  host::meet_warp();
}

}  // namespace mpk::ptx
