"""Small kernels that the simulator is tested with: PTX by hand, Triton over a cluster, CUDA over a cluster."""

from __future__ import annotations

HEADER = ".version 8.7\n.target sm_90\n.address_size 64\n"

#: Each CTA of a cluster of 4 leaves a number per warp with its right neighbour, all meet, and each reads its own.
RING = (
    HEADER
    + """
.visible .entry ring(.param .u64 out)
.reqntid 64
.explicitcluster
.reqnctapercluster 4
{
    .reg .pred %p<3>;
    .reg .b32 %r<20>;
    .reg .b64 %rd<5>;
    .shared .align 4 .b8 box[8];
    ld.param.u64 %rd1, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %cluster_ctarank;
    barrier.cluster.arrive.relaxed.aligned;
    barrier.cluster.wait.aligned;
    add.u32 %r3, %r2, 1;
    and.b32 %r3, %r3, 3;
    mov.u32 %r4, box;
    mapa.shared::cluster.u32 %r5, %r4, %r3;
    shr.u32 %r6, %r1, 5;
    shl.b32 %r7, %r6, 2;
    and.b32 %r8, %r1, 31;
    setp.ne.u32 %p1, %r8, 0;
    add.u32 %r9, %r5, %r7;
    mad.lo.u32 %r10, %r2, 10, %r6;
    @%p1 bra $MEET;
    st.shared::cluster.u32 [%r9], %r10;
$MEET:
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    ld.shared.u32 %r11, [box];
    ld.shared.u32 %r12, [box+4];
    add.u32 %r13, %r11, %r12;
    mov.u32 %r14, %ctaid.x;
    mul.wide.u32 %rd2, %r14, 4;
    add.s64 %rd3, %rd1, %rd2;
    setp.ne.u32 %p2, %r1, 0;
    @%p2 bra $END;
    st.global.u32 [%rd3], %r13;
$END:
    ret;
}
"""
)

#: out[w] = A·Bᵀ + 1 for A [16, 16] and B [8, 16] of bfloat16, by each of two warps. They copy 16 bytes a thread to shared
#: memory, A's by the first warp and B's by half of the second, and read matrices from there.
PRODUCT = (
    HEADER
    + """
.visible .entry product(.param .u64 a, .param .u64 b, .param .u64 out)
.reqntid 64
{
    .reg .pred %p<3>;
    .reg .b32 %r<30>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<9>;
    .shared .align 16 .b8 tiles[768];
    ld.param.u64 %rd1, [a];
    ld.param.u64 %rd2, [b];
    ld.param.u64 %rd3, [out];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, tiles;
    shl.b32 %r3, %r1, 4;
    cvt.u64.u32 %rd4, %r3;
    add.u32 %r4, %r2, %r3;
    setp.lt.u32 %p1, %r1, 32;
    add.s64 %rd5, %rd1, %rd4;
    add.s64 %rd6, %rd2, %rd4;
    mov.u32 %r5, 16;
    @%p1 cp.async.cg.shared.global [%r4], [%rd5], 0x10, %r5;
    setp.ge.u32 %p1, %r1, 32;
    setp.lt.and.u32 %p2, %r1, 48, %p1;
    @%p2 cp.async.cg.shared.global [%r4], [%rd6+-512], 0x10;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    and.b32 %r6, %r1, 31;
    and.b32 %r7, %r1, 15;
    shr.u32 %r8, %r6, 4;
    shl.b32 %r8, %r8, 4;
    shl.b32 %r9, %r7, 5;
    add.u32 %r8, %r8, %r9;
    add.u32 %r8, %r8, %r2;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r8];
    and.b32 %r7, %r1, 7;
    shl.b32 %r7, %r7, 5;
    shl.b32 %r9, %r6, 1;
    and.b32 %r9, %r9, 16;
    add.u32 %r7, %r7, %r9;
    add.u32 %r7, %r7, %r2;
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r14, %r15}, [%r7+512];
    mov.f32 %f1, 0f3F800000;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f2, %f3, %f4, %f5}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f1, %f1, %f1, %f1};
    shr.u32 %r16, %r1, 5;
    shl.b32 %r16, %r16, 9;
    shl.b32 %r17, %r6, 3;
    add.u32 %r16, %r16, %r17;
    cvt.u64.u32 %rd7, %r16;
    add.s64 %rd8, %rd3, %rd7;
    st.global.v2.f32 [%rd8], {%f2, %f3};
    st.global.v2.f32 [%rd8+256], {%f4, %f5};
    ret;
}
"""
)

_PRODUCT = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4, %f5, %f6, %f7, %f8}"

