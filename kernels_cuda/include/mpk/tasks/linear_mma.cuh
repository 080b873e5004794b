// linear for 2 to 16 tokens on tensor cores (mma.sync m16n8k16): tokens are M, 8 weight rows are N.
//
// A slot is a tile of 8 rows x CHUNK columns, row pieces padded apart so that 16-byte reads do not conflict. Within 32
// columns a lane takes 8 consecutive ones of its row and of its tokens: a permutation of k that both operands share, so
// every operand is one 16-byte load. Warp w owns the 32-column groups w, w + 8, ... of a chunk; x fragments of a chunk
// stay in registers while the block's tiles pass. The order of slots is chunk, tile, joint weight; a run of the loader
// is one block of one segment. Partial sums of the warps meet in shared memory in a fixed order.
//
// N: as in linear.cuh; COPY_BYTES is CHUNK columns.
#pragma once
#include "mpk/group.cuh"

namespace mpk {

template <class N>
struct MmaShape {
  static constexpr int CHUNK = N::COPY_BYTES / 2;
  static constexpr int CHUNKS = (N::K + CHUNK - 1) / CHUNK;
  static constexpr int GROUPS = (CHUNK / 32 + (CHUNK % 32 != 0) + static_cast<int>(kConsumerWarps) - 1) / static_cast<int>(kConsumerWarps);
  static constexpr int TOKENS = N::T > 8 ? 16 : 8;
  static constexpr int TILES = 8 / N::JOINT;  // tiles of a block: as many as registers allow
  // Every chunk is whole and every warp has all its groups: no bounds to check.
  static constexpr bool WHOLE = N::K % CHUNK == 0 && CHUNK % (32 * static_cast<int>(kConsumerWarps)) == 0;
  static constexpr int BLOCK_ROWS = TILES * static_cast<int>(kTileRows);
  static constexpr int ENTRY = TOKENS * static_cast<int>(kTileRows);  // partial sums of a tile
  static constexpr int ROUND = (TOKENS == 8 ? 8 : 4) / N::JOINT;     // tiles reduced together: 16 KiB
  static constexpr int SCRATCH = ROUND * N::JOINT * ENTRY * static_cast<int>(kConsumerWarps) * 4;
  static_assert(N::REDUCTIONS == 0, "with several tokens the prologue is a map");
  static_assert(N::T <= 16 && (N::JOINT == 1 || N::JOINT == 2 || N::JOINT == 4), "shape");
};

template <class E>
MPK_DEVICE u32 pack2(float a, float b) {
  return static_cast<u32>(narrow<E>(a).bits) | static_cast<u32>(narrow<E>(b).bits) << 16;
}

template <class N, class Ctx>
MPK_DEVICE void linear_mma(Ctx& c) {
  using S = MmaShape<N>;
  using E = typename N::Element;
  constexpr bool HALF = N::HALF;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane / 4, q = lane % 4;
  float* scratch = reinterpret_cast<float*>(c.scratch());
  if (!c.wait()) return;
  const int segments = c.arg(7);
  for (int s = 0; s < segments; ++s) {
    const Segment seg = c.ready->segment[s];
    const int joint = N::joint(seg.part);
    for (u32 block = 0; block < seg.rows; block += S::BLOCK_ROWS) {
      const int rows = min(static_cast<u32>(S::BLOCK_ROWS), seg.rows - block);
      const int tiles = (rows + static_cast<int>(kTileRows) - 1) / static_cast<int>(kTileRows);
      float acc[S::TILES][N::JOINT][4];
#pragma unroll
      for (int i = 0; i < S::TILES; ++i)
#pragma unroll
        for (int j = 0; j < N::JOINT; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
#pragma unroll 1
      for (int chunk = 0; chunk < S::CHUNKS; ++chunk) {
        const int columns = S::WHOLE ? S::CHUNK : min(S::CHUNK, N::K - chunk * S::CHUNK);
        u32 a[S::GROUPS][S::TOKENS / 8][4];
        const auto column = [&](int i) { return (warp + i * static_cast<int>(kConsumerWarps)) * 32 + q * 8; };
#pragma unroll
        for (int h = 0; h < S::TOKENS / 8; ++h) {  // 8 tokens at a time: what is held of 16 did not fit in registers
          const int t = g + h * 8;
          typename N::Held held[S::GROUPS];
          const auto each = [&](auto&& visit) {
#pragma unroll
            for (int i = 0; i < S::GROUPS; ++i)
              if ((S::WHOLE || column(i) < columns) && t < N::T) visit(i, chunk * S::CHUNK + column(i));
          };
          each([&](int i, int k) {
            N::template load<true>(c, t, k, held[i]);
            N::template load<false>(c, t, k, held[i]);
          });
          poll_until(c, [&] {
            bool complete = true;
            each([&](int i, int k) { complete = N::poll(c, t, k, held[i]) && complete; });
            return complete;
          });
#pragma unroll
          for (int i = 0; i < S::GROUPS; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) a[i][h][e] = 0;
          each([&](int i, int k) {
            float x[8];
            N::x(c, t, k, held[i], nullptr, x);
#pragma unroll
            for (int e = 0; e < 4; ++e) a[i][h][e] = pack2<E>(x[2 * e], x[2 * e + 1]);
          });
        }
        if (s == 0 && block == 0 && chunk == 0) c.streaming();
#pragma unroll
        for (int tile = 0; tile < S::TILES; ++tile) {
          if (tile >= tiles) continue;
#pragma unroll
          for (int j = 0; j < N::JOINT; ++j) {
            if (j >= joint) continue;
            const char* bytes = c.ring.wait() + g * (N::COPY_BYTES + static_cast<int>(kTilePad)) + q * 16 + warp * 64;
            ptx::Vec4 w[S::GROUPS];  // all loads of the slot before the first product
#pragma unroll
            for (int i = 0; i < S::GROUPS; ++i) {
              const int k = (warp + i * static_cast<int>(kConsumerWarps)) * 32 + q * 8;
              w[i] = {0, 0, 0, 0};  // stale bytes of a slot must not meet x = 0: they may be infinite
              if (S::WHOLE || k < columns) w[i] = ptx::load_shared(bytes + i * static_cast<int>(kConsumerWarps) * 64);
            }
            constexpr int HI = S::TOKENS / 8 - 1;
            float odd[4] = {0.0f, 0.0f, 0.0f, 0.0f};  // two chains of products: each waits for its own last one only
#pragma unroll
            for (int i = 0; i < S::GROUPS; ++i) {
              const auto a1 = [&](int e) { return HI ? a[i][HI][e] : 0u; };
              ptx::mma16816<HALF>(acc[tile][j], a[i][0][0], a1(0), a[i][0][1], a1(1), w[i].x, w[i].y);
              ptx::mma16816<HALF>(odd, a[i][0][2], a1(2), a[i][0][3], a1(3), w[i].z, w[i].w);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[tile][j][e] += odd[e];
            c.ring.release();
          }
        }
      }
      if (s == segments - 1 && block + S::BLOCK_ROWS >= seg.rows) c.last_slot_consumed();
#pragma unroll
      for (int round = 0; round < S::TILES; round += S::ROUND) {
        if (round >= tiles) continue;
        c.barrier();  // the previous round has been read
#pragma unroll
        for (int i = 0; i < S::ROUND; ++i)
#pragma unroll
          for (int j = 0; j < N::JOINT; ++j) {
            float* to = scratch + ((i * N::JOINT + j) * static_cast<int>(kConsumerWarps) + warp) * S::ENTRY + g * 8 + q * 2;
            if (round + i < S::TILES) {
              to[0] = acc[round + i][j][0];
              to[1] = acc[round + i][j][1];
              if (S::TOKENS == 16) {
                to[64] = acc[round + i][j][2];
                to[65] = acc[round + i][j][3];
              }
            }
          }
        c.barrier();
        for (int e = threadIdx.x; e < S::ROUND * N::T * 8; e += kConsumers) {
          const int i = e / (N::T * 8), t = e / 8 % N::T, r = e % 8, row = (round + i) * 8 + r;
          if (row < rows) {
            float y[N::JOINT];
#pragma unroll
            for (int j = 0; j < N::JOINT; ++j) {
              const float* from = scratch + (i * N::JOINT + j) * static_cast<int>(kConsumerWarps) * S::ENTRY + t * 8 + r;
              y[j] = 0.0f;
#pragma unroll
              for (int w = 0; w < static_cast<int>(kConsumerWarps); ++w) y[j] += from[w * S::ENTRY];
            }
            u32 kept[N::HOLD];
            N::hold(c, seg.part, t, seg.row + block + row, kept);
            N::epilogue(c, seg.part, t, seg.row + block + row, y, kept);
          }
        }
      }
    }
  }
}

}  // namespace mpk
