// linear of one token, fp32 FMA: y[n] = sum_k x[k] * w[n, k], weights streamed through the ring.
//
// A slot is one contiguous copy: whole rows, or one of PIECES equal pieces of a row. WARPS warps share its columns, and the
// others take other rows. Of a warp's columns 4 lanes take 64 bytes of a row: 8 rows at a time, or where a slot has fewer,
// SEGMENTS parts of each. Where it has 8, odd rows are read in the other order of the two halves of 128 bytes, so that the 8
// lanes that a 16-byte load serves together never share a bank. A lane's vectors of a tile are read a tile before they are
// multiplied, and the slot's barrier is looked at a tile before that.
//
// x goes through shared memory to the lanes that own its columns. Sums meet there too, over lanes and warps: no tile waits
// for shuffles. One owner and a fixed order: bit-identical from run to run.
//
// N (generated): as for linear.cuh. PLAIN: x is the one vector that is held, as it is in memory: plain(held).
#pragma once
#include "mpk/tasks/linear.cuh"

namespace mpk {

constexpr int pow2_at_most(int n) { return n < 2 ? n : 2 * pow2_at_most(n / 2); }

template <class N>
struct TokenShape {
  static constexpr int VECTOR = 16 / static_cast<int>(sizeof(typename N::Element));  // elements of 16 bytes
  static constexpr int ROW_BYTES = N::K * static_cast<int>(sizeof(typename N::Element));
  static constexpr int PIECES = N::COPY_BYTES < ROW_BYTES ? ROW_BYTES / N::COPY_BYTES : 1;
  static constexpr int SLOT_ROWS = PIECES > 1 ? 1 : N::COPY_BYTES / ROW_BYTES;
  static constexpr int PIECE_BYTES = ROW_BYTES / PIECES;
  static constexpr int WARPS = N::WARPS, GROUPS = static_cast<int>(kConsumerWarps) / WARPS;
  static constexpr int ROWS = SLOT_ROWS > 4 ? 8 : SLOT_ROWS > 2 ? 4 : SLOT_ROWS;  // of a tile
  static constexpr int TILES = (SLOT_ROWS + 8 * GROUPS - 1) / (8 * GROUPS);       // of a slot and a group of warps
  static constexpr int SEGMENTS = 8 / ROWS;                                       // of a row
  static constexpr bool ALTERNATE = SEGMENTS == 1;
  static constexpr int UNIT = (ALTERNATE ? 2 : SEGMENTS) * 64;  // bytes of a row that a warp takes at a time
  static constexpr int STEPS = (PIECE_BYTES + UNIT * WARPS - 1) / (UNIT * WARPS) * (ALTERNATE ? 2 : 1);
  static constexpr bool WHOLE = PIECE_BYTES % (UNIT * WARPS) == 0;
  static constexpr bool UNPACKED = PIECES * STEPS * VECTOR <= 64;  // x is in fp32 registers, otherwise as in memory
  struct Input {  // x as the threads compute it
    static constexpr int VECTOR = TokenShape::VECTOR, VECTORS = N::K / VECTOR, LANES = static_cast<int>(kConsumers), PIECES = 1;
    static constexpr int PER_THREAD = (VECTORS + LANES - 1) / LANES;
  };
  // Of a row, a warp leaves the sums of LEFT lanes in shared memory, a block of rows at a time.
  static constexpr int PARTIAL_MOST = 7936;  // bytes of a block; with 8192 an x of 24 KiB would cost a slot of the ring
  static constexpr int LEFT = SEGMENTS * N::JOINT <= 2 ? 4 * SEGMENTS : SEGMENTS;
  static constexpr int ROW_SUMS = N::JOINT * WARPS * LEFT;
  static constexpr int STRIDE = ROW_SUMS + 4;  // other banks each row
  static constexpr int MOST = LEFT < 8 ? LEFT : 8, FIT = pow2_at_most(static_cast<int>(kConsumers) / SLOT_ROWS);
  static constexpr int READERS = MOST < FIT ? MOST : FIT;  // threads that sum up a row
  static constexpr int BUDGET = PARTIAL_MOST / (STRIDE * 4), READ = static_cast<int>(kConsumers) / READERS;
  static constexpr int LIMIT = BUDGET < READ ? BUDGET : READ;
  static constexpr int BLOCK_ROWS = LIMIT < SLOT_ROWS ? SLOT_ROWS : LIMIT / SLOT_ROWS * SLOT_ROWS;
  static constexpr int PARTIAL_BYTES = BLOCK_ROWS * STRIDE * 4;
  // Two blocks, one barrier each. x lies where the second will: its first sums come when all have read x.
  static constexpr int SCRATCH = 128 + PARTIAL_BYTES + (PARTIAL_BYTES > ROW_BYTES ? PARTIAL_BYTES : (ROW_BYTES + 15) / 16 * 16);
  static_assert(BLOCK_ROWS <= READ, "a block is summed up at once");
  static_assert(PIECES > 1 ? PIECES * N::COPY_BYTES == ROW_BYTES : SLOT_ROWS * ROW_BYTES == N::COPY_BYTES, "copies");
  static_assert(N::T == 1 && PIECE_BYTES % 16 == 0 && GROUPS * WARPS == kConsumerWarps, "shape");
};

// The stream of weights, of which a lane holds its vectors of the next tile in registers.
template <class N, class Ctx>
struct TokenWeights {
  using S = TokenShape<N>;
  Ctx& c;
  const int group, row;
  const int place;  // bytes from the start of a piece to this lane's first vector, of x and of weights
  int left = 0;     // tiles of the task that are not read yet
  int tile = 0;     // of the slot: the next to read
  bool full = false;  // its slot is there: seen when the tile before was read
  ptx::Vec4 ahead[S::STEPS];

