"""The operations of `kernels/ops.py` as Triton kernels, one file each; `ops.py` gathers them."""
