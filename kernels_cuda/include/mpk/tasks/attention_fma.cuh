// The general attention body: any element type of the cache, products in fp32. Keys are spread over lane groups of LANES
// (8 elements each), each with its own online softmax, merged at the end in a fixed order.
#pragma once

namespace mpk {

template <class N>
struct FmaAttention {
  static constexpr int LANES = pow2_at_least(N::D / 8);  // lanes of a key
  static constexpr int KEYS = 32 / LANES;               // keys a warp looks at together
  static constexpr int FIT = 4096 / N::D / static_cast<int>(kConsumerWarps);
  static constexpr int HEADS = N::G < 4 ? (N::G < FIT ? N::G : FIT) : (4 < FIT ? 4 : FIT);  // heads per pass
  using Scratch = AttentionScratch<N, float, HEADS, static_cast<int>(kConsumerWarps)>;
  static constexpr int SCRATCH = Scratch::BYTES;
  static_assert(N::D % 8 == 0 && N::D <= 256, "head size");
  static constexpr int UNROLL = HEADS > 2 ? 2 : 4;
};

template <class N, class Ctx>
MPK_DEVICE void attention_fma(Ctx& c) {
  using S = FmaAttention<N>;
  constexpr int D = N::D, W = static_cast<int>(kConsumerWarps);
  if (!c.wait()) return;
  const int b = c.arg(0), g = c.arg(1), split = c.arg(2), splits = c.arg(3);
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  float* rows = reinterpret_cast<float*>(c.scratch());
  float* sums = reinterpret_cast<float*>(c.scratch() + S::Scratch::ROWS);
  float* stats = sums + W * S::HEADS * S::Scratch::STRIDE;
  const int part = lane % S::LANES, d0 = part * 8;
  const bool live = D % (S::LANES * 8) == 0 || d0 < D;
  constexpr int STRIDE = W * S::KEYS;  // keys the worker looks at together
  Pack<typename N::Cache, 8> key[S::UNROLL], value[S::UNROLL];
  bool ignored[S::UNROLL];   // of a mask that all heads share
  float added[S::UNROLL];
  const int position = c.ready->ahead[0], begin = c.ready->ahead[1], end = c.ready->ahead[2];
  const int s_first = begin + warp * S::KEYS + lane / S::LANES;
  const auto fetch = [&](int u, int s) {
    if constexpr (N::MASK == 1 && !N::MASK_PER_HEAD) ignored[u] = s < end && !N::mask_bool(c, b, 0, s);
    if constexpr (N::MASK == 2 && !N::MASK_PER_HEAD) added[u] = s < end ? N::mask_add(c, b, 0, s) : 0.0f;
    if (s < end && live && s != position) {
      key[u].load(N::key_at(c, b, g, s) + d0);
      value[u].load(N::value_at(c, b, g, s) + d0);
    }
  };
#pragma unroll
  for (int u = 0; u < S::UNROLL; ++u) fetch(u, s_first + u * STRIDE);
  attention_rows<N>(c, b, g, rows);
  c.barrier();
  c.mark(kInputs);
  if (split == 0) attention_append<N>(c, b, g, position, rows);
  if (!c.ready->ahead[3]) return;
  const float* new_key = rows + N::G * D;
  const float* new_value = new_key + D;
#pragma unroll 1
  for (int h0 = 0; h0 < N::G; h0 += S::HEADS) {
    float q[S::HEADS][8], o[S::HEADS][8], m[S::HEADS], l[S::HEADS];
#pragma unroll
    for (int h = 0; h < S::HEADS; ++h) {
      m[h] = -infinity();
      l[h] = 0.0f;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        o[h][e] = 0.0f;
        q[h][e] = live && h0 + h < N::G ? rows[(h0 + h) * D + d0 + e] : 0.0f;
      }
    }
    if (h0) {
#pragma unroll
      for (int u = 0; u < S::UNROLL; ++u) fetch(u, s_first + u * STRIDE);
    }
    for (int s0 = s_first; s0 - lane / S::LANES < end; s0 += STRIDE * S::UNROLL) {
#pragma unroll
      for (int u = 0; u < S::UNROLL; ++u) {
        const int s = s0 + u * STRIDE;
        float k[8], v[8];
        if (s < end && live && s != position) {
          key[u].unpack(k);
          value[u].unpack(v);
        } else {
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            k[e] = s == position && live ? new_key[d0 + e] : 0.0f;
            v[e] = s == position && live ? new_value[d0 + e] : 0.0f;
          }
        }
        const bool ignore = N::MASK == 1 && !N::MASK_PER_HEAD ? ignored[u] : false;
        const float add = N::MASK == 2 && !N::MASK_PER_HEAD ? added[u] : 0.0f;
        fetch(u, s + STRIDE * S::UNROLL);
        if (s - lane / S::LANES >= end) continue;
#pragma unroll
        for (int h = 0; h < S::HEADS; ++h) {
          float score = 0.0f;
#pragma unroll
          for (int e = 0; e < 8; ++e) score = fmaf(q[h][e], k[e], score);
#pragma unroll
          for (int bit = S::LANES / 2; bit; bit >>= 1) score += __shfl_xor_sync(~0u, score, bit);
          score *= N::SCALE;
          if constexpr (N::SOFTCAP != 0.0f) score = N::SOFTCAP * tanhf(score * (1.0f / N::SOFTCAP));
          bool dead = s >= end || ignore;
          const int head = g * N::G + min(h0 + h, N::G - 1);
          if constexpr (N::MASK == 1 && N::MASK_PER_HEAD) dead = dead || !N::mask_bool(c, b, head, s);
          if constexpr (N::MASK == 2) score += N::MASK_PER_HEAD && !dead ? N::mask_add(c, b, head, s) : add;
          if (!dead && score != -infinity()) {
            const float top = fmaxf(m[h], score);
            const float keep = ptx::exp2_approx((m[h] - top) * kLog2e), p = ptx::exp2_approx((score - top) * kLog2e);
            l[h] = l[h] * keep + p;
#pragma unroll
            for (int e = 0; e < 8; ++e) o[h][e] = fmaf(p, v[e], o[h][e] * keep);
            m[h] = top;
          }
        }
      }
    }
    // lane groups of the warp, then warps
#pragma unroll
    for (int h = 0; h < S::HEADS; ++h) {
#pragma unroll
      for (int bit = S::LANES; bit < 32; bit <<= 1) {
        const float m2 = __shfl_xor_sync(~0u, m[h], bit), l2 = __shfl_xor_sync(~0u, l[h], bit);
        const float top = fmaxf(m[h], m2);
        const float a = l[h] != 0.0f ? ptx::exp2_approx((m[h] - top) * kLog2e) : 0.0f;
        const float b2 = l2 != 0.0f ? ptx::exp2_approx((m2 - top) * kLog2e) : 0.0f;
        // the same sum on both sides: add in an order that does not depend on the lane
        const bool low = (lane & bit) == 0;
        l[h] = low ? l[h] * a + l2 * b2 : l2 * b2 + l[h] * a;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const float o2 = __shfl_xor_sync(~0u, o[h][e], bit);
          o[h][e] = low ? o[h][e] * a + o2 * b2 : o2 * b2 + o[h][e] * a;
        }
        m[h] = top;
      }
      float* to = sums + (warp * S::HEADS + h) * S::Scratch::STRIDE;
      if (lane < S::LANES && live) {
#pragma unroll
        for (int e = 0; e < 8; ++e) to[d0 + e] = o[h][e];
      }
      if (lane == 0) {
        stats[(warp * S::HEADS + h) * 2] = m[h];
        stats[(warp * S::HEADS + h) * 2 + 1] = l[h];
      }
    }
    c.barrier();
    attention_finish<N, typename S::Scratch>(c, sums, stats, b, g * N::G + h0, min(S::HEADS, N::G - h0), split, splits);
    if (h0 + S::HEADS < N::G) c.barrier();
  }
}

}  // namespace mpk
