// Named arguments of a block's constructor, taken one by one: none is bound by its place, and none is passed over.
#pragma once
#include "bindings/common.h"

class Fields {
  public:
    Fields(const char* block, const py::kwargs& given) : block_(block), rest_(given.attr("copy")()) {}

    // TypeError where it is missing.
    template <class T>
    T need(const char* name) {
        if (!rest_.contains(name)) throw py::type_error(std::string(block_) + ": " + name + " is missing");
        return taken<T>(name);
    }
    template <class T>
    T take(const char* name, T otherwise) {
        return rest_.contains(name) ? taken<T>(name) : otherwise;
    }
    // Empty where it is missing or None.
    Vector vector(const char* name) { return to_vector(take<std::optional<Floats>>(name, std::nullopt)); }
    // Any number of dimensions, flat.
    Vector flat(const char* name) {
        const Floats a = need<Floats>(name);
        return Vector(a.data(), a.data() + a.size());
    }
    // TypeError where something was given that nobody took.
    void end() const {
        for (const auto& item : rest_)
            throw py::type_error(std::string(block_) + " has no argument '" + py::cast<std::string>(item.first) + "'");
    }

  private:
    template <class T>
    T taken(const char* name) {
        const py::object value = rest_.attr("pop")(name);
        // pybind11 takes None for false
        const bool fits = !std::is_same_v<T, bool> || PyBool_Check(value.ptr());
        try {
            if (fits) return py::cast<T>(value);
        } catch (const py::cast_error&) {
        }
        const auto type = py::cast<std::string>(py::str(py::type::of(value)));
        throw py::type_error(std::string(block_) + ": " + name + " has the wrong type, " + type);
    }

    const char* block_;
    py::dict rest_;
};
