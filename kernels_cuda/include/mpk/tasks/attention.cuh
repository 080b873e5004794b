// attention: one query token of one (batch, KV head), a range of keys. arg = {b, g, split, splits, partial, stats}: the
// last two are operand indices of the partial results (unused when splits == 1).
//
// The prologue (norms, rotary, whatever the graph has) is evaluated by every task of a (b, g): q rows of the group and
// the appended key and value go to shared memory, so that no edge separates them. Keys are spread over lane groups of
// LANES (16 bytes each), each with its own online softmax, merged at the end in a fixed order.
//
// N (generated): Cache (element type); G (query heads per KV head), D, S, APPEND, MASK (0 none, 1 bool, 2 additive),
// MASK_PER_HEAD, SCALE, SOFTCAP (0: none); q_row(c, group, b, h, store), key_row, value_row(c, group, b, g, store) with store(d, value); position(c, b),
// first(c, b), last(c, b); key_at(c, b, g, s), value_at: pointers to D consecutive elements; new_key_at, new_value_at:
// the same in the written version; mask_bool / mask_add(c, b, h, s); store(c, b, h, d, value);
// partial(pointer, value) stores a partial result; FLAGGED: whether they are their own flags.
#pragma once
#include "mpk/group.cuh"

namespace mpk {

constexpr int pow2_at_least(int n) { int p = 1; while (p < n) p *= 2; return p; }

template <class N>
struct AttentionShape {
  static constexpr int LANES = pow2_at_least(N::D / 8);  // lanes of a key
  static constexpr int KEYS = 32 / LANES;               // keys a warp looks at together
  static constexpr int FIT = 4096 / N::D / static_cast<int>(kConsumerWarps);
  static constexpr int HEADS = N::G < 4 ? (N::G < FIT ? N::G : FIT) : (4 < FIT ? 4 : FIT);  // heads per pass
  static constexpr int ROWS = N::G + 2;                 // q rows, new key, new value
  static constexpr int SCRATCH = (ROWS * N::D + static_cast<int>(kConsumerWarps) * HEADS * (N::D + 2)) * 4;
  static_assert(N::D % 8 == 0 && N::D <= 256, "head size");
  static constexpr int UNROLL = HEADS > 2 ? 2 : 4;
};

template <class N, class Ctx>
MPK_DEVICE void attention(Ctx& c) {
  using S = AttentionShape<N>;
  constexpr int D = N::D, W = static_cast<int>(kConsumerWarps);
  if (!c.wait()) return;
  const int b = c.arg(0), g = c.arg(1), split = c.arg(2), splits = c.arg(3);
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  float* rows = reinterpret_cast<float*>(c.scratch());
  float* merge = rows + S::ROWS * D;
  int position = -1;
  if constexpr (N::APPEND) {
    const i64 p = N::position(c, b);
    if (static_cast<u64>(p) < static_cast<u64>(N::S)) position = static_cast<int>(p);
    else if (threadIdx.x == 0) c.fail(kCacheFull, 0, N::S, static_cast<u32>(p));
  }
  const int lo = max(0, static_cast<int>(N::first(c, b))), hi = min(N::S, static_cast<int>(N::last(c, b)));
  const int chunk = (max(0, hi - lo) + splits - 1) / splits;
  const int begin = lo + split * chunk, end = min(hi, begin + chunk);
  const int part = lane % S::LANES, d0 = part * 8;
  const bool live = D % (S::LANES * 8) == 0 || d0 < D;
  constexpr int STRIDE = W * S::KEYS;  // keys the worker looks at together
  Pack<typename N::Cache, 8> key[S::UNROLL], value[S::UNROLL];
  bool ignored[S::UNROLL];   // of a mask that all heads share
  float added[S::UNROLL];
  const auto fetch = [&](int u, int s) {
    if constexpr (N::MASK == 1 && !N::MASK_PER_HEAD) ignored[u] = s < end && !N::mask_bool(c, b, 0, s);
    if constexpr (N::MASK == 2 && !N::MASK_PER_HEAD) added[u] = s < end ? N::mask_add(c, b, 0, s) : 0.0f;
    if (s < end && live && s != position) {
      key[u].load(N::key_at(c, b, g, s) + d0);
      value[u].load(N::value_at(c, b, g, s) + d0);
    }
  };
  const int s_first = begin + warp * S::KEYS + lane / S::LANES;
#pragma unroll
  for (int u = 0; u < S::UNROLL; ++u) fetch(u, s_first + u * STRIDE);  // old keys: on their way while the prologue runs
  const WarpGroup group;
  for (int r = warp; r < S::ROWS; r += W) {
    float* to = rows + r * D;
    const auto store = [&](int d, float v) { to[d] = v; };
    if (r < N::G) {
      N::q_row(c, group, b, g * N::G + r, store);
    } else if constexpr (N::APPEND) {
      if (r == N::G) N::key_row(c, group, b, g, store);
      else N::value_row(c, group, b, g, store);
    }
  }
  c.barrier();
  c.mark(kInputs);
  const float* new_key = rows + N::G * D;
  const float* new_value = new_key + D;
  if constexpr (N::APPEND) {
    if (split == 0 && position >= 0)
      for (int d = threadIdx.x; d < D; d += kConsumers) {
        store1(N::new_key_at(c, b, g, position) + d, new_key[d]);
        store1(N::new_value_at(c, b, g, position) + d, new_value[d]);
      }
  }
  constexpr float kLog2e = 1.4426950408889634f;
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
      float* to = merge + (warp * S::HEADS + h) * (D + 2);
      if (lane < S::LANES && live) {
#pragma unroll
        for (int e = 0; e < 8; ++e) to[2 + d0 + e] = o[h][e];
      }
      if (lane == 0) {
        to[0] = m[h];
        to[1] = l[h];
      }
    }
    c.barrier();
    for (int i = threadIdx.x; i < S::HEADS * D; i += kConsumers) {
      const int h = i / D, d = i % D, head = g * N::G + h0 + h;
      if (h0 + h >= N::G) continue;
      float top = -infinity();
#pragma unroll
      for (int w = 0; w < W; ++w) top = fmaxf(top, merge[(w * S::HEADS + h) * (D + 2)]);
      float sum = 0.0f, out = 0.0f;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const float* from = merge + (w * S::HEADS + h) * (D + 2);
        const float scale = from[1] != 0.0f ? ptx::exp2_approx((from[0] - top) * kLog2e) : 0.0f;
        sum += from[1] * scale;
        out += scale != 0.0f ? from[2 + d] * scale : 0.0f;
      }
      if (splits == 1) {
        N::store(c, b, head, d, sum != 0.0f ? out / sum : 0.0f);
      } else {
        const int at = (b * N::H + head) * splits + split;
        N::partial(c.template pointer<float>(c.arg(4)) + at * D + d, out);
        if (d == 0) {
          N::partial(c.template pointer<float>(c.arg(5)) + at * 2, top);
          N::partial(c.template pointer<float>(c.arg(5)) + at * 2 + 1, sum);
        }
      }
    }
    if (h0 + S::HEADS < N::G) c.barrier();
  }
}

