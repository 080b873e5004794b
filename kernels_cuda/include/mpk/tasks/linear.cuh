// linear of several tokens, fp32 FMA: y[t, n] = sum_k x[t, k] * w[n, k], weights streamed through the ring.
//
// General, not fast: bf16 and f16 take linear_mma, one token linear_token. A slot is one contiguous copy: whole rows, or one
// of PIECES equal pieces of a row. A group of WARPS warps owns a row: thread `rank` of the group owns the 16-byte vectors
// rank, rank + WARPS*32, ... of it. x is read again for every slot and token (from L1); sums over the pieces of a row gather
// in shared memory. One owner and a fixed order: bit-identical from run to run.
//
// N (generated): Element; T, K, JOINT, COPY_BYTES, WARPS; the prologue along k, VECTOR columns at a time: Held, what it reads
// (load<true>: operands that nothing writes, before the events have come; load<false>: the rest; poll: loads again what is
// flagged and was missing, false if so), REDUCTIONS over k,
// each with term<i>(..., held, red, out) and Combine<i>, and x(c, t, k, held, red, out);
// joint(part): weights of a part; hold(c, part, t, n, held): what the epilogue reads, before the weights stream by;
// epilogue(c, part, t, n, acc[JOINT], held).
#pragma once
#include "mpk/group.cuh"

