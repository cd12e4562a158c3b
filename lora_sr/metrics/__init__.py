"""Perceptual metrics for validation."""
