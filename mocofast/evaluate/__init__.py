"""Evaluation of encoders: nearest neighbours, linear probe, fine-tuning, and the kNN monitor."""
