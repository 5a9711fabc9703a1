"""Benchmarks of mocofast beside what it replaces, machine-code inspection and performance models."""
