"""The ktcore backend for Ascend NPUs."""
