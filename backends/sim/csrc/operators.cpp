// torch operators on the device. Shapes are worked out at once on meta tensors, the CPU kernel runs later on the
// stream's worker thread; what is not in the list goes to the host, counted and synchronous.
#include <ATen/EmptyTensor.h>
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include "native_list.h"
#include "tensors.h"

namespace sim {
namespace {

using c10::IValue;
using Stack = torch::jit::Stack;

template <class F>
IValue map_tensors(const IValue& v, F&& change) {
  if (v.isTensor()) return v.toTensor().defined() ? IValue(change(v.toTensor())) : v;
  if (v.isTensorList()) {
    c10::List<at::Tensor> made;
    for (const at::Tensor& t : v.toTensorVector()) made.push_back(change(t));
    return made;
  }
  if (v.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> made;
    for (const auto& t : v.toOptionalTensorVector())
      made.push_back(t && t->defined() ? std::optional<at::Tensor>(change(*t)) : std::nullopt);
    return made;
  }
  return v;
}

at::Tensor as_meta(const at::Tensor& t) {
  if (!on_device(t)) return t;
  return at::Tensor(at::detail::empty_strided_meta(t.sizes(), t.strides(), t.scalar_type()));
}

bool takes_host_index(const std::string& name) { return name.find("index") != std::string::npos; }

// A mask as an index needs its count on the host: as on real devices, that waits.
bool mask_to_index(const c10::OperatorHandle& op, Stack& stack, size_t arguments) {
  bool changed = false;
  for (size_t i = stack.size() - arguments; i < stack.size(); i++) {
    if (!stack[i].isOptionalTensorList()) continue;
    c10::List<std::optional<at::Tensor>> made;
    for (const auto& t : stack[i].toOptionalTensorVector()) {
      if (t && t->defined() && t->scalar_type() == at::kBool) {
        changed = true;
        for (const auto& column : t->nonzero().unbind(1)) made.push_back(std::optional<at::Tensor>(column));
      } else {
        made.push_back(t && t->defined() ? std::optional<at::Tensor>(*t) : std::nullopt);
      }
    }
    if (changed) stack[i] = made;
  }
  (void)op;
  return changed;
}

void native(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.operator_name().name;
  size_t count = schema.arguments().size(), first = stack->size() - count;
  mask_to_index(op, *stack, count);

  int index = -1;
  bool mixed = false;
  std::vector<Use> uses;
  Stack launched(count), meta(count);
  bool functional = true;
  for (const auto& r : schema.returns())
    if (r.alias_info() && r.alias_info()->isWrite()) functional = false;
  for (size_t i = 0; i < count; i++) {
    launched[i] = map_tensors((*stack)[first + i], [&](const at::Tensor& t) -> at::Tensor {
      if (on_device(t)) {
        mixed |= index >= 0 && index != t.device().index();
        index = t.device().index();
        return alias(t, uses);
      }
      TORCH_CHECK(t.device().is_cpu() && (t.dim() == 0 || takes_host_index(name)),
                  "Expected all tensors to be on the same device, but ", name, " got tensors on sim and on ", t.device());
      // the caller may change it before the worker gets there
      return t.unsafeGetTensorImpl()->is_wrapped_number() ? t : t.clone();
    });
  }
  TORCH_CHECK(index >= 0 && !mixed, name, ": tensors are on different devices of sim");
  c10::DeviceGuard guard({kType, static_cast<c10::DeviceIndex>(index)});

  // shapes and the errors that a caller made: known at once
  for (size_t i = 0; i < count; i++) meta[i] = map_tensors((*stack)[first + i], as_meta);
  Stack shapes = meta;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &shapes);
  }
  std::vector<at::Tensor> aliases;
  Stack results;
  if (functional) {
    for (const IValue& v : shapes) {
      TORCH_CHECK(v.isTensor(), name, " returns something else than tensors");
      const auto& t = v.toTensor();
      auto made = new_tensor(t.sizes(), t.strides(), t.scalar_type(), index);
      aliases.push_back(alias(made, uses));
      results.emplace_back(std::move(made));
    }
  } else {
    // written arguments are the results; `out` may have been given in another size
    for (size_t i = 0; i < count; i++) {
      const auto& info = schema.arguments()[i].alias_info();
      if (!info || !info->isWrite() || !(*stack)[first + i].isTensor()) continue;
      const auto& given = (*stack)[first + i].toTensor();
      auto wanted = meta[i].toTensor().sizes();
      if (on_device(given) && given.sizes() != wanted) {
        given.resize_(wanted);
        launched[i] = alias(given, uses);
      }
    }
    for (const auto& r : schema.returns())
      for (size_t i = 0; i < count; i++) {
        const auto& info = schema.arguments()[i].alias_info();
        if (info && r.alias_info() && *info == *r.alias_info()) results.push_back((*stack)[first + i]);
      }
  }
  launch(index, name.c_str(), std::move(uses), [op, launched, aliases] {
    Stack work = launched;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &work);
    for (size_t i = 0; i < aliases.size(); i++) aliases[i].copy_(work[i].toTensor());
  });
  torch::jit::drop(*stack, count);
  for (auto& r : results) stack->push_back(std::move(r));
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  int index = current_device();
  size_t count = op.schema().arguments().size();
  for (const IValue& v : torch::jit::last(*stack, count))
    map_tensors(v, [&](const at::Tensor& t) {
      if (on_device(t)) index = t.device().index();
      return t;
    });
  const auto& n = op.schema().operator_name();
  device(index).count_fallback(n.overload_name.empty() ? n.name : n.name + "." + n.overload_name);
  at::native::cpu_fallback(op, stack);
}

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

const at::Tensor& resize_(const at::Tensor& t, c10::IntArrayRef sizes, std::optional<at::MemoryFormat> format) {
  return at::native::resize_(t, sizes, format);
}

at::Tensor& set_offset(at::Tensor& t, at::Storage storage, int64_t offset, c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  return at::native::set_storage_cpu_(t, std::move(storage), offset, sizes, strides);
}

at::Tensor& set_whole(at::Tensor& t, at::Storage storage) {
  auto length = static_cast<int64_t>(storage.nbytes() / t.itemsize());
  return at::native::set_storage_cpu_(t, std::move(storage), 0, {length}, {1});
}

}  // namespace

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar);
  m.impl("nonzero", nonzero);
  m.impl("equal", equal);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_offset);
  m.impl("set_.source_Storage", set_whole);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
  for (const char* name : kNative) m.impl(name, torch::CppFunction::makeFromBoxedFunction<&native>());
}

}  // namespace sim
