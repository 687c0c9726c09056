// The part of the Python module that is about NUMA nodes.
#pragma once
#include <pybind11/pybind11.h>

void bind_numa(pybind11::module_& m);
