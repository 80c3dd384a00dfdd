// The launches of ensemble_sample.cuh.
#include "ensemble_sample.cuh"

namespace ensemble_decode {
namespace cuda {
namespace {

template <typename T>
cudaError_t in_clusters(const SampleArgs& args, const Plan& plan, cudaStream_t stream) {
  auto kernel = ensemble_sample_cluster<T>;
  // All that there is, whatever this call needs: the limit is the function's, and other threads launch it too.
  int device = 0, shared = 0;
  cudaFuncAttributes own = {};
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&own, kernel);
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 shared - static_cast<int>(own.sharedSizeBytes));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(args.rows) * kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args, plan.slice);
}

template <typename T>
cudaError_t in_two_launches(const SampleArgs& args, const Plan& plan, void* memory, cudaStream_t stream) {
  Workspace workspace = workspace_at(args, plan, memory);
  dim3 rows(static_cast<unsigned>(args.rows)), grid(rows.x, static_cast<unsigned>(plan.slices));
  ensemble_sample_visit<T><<<grid, kThreads, 0, stream>>>(args, plan.slice, workspace);
  ensemble_sample_finish<T><<<rows, kThreads, 0, stream>>>(args, workspace);
  return cudaGetLastError();
}

template <typename T>
cudaError_t run(const SampleArgs& args, const Plan& plan, void* workspace, cudaStream_t stream) {
  return plan.cluster ? in_clusters<T>(args, plan, stream) : in_two_launches<T>(args, plan, workspace, stream);
}

}  // namespace

cudaError_t plan_ensemble_sample(const SampleArgs& args, Plan* plan) {
  int device = 0, clusters = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  *plan = planned(args, clusters != 0, static_cast<size_t>(shared));
  return cudaSuccess;
}

cudaError_t ensemble_sample(const SampleArgs& args, const Plan& plan, void* workspace, cudaStream_t stream) {
  if (args.rows == 0) return cudaSuccess;
  if (args.pairs > kMostPairs) return cudaErrorInvalidValue;
  switch (args.dtype) {
    case DType::float32: return run<float>(args, plan, workspace, stream);
    case DType::bfloat16: return run<bfloat16>(args, plan, workspace, stream);
    case DType::float16: return run<float16>(args, plan, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace cuda
}  // namespace ensemble_decode
