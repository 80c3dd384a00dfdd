// ensemble_sample in a C++ program: no Python, no torch, only headers of csrc. `make run` builds and runs it; with the CUDA
// toolkit, `make run CUDA=1` adds the GPU.
#include <cstdio>
#include <vector>

#include "cpu/layers.h"
#if defined(WITH_CUDA)
#include "cuda/ensemble_sample.h"
#endif

using namespace ensemble_decode;

int main() {
  // Two rows over a vocabulary of 50,257, one expert pair: row 0 is steered, row 1 is not, and its experts are not read.
  const int64_t rows = 2, vocab = 50257;
  std::vector<float> target(rows * vocab), expert(rows * vocab), anti(rows * vocab);
  auto logit = [](uint32_t i) { return static_cast<float>(i * 2654435761u >> 16) / 8192.0f; };  // 0 to 8, and exact
  for (uint32_t i = 0; i < target.size(); i++) target[i] = logit(i), expert[i] = logit(3 * i + 1), anti[i] = logit(5 * i + 2);
  std::vector<float> alpha{1.5f, 0.0f}, temperature{0.8f, 0.0f}, top_p{0.9f, 1.0f}, min_p{0.0f, 0.0f};
  std::vector<int32_t> top_k{0, 0};
  std::vector<int64_t> seed{42, 43}, position{7, 7}, token(rows);
  std::vector<float> logprob(rows), target_logprob(rows);

  SampleArgs args{};
  args.dtype = DType::float32;
  args.rows = rows, args.vocab = vocab, args.pairs = 1;
  args.target = target.data(), args.expert = expert.data(), args.anti = anti.data();
  args.target_stride = args.expert_stride = args.anti_stride = vocab;
  args.expert_pair_stride = args.anti_pair_stride = rows * vocab;
  args.alpha = alpha.data(), args.alpha_stride = 1;
  args.temperature = temperature.data(), args.top_p = top_p.data(), args.min_p = min_p.data();
  args.top_k = top_k.data(), args.seed = seed.data(), args.position = position.data();
  args.token = token.data(), args.logprob = logprob.data(), args.target_logprob = target_logprob.data();
  kernels().ensemble_sample(args);
  for (size_t row = 0; row < rows; row++)
    std::printf("cpu  row %zu token %lld logprob %.5f target_logprob %.5f\n", row, static_cast<long long>(token[row]),
                logprob[row], target_logprob[row]);

#if defined(WITH_CUDA)
  // The same rows in device memory: every pointer of `args` changes, nothing else does.
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("cuda there is no GPU here");
    return 0;
  }
  auto on_device = [](const auto& values) {
    void* memory = nullptr;
    cudaMalloc(&memory, values.size() * sizeof(values[0]));
    cudaMemcpy(memory, values.data(), values.size() * sizeof(values[0]), cudaMemcpyHostToDevice);
    return memory;
  };
  std::vector<int64_t> cpu_token = token;
  args.target = on_device(target), args.expert = on_device(expert), args.anti = on_device(anti);
  args.alpha = static_cast<float*>(on_device(alpha)), args.temperature = static_cast<float*>(on_device(temperature));
  args.top_p = static_cast<float*>(on_device(top_p)), args.min_p = static_cast<float*>(on_device(min_p));
  args.top_k = static_cast<int32_t*>(on_device(top_k));
  args.seed = static_cast<int64_t*>(on_device(seed)), args.position = static_cast<int64_t*>(on_device(position));
  args.token = static_cast<int64_t*>(on_device(token)), args.logprob = static_cast<float*>(on_device(logprob));
  args.target_logprob = static_cast<float*>(on_device(target_logprob));
  cuda::Plan plan;
  void* workspace = nullptr;
  cudaError_t error = cuda::plan_ensemble_sample(args, &plan);
  if (error == cudaSuccess) error = cudaMalloc(&workspace, plan.workspace_bytes + 1);
  if (error == cudaSuccess) error = cuda::ensemble_sample(args, plan, workspace, nullptr);
  if (error == cudaSuccess) error = cudaMemcpy(token.data(), args.token, 8 * rows, cudaMemcpyDeviceToHost);
  if (error != cudaSuccess) {
    std::printf("cuda %s\n", cudaGetErrorString(error));
    return 1;
  }
  for (size_t row = 0; row < rows; row++) std::printf("cuda row %zu token %lld\n", row, static_cast<long long>(token[row]));
  return token == cpu_token ? 0 : 1;
#endif
}
