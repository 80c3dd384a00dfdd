// In place of the toolkit's header where kernels run on a CPU: cuda_on_cpu.h has declared what is needed.
#pragma once
