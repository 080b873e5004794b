// Flagged buffers: the data is its own flag. An element that still is the sentinel (all bits one, which no writer
// produces) has not been published; readers poll exactly what they read. Elements are bf16, f16 or fp32, each checked by
// itself, so a 16-byte load may tear between elements. A read orders nothing but the element it returns.
#pragma once
#include "mpk/fault.cuh"
#include "mpk/scalar.cuh"

namespace mpk {

template <class T> MPK_DEVICE u32 sentinel() { return sizeof(T) == 2 ? 0xffffu : 0xffffffffu; }

template <class T> MPK_DEVICE u32 load_bits(const T* p) {
  if constexpr (sizeof(T) == 2) return ptx::load_relaxed(reinterpret_cast<const u16*>(p));
  else return ptx::load_relaxed(reinterpret_cast<const u32*>(p));
}
template <class T> MPK_DEVICE float float_of(u32 bits) {
  if constexpr (sizeof(T) == 2) return widen(T{static_cast<u16>(bits)});
  else return __uint_as_float(bits);
}

// One round of polling: load *p again if it was missing. Polls of several elements go in rounds (`poll_until`), so that
// their loads are under way together; one after the other would cost a round trip each.
template <class T> MPK_DEVICE bool poll(u32& bits, const T* p) {
  if (bits != sentinel<T>()) return true;
  bits = load_bits(p);
  return false;
}
// `round` returns whether everything has been published.
template <class Ctx, class F> MPK_DEVICE void poll_until(const Ctx& c, F&& round) {
  while (!round() && !c.shared.health.aborted) {}
}
template <class T, class Ctx> MPK_DEVICE u32 settle(const Ctx& c, u32 bits, const T* p) {
  poll_until(c, [&] { return poll(bits, p); });
  return bits;
}
template <class T, class Ctx> MPK_DEVICE float load_flagged(const Ctx& c, const T* p) {
  return float_of<T>(settle(c, load_bits(p), p));
}

template <class T> MPK_DEVICE void publish(T* p, float v) {
  if constexpr (sizeof(T) == 2) {
    ptx::store_relaxed(reinterpret_cast<u16*>(p), narrow<T>(v).bits);  // a conversion makes no NaN but 0x7fff
  } else {
    const u32 bits = __float_as_uint(v);
    ptx::store_relaxed(reinterpret_cast<u32*>(p), bits == 0xffffffffu ? 0x7fc00000u : bits);
  }
}

// A Pack of a flagged buffer.
template <class T, int N> struct FlaggedPack : Pack<T, N> {
  static_assert(sizeof(T) * N % 16 == 0, "whole vectors");
  using Base = Pack<T, N>;
  MPK_DEVICE void load(const T* p) {
#pragma unroll
    for (int i = 0; i < Base::VECTORS; ++i) this->raw[i] = ptx::load_relaxed(reinterpret_cast<const ptx::Vec4*>(p) + i);
  }
  MPK_DEVICE static bool missing(const ptx::Vec4& v) {
    if constexpr (sizeof(T) == 4) return max(max(v.x, v.y), max(v.z, v.w)) == 0xffffffffu;
    u32 found = 0;
    const u32 words[4] = {~v.x, ~v.y, ~v.z, ~v.w};  // look for a 16-bit zero
#pragma unroll
    for (int i = 0; i < 4; ++i) found |= (words[i] - 0x00010001u) & ~words[i] & 0x80008000u;
    return found != 0;
  }
  MPK_DEVICE bool poll(const T* p) {
    bool complete = true;
#pragma unroll
    for (int i = 0; i < Base::VECTORS; ++i)
      if (missing(this->raw[i])) {
        complete = false;
        this->raw[i] = ptx::load_relaxed(reinterpret_cast<const ptx::Vec4*>(p) + i);
      }
    return complete;
  }
};

}  // namespace mpk
