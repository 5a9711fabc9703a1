"""Fused kernels of momentum contrast. Depends on torch, and on Triton where a GPU is used; never on mocofast."""
