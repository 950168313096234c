"""Inference: targets, algorithms, posteriors."""