// attention_combine: arg = {b, h_start, h_stop, splits, partial, stats}.
template <class N, class Ctx>
MPK_DEVICE void attention_combine(Ctx& c) {
  if (!c.wait()) return;
  const int b = c.arg(0), h0 = c.arg(1), h1 = c.arg(2), splits = c.arg(3);
  const float* partial = c.template pointer<float>(c.arg(4));
  const float* stats = c.template pointer<float>(c.arg(5));
  constexpr float kLog2e = 1.4426950408889634f;
  constexpr int BATCH = 8;
  for (int i = threadIdx.x; i < (h1 - h0) * N::D; i += kConsumers) {
    const int h = h0 + i / N::D, d = i % N::D, at = (b * N::H + h) * splits;
    float top = -infinity(), sum = 0.0f, out = 0.0f;
    for (int s0 = 0; s0 < splits; s0 += BATCH) {  // all loads of a batch are under way together
      u32 raw[3][BATCH];
      float m[BATCH], l[BATCH], p[BATCH];
      const auto place = [&](int u) { return at + min(s0 + u, splits - 1); };
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        raw[0][u] = load_bits(stats + place(u) * 2);
        raw[1][u] = load_bits(stats + place(u) * 2 + 1);
        raw[2][u] = load_bits(partial + place(u) * N::D + d);
      }
      if constexpr (N::FLAGGED)
        poll_until(c, [&] {
          bool complete = true;
#pragma unroll
          for (int u = 0; u < BATCH; ++u) {
            complete = poll(raw[0][u], stats + place(u) * 2) && complete;
            complete = poll(raw[1][u], stats + place(u) * 2 + 1) && complete;
            complete = poll(raw[2][u], partial + place(u) * N::D + d) && complete;
          }
          return complete;
        });
      c.mark(kInputs);
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        m[u] = __uint_as_float(raw[0][u]);
        l[u] = s0 + u < splits ? __uint_as_float(raw[1][u]) : 0.0f;
        p[u] = __uint_as_float(raw[2][u]);
      }
      float next = top;
#pragma unroll
      for (int u = 0; u < BATCH; ++u) next = l[u] != 0.0f ? fmaxf(next, m[u]) : next;
      const float keep = sum != 0.0f ? ptx::exp2_approx((top - next) * kLog2e) : 0.0f;
      sum *= keep;
      out *= keep;
#pragma unroll
      for (int u = 0; u < BATCH; ++u) {
        const float scale = l[u] != 0.0f ? ptx::exp2_approx((m[u] - next) * kLog2e) : 0.0f;
        sum += l[u] * scale;
        out += scale != 0.0f ? scale * p[u] : 0.0f;
      }
      top = next;
    }
    N::store(c, b, h, d, sum != 0.0f ? out / sum : 0.0f);
  }
}

}  // namespace mpk
