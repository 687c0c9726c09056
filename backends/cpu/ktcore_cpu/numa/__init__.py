"""Experts over several NUMA nodes: which node gets which part, and the module that runs them."""
