"""Merge nnU-Nets as easily as you train them."""
