"""Variational inference: guides, objectives and normalizing flows."""
