"""Inputs of the cases: valid random weight blocks, checkpoints in memory, ragged batches over scattered pages."""
