"""The kernels themselves, in Triton's language; the modules beside this folder check shapes and launch them."""
