"""The quantised product in CUDA C++ and HIP: sources, the packing of weights for it, and the build."""
