// Compiled as one: what Python calls.
#include "bindings.cpp"
#include "python_task.cpp"
