"""The ktcore backend for NVIDIA GPUs."""
