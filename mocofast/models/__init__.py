"""Encoders, their BatchNorm variants, and pixels as encoders take them."""