#: Two warpgroups fill 16 KB of shared memory, all but a quarter by copies; each multiplies A, in registers, by what ``right`` says.
WARPGROUPS = (
    HEADER
    + """
.visible .entry product(.param .u64 image, .param .u64 a, .param .u64 out, .param .u64 left, .param .u64 right)
.reqntid 256
{
    .reg .pred %p<3>;
    .reg .b32 %r<12>;
    .reg .f32 %f<10>;
    .reg .b64 %rd<12>;
    .shared .align 1024 .b8 box[16384];
    ld.param.u64 %rd1, [image];
    ld.param.u64 %rd2, [a];
    ld.param.u64 %rd3, [out];
    ld.param.u64 %rd4, [left];
    ld.param.u64 %rd5, [right];
    mov.u32 %r1, %tid.x;
    setp.eq.u32 %p1, %r1, 255;
    setp.ne.u32 %p2, %r1, 255;
    mad.wide.u32 %rd1, %r1, 16, %rd1;
    and.b32 %r2, %r1, 127;
    mad.wide.u32 %rd2, %r2, 16, %rd2;
    mad.wide.u32 %rd3, %r1, 32, %rd3;
    ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%rd2];
    mov.u32 %r2, box;
    shl.b32 %r3, %r1, 4;
    add.u32 %r2, %r2, %r3;
    ld.global.v2.u64 {%rd6, %rd7}, [%rd1];
    st.shared.v2.u64 [%r2], {%rd6, %rd7};
    cp.async.cg.shared.global [%r2+4096], [%rd1+4096], 16;
    cp.async.cg.shared.global [%r2+8192], [%rd1+8192], 16;
    cp.async.cg.shared.global [%r2+12288], [%rd1+12288], 16;
"""
    + "".join(f"    mov.f32 %f{i}, 0f3F800000;\n" for i in range(1, 9))
    + f"""    cp.async.wait_all;
    bar.sync 0;
    fence.proxy.async.shared::cta;
    wgmma.fence.sync.aligned;
    {_PRODUCT}, {{%r4, %r5, %r6, %r7}}, %rd5, 1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    st.global.v4.f32 [%rd3], {{%f1, %f2, %f3, %f4}};
    st.global.v4.f32 [%rd3+16], {{%f5, %f6, %f7, %f8}};
    ret;
}}
"""
)

#: The body of a warp whose lanes write 16 bytes to a row of their own; matrices follow.
ROWS = """    .shared .align 16 .b8 box[512];
    mov.u32 %r1, box;
    shl.b32 %r2, %r0, 4;
    add.u32 %r1, %r1, %r2;
    st.shared.v2.b64 [%r1], {%a, %b};
    bar.warp.sync -1;
"""

#: A maximum over a cluster with cooperative groups; scores stay in dynamic shared memory.
CLUSTER_MAXIMUM = r"""
#include <cooperative_groups.h>
namespace cg = cooperative_groups;
extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(128) maximum(const float* z, float* out, int V) {
  extern __shared__ float held[];
  __shared__ float warp[4], part;
  auto cluster = cg::this_cluster();
  unsigned rank = cluster.block_rank();
  int row = blockIdx.x / 8, count = 0;
  for (int i = rank * 128 + threadIdx.x; i < V; i += 1024) held[128 * count++ + threadIdx.x] = z[(long long)row * V + i];
  float best = -INFINITY;
  for (int i = 0; i < count; i++) best = fmaxf(best, held[128 * i + threadIdx.x]);
  for (int step = 16; step; step /= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, step));
  if (threadIdx.x % 32 == 0) warp[threadIdx.x / 32] = best;
  __syncthreads();
  if (threadIdx.x == 0) part = fmaxf(fmaxf(warp[0], warp[1]), fmaxf(warp[2], warp[3]));
  cluster.sync();
  best = -INFINITY;
  for (int r = 0; r < 8; r++) best = fmaxf(best, *cluster.map_shared_rank(&part, r));
  cluster.sync();
  if (rank == 0 && threadIdx.x == 0) out[row] = best;
}
"""


