// The only inline PTX of the project. Semantics: PTX ISA; which fence gives which edge: docs/memory_model.md.
#pragma once
#include "mpk/abi.h"

#define MPK_DEVICE __device__ __forceinline__

namespace mpk::ptx {

struct alignas(16) Vec4 { u32 x, y, z, w; };

// threadIdx.x, read where it stands: what is derived from it stays in a task body instead of in registers of the loop
// around all of them.
MPK_DEVICE int thread_index() {
  int i;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(i));
  return i;
}

// Keeps the computation of v where it stands.
MPK_DEVICE void settle(float& v) { asm volatile("" : "+f"(v)); }

// A place in shared memory as instructions take it. Working it out from a pointer reads special registers, which takes as
// long as a short loop: such a loop keeps it, `opaque` so that the compiler does not work it out again.
using Address = u32;
MPK_DEVICE Address shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }
MPK_DEVICE Address opaque(Address a) {
  asm("" : "+r"(a));
  return a;
}

MPK_DEVICE void mbarrier_init(u64* bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count) : "memory");
}
MPK_DEVICE void mbarrier_arrive(Address bar) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.shared::cta.b64 t, [%0]; }" ::"r"(bar) : "memory");
}
MPK_DEVICE void mbarrier_arrive(u64* bar) { mbarrier_arrive(shared_address(bar)); }
// Without ever suspending the thread.
MPK_DEVICE bool mbarrier_look(Address bar, u32 parity) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(bar), "r"(parity) : "memory");
  return done;
}
MPK_DEVICE bool mbarrier_look(u64* bar, u32 parity) { return mbarrier_look(shared_address(bar), parity); }
MPK_DEVICE bool mbarrier_test(Address bar, u32 parity) {
#if __CUDA_ARCH__ >= 900
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(bar), "r"(parity) : "memory");
  return done;
#else
  return mbarrier_look(bar, parity);
#endif
}
MPK_DEVICE bool mbarrier_test(u64* bar, u32 parity) { return mbarrier_test(shared_address(bar), parity); }

#if __CUDA_ARCH__ >= 900
MPK_DEVICE void mbarrier_expect(Address bar, u32 bytes) {
  asm volatile("{ .reg .b64 t; mbarrier.arrive.expect_tx.shared::cta.b64 t, [%0], %1; }" ::"r"(bar), "r"(bytes) : "memory");
}
MPK_DEVICE u64 policy_evict_first() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
// Bulk copy of bytes (a multiple of 16, both ends 16-byte aligned); completes on bar's transaction count.
MPK_DEVICE void bulk_copy(Address to, const void* from, u32 bytes, Address bar, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}
#else
MPK_DEVICE void async_copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// This thread's arrival happens when all its async copies so far have landed.
MPK_DEVICE void async_copy_arrive(u64* bar) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(bar)) : "memory");
}
#endif

MPK_DEVICE void fence_mbarrier_init() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// All warps of a warpgroup at once: COUNT registers per thread from here on, fewer or more than now.
template <u32 COUNT> MPK_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <u32 COUNT> MPK_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// Named barrier over `threads` threads of the CTA.
MPK_DEVICE void barrier(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

MPK_DEVICE void red_add_release(u32* p, u32 v) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MPK_DEVICE u32 atomic_add_acq_rel(u32* p, u32 v) {
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
  return old;
}
MPK_DEVICE u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
MPK_DEVICE u32 load_relaxed(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
MPK_DEVICE void store_relaxed(u32* p, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MPK_DEVICE void store_release(u32* p, u32 v) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MPK_DEVICE u32 compare_swap_system(u32* p, u32 expected, u32 desired) {
  u32 old;
  asm volatile("atom.relaxed.sys.global.cas.b32 %0, [%1], %2, %3;" : "=r"(old) : "l"(p), "r"(expected), "r"(desired) : "memory");
  return old;
}
MPK_DEVICE void store_release_system(u32* p, u32 v) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
MPK_DEVICE u64 clock() {
  u64 t;
  asm volatile("mov.u64 %0, %clock64;" : "=l"(t));
  return t;
}
MPK_DEVICE u64 global_timer() {
  u64 t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t));
  return t;
}

MPK_DEVICE Vec4 load_shared(Address a) {
  Vec4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
MPK_DEVICE Vec4 load_shared(const void* p) { return load_shared(shared_address(p)); }
// Data another SM wrote in this launch: ordinary, coherent loads (never .nc); ordered by the acquire of the event.
MPK_DEVICE Vec4 load_global(const void* p) {
  Vec4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
// If so; else v stays. Without a branch, at whose end the load would be waited for.
MPK_DEVICE void load_global_if(bool so, const void* p, Vec4& v) {
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.v4.u32 {%0,%1,%2,%3}, [%4]; }"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(p), "r"(static_cast<u32>(so)) : "memory");
}
// A weight: nothing writes it during a launch, so only the order of other such loads and barriers is kept.
MPK_DEVICE Vec4 load_weight(const void* p) {
  Vec4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
// Only a hint: brings a line to the L2 cache.
MPK_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Flag-in-data: single-copy atomic per element, coherent at gpu scope, never from L1.
MPK_DEVICE Vec4 load_relaxed(const Vec4* p) {
  Vec4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
MPK_DEVICE u32 load_relaxed(const unsigned short* p) {
  unsigned short v;
  asm volatile("ld.relaxed.gpu.global.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
  return v;
}
MPK_DEVICE void store_relaxed(unsigned short* p, unsigned short v) {
  asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(p), "h"(v) : "memory");
}

MPK_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

MPK_DEVICE float float_of_half(unsigned short bits) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
}
// The greater and the smaller of two; what is not a number wins, and -0 is below +0, as in torch.
MPK_DEVICE float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
MPK_DEVICE float min_nan(float a, float b) {
  float r;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
// Two numbers rounded to 16 bits, the first in the low half.
MPK_DEVICE u32 pack_bf16x2(float a, float b) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
MPK_DEVICE u32 pack_f16x2(float a, float b) {
  u32 r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}

// An 8x8 matrix of 16-bit elements, a lane's two (row lane / 4, columns 2 (lane % 4) and the next), transposed.
MPK_DEVICE u32 transpose8x8(u32 v) {
  u32 r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

// D[16x8] += A[16x16] B[16x8], bf16 or f16 operands, f32 accumulators (mma.sync.m16n8k16).
template <bool HALF>
MPK_DEVICE void mma16816(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  if constexpr (HALF)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

}  // namespace mpk::ptx
