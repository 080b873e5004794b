// linear, fp32 FMA body: y[t, n] = sum_k x[t, k] * w[n, k], weights streamed through the ring.
//
// A slot is one contiguous copy: whole rows, or one of PIECES equal pieces of a row. A group of WARPS warps owns a row:
// thread `rank` of the group owns the 16-byte vectors rank, rank + WARPS*32, ... of it, and keeps its slice of x in
// fp32 registers (one token). So a row is read without bank conflicts and x never goes through shared memory.
// A slot's vectors are read a slot before they are multiplied, and its barrier is looked at a slot before that: two warps
// a scheduler hide little else.
// Sums of a few rows are reduced over the lanes together until each is in LEFT lanes; shared memory takes it from there,
// where as many threads sum up a row over lanes and warps. One owner and a fixed order: bit-identical from run to run.
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
  // Slots (or rows in pieces) per reduction: as many as make four ring slots. All of it is unrolled, and code that runs a
  // few times a task is as slow as it is long.
  static constexpr int SLOTS = GROUP_ROWS * PIECES * N::JOINT >= 4 ? 1 : 4 / (GROUP_ROWS * PIECES * N::JOINT);
  static constexpr int SUMS = SLOTS * N::JOINT * GROUP_ROWS;
  static constexpr int TOGETHER = SUMS < 8 ? SUMS : 8;
  static constexpr int PADDED = (SUMS + TOGETHER - 1) / TOGETHER * TOGETHER;
  static constexpr int LEFT = N::T > 1 ? 1 : TOGETHER > 4 ? 4 : 8;  // lanes whose partial sums of a row are kept apart
  static constexpr int ROW_SUMS = N::T * N::JOINT * WARPS * LEFT;
  static constexpr int STRIDE = ROW_SUMS + (N::T == 1 && ROW_SUMS % (2 * LEFT) == 0 ? LEFT : 0);  // other banks each row
  static constexpr int BATCH_ROWS = SLOTS * SLOT_ROWS;
  static constexpr int BUDGET = 8192 / (STRIDE * 4);  // rows whose partial sums fit in 8 KiB
  static constexpr int READ = static_cast<int>(kConsumers) / LEFT;  // rows that all threads sum up together
  static constexpr int LIMIT = BUDGET < READ || N::T > 1 ? BUDGET : READ;
  static constexpr int BLOCK_ROWS = LIMIT < BATCH_ROWS ? BATCH_ROWS : LIMIT / BATCH_ROWS * BATCH_ROWS;
  static constexpr int PARTIAL_BYTES = BLOCK_ROWS * STRIDE * 4;
  static_assert(N::T > 1 || BLOCK_ROWS <= READ, "a block is summed up at once");
  static_assert(GROUP_ROWS <= 8, "LaneSums takes 8 rows");
  static constexpr int SCRATCH = 128 + 2 * PARTIAL_BYTES;  // two blocks, so that one barrier per block suffices
  static_assert(PIECES > 1 ? PIECES * N::COPY_BYTES == ROW_BYTES : SLOT_ROWS * ROW_BYTES == N::COPY_BYTES, "copies");
  static_assert(N::T == 1 || N::REDUCTIONS == 0, "with several tokens the prologue is a map");
  static_assert(VECTORS * VECTOR * PIECES == N::K, "rows are cut into equal pieces of whole vectors");
};

