// Compiled as one: torch's headers take a compiler ten seconds each time.
#include "copies.cpp"
#include "kernels.cpp"
#include "operators.cpp"
#include "torch_device.cpp"
