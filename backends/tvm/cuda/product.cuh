// Products on tensor cores: a tile of A [rows, depth] times B [columns, depth] transposed, summed in float32.
//
// Both operands are read with the depth along 16-byte chunks. A is a matrix, or an image seen through a window (a
// convolution: a row is a pixel of the result, the depth runs over the taps of the window and their channels). Chunks go
// from global to shared memory asynchronously, several steps ahead; 128 bytes of depth make a step. The chunks of a row
// are permuted by the row's number, so that the eight rows of a matrix fragment lie in different banks.
//
// The result is left in shared memory as float32, where the code of the epilogue reads it.
#ifndef GRAPHOPT_PRODUCT
#define GRAPHOPT_PRODUCT
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace graphopt {

constexpr int kChunk = 16;       // bytes that are copied at once
constexpr int kChunksOfStep = 8; // chunks of a row in a step
constexpr int kSkew = 8;         // floats between rows of the result's tile, against bank conflicts
constexpr int kOutside = -(1 << 20);

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Zeros where nothing is to be read.
__device__ __forceinline__ void copy_chunk(unsigned to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? kChunk : 0));
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

template <int Pending>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending));
}

__device__ __forceinline__ void load_fragments(unsigned (&to)[4], unsigned from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(from));
}

__device__ __forceinline__ void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, half*) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                         nv_bfloat16*) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply_tf32(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// A float32 as the sum of two numbers of 11 bits each.
__device__ __forceinline__ void split(unsigned value, unsigned& high, unsigned& low) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(__uint_as_float(value)));
  float rest = __uint_as_float(value) - __uint_as_float(high);
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(low) : "f"(rest));
}

// float32 in three products of shorter numbers, the small ones first: as exact as float32 but for the last bits.
__device__ __forceinline__ void multiply(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, float*) {
  unsigned high[4], low[4], high0, low0, high1, low1;
  for (int i = 0; i < 4; ++i) split(a[i], high[i], low[i]);
  split(b0, high0, low0);
  split(b1, high1, low1);
  multiply_tf32(sum, low, high0, high1);
  multiply_tf32(sum, high, low0, low1);
  multiply_tf32(sum, high, high0, high1);
}

// A matrix [rows, Depth].
template <class T, int Depth_, long RowStride, long Stride>
struct Matrix {
  static constexpr int Depth = Depth_;
  static constexpr int Lanes = kChunk / sizeof(T);
  static constexpr bool Chunks = Stride == 1 && RowStride % Lanes == 0 && Depth % Lanes == 0;
  struct Row {
    const T* start;
    bool exists;
  };
  struct Column {
    long offset;
    bool exists;
  };
  static __device__ __forceinline__ Row row(const T* base, int number, int rows) {
    return {base + (number < rows ? number : 0) * RowStride, number < rows};
  }
  static __device__ __forceinline__ Column column(int k) { return {k * Stride, k < Depth}; }
  static __device__ __forceinline__ const T* at(const Row& row, const Column& column) {
    return row.start + (column.exists ? column.offset : 0);
  }
  static __device__ __forceinline__ bool inside(const Row& row, const Column& column) {
    return row.exists && column.exists;
  }
};

// An image [N, C, H, W] of any strides seen through a window of KH x KW taps. Channels are those of one group.
template <class T, int C, int H, int W, int KH, int KW, int StepY, int StepX, int PadY, int PadX, int HoleY, int HoleX,
          int OutH, int OutW, long ImageStride, long ChannelStride, long RowStride, long PixelStride>
