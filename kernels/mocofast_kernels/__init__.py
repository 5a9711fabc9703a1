"""Fused kernels of momentum contrast. Needs torch, and Triton where a GPU is used; never mocofast."""
