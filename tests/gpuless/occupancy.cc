// Blocks of a kernel that fit on a multiprocessor, by NVIDIA's own host-only header:
// occupancy <compute capability> <registers a thread> <shared bytes a block> <threads a block>.
#include <cuda_occupancy.h>

#include <cstdio>
#include <cstdlib>

int main(int count, char** words) {
  if (count != 5) return 2;
  int capability = atoi(words[1]), registers = atoi(words[2]), shared = atoi(words[3]), threads = atoi(words[4]);
  bool ampere = capability == 80;
  cudaOccDeviceProp device{};
  device.computeMajor = capability / 10;
  device.computeMinor = capability % 10;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = 2048;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32;
  device.sharedMemPerBlock = 49152;
  device.sharedMemPerMultiprocessor = ampere ? 167936 : 233472;
  device.sharedMemPerBlockOptin = ampere ? 166912 : 232448;
  device.reservedSharedMemPerBlock = 1024;
  device.numSms = ampere ? 108 : capability == 90 ? 132 : 148;
  cudaOccFuncAttributes kernel{};
  kernel.maxThreadsPerBlock = 1024;
  kernel.numRegs = registers;
  kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.numBlockBarriers = 1;
  cudaOccDeviceState state{};
  cudaOccResult result{};
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared) != CUDA_OCC_SUCCESS)
    return 1;
  printf("%d\n", result.activeBlocksPerMultiprocessor);
  return 0;
}