// Sum in[i] over the lanes that agree in their place within LEFT lanes, for COUNT values at once. The result of value i
// ends on the lanes where owner(lane) == i; returns it.
template <int COUNT, int LEFT = 1>
struct LaneSums {
  static constexpr int P = COUNT > 4 ? 8 : COUNT > 2 ? 4 : COUNT > 1 ? 2 : 1;
  static constexpr int COPIES = 32 / P - 1 & ~(LEFT - 1);  // bits of the lane in which lanes with the same sum differ
  static_assert(P * LEFT <= 32, "lanes");
  MPK_DEVICE static float reduce(const float* in, int lane, int& owner) {
    float v[P];
#pragma unroll
    for (int i = 0; i < P; ++i) v[i] = i < COUNT ? in[i] : 0.0f;
    owner = 0;
#pragma unroll
    for (int bit = 16, n = P; bit >= LEFT; bit >>= 1) {
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

// One token: the stream of weights, of which this thread holds its vectors of the next slot in registers.
template <class N, class Ctx>
struct Weights {
  using S = LinearShape<N>;
  Ctx& c;
  const int rank, group;
  int left = 0;  // slots of the task that are not read yet
  bool full = false;  // the next one is there: seen when the one before was read
  ptx::Vec4 ahead[S::GROUP_ROWS * S::PER_THREAD];

  MPK_DEVICE Weights(Ctx& context, int r, int g) : c(context), rank(r), group(g) {}
  MPK_DEVICE static void unpack(const ptx::Vec4& v, float (&out)[S::VECTOR]) {
    Pack<typename N::Element, S::VECTOR> pack;
    pack.raw[0] = v;
    pack.unpack(out);
  }
  MPK_DEVICE bool owns(int p) const { return S::VECTORS % S::LANES == 0 || p * S::LANES + rank < S::VECTORS; }
  MPK_DEVICE bool has(int r) const { return S::SLOT_ROWS % S::GROUPS == 0 || group + r * S::GROUPS < S::SLOT_ROWS; }
  // Count the slots of the task, and read the first.
  MPK_DEVICE void begin() {
#pragma unroll 1
    for (int s = 0; s < c.arg(7); ++s) {
      const Segment seg = c.ready->segment[s];
      left += (static_cast<int>(seg.rows) + S::SLOT_ROWS - 1) / S::SLOT_ROWS * S::PIECES * N::joint(seg.part);
    }
    read();
  }
  MPK_DEVICE void read() {
    --left;
    if (!full) c.ring.wait();
    const char* bytes = c.ring.bytes() + group * S::ROW_BYTES + rank * 16;
#pragma unroll
    for (int r = 0; r < S::GROUP_ROWS; ++r)
#pragma unroll
      for (int p = 0; p < S::PER_THREAD; ++p)
        if (has(r) && owns(p)) ahead[r * S::PER_THREAD + p] = ptx::load_shared(bytes + r * S::GROUPS * S::ROW_BYTES + p * S::LANES * 16);
    c.ring.release();
  }
  // acc[r] += this thread's part of the product of the slot's rows with x; reads the slot after it.
  MPK_DEVICE void multiply(const float (*x)[S::VECTOR], float* acc) {
    ptx::Vec4 now[S::GROUP_ROWS * S::PER_THREAD];
#pragma unroll
    for (int i = 0; i < S::GROUP_ROWS * S::PER_THREAD; ++i) now[i] = ahead[i];
    if (left) read();
    full = c.ring.full();
#pragma unroll
    for (int r = 0; r < S::GROUP_ROWS; ++r)
#pragma unroll
      for (int p = 0; p < S::PER_THREAD; ++p)
        if (has(r) && owns(p)) {
          float w[S::VECTOR];
          unpack(now[r * S::PER_THREAD + p], w);
#pragma unroll
          for (int i = 0; i < S::VECTOR; ++i) acc[r] = fmaf(w[i], x[p][i], acc[r]);
        }
  }
};

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
  using E = typename N::Element;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  const int group = warp / S::WARPS;
  const WarpsGroup<S::WARPS> g(c.scratch());
  float* partial[2] = {reinterpret_cast<float*>(c.scratch() + 128), reinterpret_cast<float*>(c.scratch() + 128 + S::PARTIAL_BYTES)};
  int turn = 0;

  Weights<N, Ctx> weights(c, g.rank, group);
  constexpr int OWN = S::PIECES * S::PER_THREAD;
  float x[OWN][S::VECTOR];  // this thread's slice of the one token
  if constexpr (N::T == 1) {
    typename N::Held held[OWN];
    const auto own = [&](int p) { return p % S::PER_THREAD * S::LANES + g.rank < S::VECTORS; };
    const auto column = [&](int p) { return (p / S::PER_THREAD * S::VECTORS + p % S::PER_THREAD * S::LANES + g.rank) * S::VECTOR; };
#pragma unroll
    for (int p = 0; p < OWN; ++p)
      if (own(p)) N::template load<true>(c, 0, column(p), held[p]);
    if (!c.wait()) return;
#pragma unroll
    for (int p = 0; p < OWN; ++p)
      if (own(p)) N::template load<false>(c, 0, column(p), held[p]);
    weights.begin();
    poll_until(c, [&] {
      bool complete = true;
#pragma unroll
      for (int p = 0; p < OWN; ++p)
        if (own(p) && !N::poll(c, 0, column(p), held[p])) complete = false;
      return complete;
    });
    float red[N::REDUCTIONS + 1];
    prologue_reductions<N, S, 0>(c, g, 0, held, red);
#pragma unroll
    for (int p = 0; p < OWN; ++p)
      if (own(p)) N::x(c, 0, column(p), held[p], red, x[p]);
    c.streaming();
  } else {
    if (!c.wait()) return;
  }

  const int segments = c.arg(7);
#pragma unroll 1
  for (int s = 0; s < segments; ++s) {
    const Segment seg = c.ready->segment[s];
    const int joint = N::joint(seg.part);
#pragma unroll 1
    for (u32 block = 0; block < seg.rows; block += S::BLOCK_ROWS, turn ^= 1) {
      const int rows = min(static_cast<u32>(S::BLOCK_ROWS), seg.rows - block);
      float* sums = partial[turn];
      u32 kept[N::HOLD];
      const int mine = threadIdx.x / S::LEFT, sub = threadIdx.x % S::LEFT;  // one token: the row and part that this thread sums up
      if (N::T == 1 && sub == 0 && mine < rows) N::hold(c, seg.part, 0, seg.row + block + mine, kept);
#pragma unroll 1
      for (int first = 0; first < rows; first += S::BATCH_ROWS) {
        if constexpr (N::T == 1) {
          float acc[S::PADDED];
#pragma unroll
          for (int i = 0; i < S::PADDED; ++i) acc[i] = 0.0f;
#pragma unroll
          for (int slot = 0; slot < S::SLOTS; ++slot) {
            if (first + slot * S::SLOT_ROWS >= rows) continue;
#pragma unroll
            for (int piece = 0; piece < S::PIECES; ++piece)
#pragma unroll
              for (int j = 0; j < N::JOINT; ++j)
                if (j < joint) weights.multiply(x + piece * S::PER_THREAD, acc + (slot * N::JOINT + j) * S::GROUP_ROWS);
          }
          if (s == segments - 1 && block + first + S::BATCH_ROWS >= seg.rows) c.last_slot_consumed();
#pragma unroll
          for (int some = 0; some < S::SUMS; some += S::TOGETHER) {
            using Sums = LaneSums<S::TOGETHER, S::LEFT>;
            int owner;
            const float sum = Sums::reduce(acc + some, lane, owner);
            const int i = owner + some, j = i / S::GROUP_ROWS % N::JOINT, in_slot = group + i % S::GROUP_ROWS * S::GROUPS;
            if ((lane & Sums::COPIES) == 0 && owner < S::TOGETHER && i < S::SUMS && j < joint && in_slot < S::SLOT_ROWS) {
              const int row = first + i / (S::GROUP_ROWS * N::JOINT) * S::SLOT_ROWS + in_slot;
              sums[row * S::STRIDE + (j * S::WARPS + warp % S::WARPS) * S::LEFT + lane % S::LEFT] = sum;
            }
          }
        } else {
          // Several tokens: x is read again for every slot and token (from L1); sums over the pieces of a row gather in
          // shared memory. General, not fast: bf16 and f16 with several tokens take linear_mma.
#pragma unroll 1
          for (int slot = 0; slot < S::SLOTS; ++slot) {
            if (first + slot * S::SLOT_ROWS >= rows) continue;
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
                    const int v = p * S::LANES + g.rank;
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
                          Weights<N, Ctx>::unpack(ptx::load_shared(bytes + row * S::ROW_BYTES + v * 16), w);
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
                    float& at = sums[(((first + slot * S::SLOT_ROWS + row) * N::T + t) * N::JOINT + j) * S::WARPS + warp % S::WARPS];
                    at = piece == 0 ? sum : at + sum;
                  }
                }
                c.ring.release();
              }
          }
          if (s == segments - 1 && block + first + S::BATCH_ROWS >= seg.rows) c.last_slot_consumed();
        }
      }
      c.barrier();
      if constexpr (N::T == 1) {
        float y[N::JOINT];
#pragma unroll
        for (int j = 0; j < N::JOINT; ++j) {
          y[j] = 0.0f;
          if (j < joint && mine < rows)
#pragma unroll
            for (int w = 0; w < S::WARPS; ++w) y[j] += sums[mine * S::STRIDE + (j * S::WARPS + w) * S::LEFT + sub];
#pragma unroll
          for (int bit = 1; bit < S::LEFT; bit <<= 1) y[j] += __shfl_xor_sync(~0u, y[j], bit);
        }
        if (sub == 0 && mine < rows) N::epilogue(c, seg.part, 0, seg.row + block + mine, y, kept);
      } else {
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
          N::hold(c, seg.part, t, seg.row + block + row, kept);
          N::epilogue(c, seg.part, t, seg.row + block + row, y, kept);
        }
      }
    }
  }
}

}  // namespace mpk
