// Blocks that one multiprocessor holds at once, by NVIDIA's own host-only header. Arguments: compute capability (90),
// registers a thread, threads a block, static and dynamic shared memory a block. Prints the number.
#include <cuda_occupancy.h>

#include <cstdio>
#include <cstdlib>

int main(int count, char** argument) {
  if (count != 6) return 2;
  int capability = atoi(argument[1]);
  cudaOccDeviceProp device{};
  device.computeMajor = capability / 10;
  device.computeMinor = capability % 10;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = 2048;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 49152;
  device.sharedMemPerMultiprocessor = capability == 80 ? 167936 : 233472;
  device.sharedMemPerBlockOptin = capability == 80 ? 166912 : 232448;
  device.reservedSharedMemPerBlock = 1024;
  device.numSms = capability == 80 ? 108 : capability == 90 ? 132 : 148;
  cudaOccFuncAttributes kernel{};
  kernel.maxThreadsPerBlock = 1024;
  kernel.numRegs = atoi(argument[2]);
  kernel.sharedSizeBytes = static_cast<size_t>(atoi(argument[4]));
  kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.numBlockBarriers = 1;
  cudaOccDeviceState state{};
  cudaOccResult result{};
  cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, atoi(argument[3]),
                                                               static_cast<size_t>(atoi(argument[5])));
  if (error != CUDA_OCC_SUCCESS) return 1;
  std::printf("%d\n", result.activeBlocksPerMultiprocessor);
}
