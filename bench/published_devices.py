"""Profiles of devices that nobody measured for us: published peak rates, and the share of them that is assumed."""

from __future__ import annotations

from cluster.planning.device_profile import DeviceProfile
from cluster.planning.operators import Collective, DecodeAttention, Gemm, PrefillAttention, Roofline

# NVIDIA L4 datasheet: 121 TFLOP/s bfloat16 dense (242 with sparsity), 300 GB/s, 24 GB (23,034 MiB usable), PCIe 4.0.
# It throttles at 72 W. An L40S, with its 350 W, reaches 0.6 to 0.7 of its published flops in its measured rows.
L4_FLOPS, L4_BYTES = 121e12, 300e9
L4_GEMM_SHARE, L4_ATTENTION_SHARE, L4_MEMORY_SHARE = 0.6, 0.4, 0.85
L4_PCIE_BYTES = 32e9

L4 = DeviceProfile(
    name="l4",
    source=(
        "NVIDIA L4 datasheet: 121 TFLOP/s bfloat16 dense, 300 GB/s, 24 GB, PCIe 4.0 x16 (32 GB/s one way). "
        f"Assumed, not measured: {L4_GEMM_SHARE:.0%} of the flops in matrix products, "
        f"{L4_ATTENTION_SHARE:.0%} in attention, {L4_MEMORY_SHARE:.0%} of the bandwidth, 5 us per matrix product or "
        "copy, 10 us per attention, 60 % of PCIe and 10 us per hop in collectives, 25 Gbit/s per GPU to other nodes. "
        "Replace by `tandem profile`."
    ),
    memory_bytes=23034 << 20,
    element_bytes=2,
    nvlink_bytes_s=0.6 * L4_PCIE_BYTES,
    network_bytes_s=25e9 / 8,
    gemm=Gemm(Roofline(L4_GEMM_SHARE * L4_FLOPS, L4_MEMORY_SHARE * L4_BYTES, 5e-6)),
    prefill_attention=PrefillAttention(Roofline(L4_ATTENTION_SHARE * L4_FLOPS, L4_MEMORY_SHARE * L4_BYTES, 1e-5)),
    decode_attention=DecodeAttention(Roofline(L4_ATTENTION_SHARE * L4_FLOPS, L4_MEMORY_SHARE * L4_BYTES, 1e-5)),
    collectives={"all_reduce": Collective(Roofline(L4_GEMM_SHARE * L4_FLOPS, 0.6 * L4_PCIE_BYTES, 1e-5))},
    memory_copy=Roofline(L4_GEMM_SHARE * L4_FLOPS, L4_MEMORY_SHARE * L4_BYTES, 5e-6),
)

# Two cores of a server with AVX-512 at 2.5 GHz: 2 cores x 2 fused multiply-adds x 16 lanes x 2.5 GHz = 320 GFLOP/s in
# float32, 20 GB/s of memory bandwidth to go with them.
CPU_FLOPS, CPU_BYTES = 320e9, 20e9
CPU_GEMM_SHARE, CPU_ATTENTION_SHARE, CPU_MEMORY_SHARE = 0.6, 0.3, 0.7

CPU = DeviceProfile(
    name="cpu",
    source=(
        "Two generic server cores: 2 x 2 x 16 lanes x 2 flops x 2.5 GHz = 320 GFLOP/s in float32, 20 GB/s, 16 GiB. "
        f"Assumed, not measured: {CPU_GEMM_SHARE:.0%} of the flops in matrix products, {CPU_ATTENTION_SHARE:.0%} in "
        f"attention, {CPU_MEMORY_SHARE:.0%} of the bandwidth, 10 us per operator, 5 GB/s between processes, 10 Gbit/s "
        "to other nodes. Replace by `tandem profile`."
    ),
    memory_bytes=16 << 30,
    element_bytes=4,
    nvlink_bytes_s=5e9,
    network_bytes_s=10e9 / 8,
    gemm=Gemm(Roofline(CPU_GEMM_SHARE * CPU_FLOPS, CPU_MEMORY_SHARE * CPU_BYTES, 1e-5), element_bytes=4),
    prefill_attention=PrefillAttention(
        Roofline(CPU_ATTENTION_SHARE * CPU_FLOPS, CPU_MEMORY_SHARE * CPU_BYTES, 1e-5), element_bytes=4
    ),
    decode_attention=DecodeAttention(
        Roofline(CPU_ATTENTION_SHARE * CPU_FLOPS, CPU_MEMORY_SHARE * CPU_BYTES, 1e-5), element_bytes=4
    ),
    collectives={"all_reduce": Collective(Roofline(CPU_GEMM_SHARE * CPU_FLOPS, 5e9, 2e-5))},
    memory_copy=Roofline(CPU_GEMM_SHARE * CPU_FLOPS, CPU_MEMORY_SHARE * CPU_BYTES, 1e-5),
)
