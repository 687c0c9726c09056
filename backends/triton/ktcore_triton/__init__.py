"""Triton kernels for every accelerator that speaks Triton; a backend brings the device, the rules and the tuning."""
