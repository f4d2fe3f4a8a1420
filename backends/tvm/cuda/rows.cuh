// Sums over the threads of a warp.
#ifndef GRAPHOPT_ROWS
#define GRAPHOPT_ROWS

namespace graphopt {

// The same bits in every thread: both of a pair add the same two numbers.
__device__ __forceinline__ float over_warp(float value) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
  return value;
}

}  // namespace graphopt
#endif
