"""Graphs from headers."""
