"""Interleavings."""
