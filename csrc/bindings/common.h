// What the bindings share: argument types and their checks.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "blocks/attention.h"

namespace py = pybind11;
using namespace ktcore;

using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Ints = py::array_t<int32_t, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using NoGil = py::gil_scoped_release;

inline Vector to_vector(const std::optional<Floats>& a) {
    if (!a) return {};
    check(a->ndim() == 1 && a->size() > 0, "expected a vector");
    return Vector(a->data(), a->data() + a->size());
}

inline std::vector<int32_t> to_ints(const Ints& a, int dims, const char* what) {
    check(a.ndim() == dims, std::string(what) + " must have " + std::to_string(dims) + " dimension(s)");
    return std::vector<int32_t>(a.data(), a.data() + a.size());
}

inline float* pointer(uintptr_t address, const char* what) {
    check(address != 0 && address % 4 == 0, std::string(what) + " must be a non-null address aligned to 4 bytes");
    return reinterpret_cast<float*>(address);
}

inline int check_tokens(int64_t tokens) {
    check(tokens >= 0 && tokens <= 1 << 24, "tokens must be 0 to 2^24");
    return static_cast<int>(tokens);
}

inline py::buffer_info contiguous_bytes(const py::buffer& raw) {
    py::buffer_info b = raw.request();
    py::ssize_t step = b.itemsize;
    for (py::ssize_t i = b.ndim - 1; i >= 0; i--) {
        check(b.shape[static_cast<size_t>(i)] <= 1 || b.strides[static_cast<size_t>(i)] == step, "raw must be C-contiguous");
        step *= b.shape[static_cast<size_t>(i)];
    }
    check(b.itemsize == 1, "raw must be a buffer of bytes");
    return b;
}

// A Python object that stays alive as long as native code borrows its memory.
inline Keep keep_alive(const py::object& owner) {
    return Keep(owner.inc_ref().ptr(), [](const void* object) {
        const py::gil_scoped_acquire gil;
        Py_DECREF(static_cast<PyObject*>(const_cast<void*>(object)));
    });
}

// Memory of `owner` as a read-only array without a copy.
inline py::array_t<uint8_t> as_array(const uint8_t* data, size_t bytes, const py::object& owner) {
    py::array_t<uint8_t> out({static_cast<py::ssize_t>(bytes)}, {py::ssize_t{1}}, data, owner);
    out.attr("setflags")(py::arg("write") = false);
    return out;
}

inline Cache to_cache(uintptr_t k, uintptr_t v, int64_t num_pages, int page_size, const std::string& type) {
    const CacheType t = parse_cache_type(type);
    check(page_size > 0 && page_size <= 65536, "page_size must be 1 to 65536");
    check(num_pages > 0 && num_pages < int64_t{1} << 31, "num_pages must be positive");
    return {pointer(k, "k_pages_ptr"), pointer(v, "v_pages_ptr"), num_pages, page_size, t};
}

inline bool is_interleaved(const std::string& pairing) {
    if (pairing == "interleaved") return true;
    check(pairing == "half", "unknown rope_pairing '" + pairing + "'; known: half, interleaved");
    return false;
}

void bind_delta(py::module_& m);
void bind_entries(py::module_& m);
void bind_kda(py::module_& m);
void bind_experts(py::module_& m);
void bind_limits(py::module_& m);
void bind_mla(py::module_& m);
void bind_streams(py::module_& m);
