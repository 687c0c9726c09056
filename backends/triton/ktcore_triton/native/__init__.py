"""The quantised product in C++ for CUDA and HIP: its source, the packing of weights for it, its build, the operator."""
