"""Matching the units of models with no common base."""
