// Attention on tensor cores: q has the 16-bit type of the cache. A warp takes TILE keys at a time from memory straight to
// registers, in the fragments of mma.m16n8k16: keys are the rows of A against 8 query heads, values the rows (along d)
// of A against 8 columns of weights. Which element of a row stands for which place of the sum over d is free, so a lane
// takes whole 16-byte vectors: d = 32 j + 8 (lane % 4) ... + 8 of a key, d = 64 j + 8 (lane / 4) ... + 8 of a value.
//
// Scores, weights and sums are fp32. A weight enters the product as the sum of two 16-bit numbers, which leaves an error
// of 2^-16 (bf16) of its size.
#pragma once

namespace mpk {

template <class N>
struct MmaAttention {
  static constexpr int HEADS = N::G < 8 ? N::G : 8;      // per pass over the keys
  static constexpr int PARTS = N::D <= 128 ? 1 : 2;      // warps that share keys: each has a part of the values' columns
  static constexpr int GROUPS = static_cast<int>(kConsumerWarps) / PARTS;
  static constexpr int HALVES = N::D <= 128 ? 2 : 1;     // rows of A in use: 8 keys each
  static constexpr int TILES = N::D <= 64 ? 2 : 1;       // under way together
  static constexpr int TILE = 8 * HALVES;                // keys
  static constexpr int KEY_VECTORS = (N::D + 31) / 32, VALUE_VECTORS = ((N::D + 63) / 64 + PARTS - 1) / PARTS;
  static constexpr int FIT = 8192 / N::D / GROUPS;
  static constexpr int MERGED = HEADS <= FIT ? HEADS : FIT & ~1;  // heads whose sums are exchanged together
  using Scratch = AttentionScratch<N, typename N::Cache, MERGED, GROUPS>;
  static constexpr int SCRATCH = Scratch::BYTES;
  static_assert(N::S >= TILE, "a tile must lie within the cache");
  static_assert(N::D % 8 == 0 && N::D <= 256 && sizeof(typename N::Cache) == 2 && MERGED > 0, "head size");
};

// Rows of keys, columns of heads (lane: row lane / 4, columns 2 (lane % 4) and the next) to the fragment of B whose rows
// are these keys, as two 16-bit numbers each that sum to the weight.
template <class T>
MPK_DEVICE void weight_fragments(float w0, float w1, u32& high, u32& low) {
  const float h0 = round_to<T>(w0), h1 = round_to<T>(w1);
  high = ptx::transpose8x8(pack2<T>(h0, h1));
  low = ptx::transpose8x8(pack2<T>(w0 - h0, w1 - h1));
}

template <class N, class Ctx>
MPK_DEVICE void attention_mma(Ctx& c) {
  using S = MmaAttention<N>;
  using T = typename N::Cache;
  constexpr bool HALF = N::HALF;
  constexpr int D = N::D, W = S::GROUPS, KV = S::KEY_VECTORS, VV = S::VALUE_VECTORS;
  if (!c.wait()) return;
  const int b = c.arg(0), g = c.arg(1), split = c.arg(2), splits = c.arg(3);
  const int warp = threadIdx.x / 32 % W, part = S::PARTS == 1 ? 0 : threadIdx.x / (32 * W);
  const int lane = threadIdx.x & 31, row = lane / 4, column = lane % 4;
  const auto column_of = [&](int j) { return 64 * (part * VV + j) + 8 * row; };
  T* rows = reinterpret_cast<T*>(c.scratch());
  float* sums = reinterpret_cast<float*>(c.scratch() + S::Scratch::ROWS);
  float* stats = sums + W * S::MERGED * S::Scratch::STRIDE;

  ptx::Vec4 key[S::TILES][S::HALVES][KV], value[S::TILES][2 * S::HALVES][VV];
  u32 mask[S::TILES][S::HALVES];  // that all heads share; its values are made of it where they are used
  const int position = c.ready->ahead[0], begin = c.ready->ahead[1], end = c.ready->ahead[2];
  const int start = begin + warp * S::TILE;
  T *const keys = N::key_at_base(c), *const values = N::value_at_base(c);
  const auto key_of = [&](int r) { return 8 * r + row; };  // within a tile
  const auto value_of = [&](int i) { return 8 * (i / 2) + 2 * column + i % 2; };
  // Tiles of a round, and where their rows begin. The last tile of the range lies where it is whole, so that rows are at
  // fixed distances: it begins with keys that are another tile's, which are dead to it.
  const auto tile_of = [&](int t, int s0) { return s0 + t * W * S::TILE; };
  const auto place = [&](int s) { return max(min(s, end - S::TILE), 0); };
  // The appended key's row is not read: it is being written.
  const auto fetch_keys = [&](int s0) {
#pragma unroll
    for (int t = 0; t < S::TILES; ++t) {
      const int p = place(tile_of(t, s0));
      const bool there = t == 0 || tile_of(t, s0) < end;
      const T* first = N::key_at(c, b, g, p + row, keys) + 8 * column;
#pragma unroll
      for (int r = 0; r < S::HALVES; ++r) {
        const int s = p + key_of(r);
        const T* from = N::KEY_STRIDE ? first + 8 * r * N::KEY_STRIDE : N::key_at(c, b, g, s, keys) + 8 * column;
#pragma unroll
        for (int j = 0; j < KV; ++j)
          ptx::load_global_if(there && s != position && (D % 32 == 0 || 32 * j + 8 * column < D), from + 32 * j, key[t][r][j]);
        if constexpr (N::MASK != 0 && !N::MASK_PER_HEAD) mask[t][r] = N::mask_word(c, b, 0, s);
      }
    }
  };
  const auto fetch_values = [&](int s0) {
#pragma unroll
    for (int t = 0; t < S::TILES; ++t) {
      const int p = place(tile_of(t, s0));
      const bool there = t == 0 || tile_of(t, s0) < end;
      const T* first = N::value_at(c, b, g, p + 2 * column, values) + column_of(0);
#pragma unroll
      for (int i = 0; i < 2 * S::HALVES; ++i) {
        const int s = p + value_of(i);
        const T* from = N::VALUE_STRIDE ? first + (8 * (i / 2) + i % 2) * N::VALUE_STRIDE : N::value_at(c, b, g, s, values) + column_of(0);
#pragma unroll
        for (int j = 0; j < VV; ++j)
          ptx::load_global_if(there && s != position && (D % (64 * S::PARTS) == 0 || column_of(j) < D), from + 64 * j, value[t][i][j]);
      }
    }
  };
#pragma unroll
  for (int t = 0; t < S::TILES; ++t) {
#pragma unroll
    for (int r = 0; r < S::HALVES; ++r) {
      mask[t][r] = 0;
#pragma unroll
      for (int j = 0; j < KV; ++j) key[t][r][j] = {0, 0, 0, 0};
    }
#pragma unroll
    for (int i = 0; i < 2 * S::HALVES; ++i)
#pragma unroll
      for (int j = 0; j < VV; ++j) value[t][i][j] = {0, 0, 0, 0};
  }
  if (start < end) {
    fetch_keys(start);
    fetch_values(start);
  }
  attention_rows<N>(c, b, g, rows);
  c.barrier();
  c.mark(kInputs);
  if (split == 0) attention_append<N>(c, b, g, position, rows);
  if (!c.ready->ahead[3]) return;
  const T *new_key = rows + N::G * D, *new_value = new_key + D;

#pragma unroll 1
  for (int h0 = 0; h0 < N::G; h0 += S::HEADS) {
    const int count = min(S::HEADS, N::G - h0);
    const auto load_q = [&](int j) {
      const int d = 32 * j + 8 * column;
      return row < count && (D % 32 == 0 || d < D) ? ptx::load_shared(rows + (h0 + row) * D + d) : ptx::Vec4{0, 0, 0, 0};
    };
    float o[VV * 4][4], m[2] = {-infinity(), -infinity()}, l[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < VV * 4; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[i][e] = 0.0f;
    if (h0 && start < end) {
      fetch_keys(start);
      fetch_values(start);
    }
#pragma unroll 1
    for (int s0 = start; s0 < end; s0 += S::TILES * W * S::TILE) {
      const auto fresh = [&](int t) { return N::APPEND && static_cast<u32>(position - tile_of(t, s0)) < static_cast<u32>(S::TILE); };
      float w[S::TILES][4];
#pragma unroll
      for (int t = 0; t < S::TILES; ++t) {
        if (fresh(t))
#pragma unroll
          for (int r = 0; r < S::HALVES; ++r)
            if (place(tile_of(t, s0)) + key_of(r) == position)
#pragma unroll
              for (int j = 0; j < KV; ++j)
                if (const int d = 32 * j + 8 * column; D % 32 == 0 || d < D) key[t][r][j] = ptx::load_shared(new_key + d);
#pragma unroll
        for (int e = 0; e < 4; ++e) w[t][e] = 0.0f;
#pragma unroll
        for (int j = 0; j < KV; ++j) {
          const ptx::Vec4 x = load_q(j), a = key[t][0][j];  // q has no registers of its own
          const ptx::Vec4 z = S::HALVES == 2 ? key[t][S::HALVES - 1][j] : ptx::Vec4{0, 0, 0, 0};
          ptx::mma16816<HALF>(w[t], a.x, z.x, a.y, z.y, x.x, x.y);
          ptx::mma16816<HALF>(w[t], a.z, z.z, a.w, z.w, x.z, x.w);
        }
      }
      float top[2] = {m[0], m[1]};
#pragma unroll
      for (int t = 0; t < S::TILES; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float score = w[t][e] * N::SCALE;
          if constexpr (N::SOFTCAP != 0.0f) score = N::SOFTCAP * tanhf(score * (1.0f / N::SOFTCAP));
          const int s = place(tile_of(t, s0)) + key_of(e / 2);
          bool dead = s < tile_of(t, s0) || s >= end || (e >= 2 && S::HALVES == 1);
          if constexpr (N::MASK != 0 && !N::MASK_PER_HEAD) score += N::mask_value(mask[t][e / 2 % S::HALVES]);
          if constexpr (N::MASK != 0 && N::MASK_PER_HEAD) {
            const int head = g * N::G + min(h0 + 2 * column + e % 2, N::G - 1);
            if (!dead) {
              if constexpr (N::MASK == 1) dead = !N::mask_bool(c, b, head, s);
              else score += N::mask_add(c, b, head, s);
            }
          }
          w[t][e] = dead ? -infinity() : score;
          top[e % 2] = fmaxf(top[e % 2], w[t][e]);
        }
      const int next = s0 + S::TILES * W * S::TILE;
      if (next < end) fetch_keys(next);
      bool moved = false;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int bit = 4; bit < 32; bit <<= 1) top[i] = fmaxf(top[i], __shfl_xor_sync(~0u, top[i], bit));
        moved = moved || top[i] != m[i];
      }
      if (__any_sync(~0u, moved)) {
        float keep[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          keep[i] = m[i] != -infinity() ? ptx::exp2_approx((m[i] - top[i]) * kLog2e) : 0.0f;
          l[i] *= keep[i];
          m[i] = top[i];
        }
#pragma unroll
        for (int i = 0; i < VV * 4; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) o[i][e] *= keep[e % 2];
      }
#pragma unroll
      for (int t = 0; t < S::TILES; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          w[t][e] = w[t][e] != -infinity() ? ptx::exp2_approx((w[t][e] - m[e % 2]) * kLog2e) : 0.0f;
          l[e % 2] += w[t][e];
        }
        if (fresh(t))
#pragma unroll
          for (int i = 0; i < 2 * S::HALVES; ++i)
            if (place(tile_of(t, s0)) + value_of(i) == position)
#pragma unroll
              for (int j = 0; j < VV; ++j)
                if (const int d = column_of(j); D % (64 * S::PARTS) == 0 || d < D) value[t][i][j] = ptx::load_shared(new_value + d);
        // What an ignored key holds, even NaN, is no matter.
        u32 used[S::HALVES];
        if constexpr (N::MASK != 0) {
          const bool mine = 2 * column < count, beside = 2 * column + 1 < count;
#pragma unroll
          for (int r = 0; r < S::HALVES; ++r)
            used[r] = __ballot_sync(~0u, (mine && w[t][2 * r] != 0.0f) || (beside && w[t][2 * r + 1] != 0.0f));
        }
        if (N::MASK != 0 || tile_of(t, s0) + S::TILE > end)
#pragma unroll
          for (int i = 0; i < 2 * S::HALVES; ++i) {
            const int s = place(tile_of(t, s0)) + value_of(i);
            if (N::MASK != 0 ? (used[i / 2] >> (4 * (2 * column + i % 2)) & 15u) == 0 : s < tile_of(t, s0) || s >= end)
#pragma unroll
              for (int j = 0; j < VV; ++j) value[t][i][j] = {0, 0, 0, 0};
          }
        u32 high[2] = {0, 0}, low[2] = {0, 0};
#pragma unroll
        for (int r = 0; r < S::HALVES; ++r) weight_fragments<T>(w[t][2 * r], w[t][2 * r + 1], high[r], low[r]);
#pragma unroll
        for (int j = 0; j < VV; ++j) {
          constexpr int LAST = 2 * S::HALVES - 2;
          const ptx::Vec4 &v0 = value[t][0][j], &v1 = value[t][1][j], &v2 = value[t][LAST][j], &v3 = value[t][LAST + 1][j];
          const u32 from[4][4] = {{v0.x, v1.x, v2.x, v3.x}, {v0.y, v1.y, v2.y, v3.y}, {v0.z, v1.z, v2.z, v3.z}, {v0.w, v1.w, v2.w, v3.w}};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const u32 a0 = __byte_perm(from[i][0], from[i][1], 0x5410), a1 = __byte_perm(from[i][0], from[i][1], 0x7632);
            const u32 a2 = S::HALVES == 2 ? __byte_perm(from[i][2], from[i][3], 0x5410) : 0;
            const u32 a3 = S::HALVES == 2 ? __byte_perm(from[i][2], from[i][3], 0x7632) : 0;
            ptx::mma16816<HALF>(o[4 * j + i], a0, a1, a2, a3, high[0], high[1]);
            ptx::mma16816<HALF>(o[4 * j + i], a0, a1, a2, a3, low[0], low[1]);
          }
        }
      }
      if (next < end) fetch_values(next);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int bit = 4; bit < 32; bit <<= 1) l[i] += __shfl_xor_sync(~0u, l[i], bit);
#pragma unroll 1
    for (int first = 0; first < count; first += S::MERGED) {
      const int merged = min(S::MERGED, count - first);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int h = 2 * column + i - first;
        if (h < 0 || h >= merged) continue;
        float* to = sums + (warp * S::MERGED + h) * S::Scratch::STRIDE;
#pragma unroll
        for (int j = 0; j < VV; ++j)
          if (const int d = column_of(j); D % (64 * S::PARTS) == 0 || d < D)
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              to[d + 2 * k] = o[4 * j + k][i];
              to[d + 2 * k + 1] = o[4 * j + k][2 + i];
            }
        if (row == 0 && part == 0) {
          stats[(warp * S::MERGED + h) * 2] = m[i];
          stats[(warp * S::MERGED + h) * 2 + 1] = l[i];
        }
      }
      c.barrier();
      attention_finish<N, typename S::Scratch>(c, sums, stats, b, g * N::G + h0 + first, merged, split, splits);
      if (h0 + first + merged < N::G) c.barrier();
    }
  }
}

}  // namespace mpk
