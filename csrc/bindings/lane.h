// The lane's part of the Python module.
#pragma once
#include <pybind11/pybind11.h>

namespace ktcore {
void bind_lane(pybind11::module_& m);
}
