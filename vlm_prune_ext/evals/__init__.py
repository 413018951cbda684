"""Thin wrappers for evaluation frameworks; the only modules that import them."""
