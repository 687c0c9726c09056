// What makes, views and copies tensors, and the few operators whose answer the host must wait for.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "tensors.h"

namespace sim {
namespace {

at::Tensor empty(c10::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> where, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(where);
  return at::detail::empty_generic(sizes, c10::GetAllocator(kType), c10::DispatchKeySet(kKey), c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> where, std::optional<bool>) {
  auto index = where && where->has_index() ? where->index() : current_device();
  return new_tensor(sizes, strides, c10::dtype_or_default(dtype), index);
}

// Between two devices the copy runs on the source's stream, and both streams see it in order.
void copy_between(const at::Tensor& from, const at::Tensor& to) {
  int a = from.device().index(), b = to.device().index();
  Event ready, copied;
  ready.record(*current_stream(b));
  ready.make_wait(*current_stream(a));
  std::vector<Use> uses;
  auto s = alias(from, uses), d = alias(to, uses);
  launch(a, "copy", std::move(uses), [s, d] { d.copy_(s); }, Kind::Transfer);
  copied.record(*current_stream(a));
  copied.make_wait(*current_stream(b));
}

at::Tensor copy_from(const at::Tensor& given, const at::Tensor& to, bool non_blocking) {
  if (to.numel() == 0) return to;
  auto from = given.expand(to.sizes());
  if (on_device(from) && on_device(to)) {
    if (from.device() != to.device()) {
      copy_between(from, to);
      return to;
    }
    std::vector<Use> uses;
    auto s = alias(from, uses), d = alias(to, uses);
    launch(to.device().index(), "copy", std::move(uses), [s, d] { d.copy_(s); }, Kind::Transfer);
    return to;
  }
  int index = on_device(to) ? to.device().index() : from.device().index();
  const auto& host = on_device(to) ? from : to;
  bool staged = !is_pinned(host.const_data_ptr());
  if (staged) current_stream(index)->refuse_while_capturing("a copy of pageable memory");
  std::vector<Use> uses;
  at::Tensor s, d;
  if (on_device(to)) {
    // pageable memory is staged at once, a pinned buffer is read when the copy's turn comes
    s = staged && non_blocking ? from.clone() : from.alias();
    d = alias(to, uses);
  } else {
    s = alias(from, uses);
    d = to;
  }
  launch(index, "copy", std::move(uses), [s, d] { d.copy_(s); }, Kind::Transfer);
  if (!non_blocking || (staged && !on_device(to))) block_on(index, "a blocking copy");
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar local_scalar(const at::Tensor& t) {
  auto host = at::empty({}, t.options().device(at::kCPU));
  copy_from(t, host, false);
  return host.item();
}

at::Tensor nonzero(const at::Tensor& t) {
  int index = t.device().index();
  std::vector<Use> uses;
  auto s = alias(t, uses);
  auto found = std::make_shared<at::Tensor>();
  current_stream(index)->refuse_while_capturing("nonzero");
  launch(index, "nonzero", std::move(uses), [s, found] { *found = at::nonzero(s); });
  block_on(index, "nonzero");
  auto made = new_tensor(found->sizes(), at::kLong, index);
  if (found->numel()) {
    std::vector<Use> also;
    auto d = alias(made, also);
    launch(index, "nonzero", std::move(also), [d, found] { d.copy_(*found); });
  }
  return made;
}

bool equal(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes()) return false;
  return at::equal(a.cpu(), b.cpu());
}

// torch's own would move the bytes on the host.
const at::Tensor& resize_(const at::Tensor& t, c10::IntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!format || *format == at::MemoryFormat::Contiguous, "sim resizes contiguous tensors only");
  auto impl = t.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  auto bytes = static_cast<size_t>(impl->numel() + impl->storage_offset()) * t.itemsize();
  if (impl->numel() && bytes > t.storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(t.storage(), bytes);
  return t;
}

at::Tensor& set_offset(at::Tensor& t, at::Storage storage, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  return at::native::set_storage_cpu_(t, std::move(storage), offset, sizes, strides);
}

at::Tensor& set_whole(at::Tensor& t, at::Storage storage) {
  auto length = static_cast<int64_t>(storage.nbytes() / t.itemsize());
  return at::native::set_storage_cpu_(t, std::move(storage), 0, {length}, {1});
}

void record_stream(at::Tensor& t, c10::Stream s) {
  if (Block* b = block_of(t)) device(b->device).memory.record_user(b, device(s.device_index()).stream(s.id()));
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("record_stream", record_stream);
  m.impl("nonzero", nonzero);
  m.impl("equal", equal);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_offset);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
}

}  // namespace sim