namespace mpk {

template <class N>
struct LinearShape {
  static constexpr int VECTOR = 16 / static_cast<int>(sizeof(typename N::Element));  // elements of 16 bytes
  static constexpr int ROW_BYTES = N::K * static_cast<int>(sizeof(typename N::Element));
  static constexpr int PIECES = N::COPY_BYTES < ROW_BYTES ? ROW_BYTES / N::COPY_BYTES : 1;
  static constexpr int SLOT_ROWS = PIECES > 1 ? 1 : N::COPY_BYTES / ROW_BYTES;
  static constexpr int VECTORS = N::K / VECTOR / PIECES;  // of a row piece
  static constexpr int WARPS = N::WARPS;
  static constexpr int LANES = WARPS * 32;
  static constexpr int GROUPS = static_cast<int>(kConsumerWarps) / WARPS;
  static constexpr int PER_THREAD = (VECTORS + LANES - 1) / LANES;  // vectors a thread owns of a piece
  static constexpr int GROUP_ROWS = (SLOT_ROWS + GROUPS - 1) / GROUPS;
  static constexpr int STRIDE = N::T * N::JOINT * WARPS;  // sums of a row
  static constexpr int LIMIT = 8192 / (STRIDE * 4);       // rows whose sums fit in 8 KiB
  static constexpr int BLOCK_ROWS = LIMIT < SLOT_ROWS ? SLOT_ROWS : LIMIT / SLOT_ROWS * SLOT_ROWS;
  static constexpr int PARTIAL_BYTES = BLOCK_ROWS * STRIDE * 4;
  static constexpr int SCRATCH = 128 + 2 * PARTIAL_BYTES;  // two blocks, so that one barrier per block suffices
  static_assert(GROUP_ROWS <= 8, "LaneSums takes 8 rows");
  static_assert(PIECES > 1 ? PIECES * N::COPY_BYTES == ROW_BYTES : SLOT_ROWS * ROW_BYTES == N::COPY_BYTES, "copies");
  static_assert(N::T > 1 && N::REDUCTIONS == 0, "with several tokens the prologue is a map");
  static_assert(VECTORS * VECTOR * PIECES == N::K, "rows are cut into equal pieces of whole vectors");
};

// Sum in[i] over the lanes, for COUNT values at once. The result of value i ends on the lanes where owner(lane) == i;
// returns it.
template <int COUNT>
struct LaneSums {
  static constexpr int P = COUNT > 4 ? 8 : COUNT > 2 ? 4 : COUNT > 1 ? 2 : 1;
  MPK_DEVICE static float reduce(const float* in, int lane, int& owner) {
    float v[P];
#pragma unroll
    for (int i = 0; i < P; ++i) v[i] = i < COUNT ? in[i] : 0.0f;
    owner = 0;
#pragma unroll
    for (int bit = 16, n = P; bit; bit >>= 1) {
      if (n > 1) {
        n >>= 1;
        const bool up = lane & bit;
#pragma unroll
        for (int i = 0; i < n; ++i) {
          const float keep = up ? v[i + n] : v[i], give = up ? v[i] : v[i + n];
          v[i] = keep + __shfl_xor_sync(~0u, give, bit);
        }
        owner += up ? n : 0;
      } else {
        v[0] += __shfl_xor_sync(~0u, v[0], bit);
      }
    }
    return v[0];
  }
};

template <class E, int N>
MPK_DEVICE void unpack(const ptx::Vec4& v, float (&out)[N]) {
  Pack<E, N> pack;
  pack.raw[0] = v;
  pack.unpack(out);
}

// S: which 16-byte vectors of a row a thread of the group owns (PIECES, PER_THREAD, VECTORS, LANES).
template <class N, class S, int I, class Ctx, class Group, class Held>
MPK_DEVICE void prologue_reductions(Ctx& c, const Group& g, int t, const Held& held, float* red) {
  if constexpr (I < N::REDUCTIONS) {
    using Combine = typename N::template Combine<I>;
    float total = Combine::identity();
#pragma unroll
    for (int p = 0; p < S::PIECES * S::PER_THREAD; ++p) {
      const int v = p / S::PER_THREAD * S::VECTORS + p % S::PER_THREAD * S::LANES + g.rank;
      if (p % S::PER_THREAD * S::LANES + g.rank < S::VECTORS) {
        float x[S::VECTOR];
        N::template term<I>(c, t, v * S::VECTOR, held[p], red, x);
#pragma unroll
        for (int i = 0; i < S::VECTOR; ++i) total = Combine::apply(total, x[i]);
      }
    }
    red[I] = g.template reduce<Combine>(total);
    prologue_reductions<N, S, I + 1>(c, g, t, held, red);
  }
}

template <class N, class Ctx>
MPK_DEVICE void linear(Ctx& c) {
  using S = LinearShape<N>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, group = warp / S::WARPS, rank = threadIdx.x % S::LANES;
  float* partial[2] = {reinterpret_cast<float*>(c.scratch() + 128), reinterpret_cast<float*>(c.scratch() + 128 + S::PARTIAL_BYTES)};
  int turn = 0;
  if (!c.wait()) return;

  const int segments = c.arg(7);
#pragma unroll 1
  for (int s = 0; s < segments; ++s) {
    const Segment seg = c.ready->segment[s];
    const int joint = N::joint(seg.part);
#pragma unroll 1
    for (u32 block = 0; block < seg.rows; block += S::BLOCK_ROWS, turn ^= 1) {
      const int rows = min(static_cast<u32>(S::BLOCK_ROWS), seg.rows - block);
      float* sums = partial[turn];
      const bool end = s == segments - 1 && block + S::BLOCK_ROWS >= seg.rows;
#pragma unroll 1
      for (int first = 0; first < rows; first += S::SLOT_ROWS) {
#pragma unroll 1
        for (int piece = 0; piece < S::PIECES; ++piece)
#pragma unroll 1
          for (int j = 0; j < joint; ++j) {
            const char* bytes = c.ring.wait();
            if (s == 0 && block == 0) c.streaming();
#pragma unroll 1
            for (int t = 0; t < N::T; ++t) {
              float acc[S::GROUP_ROWS];
#pragma unroll
              for (int r = 0; r < S::GROUP_ROWS; ++r) acc[r] = 0.0f;
#pragma unroll
              for (int p = 0; p < S::PER_THREAD; ++p) {
                const int v = p * S::LANES + rank;
                if (v < S::VECTORS) {
                  float xs[S::VECTOR];
                  const int k = (piece * S::VECTORS + v) * S::VECTOR;
                  typename N::Held held;
                  N::template load<true>(c, t, k, held);
                  N::template load<false>(c, t, k, held);
                  poll_until(c, [&] { return N::poll(c, t, k, held); });
                  N::x(c, t, k, held, nullptr, xs);
#pragma unroll
                  for (int r = 0; r < S::GROUP_ROWS; ++r) {
                    const int row = group + r * S::GROUPS;
                    if (row < S::SLOT_ROWS) {
                      float w[S::VECTOR];
                      unpack<typename N::Element>(ptx::load_shared(bytes + row * S::ROW_BYTES + v * 16), w);
#pragma unroll
                      for (int i = 0; i < S::VECTOR; ++i) acc[r] = fmaf(w[i], xs[i], acc[r]);
                    }
                  }
                }
              }
              int owner;
              const float sum = LaneSums<S::GROUP_ROWS>::reduce(acc, lane, owner);
              constexpr int COPIES = 32 / LaneSums<S::GROUP_ROWS>::P;
              const int row = group + owner * S::GROUPS;
              if ((lane & (COPIES - 1)) == 0 && owner < S::GROUP_ROWS && row < S::SLOT_ROWS) {
                float& at = sums[(((first + row) * N::T + t) * N::JOINT + j) * S::WARPS + warp % S::WARPS];
                at = piece == 0 ? sum : at + sum;
              }
            }
            c.ring.release();
          }
      }
      if (end) c.last_slot_consumed();
      c.barrier();
      for (int i = threadIdx.x; i < rows * N::T; i += kConsumers) {
        const int row = i % rows, t = i / rows;
        float y[N::JOINT];
#pragma unroll
        for (int j = 0; j < N::JOINT; ++j) {
          const float* q = sums + ((row * N::T + t) * N::JOINT + j) * S::WARPS;
          y[j] = 0.0f;
          if (j < joint)
#pragma unroll
            for (int w = 0; w < S::WARPS; ++w) y[j] += q[w];
        }
        u32 kept[N::HOLD];
        N::hold(c, seg.part, t, seg.row + block + row, kept);
        N::epilogue(c, seg.part, t, seg.row + block + row, y, kept);
      }
    }
  }
}

}  // namespace mpk
