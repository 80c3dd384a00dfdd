"""Executes compiled PTX on the CPU, in NumPy, with every thread of every CTA a vector lane.

What it is for: a kernel that was compiled for a GPU which is not there is run instruction by instruction, so that its
results can be compared with the reference, and its memory accesses and barriers checked:

* global memory: inside the tensors passed in, naturally aligned (a 16-byte load needs a 16-byte address), nothing read
  that was never written, bytes and 32-byte sectors counted per tensor, two CTAs racing on one place;
* shared memory, that of other CTAs of the cluster included: inside, aligned, written before it is read, no race (exact
  happens-before by vector clocks, a clock per warp), no access to a CTA that may not have begun or may have ended;
* copies to shared memory (``cp.async``): their destination is touched by nobody until their thread has waited for them;
* products of a warpgroup (``wgmma``): until they are waited for nobody touches their registers or overwrites what they read,
  which was stored before a proxy fence; registers used before are fenced; all four warps begin them, with one descriptor;
* products in tensor memory (``tcgen05``): bounds, allocation, undefined reads and races there as in shared memory; who uses
  what they read or write has waited for their mbarrier; loads and stores of tensor memory that no wait has covered;
* barriers: divergence, deadlock, arriving twice at a cluster barrier; mbarriers that are not initialised, or still in use when
  they end; warp instructions whose mask names absent lanes, matrix instructions that a part of a warp executes.

What it cannot see: the weak memory model's reorderings, races inside one warp, a copy's source that changes under way, time;
registers of ``tcgen05.ld`` used before its wait (LLVM moves uses there, ptxas keeps the order) and the lack of ``tcgen05.fence``
(Triton writes none; barriers are taken to order all). Warps of a warpgroup that come to a product one after another are refused.
``ex2``, ``lg2`` and other approximations, and sums of matrix products, are rounded from float64; ``approximate=True`` adds a
random error up to the manual's bound (to matrix products, for which it has none, 2⁻²¹ of the terms). Refused: ``wgmma`` and
``tcgen05`` of other types than bf16 and f16 summed in float32, or over two CTAs; bulk copies (TMA); ``mbarrier.arrive``.
"""

from tests.gpuless.ptxsim.machine import Machine, launch
from tests.gpuless.ptxsim.parser import Kernel
from tests.gpuless.ptxsim.values import PtxError

__all__ = ["Kernel", "Machine", "PtxError", "launch"]
