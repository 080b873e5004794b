// linear for 2 to 16 tokens on tensor cores (mma.sync m16n8k16), a tile of 8 weight rows at a time.
//
// More than 8 tokens are M and the weight rows N. Up to 8 are N, and 16 bytes of a weight row, as a lane loads them, the
// four registers of A: their first and third word stand for row g of M, the second and fourth for row g + 8. So two
// products, each with the tokens' words for one of the rows; the sums of the other are not used. Nothing is moved or
// zeroed for either.
//
// A slot holds SLOT_ROWS rows, each CHUNK columns long, one after the other: whole rows, which are then one contiguous
// copy, or pieces of rows too long for x to stay in registers. Every warp passes every slot and owns some of its columns
// (mma_input.cuh). The 8 lanes that a 16-byte shared load serves together read 64 bytes of two rows; where rows are a
// multiple of 128 bytes apart, odd rows read their other 64 bytes first, so that the two never share a bank.
//
// The order of slots is chunk, tile, joint weight. Weights go to registers while the ones before are multiplied, across
// tiles, and the barriers of a tile's slots have been looked at a tile before. Sums of a tile leave the registers with the
// chunk: each warp keeps its own in shared memory, so that one loop passes all tiles (its code once for each tile would not
// stay in the instruction cache). They meet there in a fixed order at the end of a block.
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
  static constexpr int FIT = 8 / Input::HALVES / N::JOINT, EACH = static_cast<int>(kConsumers) / (TILE * N::T);
  // Of a block: 16 KiB of sums, and an output element a thread where x need not be read again for each block.
  static constexpr int TILES = FIT < EACH || Input::CHUNKS > 1 ? FIT : EACH;
  static constexpr int BLOCK_ROWS = TILES * TILE;
  static constexpr int ENTRY = Input::HALVES * 8 * TILE;     // sums of a tile, of a warp
  static constexpr int PITCH = WARPS * ENTRY + (Input::HALVES == 2 ? 8 / N::JOINT : 4);  // neighbours in other banks
  static constexpr int OWN = (BLOCK_ROWS * N::T + static_cast<int>(kConsumers) - 1) / static_cast<int>(kConsumers);
  static constexpr int SUMS = TILES * N::JOINT * PITCH * 4;
  static constexpr int SCRATCH = SUMS + Input::SCRATCH;
  static_assert(Input::EXCHANGED <= TILES * N::JOINT * (ENTRY / 4), "a warp exchanges its input where its sums will be");
  static_assert(TILES > 0 && N::T <= 16 && (N::JOINT == 1 || N::JOINT == 2), "shape");
};

// Where a warp's sums of a tile are, as MmaTiles leaves them.
template <class N>
MPK_DEVICE int place_in_entry(int row, int t) {
  return MmaInput<N>::HALVES == 2 ? t * static_cast<int>(kTileRows) + row : row * 8 + t;
}

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

// The tiles of a task. This thread has its vectors of the next AHEAD groups of columns in registers.
template <class N, class Ctx>
struct MmaTiles {
  using S = MmaShape<N>;
  using I = MmaInput<N>;
  static constexpr int AHEAD = I::GROUPS < 2 ? I::GROUPS : 2;
  Ctx& c;
  const I& x;
  const bool swap;
  const ptx::Address base;
  ptx::Vec4 w[AHEAD][2];
  ptx::Address at;    // where this lane reads the tile
  int columns;        // of the tile
  int parts = 0;      // slots of the tile, which this warp still has
  bool full = false;  // those of the tile after it are there
  MPK_DEVICE MmaTiles(Ctx& context, const I& input)
      : c(context), x(input), swap(S::SWAP && (input.lane / 4 & 1)), base(ptx::opaque(ptx::shared_address(&context.ring.ring))) {}

