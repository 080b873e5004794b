// linear for 2 to 16 tokens on tensor cores (mma.sync m16n8k16): tokens are M, 8 weight rows (a tile) are N.
//
// A slot holds SLOT_ROWS rows, each CHUNK columns long, one after the other: whole rows, which are then one contiguous
// copy, or pieces of rows too long for x to stay in registers. Every warp passes every slot and owns some of its columns
// (mma_input.cuh). The 8 lanes that a 16-byte shared load serves together read 64 bytes of two rows; where rows are a
// multiple of 128 bytes apart, odd rows read their other 64 bytes first, so that the two never share a bank.
//
// The order of slots is chunk, tile, joint weight. Sums of a tile leave the registers with the chunk: each warp keeps its
// own in shared memory, so that one loop passes all tiles (its code once for each tile would not stay in the instruction
// cache). They meet there in a fixed order at the end of a block.
//
// N: as in linear.cuh but for the prologue (mma_input.cuh); SLOT_ROWS, CHUNK.
#pragma once
#include "mpk/tasks/mma_input.cuh"

namespace mpk {

template <class N>
struct MmaShape {
  using Input = MmaInput<N>;
  static constexpr int WARPS = static_cast<int>(kConsumerWarps);
  static constexpr int TILE = static_cast<int>(kTileRows);
  static constexpr int PARTS = TILE / N::SLOT_ROWS;  // slots of a tile
  static constexpr int STRIDE = Input::CHUNKS == 1 ? N::K * 2 : N::CHUNK * 2;  // bytes from row to row in a slot
  static constexpr bool SWAP = STRIDE % 128 < 32 || STRIDE % 128 > 96;
  static constexpr int BLOCK_ROWS = N::TILES * TILE;
  static constexpr int ENTRY = Input::HALVES * 8 * TILE;     // sums of a tile, of a warp
  static constexpr int PITCH = WARPS * ENTRY + 8 / N::JOINT;  // padded: neighbouring tiles in other banks
  static constexpr int SUMS = N::TILES * N::JOINT * PITCH * 4;
  static constexpr int SCRATCH = SUMS + Input::SCRATCH;
  static constexpr int OWN = (BLOCK_ROWS * N::T + static_cast<int>(kConsumers) - 1) / static_cast<int>(kConsumers);
  static_assert(N::T <= 16 && (N::JOINT == 1 || N::JOINT == 2), "shape");
};

// The output elements that this thread owns of a block: visit(u, row of the block, token), rows next to each other.
template <class N, class F>
MPK_DEVICE void each_owned(int rows, F&& visit) {
  using S = MmaShape<N>;
#pragma unroll
  for (int u = 0; u < S::OWN; ++u) {
    const int e = static_cast<int>(threadIdx.x) + u * static_cast<int>(kConsumers);
    const int row = e % S::BLOCK_ROWS, t = e / S::BLOCK_ROWS;
    if (t < N::T && row < rows) visit(u, row, t);
  }
}

// x times one tile of a weight, of which `m` rows exist, into sums (added to what is there if `more`).
template <class N, class Ctx>
MPK_DEVICE void multiply_tile(Ctx& c, const MmaInput<N>& x, int m, int columns, float2* sums, bool more) {
  using S = MmaShape<N>;
  using I = MmaInput<N>;
  const int g = x.lane / 4;
  const int parts = min(S::PARTS, (m + N::SLOT_ROWS - 1) / N::SLOT_ROWS);
  const char* mine = nullptr;
  auto ahead = c.ring.at;
#pragma unroll
  for (int p = 0; p < S::PARTS; ++p)
    if (p < parts) {
      const char* slot = c.ring.wait(ahead);
      if (p == 0 || g / N::SLOT_ROWS >= p) mine = slot;  // lanes without a row read the last slot there is
      ahead.next();
    }
  const bool swap = S::SWAP && (g & 1);
  mine += g % N::SLOT_ROWS * S::STRIDE + x.first * 2;
  float acc[4][4];  // chains of products: each waits for its own last one only
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[i][e] = 0.0f;
  constexpr int AHEAD = I::GROUPS < 4 ? I::GROUPS : 4;  // groups loaded ahead of their products
  ptx::Vec4 w[AHEAD][2];
  const auto load = [&](int i) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int half = swap ? 1 - s : s;
      w[i % AHEAD][s] = {0, 0, 0, 0};  // stale bytes of a slot must not meet x = 0: they may be infinite
      if (I::WHOLE || x.at(i, half) < columns) w[i % AHEAD][s] = ptx::load_shared(mine + i * 128 * S::WARPS + half * 64);
    }
  };
