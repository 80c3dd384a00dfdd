// ensemble_sample on an NVIDIA GPU, for C++ callers: pointers, sizes and strides in elements, a stream, no framework.
// Link it with what nvcc makes of ensemble_sample.cu; or include ensemble_sample.cuh in a .cu of your own.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>

#include "../cpu/layers.h"

namespace ensemble_decode {
namespace cuda {

// How a row's tokens are divided. A function of the vocabulary, of what is asked for and of the device; never of the
// batch.
struct Plan {
  bool cluster;            // one launch, a row's scores in the shared memory of a cluster; else two, and a workspace
  int slice;               // tokens of a block
  int slices;              // blocks that visit a row
  size_t shared_bytes;     // of a block of the cluster
  size_t workspace_bytes;  // that the caller provides, 16-byte aligned, for as long as the stream may run
};

// For the current device.
cudaError_t plan_ensemble_sample(const SampleArgs& args, Plan* plan);

// Queues the operator on `stream`; all pointers of `args` are device pointers, and at most 64 pairs are allowed. Nothing
// waits for the device, so it can be part of a CUDA graph.
cudaError_t ensemble_sample(const SampleArgs& args, const Plan& plan, void* workspace, cudaStream_t stream);

}  // namespace cuda
}  // namespace ensemble_decode