  MPK_DEVICE TokenWeights(Ctx& context, int warp, int lane)
      : c(context), group(warp / S::WARPS), row(lane / 4 / S::SEGMENTS),
        place(warp % S::WARPS * S::UNIT + lane / 4 % (S::UNIT / 64) * 64 + lane % 4 * 16) {}
  MPK_DEVICE int at(int step) const {
    if constexpr (S::ALTERNATE) return step / 2 * (S::UNIT * S::WARPS) + (step & 1 ? place ^ 64 : place);
    else return step * (S::UNIT * S::WARPS) + place;
  }
  MPK_DEVICE bool has(int step) const { return S::WHOLE || at(step) < S::PIECE_BYTES; }
  // Count the tiles of the task, and read the first.
  MPK_DEVICE void begin() {
#pragma unroll 1
    for (int s = 0; s < c.arg(7); ++s) {
      const Segment seg = c.ready->segment[s];
      left += (static_cast<int>(seg.rows) + S::SLOT_ROWS - 1) / S::SLOT_ROWS * (S::PIECES * S::TILES) * N::joint(seg.part);
    }
    read();
  }
  MPK_DEVICE void read() {
    --left;
    if (!full && tile == 0) c.ring.wait();
    // rows that the slot does not have are read from its last one: nobody keeps their sums
    const char* bytes = c.ring.bytes() + min((tile * S::GROUPS + group) * 8 + row, S::SLOT_ROWS - 1) * S::ROW_BYTES;
#pragma unroll
    for (int i = 0; i < S::STEPS; ++i)
      if (has(i)) ahead[i] = ptx::load_shared(bytes + at(i));
    if (S::TILES == 1 || ++tile == S::TILES) {
      tile = 0;
      c.ring.release();
    }
  }
  // This lane's part of the product of the tile with x, added to acc; reads the tile after it.
  MPK_DEVICE void multiply(const float (*x)[S::VECTOR], const ptx::Vec4* packed, float (&acc)[4]) {
    ptx::Vec4 now[S::STEPS];
#pragma unroll
    for (int i = 0; i < S::STEPS; ++i) now[i] = ahead[i];
    if (left) read();
    full = tile == 0 && c.ring.full();
#pragma unroll
    for (int i = 0; i < S::STEPS; ++i) {
      if (!has(i)) continue;  // stale bytes must not meet x = 0: they may be infinite
      float w[S::VECTOR], u[S::VECTOR];
      unpack<typename N::Element>(now[i], w);
      if constexpr (!S::UNPACKED) unpack<typename N::Element>(packed[i], u);
#pragma unroll
      for (int e = 0; e < S::VECTOR; ++e) acc[e % 4] = fmaf(w[e], S::UNPACKED ? x[i][e] : u[e], acc[e % 4]);
    }
  }
};

template <class N, class Ctx>
MPK_DEVICE void linear_token(Ctx& c) {
  using S = TokenShape<N>;
  using E = typename N::Element;
  const int thread = ptx::thread_index(), warp = thread / 32, lane = thread & 31;
  float* const partial = reinterpret_cast<float*>(c.scratch() + 128);
  char* const shared_x = c.scratch() + 128 + S::PARTIAL_BYTES;
  const int mine = thread / S::READERS, sub = thread % S::READERS;  // the row of a block that this thread sums up
  TokenWeights<N, Ctx> weights(c, warp, lane);
  u32 kept[N::HOLD];
  float x[S::UNPACKED ? S::PIECES * S::STEPS : 1][S::VECTOR];
  ptx::Vec4 packed[S::UNPACKED ? 1 : S::PIECES * S::STEPS];
  {
    using I = typename S::Input;
    WorkerGroup g(c.scratch());
    g.rank = thread;
    typename N::Held held[I::PER_THREAD];
    float red[N::REDUCTIONS + 1];
    const auto each = [&](auto&& visit) {  // threads without a vector take the last one again
#pragma unroll
      for (int p = 0; p < I::PER_THREAD; ++p) visit(p, min(p * I::LANES + thread, I::VECTORS - 1) * I::VECTOR);
    };
    each([&](int p, int k) { N::template load<true>(c, 0, k, held[p]); });
    if (!c.wait()) return;
    each([&](int p, int k) { N::template load<false>(c, 0, k, held[p]); });
    // what the epilogue reads, before the weights stream by: behind them it would come late
    const Segment seg = c.ready->segment[0];
    if (sub == 0 && mine < static_cast<int>(seg.rows)) N::hold(c, seg.part, 0, seg.row + mine, kept);
    weights.begin();
    poll_until(c, [&] {
      bool complete = true;
      each([&](int p, int k) { complete = N::poll(c, 0, k, held[p]) && complete; });
      return complete;
    });
    prologue_reductions<N, I, 0>(c, g, 0, held, red);
    each([&](int p, int k) {
      ptx::Vec4 v;
      if constexpr (N::PLAIN) {
        v = N::plain(held[p]);
      } else {
        float y[S::VECTOR];
        N::x(c, 0, k, held[p], red, y);
        if constexpr (sizeof(E) == 4) v = {__float_as_uint(y[0]), __float_as_uint(y[1]), __float_as_uint(y[2]), __float_as_uint(y[3])};
        else v = {pack2<E>(y[0], y[1]), pack2<E>(y[2], y[3]), pack2<E>(y[4 % S::VECTOR], y[5 % S::VECTOR]), pack2<E>(y[6 % S::VECTOR], y[7 % S::VECTOR])};
      }
      *reinterpret_cast<ptx::Vec4*>(shared_x + k * sizeof(E)) = v;
    });
    c.barrier();
#pragma unroll
    for (int piece = 0; piece < S::PIECES; ++piece)
#pragma unroll
      for (int i = 0; i < S::STEPS; ++i) {
        ptx::Vec4 v = {0, 0, 0, 0};
        if (weights.has(i)) v = ptx::load_shared(shared_x + piece * S::PIECE_BYTES + weights.at(i));
        if constexpr (S::UNPACKED) unpack<E>(v, x[piece * S::STEPS + i]);
        else packed[piece * S::STEPS + i] = v;
      }
    c.streaming();
  }

  const int segments = c.arg(7);
  int turn = 0;
#pragma unroll 1
  for (int s = 0; s < segments; ++s) {
    const Segment seg = c.ready->segment[s];
    const int joint = N::joint(seg.part);
#pragma unroll 1
    for (u32 block = 0; block < seg.rows; block += S::BLOCK_ROWS, turn ^= 1) {
      const int rows = min(static_cast<u32>(S::BLOCK_ROWS), seg.rows - block);
      float* const sums = partial + turn * (S::PARTIAL_BYTES / 4);
      if ((s || block) && sub == 0 && mine < rows) N::hold(c, seg.part, 0, seg.row + block + mine, kept);
      constexpr int PART = S::WARPS * S::LEFT;  // of a row's sums: those of one of the joint weights
      const int lanes = S::LEFT > S::SEGMENTS ? lane % (4 * S::SEGMENTS) : lane / 4 % S::SEGMENTS;
      float* to = sums + (weights.group * 8 + weights.row) * S::STRIDE + warp % S::WARPS * S::LEFT + lanes;
      const int tiles = (rows + S::SLOT_ROWS - 1) / S::SLOT_ROWS * joint * S::TILES;
      int j = 0, tile = 0;
#pragma unroll 1
      for (int i = 0; i < tiles; ++i) {
        float acc[4] = {};
#pragma unroll
        for (int piece = 0; piece < S::PIECES; ++piece)
          weights.multiply(x + (S::UNPACKED ? piece * S::STEPS : 0), packed + (S::UNPACKED ? 0 : piece * S::STEPS), acc);
        float sum = (acc[0] + acc[1]) + (acc[2] + acc[3]);
        if constexpr (S::LEFT == S::SEGMENTS) {
          sum += __shfl_xor_sync(~0u, sum, 1);
          sum += __shfl_xor_sync(~0u, sum, 2);
        }
        ptx::settle(sum);  // before the branch: behind it, the answer of the barrier would be waited for first
        if ((S::LEFT > S::SEGMENTS || lane % 4 == 0) && (tile * S::GROUPS + weights.group) * 8 + weights.row < S::SLOT_ROWS) *to = sum;
        if (S::TILES > 1 && ++tile < S::TILES) {
          to += 8 * S::GROUPS * S::STRIDE;
          continue;
        }
        to -= tile > 0 ? (S::TILES - 1) * 8 * S::GROUPS * S::STRIDE : 0;
        tile = 0;
        if (N::JOINT > 1 && ++j < joint) {
          to += PART;
          continue;
        }
        to += S::SLOT_ROWS * S::STRIDE - (j > 0 ? (N::JOINT - 1) * PART : 0);
        j = 0;
      }
      if (s == segments - 1 && block + S::BLOCK_ROWS >= seg.rows) c.last_slot_consumed();
      c.barrier();
      float y[N::JOINT];
#pragma unroll
      for (int j = 0; j < N::JOINT; ++j) {
        y[j] = 0.0f;
        if (j < joint && mine < rows)
#pragma unroll
          for (int w = 0; w < PART; w += S::READERS) y[j] += sums[mine * S::STRIDE + j * PART + w + sub];
#pragma unroll
        for (int bit = 1; bit < S::READERS; bit <<= 1) y[j] += __shfl_xor_sync(~0u, y[j], bit);
      }
      if (sub == 0 && mine < rows) N::epilogue(c, seg.part, 0, seg.row + block + mine, y, kept);
    }
  }
}

}  // namespace mpk
