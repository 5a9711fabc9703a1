"""Encoders, BatchNorm variants, and conversion of pixels to encoder inputs."""
