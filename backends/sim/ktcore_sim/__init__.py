"""The ktcore backend for a simulated accelerator."""
