"""Benchmarks of mocofast beside other implementations, and models of its performance."""
