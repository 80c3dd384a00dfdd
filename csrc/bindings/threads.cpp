#include "../cpu/threads.h"

#include <torch/csrc/stable/library.h>

namespace {
void set_num_threads(int64_t n) { ensemble_decode::set_num_threads(static_cast<int>(n)); }
int64_t num_threads() { return ensemble_decode::num_threads(); }
}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ensemble_decode, m) {
  m.def("set_num_threads(int n) -> ()");
  m.def("num_threads() -> int");
}
STABLE_TORCH_LIBRARY_IMPL(ensemble_decode, CompositeExplicitAutograd, m) {
  m.impl("set_num_threads", TORCH_BOX(&set_num_threads));
  m.impl("num_threads", TORCH_BOX(&num_threads));
}
