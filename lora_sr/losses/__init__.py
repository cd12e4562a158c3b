"""Losses for distillation."""
