"""The ktcore backend for AMD GPUs."""
