"""Fused kernels of momentum contrast. They need torch, and Triton on a GPU, but never mocofast."""
