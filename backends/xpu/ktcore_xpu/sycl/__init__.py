"""The XPU backend's own kernels: SYCL source, compiled when first used by the SYCL runtime that torch brings."""
