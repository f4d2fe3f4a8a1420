// Attention on tensor cores: softmax(query key^T scale + mask) value for some queries of one head.
//
// A warp computes 16 queries; several warps may share them, each with a part of the keys of every tile. Keys and values
// come through shared memory in tiles, one tile ahead. Scores stay in registers: those of one tile are made
// exponentials, weighted with the values, and forgotten, while sums so far are rescaled whenever a larger score comes
// (Milakov and Gimelshein 2018; Dao et al., "FlashAttention", 2022). Needs product.cuh.
#ifndef GRAPHOPT_ATTENTION
#define GRAPHOPT_ATTENTION

namespace graphopt {

constexpr int kTileKeys = 64;
constexpr float kLog2E = 1.4426950408889634f;

struct NoMask {
  __device__ __forceinline__ float at(int, int) const { return 0.0f; }
};

// Added to the scores: numbers as they are, booleans as nothing or minus infinity.
template <class M, long RowStride, long KeyStride>
struct Mask {
  const M* start;
  __device__ __forceinline__ float at(int row, int key) const {
    M entry = start[row * RowStride + key * KeyStride];
    if constexpr (sizeof(M) == 1)
      return entry ? 0.0f : -INFINITY;
    else
      return static_cast<float>(entry);
  }
};

__device__ __forceinline__ void load_turned(unsigned (&to)[4], unsigned from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}

__device__ __forceinline__ unsigned packed(float low, float high, half*) {
  half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<unsigned*>(&pair);
}

__device__ __forceinline__ unsigned packed(float low, float high, nv_bfloat16*) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<unsigned*>(&pair);
}

// Rows of `Width` numbers into shared memory, a row every `Width` + 8 numbers.
template <class T, int Rows, int Width, int Threads>
__device__ __forceinline__ void copy_rows(unsigned to, const T* from, long stride, int first, int total) {
  constexpr int Lanes = kChunk / sizeof(T), Chunks = Width / Lanes;
  for (int i = threadIdx.x; i < Rows * Chunks; i += Threads) {
    int row = i / Chunks, chunk = i % Chunks;
    bool inside = first + row < total;
    const T* source = from + (inside ? (first + row) * stride + chunk * Lanes : 0);
    copy_chunk(to + (row * (Chunks + 1) + chunk) * kChunk, source, inside);
  }
}

template <bool Largest>
__device__ __forceinline__ float over_row(float value) {
#pragma unroll
  for (int apart = 1; apart < 4; apart *= 2) {
    float other = __shfl_xor_sync(0xffffffffu, value, apart);
    value = Largest ? fmaxf(value, other) : value + other;
  }
  return value;
}

// The result for queries from `row`, into `tile` [RowWarps * 16][Depth + kSkew] in float32.
template <class T, int Width, int Depth, int Keys, long QueryStride, long KeyStride, long ValueStride, bool Causal,
          int RowWarps, int KeyWarps, class M>