struct Window {
  static constexpr int Depth = KH * KW * C;
  static constexpr int Lanes = kChunk / sizeof(T);
  static constexpr bool Chunks = ChannelStride == 1 && C % Lanes == 0 && ImageStride % Lanes == 0 &&
                                 RowStride % Lanes == 0 && PixelStride % Lanes == 0;
  struct Row {
    const T* start;
    int y, x;
  };
  struct Column {
    long offset;
    int y, x;
  };
  static __device__ __forceinline__ Row row(const T* base, int number, int rows) {
    if (number >= rows) return {base, kOutside, kOutside};
    int image = number / (OutH * OutW), pixel = number % (OutH * OutW);
    int y = pixel / OutW * StepY - PadY, x = pixel % OutW * StepX - PadX;
    return {base + image * ImageStride + y * RowStride + x * PixelStride, y, x};
  }
  static __device__ __forceinline__ Column column(int k) {
    if (k >= Depth) return {0, kOutside, kOutside};
    int tap = k / C, channel = k % C;
    int y = tap / KW * HoleY, x = tap % KW * HoleX;
    return {y * RowStride + x * PixelStride + channel * ChannelStride, y, x};
  }
  static __device__ __forceinline__ const T* at(const Row& row, const Column& column) {
    return row.start + column.offset;
  }
  static __device__ __forceinline__ bool inside(const Row& row, const Column& column) {
    return static_cast<unsigned>(row.y + column.y) < H && static_cast<unsigned>(row.x + column.x) < W;
  }
};

__device__ __forceinline__ unsigned chunk_place(int row, int chunk) {
  return (row * kChunksOfStep + (chunk ^ (row % kChunksOfStep))) * kChunk;
}

// The part of an operand's tile that a thread copies: one chunk of every Threads / 8 rows.
template <class T, class Operand, int Rows, int Threads>
struct Copier {
  static constexpr int Apart = Threads / kChunksOfStep;
  static constexpr int Count = (Rows + Apart - 1) / Apart;
  typename Operand::Row rows[Count];
  int first, chunk;

  __device__ __forceinline__ Copier(const T* base, int start, int total, int thread)
      : first(thread / kChunksOfStep), chunk(thread % kChunksOfStep) {
#pragma unroll
    for (int i = 0; i < Count; ++i) rows[i] = Operand::row(base, start + first + i * Apart, total);
  }

  __device__ __forceinline__ void copy(unsigned to, char* generic, int step) const {
    constexpr int Lanes = Operand::Lanes;
    int k = (step * kChunksOfStep + chunk) * Lanes;
    if constexpr (Operand::Chunks) {
      typename Operand::Column column = Operand::column(k);
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        int row = first + i * Apart;
        if (Rows % Apart && row >= Rows) break;
        bool inside = Operand::inside(rows[i], column);
        copy_chunk(to + chunk_place(row, chunk), inside ? Operand::at(rows[i], column) : rows[0].start, inside);
      }
    } else {
      typename Operand::Column columns[Lanes];
#pragma unroll
      for (int lane = 0; lane < Lanes; ++lane) columns[lane] = Operand::column(k + lane);
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        int row = first + i * Apart;
        if (Rows % Apart && row >= Rows) break;
        alignas(16) T values[Lanes];
#pragma unroll
        for (int lane = 0; lane < Lanes; ++lane) {
          bool inside = Operand::inside(rows[i], columns[lane]);
          values[lane] = inside ? *Operand::at(rows[i], columns[lane]) : static_cast<T>(0.0f);
        }
        *reinterpret_cast<int4*>(generic + chunk_place(row, chunk)) = *reinterpret_cast<const int4*>(values);
      }
    }
  }
};

__device__ __forceinline__ void meet_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Sums the tiles of the blocks of a cluster, each of which keeps a share of the rows: those from rank * Rows / Parts.
template <int Rows, int Columns, int Parts, int Threads>
__device__ __forceinline__ void add_up(float* tile, int rank, int thread) {
  constexpr int Pitch = Columns + kSkew, Quads = Columns / 4, Share = Rows / Parts;
  meet_cluster();
  for (int i = thread; i < Share * Quads; i += Threads) {
    float* place = tile + (rank * Share + i / Quads) * Pitch + i % Quads * 4;
    float4 total = {0, 0, 0, 0};
#pragma unroll
    for (int part = 0; part < Parts; ++part) {
      unsigned address;
      float4 value;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(place)), "r"(part));
      asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                   : "r"(address)
                   : "memory");
      total.x += value.x, total.y += value.y, total.z += value.z, total.w += value.w;
    }
    *reinterpret_cast<float4*>(place) = total;
  }
  meet_cluster();
}

