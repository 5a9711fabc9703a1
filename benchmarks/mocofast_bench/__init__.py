"""Benchmarks of mocofast beside PyTorch and other packages, and performance models."""
