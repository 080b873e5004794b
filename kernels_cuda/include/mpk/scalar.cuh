// Element types in memory and their conversions. Arithmetic is fp32; bf16 and f16 exist as bits and as roundings.
#pragma once
#include "mpk/ptx.cuh"

namespace mpk {

using u16 = unsigned short;
using u8 = unsigned char;
using i64 = long long;
MPK_DEVICE float infinity() { return __int_as_float(0x7f800000); }

struct bf16 { u16 bits; };
struct f16 { u16 bits; };

MPK_DEVICE float widen(bf16 v) { return __uint_as_float(static_cast<u32>(v.bits) << 16); }
MPK_DEVICE float widen(f16 v) { return ptx::float_of_half(v.bits); }
MPK_DEVICE float widen(float v) { return v; }

// Two numbers of a 16-bit type, the first in the low half.
template <class T> MPK_DEVICE u32 pack2(float a, float b);
template <> MPK_DEVICE u32 pack2<bf16>(float a, float b) { return ptx::pack_bf16x2(a, b); }
template <> MPK_DEVICE u32 pack2<f16>(float a, float b) { return ptx::pack_f16x2(a, b); }

// One number is converted as half of a pair: a conversion to a single one (F2F) goes through the slow unit that computes
// square roots and sines, one to a pair (F2FP) does not.
template <class T> MPK_DEVICE T narrow(float v) { return T{static_cast<u16>(pack2<T>(v, 0.0f))}; }
template <> MPK_DEVICE float narrow<float>(float v) { return v; }

template <class T> MPK_DEVICE float round_to(float v) { return widen(narrow<T>(v)); }
template <> MPK_DEVICE float round_to<bf16>(float v) { return __uint_as_float(pack2<bf16>(0.0f, v)); }

// One element: what a Load of the expression IR becomes. bool is one byte, 0 or 1.
MPK_DEVICE float load1(const bf16* p) { return widen(*p); }
MPK_DEVICE float load1(const f16* p) { return widen(*p); }
MPK_DEVICE float load1(const float* p) { return *p; }
MPK_DEVICE double load1(const double* p) { return *p; }
MPK_DEVICE i64 load1(const i64* p) { return *p; }
MPK_DEVICE int load1(const int* p) { return *p; }
MPK_DEVICE int load1(const u8* p) { return *p; }
MPK_DEVICE bool load1(const bool* p) { return *reinterpret_cast<const u8*>(p) != 0; }

// The same as it is in memory.
MPK_DEVICE u32 word_at(const bf16* p) { return p->bits; }
MPK_DEVICE u32 word_at(const f16* p) { return p->bits; }
MPK_DEVICE u32 word_at(const float* p) { return *reinterpret_cast<const u32*>(p); }
MPK_DEVICE u32 word_at(const bool* p) { return *reinterpret_cast<const u8*>(p); }

template <class T, class V> MPK_DEVICE void store1(T* p, V v) {
  if constexpr (sizeof(T) == 2) *p = narrow<T>(static_cast<float>(v));
  else *p = static_cast<T>(v);
}

// N consecutive elements held in registers as they are in memory.
template <class T, int N> struct Pack {
  static constexpr int VECTORS = static_cast<int>(sizeof(T)) * N / 16;
  ptx::Vec4 raw[VECTORS > 0 ? VECTORS : 1];
  MPK_DEVICE void load(const T* p) {
    if constexpr (VECTORS > 0) {
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) raw[i] = ptx::load_global(p + i * (16 / sizeof(T)));
    } else {
      static_assert(sizeof(T) * N == 8, "half a vector");
      const u64 half = *reinterpret_cast<const u64*>(p);
      raw[0] = {static_cast<u32>(half), static_cast<u32>(half >> 32), 0, 0};
    }
  }
  MPK_DEVICE void unpack(float (&x)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const ptx::Vec4& v = raw[i * sizeof(T) / 16];
      const u32 words[4] = {v.x, v.y, v.z, v.w};
      if constexpr (sizeof(T) == 4) x[i] = __uint_as_float(words[i % 4]);
      else x[i] = widen(T{static_cast<u16>(words[i / 2 % 4] >> (i % 2 * 16))});
    }
  }
};
MPK_DEVICE float float_mod(float a, float b) {  // sign of the divisor, as torch.remainder
  const float r = fmodf(a, b);
  return r != 0.0f && (r < 0.0f) != (b < 0.0f) ? r + b : r;
}
MPK_DEVICE double float_mod(double a, double b) {
  const double r = fmod(a, b);
  return r != 0.0 && (r < 0.0) != (b < 0.0) ? r + b : r;
}
template <class V> MPK_DEVICE V floor_div(V a, V b) {
  const V q = a / b;
  return a % b != 0 && (a < 0) != (b < 0) ? q - 1 : q;
}
template <class V> MPK_DEVICE V floor_mod(V a, V b) {
  const V r = a % b;
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
template <bool FIRST, class A, class B> struct SelectType { using type = A; };
template <class A, class B> struct SelectType<false, A, B> { using type = B; };
template <bool FIRST, class A, class B> using Select = typename SelectType<FIRST, A, B>::type;
constexpr u32 largest(u32 a) { return a; }
template <class... Rest> constexpr u32 largest(u32 a, Rest... rest) { const u32 b = largest(rest...); return a > b ? a : b; }

}  // namespace mpk