// The tile of rows from `row` and columns from `column`, into `tile` [Rows][Columns + kSkew]. In a cluster of several
// Parts each block sums over a part of the depth, and afterwards holds the result for its share of the rows only.
template <class T, class A, class B, int Rows, int Columns, int WarpRows, int WarpColumns, int Stages, int Parts>
__device__ __forceinline__ void product(const T* a, const T* b, int rows, int columns, int row, int column, int part,
                                        float* tile) {
  constexpr int WarpsAcross = Columns / WarpColumns;
  constexpr int Threads = Rows / WarpRows * WarpsAcross * 32;
  constexpr int Steps = (A::Depth + kChunksOfStep * A::Lanes - 1) / (kChunksOfStep * A::Lanes);
  constexpr int StageBytes = (Rows + Columns) * kChunksOfStep * kChunk;
  constexpr int High = WarpRows / 16, Wide = WarpColumns / 8;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int top = warp / WarpsAcross * WarpRows, left = warp % WarpsAcross * WarpColumns;
  const int first = part * Steps / Parts, last = (part + 1) * Steps / Parts;
  char* stages = reinterpret_cast<char*>(tile);
  const unsigned start = shared_address(stages);

  Copier<T, A, Rows, Threads> copy_a(a, row, rows, thread);
  Copier<T, B, Columns, Threads> copy_b(b, column, columns, thread);
  auto fetch = [&](int step) {
    if (step < last) {
      int offset = (step - first) % Stages * StageBytes, below = Rows * kChunksOfStep * kChunk;
      copy_a.copy(start + offset, stages + offset, step);
      copy_b.copy(start + offset + below, stages + offset + below, step);
    }
    commit_copies();
  };

  float sums[High][Wide][4] = {};
#pragma unroll
  for (int ahead = 0; ahead < Stages - 1; ++ahead) fetch(first + ahead);
  for (int step = first; step < last; ++step) {
    await_copies<Stages - 2>();
    __syncthreads();
    fetch(step + Stages - 1);
    const unsigned from_a = start + (step - first) % Stages * StageBytes;
    const unsigned from_b = from_a + Rows * kChunksOfStep * kChunk;
#pragma unroll
    for (int chunk = 0; chunk < kChunksOfStep; chunk += 2) {
      unsigned of_a[High][4], of_b[Wide / 2][4];
#pragma unroll
      for (int i = 0; i < High; ++i)
        load_fragments(of_a[i], from_a + chunk_place(top + i * 16 + lane % 16, chunk + lane / 16));
#pragma unroll
      for (int j = 0; j < Wide / 2; ++j)
        load_fragments(of_b[j],
                       from_b + chunk_place(left + j * 16 + lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < High; ++i)
#pragma unroll
        for (int j = 0; j < Wide; ++j)
          multiply(sums[i][j], of_a[i], of_b[j / 2][j % 2 * 2], of_b[j / 2][j % 2 * 2 + 1], static_cast<T*>(nullptr));
    }
  }
  await_copies<0>();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < High; ++i)
#pragma unroll
    for (int j = 0; j < Wide; ++j) {
      float* place = tile + (top + i * 16 + lane / 4) * (Columns + kSkew) + left + j * 8 + lane % 4 * 2;
      *reinterpret_cast<float2*>(place) = {sums[i][j][0], sums[i][j][1]};
      *reinterpret_cast<float2*>(place + 8 * (Columns + kSkew)) = {sums[i][j][2], sums[i][j][3]};
    }
  if constexpr (Parts > 1)
    add_up<Rows, Columns, Parts, Threads>(tile, part, thread);
  else
    __syncthreads();
}

}  // namespace graphopt
#endif
