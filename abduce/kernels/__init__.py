"""Kernels: small numerical operations behind plain functions, each with its plain JAX form.

Nothing here knows of models, traces or algorithms.
"""