def tensor_core(rows: int = 64) -> str:
    """A CTA of four warps multiplies A (``rows`` × 16), in tensor memory, by what ``right`` says lies in shared memory.

    Shared memory is filled as that of ``WARPGROUPS``. The accumulators, 16 columns, begin as ones; A lies behind them.
    """
    shape, width, split = ("16x32bx2", 8, ", {}") if rows == 64 else ("32x32b", 16, "")
    result, ones = (", ".join(f"%{c}{i}" for i in range(width)) for c in "fo")
    words = ", ".join(f"%w{i}" for i in range(width // 2))
    copies = "".join(f"    cp.async.cg.shared.global [%r2+{n}], [%rd1+{n}], 16;\n" for n in range(4096, 16384, 2048))
    loads = "".join(f"    ld.global.u32 %w{i}, [%rd2+{4 * i}];\n" for i in range(width // 2))
    stores = "".join(f"    st.global.f32 [%rd3+{4 * i}], %f{i};\n" for i in range(width))
    return f"""{HEADER.replace("sm_90", "sm_100a")}
.visible .entry product(.param .u64 image, .param .u64 a, .param .u64 out, .param .u64 left, .param .u64 right, .param .u32 shape)
.reqntid 128
{{
    .reg .pred %p<9>;
    .reg .b32 %r<19>;
    .reg .b32 %w<8>;
    .reg .f32 %f<16>;
    .reg .b32 %o<16>;
    .reg .b64 %rd<12>;
    .shared .align 1024 .b8 box[16384];
    .shared .align 8 .b8 done[8];
    .shared .align 4 .b8 base[4];
    ld.param.u64 %rd1, [image];
    ld.param.u64 %rd2, [a];
    ld.param.u64 %rd3, [out];
    ld.param.u64 %rd4, [left];
    ld.param.u64 %rd5, [right];
    ld.param.u32 %r9, [shape];
    mov.u32 %r1, %tid.x;
    mov.u32 %r3, base;
    mov.u32 %r4, done;
    setp.lt.u32 %p1, %r1, 32;
    setp.eq.u32 %p2, %r1, 127;
    setp.eq.u32 %p3, %r1, 0;
    mov.pred %p6, -1;
    mov.u32 %r11, 0;
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r3], 32;
    @%p1 tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;
    @%p3 mbarrier.init.shared::cta.b64 [%r4], 1;
    bar.sync 0;
    ld.shared.u32 %r5, [%r3];
    shr.u32 %r6, %r1, 5;
    shl.b32 %r6, %r6, 21;
    add.u32 %r7, %r5, %r6;
    add.u32 %r8, %r5, 16;
    mov.u32 %r2, box;
    shl.b32 %r10, %r1, 4;
    add.u32 %r2, %r2, %r10;
    mad.wide.u32 %rd1, %r1, 16, %rd1;
    mad.wide.u32 %rd2, %r1, {2 * width}, %rd2;
    mad.wide.u32 %rd3, %r1, {4 * width}, %rd3;
{copies}    ld.global.v2.u64 {{%rd6, %rd7}}, [%rd1];
    st.shared.v2.u64 [%r2], {{%rd6, %rd7}};
    ld.global.v2.u64 {{%rd6, %rd7}}, [%rd1+2048];
    st.shared.v2.u64 [%r2+2048], {{%rd6, %rd7}};
{loads}    tcgen05.st.sync.aligned.{shape}.x{width // 2}.b32 [%r7+16]{split.format(width // 2)}, {{{words}}};
{"".join(f"    mov.b32 %o{i}, 0f3F800000;{chr(10)}" for i in range(width))}    tcgen05.st.sync.aligned.{shape}.x{width}.b32 [%r7+0]{split.format(width)}, {{{ones}}};
    tcgen05.wait::st.sync.aligned;
    cp.async.wait_all;
    fence.proxy.async.shared::cta;
    bar.sync 0;
    @!%p1 bra $BEGUN;
    elect.sync %r12|%p4, -1;
    @%p4 tcgen05.mma.cta_group::1.kind::f16 [%r5], [%r8], %rd5, %r9, %p6;
    @%p4 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r4];
$BEGUN:
    {{
    .reg .pred complete;
    again:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r4], %r11;
    @!complete bra.uni again;
    }}
    tcgen05.ld.sync.aligned.{shape}.x{width}.b32 {{{result}}}, [%r7+0]{split.format(width)};
    tcgen05.wait::ld.sync.aligned;
{stores}    bar.sync 0;
    @%p3 mbarrier.inval.shared::cta.b64 [%r4];
    @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r5, 32;
    ret;
}}
"""


def straight(body: str, outputs: int = 1) -> str:
    """A kernel of one warp around ``body``: inputs in %a, %b, %c (u64 each), results from %o0 … as u64."""
    stores = "".join(f"    st.global.u64 [%at+{8 * i}], %o{i};\n" for i in range(outputs))
    return (
        HEADER
        + f"""
.visible .entry straight(.param .u64 in, .param .u64 out)
.reqntid 32
{{
    .reg .pred %p<9>;
    .reg .b16 %h<9>;
    .reg .b32 %r<19>;
    .reg .f32 %f<9>;
    .reg .b64 %rd<9>;
    .reg .b64 %a, %b, %c, %at, %o<{outputs}>;
    ld.param.u64 %rd0, [in];
    mov.u32 %r0, %tid.x;
    mad.wide.u32 %rd0, %r0, 24, %rd0;
    ld.global.u64 %a, [%rd0];
    ld.global.u64 %b, [%rd0+8];
    ld.global.u64 %c, [%rd0+16];
    ld.param.u64 %at, [out];
    mad.wide.u32 %at, %r0, {8 * outputs}, %at;
{body}
{stores}    ret;
}}
"""
    )