  // Lets go of the tile's slots and waits for the next one, of a chunk of `width` columns and `rows` rows or more.
  MPK_DEVICE void next(int rows, int width) {
    c.ring.template release<S::PARTS>(base, parts);
    parts = min(S::PARTS, (rows + N::SLOT_ROWS - 1) / N::SLOT_ROWS);
    if (parts && !full) c.ring.template await<S::PARTS>(base, parts);
    columns = width;
    const int g = x.lane / 4;  // lanes without a row read the last slot there is
    at = c.ring.address(base, max(min(g / N::SLOT_ROWS, parts - 1), 0)) + g % N::SLOT_ROWS * S::STRIDE + x.first * 2;
  }
  MPK_DEVICE void load(int i) {
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      const int half = swap ? 1 - s : s;
      const ptx::Address from = at + i * 128 * S::WARPS + half * 64;
      ptx::Vec4& to = w[i % AHEAD][s];
      if (I::WHOLE) to = ptx::load_shared(from);
      else to = x.at(i, half) < columns ? ptx::load_shared(from) : ptx::Vec4{0, 0, 0, 0};  // stale bytes may be infinite
    }
  }
  MPK_DEVICE void first(int rows, int width) {
    next(rows, width);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) load(i);
  }
  // x times the tile, into the warp's sums of it (added to what is there if `more`). The next one is of `rows` rows; if
  // there is none (0), what is loaded again is not used.
  MPK_DEVICE void multiply(float2* sums, bool more, int rows, int width) {
    float acc[4][4];  // chains of products: each waits for its own last one only
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[i][e] = 0.0f;
#pragma unroll
    for (int i = 0; i < I::GROUPS; ++i) {
      const ptx::Vec4 b[2] = {swap ? w[i % AHEAD][1] : w[i % AHEAD][0], swap ? w[i % AHEAD][0] : w[i % AHEAD][1]};
      if (i + AHEAD == I::GROUPS) next(rows, width);
      load((i + AHEAD) % I::GROUPS);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const auto& v = x.word[i][s];
        if constexpr (I::HALVES == 2) {
          ptx::mma16816<N::HALF>(acc[2 * s], v[0][0], v[1][0], v[0][1], v[1][1], b[s].x, b[s].y);
          ptx::mma16816<N::HALF>(acc[2 * s + 1], v[0][2], v[1][2], v[0][3], v[1][3], b[s].z, b[s].w);
        } else {
          ptx::mma16816<N::HALF>(acc[2 * s], b[s].x, b[s].y, b[s].z, b[s].w, v[0][0], v[0][2]);
          ptx::mma16816<N::HALF>(acc[2 * s + 1], b[s].x, b[s].y, b[s].z, b[s].w, v[0][1], v[0][3]);
        }
      }
    }
    full = c.ring.template look<S::PARTS>(base, parts);
#pragma unroll
    for (int h = 0; h < I::HALVES; ++h) {
      const auto sum = [&](int e) {
        const int odd = I::HALVES == 2 ? 2 * h + e : 2 + e;
        return (acc[0][2 * h + e] + acc[2][2 * h + e]) + (acc[1][odd] + acc[3][odd]);
      };
      const float2 old = more ? sums[32 * h] : float2{0.0f, 0.0f};
      sums[32 * h] = {old.x + sum(0), old.y + sum(1)};
    }
  }
};

template <class N, class Ctx>
MPK_DEVICE void linear_mma(Ctx& c) {
  using S = MmaShape<N>;
  using I = MmaInput<N>;
  const int warp = threadIdx.x / 32, segments = c.arg(7);
  float* scratch = reinterpret_cast<float*>(c.scratch());
  I x(c.scratch() + S::SUMS);
  if (I::CHUNKS == 1) x.load_columns(c, 0);
  if (!c.wait()) return;
  MmaTiles<N, Ctx> tiles(c, x);
  const auto exchange = [&](int i) {
    constexpr int MANY = S::ENTRY / 4;  // vectors
    return reinterpret_cast<ptx::Vec4*>(scratch + i / MANY * S::PITCH + warp * S::ENTRY) + i % MANY;
  };
  if (I::CHUNKS == 1) {
    x.load(c, 0, true, exchange);
    c.streaming();
  }
  tiles.first(c.ready->segment[0].rows, I::width(0));
#pragma unroll 1
  for (int s = 0; s < segments; ++s) {
    const Segment seg = c.ready->segment[s];
    const int joint = N::joint(seg.part);
#pragma unroll 1
    for (u32 block = 0; block < seg.rows; block += S::BLOCK_ROWS) {
      const int left = static_cast<int>(seg.rows - block), rows = min(S::BLOCK_ROWS, left);
      const u32 base = seg.row + block;
      const int after = left > rows ? left - rows : s + 1 < segments ? static_cast<int>(c.ready->segment[s + 1].rows) : 0;
      u32 kept[S::OWN][N::HOLD];
      each_owned<N>(rows, [&](int u, int row, int t) { N::hold(c, seg.part, t, base + row, kept[u]); });
      if (s || block) c.barrier();  // the sums of the block before have been read
      const int count = (rows + S::TILE - 1) / S::TILE * joint;
#pragma unroll 1
      for (int chunk = 0; chunk < I::CHUNKS; ++chunk) {
        if (I::CHUNKS > 1) {
          const bool early = s == 0 && block == 0 && chunk == 0, last = chunk + 1 == I::CHUNKS;
          x.load(c, chunk, early, exchange);
          if (early) c.streaming();
          x.prefetch(c, last ? 0 : chunk + 1, !last || after);
        }
        float* to = scratch + warp * S::ENTRY;
#pragma unroll 1
        for (int tile = 1; tile <= count; ++tile, to += S::PITCH) {
          const bool within = tile < count, over = chunk + 1 == I::CHUNKS;
          tiles.multiply(reinterpret_cast<float2*>(to) + x.lane, chunk > 0, within ? rows - tile / joint * S::TILE : over ? after : rows,
                         I::width(within ? chunk : over ? 0 : chunk + 1));
        }
      }
      if (!after) c.last_slot_consumed();
      c.barrier();
      each_owned<N>(rows, [&](int u, int row, int t) {
        float y[N::JOINT];
#pragma unroll
        for (int j = 0; j < N::JOINT; ++j) {
          const float* from = scratch + (row / S::TILE * joint + j) * S::PITCH + place_in_entry<N>(row % S::TILE, t);
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