#pragma unroll
  for (int i = 0; i < AHEAD; ++i) load(i);
#pragma unroll
  for (int i = 0; i < I::GROUPS; ++i) {
    const ptx::Vec4 b[2] = {swap ? w[i % AHEAD][1] : w[i % AHEAD][0], swap ? w[i % AHEAD][0] : w[i % AHEAD][1]};
    if (i + AHEAD < I::GROUPS) load(i + AHEAD);
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const auto a = [&](int h, int e) { return h < I::HALVES ? x.word[2 * i + s][h < I::HALVES ? h : 0][e] : 0u; };
      ptx::mma16816<N::HALF>(acc[2 * s], a(0, 0), a(1, 0), a(0, 1), a(1, 1), b[s].x, b[s].y);
      ptx::mma16816<N::HALF>(acc[2 * s + 1], a(0, 2), a(1, 2), a(0, 3), a(1, 3), b[s].z, b[s].w);
    }
  }
  c.ring.release(parts);
#pragma unroll
  for (int h = 0; h < I::HALVES; ++h) {
    const auto sum = [&](int e) { return (acc[0][e] + acc[1][e]) + (acc[2][e] + acc[3][e]); };
    const float2 old = more ? sums[32 * h] : float2{0.0f, 0.0f};
    sums[32 * h] = {old.x + sum(2 * h), old.y + sum(2 * h + 1)};
  }
}

template <class N, class Ctx>
MPK_DEVICE void linear_mma(Ctx& c) {
  using S = MmaShape<N>;
  using I = MmaInput<N>;
  static_assert(S::PARTS <= Ctx::SLOTS, "the ring must hold the rows of a tile");
  const int warp = threadIdx.x / 32;
  float* scratch = reinterpret_cast<float*>(c.scratch());
  I x(c.scratch() + S::SUMS);
  if (I::CHUNKS == 1) x.load_columns(c, 0);
  if (!c.wait()) return;
  if (I::CHUNKS == 1) {
    x.load(c, 0, true);
    c.streaming();
  }
  const int segments = c.arg(7);
  for (int s = 0; s < segments; ++s) {
    const Segment seg = c.ready->segment[s];
    const int joint = N::joint(seg.part);
    for (u32 block = 0; block < seg.rows; block += S::BLOCK_ROWS) {
      const int rows = min(static_cast<u32>(S::BLOCK_ROWS), seg.rows - block);
      const u32 base = seg.row + block;
      u32 kept[S::OWN][N::HOLD];
      each_owned<N>(rows, [&](int u, int row, int t) { N::hold(c, seg.part, t, base + row, kept[u]); });
      if (s || block) c.barrier();  // the sums of the block before have been read
      const bool end = s == segments - 1 && block + S::BLOCK_ROWS >= seg.rows;
#pragma unroll 1
      for (int chunk = 0; chunk < I::CHUNKS; ++chunk) {
        if (I::CHUNKS > 1) {
          const bool early = s == 0 && block == 0 && chunk == 0;
          x.load(c, chunk, early);
          if (early) c.streaming();
        }
        const int columns = I::width(chunk);
        float* to = scratch + warp * S::ENTRY;
#pragma unroll 1
        for (int first = 0; first < rows; first += S::TILE)
#pragma unroll 1
          for (int j = 0; j < N::JOINT; ++j, to += S::PITCH)
            if (j < joint) multiply_tile<N>(c, x, rows - first, columns, reinterpret_cast<float2*>(to) + x.lane, chunk > 0);
      }
      if (end) c.last_slot_consumed();
      c.barrier();
      each_owned<N>(rows, [&](int u, int row, int t) {
        float y[N::JOINT];
#pragma unroll
        for (int j = 0; j < N::JOINT; ++j) {
          const float* from = scratch + (row / S::TILE * N::JOINT + j) * S::PITCH + t * S::TILE + row % S::TILE;
          y[j] = 0.0f;
          if (j < joint)
#pragma unroll
            for (int w = 0; w < S::WARPS; ++w) y[j] += from[w * S::ENTRY];
        }
        N::epilogue(c, seg.part, t, base + row, y, kept[u]);
      });
    }
  }
}

}  // namespace mpk
