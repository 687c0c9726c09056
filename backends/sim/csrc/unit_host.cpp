// Compiled as one: the device itself, without torch.
#include "device.cpp"
#include "fault.cpp"
#include "graph.cpp"
#include "memory.cpp"
#include "stream.cpp"
