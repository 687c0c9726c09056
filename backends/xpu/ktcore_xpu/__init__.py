"""The ktcore backend for Intel GPUs."""
