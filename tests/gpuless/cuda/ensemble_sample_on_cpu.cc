// Runs the kernels of ensemble_sample.cuh on a CPU over cases from a file: ensemble_sample_on_cpu <cases> <results>.
//
// The form is that of test_cuda_ensemble_sample.py: a case is 16 int64 (see Header), then its arrays one after another.
// Every tensor gets memory of exactly its size, `misaligned` bytes behind a multiple of 16, so that ASan sees the first byte
// read outside.
#include <cstdio>
#include <fstream>
#include <stdexcept>

#include "ensemble_sample.cuh"

using namespace ensemble_decode;

namespace {

struct Header {
  int64_t dtype, rows, vocab, pairs, has_anti, nucleus_target, target_is_combined, two_launches;
  int64_t target_stride, expert_pair_stride, expert_stride, anti_pair_stride, anti_stride;
  int64_t target_elements, expert_elements, misaligned;
};

class Tensors {
 public:
  Tensors(std::ifstream& file) : file_(file) {}
  ~Tensors() {
    for (void* p : owned_) free(p);
  }
  template <typename T>
  T* read(int64_t bytes, int64_t misaligned = 0) {
    if (bytes == 0) return nullptr;
    // posix_memalign of a size that is no multiple of 16: the allocation ends where the tensor ends.
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, static_cast<size_t>(bytes + misaligned))) throw std::bad_alloc();
    owned_.push_back(memory);
    char* at = static_cast<char*>(memory) + misaligned;
#if defined(__SANITIZE_ADDRESS__)
    if (misaligned) __asan_poison_memory_region(memory, static_cast<size_t>(misaligned));
#endif
    if (!file_.read(at, bytes)) throw std::runtime_error("the file of cases ends early");
    return reinterpret_cast<T*>(at);
  }

 private:
  std::ifstream& file_;
  std::vector<void*> owned_;
};

template <typename T>
void run(const SampleArgs& args, const cuda::Plan& plan) {
  unsigned rows = static_cast<unsigned>(args.rows), slices = static_cast<unsigned>(plan.slices);
  if (plan.cluster) {
    on_cpu::launch(dim3(rows * cuda::kCluster), dim3(cuda::kThreads), cuda::kCluster, plan.shared_bytes,
                   [&] { cuda::ensemble_sample_cluster<T>(args, plan.slice); });
    return;
  }
  // Exactly as large as the plan says.
  on_cpu::AlignedMemory memory = on_cpu::aligned_memory(plan.workspace_bytes);
  cuda::Workspace workspace = cuda::workspace_at(args, plan, memory.get());
  on_cpu::launch(dim3(rows, slices), dim3(cuda::kThreads), 1, 0,
                 [&] { cuda::ensemble_sample_visit<T>(args, plan.slice, workspace); });
  on_cpu::launch(dim3(rows), dim3(cuda::kThreads), 1, 0, [&] { cuda::ensemble_sample_finish<T>(args, workspace); });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: %s <cases> <results>\n", argv[0]);
    return 2;
  }
  std::ifstream cases(argv[1], std::ios::binary);
  std::ofstream results(argv[2], std::ios::binary);
  Header h;
  while (cases.read(reinterpret_cast<char*>(&h), sizeof(h))) {
    Tensors tensors(cases);
    SampleArgs args{};
    args.dtype = static_cast<DType>(h.dtype);
    args.rows = h.rows, args.vocab = h.vocab, args.pairs = h.pairs;
    args.target_stride = h.target_stride;
    args.expert_pair_stride = h.expert_pair_stride, args.expert_stride = h.expert_stride;
    args.anti_pair_stride = h.anti_pair_stride, args.anti_stride = h.anti_stride;
    args.nucleus_target = h.nucleus_target, args.target_is_combined = h.target_is_combined;
    int64_t width = args.dtype == DType::float32 ? 4 : 2;
    args.target = tensors.read<void>(h.target_elements * width, h.misaligned);
    args.expert = tensors.read<void>(h.expert_elements * width);
    args.anti = h.has_anti ? tensors.read<void>(h.expert_elements * width) : nullptr;
    args.alpha = tensors.read<float>(4 * h.rows * h.pairs);
    args.alpha_stride = h.pairs;
    args.temperature = tensors.read<float>(4 * h.rows);
    args.top_k = tensors.read<int32_t>(4 * h.rows);
    args.top_p = tensors.read<float>(4 * h.rows);
    args.min_p = tensors.read<float>(4 * h.rows);
    args.seed = tensors.read<int64_t>(8 * h.rows);
    args.position = tensors.read<int64_t>(8 * h.rows);
    size_t rows = static_cast<size_t>(h.rows);
    std::vector<int64_t> token(rows);
    std::vector<float> logprob(rows), target_logprob(rows);
    args.token = token.data(), args.logprob = logprob.data(), args.target_logprob = target_logprob.data();
    cuda::Plan plan = cuda::planned(args, !h.two_launches, 232448);
    switch (args.dtype) {
      case DType::float32: run<float>(args, plan); break;
#if !defined(ONLY_FLOAT32)
      case DType::bfloat16: run<bfloat16>(args, plan); break;
      case DType::float16: run<float16>(args, plan); break;
#else
      default: return 2;
#endif
    }
    results.write(reinterpret_cast<char*>(token.data()), static_cast<std::streamsize>(8 * rows));
    results.write(reinterpret_cast<char*>(logprob.data()), static_cast<std::streamsize>(4 * rows));
    results.write(reinterpret_cast<char*>(target_logprob.data()), static_cast<std::streamsize>(4 * rows));
  }
  return 0;
}