__device__ __forceinline__ void attention(const T* query, const T* key, const T* value, const M& mask, int queries,
                                          int row, float scale, float* tile) {
  constexpr int Rows = RowWarps * 16, Threads = RowWarps * KeyWarps * 32, Units = kTileKeys / KeyWarps / 16;
  constexpr int KeyPitch = Width * sizeof(T) + kChunk, ValuePitch = Depth * sizeof(T) + kChunk;
  constexpr int Tiles = (Keys + kTileKeys - 1) / kTileKeys, StageBytes = kTileKeys * (KeyPitch + ValuePitch);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, across = warp % KeyWarps;
  const int top = warp / KeyWarps * 16, here = across * Units * 16;
  const unsigned stages = shared_address(tile), queries_at = stages + 2 * StageBytes;

  auto fetch = [&](int number) {
    if (number < Tiles) {
      unsigned to = stages + number % 2 * StageBytes;
      copy_rows<T, kTileKeys, Width, Threads>(to, key, KeyStride, number * kTileKeys, Keys);
      copy_rows<T, kTileKeys, Depth, Threads>(to + kTileKeys * KeyPitch, value, ValueStride, number * kTileKeys, Keys);
    }
    commit_copies();
  };
  copy_rows<T, Rows, Width, Threads>(queries_at, query, QueryStride, row, queries);
  fetch(0);

  unsigned of_query[Width / 16][4];
  float sums[Depth / 8][4] = {}, peak[2] = {-INFINITY, -INFINITY}, total[2] = {};
  for (int number = 0; number < Tiles; ++number) {
    fetch(number + 1);
    await_copies<1>();
    __syncthreads();
    if (number == 0) {
#pragma unroll
      for (int k = 0; k < Width / 16; ++k)
        load_fragments(of_query[k], queries_at + (top + lane % 16) * KeyPitch + (k * 2 + lane / 16) * kChunk);
    }
    const unsigned keys_at = stages + number % 2 * StageBytes + here * KeyPitch;
    const unsigned values_at = stages + number % 2 * StageBytes + kTileKeys * KeyPitch + here * ValuePitch;
    float scores[Units * 2][4] = {};
#pragma unroll
    for (int unit = 0; unit < Units; ++unit)
#pragma unroll
      for (int k = 0; k < Width / 16; ++k) {
        unsigned of_key[4];
        load_fragments(of_key, keys_at + (unit * 16 + lane / 16 * 8 + lane % 8) * KeyPitch + (k * 2 + lane / 8 % 2) * kChunk);
        multiply(scores[unit * 2], of_query[k], of_key[0], of_key[1], static_cast<T*>(nullptr));
        multiply(scores[unit * 2 + 1], of_query[k], of_key[2], of_key[3], static_cast<T*>(nullptr));
      }
    float largest[2] = {peak[0], peak[1]};
#pragma unroll
    for (int j = 0; j < Units * 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int which = number * kTileKeys + here + j * 8 + lane % 4 * 2 + i % 2, asking = row + top + lane / 4 + i / 2 * 8;
        bool counts = which < Keys && asking < queries && !(Causal && which > asking);
        scores[j][i] = counts ? (scores[j][i] * scale + mask.at(asking, which)) * kLog2E : -INFINITY;
        largest[i / 2] = fmaxf(largest[i / 2], scores[j][i]);
      }
#pragma unroll
    for (int half_ = 0; half_ < 2; ++half_) {
      largest[half_] = over_row<true>(largest[half_]);
      float shrink = largest[half_] == -INFINITY ? 1.0f : exp2f(peak[half_] - largest[half_]);
      peak[half_] = largest[half_];
      total[half_] *= shrink;
#pragma unroll
      for (int j = 0; j < Depth / 8; ++j) sums[j][half_ * 2] *= shrink, sums[j][half_ * 2 + 1] *= shrink;
    }
#pragma unroll
    for (int j = 0; j < Units * 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[j][i] = peak[i / 2] == -INFINITY ? 0.0f : exp2f(scores[j][i] - peak[i / 2]);
        total[i / 2] += scores[j][i];
      }
#pragma unroll
    for (int unit = 0; unit < Units; ++unit) {
      float(&left)[4] = scores[unit * 2];
      float(&right)[4] = scores[unit * 2 + 1];
      T* kind = nullptr;
      unsigned weights[4] = {packed(left[0], left[1], kind), packed(left[2], left[3], kind),
                             packed(right[0], right[1], kind), packed(right[2], right[3], kind)};
#pragma unroll
      for (int j = 0; j < Depth / 16; ++j) {
        unsigned of_value[4];
        load_turned(of_value, values_at + (unit * 16 + lane % 16) * ValuePitch + (j * 2 + lane / 16) * kChunk);
        multiply(sums[j * 2], weights, of_value[0], of_value[1], kind);
        multiply(sums[j * 2 + 1], weights, of_value[2], of_value[3], kind);
      }
    }
    __syncthreads();
  }

  // Of the warps that share queries, each now scales its sums to the largest score of all, and they add up in turn.
  float* statistics = tile + Rows * (Depth + kSkew);
  const int mine = top + lane / 4;
#pragma unroll
  for (int half_ = 0; half_ < 2; ++half_) total[half_] = over_row<false>(total[half_]);
  if (KeyWarps > 1) {
    if (lane % 4 == 0)
      for (int half_ = 0; half_ < 2; ++half_) {
        float* place = statistics + ((mine + half_ * 8) * KeyWarps + across) * 2;
        place[0] = peak[half_], place[1] = total[half_];
      }
    __syncthreads();
  }
#pragma unroll
  for (int half_ = 0; half_ < 2; ++half_) {
    float highest = peak[half_], all = total[half_];
    if (KeyWarps > 1) {
      const float* of_row = statistics + (mine + half_ * 8) * KeyWarps * 2;
      highest = -INFINITY, all = 0.0f;
      for (int w = 0; w < KeyWarps; ++w) highest = fmaxf(highest, of_row[w * 2]);
      for (int w = 0; w < KeyWarps; ++w)
        all += of_row[w * 2] == -INFINITY ? 0.0f : of_row[w * 2 + 1] * exp2f(of_row[w * 2] - highest);
    }
    float factor = all == 0.0f || peak[half_] == -INFINITY ? 0.0f : exp2f(peak[half_] - highest) / all;
#pragma unroll
    for (int j = 0; j < Depth / 8; ++j) sums[j][half_ * 2] *= factor, sums[j][half_ * 2 + 1] *= factor;
  }
  for (int turn = 0; turn < KeyWarps; ++turn) {
    if (across == turn) {
#pragma unroll
      for (int j = 0; j < Depth / 8; ++j)
#pragma unroll
        for (int half_ = 0; half_ < 2; ++half_) {
          float2* place = reinterpret_cast<float2*>(tile + (mine + half_ * 8) * (Depth + kSkew) + j * 8 + lane % 4 * 2);
          float2 pair = {sums[j][half_ * 2], sums[j][half_ * 2 + 1]};
          if (turn > 0) pair.x += place->x, pair.y += place->y;
          *place = pair;
        }
    }
    __syncthreads();
  }
}

template <class T, int Width, int Depth, int Keys, long QueryStride, long KeyStride, long ValueStride, bool Causal,
          int RowWarps, int KeyWarps>
__device__ __forceinline__ void plain_attention(const T* query, const T* key, const T* value, int queries, int row,
                                                float scale, float* tile) {
  attention<T, Width, Depth, Keys, QueryStride, KeyStride, ValueStride, Causal, RowWarps, KeyWarps>(
      query, key, value, NoMask{}, queries, row, scale, tile);
}

template <long MaskRow, long MaskKey, class T, int Width, int Depth, int Keys, long QueryStride, long KeyStride,
          long ValueStride, bool Causal, int RowWarps, int KeyWarps, class M>
__device__ __forceinline__ void masked_attention(const T* query, const T* key, const T* value, const M* mask,
                                                 int queries, int row, float scale, float* tile) {
  attention<T, Width, Depth, Keys, QueryStride, KeyStride, ValueStride, Causal, RowWarps, KeyWarps>(
      query, key, value, Mask<M, MaskRow, MaskKey>{mask}, queries, row, scale, tile);
}

}  // namespace graphopt
#endif
