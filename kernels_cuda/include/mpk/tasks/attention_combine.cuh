// attention_combine: arg = {b, h_start, h_stop, splits, partial, stats}: merges the splits that hold keys. A few
// neighbouring lanes share an element, so that all its splits are under way together.
#pragma once
#include "mpk/tasks/attention.cuh"

namespace mpk {

template <class N, class Ctx>
MPK_DEVICE void attention_combine(Ctx& c) {
  if (!c.wait()) return;
  constexpr int BATCH = 4;
  const int b = c.arg(0), h0 = c.arg(1), h1 = c.arg(2), splits = c.arg(3);
  const float* partial = c.template pointer<float>(c.arg(4));
  const float* stats = c.template pointer<float>(c.arg(5));
  const int used = KeyRanges(N::first(c, b), N::last(c, b), N::S, N::CHUNK, splits).used;
  const int count = (h1 - h0) * N::D;
  // as many as let the worker take all elements at once: each pass waits for its loads
  const int lanes = count <= static_cast<int>(kConsumers) / 4 ? 4 : count <= static_cast<int>(kConsumers) / 2 ? 2 : 1;
  const int lane_split = threadIdx.x % lanes;
  for (int i = threadIdx.x / lanes; i < round_up(count, 32); i += kConsumers / lanes) {
    const int e = min(i, count - 1);
    const int h = h0 + e / N::D, d = e % N::D, at = (b * N::H + h) * splits;
    float top = -infinity(), sum = 0.0f, out = 0.0f;
    for (int s0 = lane_split; s0 < used; s0 += BATCH * lanes) {
      u32 raw[3][BATCH];
      float m[BATCH], l[BATCH], p[BATCH];
      const auto held = [&](int u) { return s0 + u * lanes < used; };
      const auto place = [&](int u) { return at + s0 + u * lanes; };
#pragma unroll
      for (int u = 0; u < BATCH; ++u)
        if (held(u)) {
          raw[0][u] = load_bits(stats + place(u) * 2);
          raw[1][u] = load_bits(stats + place(u) * 2 + 1);
          raw[2][u] = load_bits(partial + place(u) * N::D + d);
        }
      if constexpr (N::FLAGGED)
        poll_until(c, [&] {
          bool complete = true;
#pragma unroll
          for (int u = 0; u < BATCH; ++u)
            if (held(u)) {
              complete = poll(raw[0][u], stats + place(u) * 2) && complete;
              complete = poll(raw[1][u], stats + place(u) * 2 + 1) && complete;
              complete = poll(raw[2][u], partial + place(u) * N::D + d) && complete;
            }
          return complete;
        });
      c.mark(kInputs);
      float next = top;
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        m[u] = held(u) ? __uint_as_float(raw[0][u]) : -infinity();
        l[u] = held(u) ? __uint_as_float(raw[1][u]) : 0.0f;
        p[u] = held(u) ? __uint_as_float(raw[2][u]) : 0.0f;
        next = l[u] != 0.0f ? fmaxf(next, m[u]) : next;
      }
      const float keep = sum != 0.0f ? ptx::exp2_approx((top - next) * kLog2e) : 0.0f;
      sum *= keep;
      out *= keep;
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        const float scale = l[u] != 0.0f ? ptx::exp2_approx((m[u] - next) * kLog2e) : 0.0f;
        sum = fmaf(l[u], scale, sum);
        out = scale != 0.0f ? fmaf(scale, p[u], out) : out;
      }
      top = next;
    }
    for (int bit = 1; bit < lanes; bit <<= 1) {  // added in an order that does not depend on the lane
      const float m2 = __shfl_xor_sync(~0u, top, bit), l2 = __shfl_xor_sync(~0u, sum, bit), o2 = __shfl_xor_sync(~0u, out, bit);
      const float next = fmaxf(top, m2);
      const float mine = sum != 0.0f ? ptx::exp2_approx((top - next) * kLog2e) : 0.0f;
      const float other = l2 != 0.0f ? ptx::exp2_approx((m2 - next) * kLog2e) : 0.0f;
      const bool low = (lane_split & bit) == 0;
      const float a = mine != 0.0f ? out * mine : 0.0f, z = other != 0.0f ? o2 * other : 0.0f;
      sum = low ? sum * mine + l2 * other : l2 * other + sum * mine;
      out = low ? a + z : z + a;
      top = next;
    }
    if (lane_split == 0 && i < count) N::store(c, b, h, d, sum != 0.0f ? out / sum : 0.0f);
  }
}

}  // namespace mpk
