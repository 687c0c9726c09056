// torch operators on the device. Shapes are worked out at once on meta tensors, the CPU kernel runs later on the
// stream's worker thread; what is not in the list goes to the host, counted and synchronous.
#include <ATen/EmptyTensor.h>
#include <ATen/ExpandUtils.h>
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/TypeProperties.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/WrapDimMinimal.h>
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
void mask_to_index(Stack& stack, size_t arguments) {
  for (size_t i = stack.size() - arguments; i < stack.size(); i++) {
    if (!stack[i].isOptionalTensorList()) continue;
    bool changed = false;
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
}

struct Shape {
  std::vector<int64_t> sizes, strides;  // no strides: contiguous
  at::ScalarType dtype;
};

// Elementwise and `cat`, without the meta kernels: those of common operators are written in Python and take 100 us.
Shape quick_shape(Rule rule, const IValue* arguments, size_t count) {
  Shape s;
  bool first = true;
  at::native::ResultTypeState types{};
  for (size_t i = 0; i < count; i++) {
    if (!arguments[i].isTensor() || !arguments[i].toTensor().defined()) continue;
    const auto& t = arguments[i].toTensor();
    s.sizes = first ? t.sizes().vec() : at::infer_size(s.sizes, t.sizes());
    first = false;
    if (rule != Rule::Where || i > 0) types = at::native::update_result_type_state(t, types);
  }
  s.dtype = at::native::result_type(types);
  if (rule == Rule::Bool) s.dtype = at::kBool;
  else if (count > 1 && arguments[1].isScalar() && arguments[0].isTensor())
    s.dtype = at::result_type(arguments[0].toTensor(), arguments[1].toScalar());
  if (rule == Rule::Float && c10::isIntegralType(s.dtype, true)) s.dtype = c10::typeMetaToScalarType(c10::get_default_dtype());
  return s;
}

// mm, bmm and addmm: the last two dimensions of the last two tensors.
Shape product_shape(const IValue* arguments, size_t count) {
  size_t at = 0;
  while (at + 1 < count && !(arguments[at].isTensor() && arguments[at + 1].isTensor())) at++;
  if (count > 2 && arguments[2].isTensor()) at = 1;
  const auto &a = arguments[at].toTensor(), &b = arguments[at + 1].toTensor();
  int64_t d = a.dim();
  TORCH_CHECK(d == b.dim() && (d == 2 || d == 3) && a.size(d - 1) == b.size(d - 2) && (d == 2 || a.size(0) == b.size(0)),
              "mat1 and mat2 shapes cannot be multiplied (", a.sizes(), " and ", b.sizes(), ")");
  TORCH_CHECK(a.scalar_type() == b.scalar_type(), "expected mat1 and mat2 to have the same dtype, but got ", a.scalar_type(), " and ",
              b.scalar_type());
  Shape s;
  s.sizes = a.sizes().vec();
  s.sizes[d - 1] = b.size(d - 1);
  s.dtype = a.scalar_type();
  if (at == 1) TORCH_CHECK(at::is_expandable_to(arguments[0].toTensor().sizes(), s.sizes), "addmm: bias ", arguments[0].toTensor().sizes());
  return s;
}

std::optional<Shape> cat_shape(const IValue& list, int64_t dim) {
  Shape s;
  at::native::ResultTypeState types{};
  for (const at::Tensor& t : list.toTensorVector()) {
    if (t.dim() == 1 && t.numel() == 0) return std::nullopt;  // an old exception, left to torch
    types = at::native::update_result_type_state(t, types);
    if (s.sizes.empty()) {
      dim = c10::maybe_wrap_dim(dim, t.dim());
      s.sizes = t.sizes().vec();
      continue;
    }
    TORCH_CHECK(t.dim() == static_cast<int64_t>(s.sizes.size()), "cat: tensors have different numbers of dimensions");
    for (int64_t d = 0; d < t.dim(); d++)
      TORCH_CHECK(d == dim || t.size(d) == s.sizes[d], "cat: sizes differ in dimension ", d);
    s.sizes[dim] += t.size(dim);
  }
  s.dtype = at::native::result_type(types);
  if (s.sizes.empty()) return std::nullopt;
  return s;
}

// What torch's meta kernels say. `outputs` of an in-place or out variant are those of the last argument list.
std::vector<Shape> meta_shapes(const c10::OperatorHandle& op, const IValue* arguments, size_t count, Stack& meta) {
  meta.resize(count);
  for (size_t i = 0; i < count; i++) meta[i] = map_tensors(arguments[i], as_meta);
  Stack results = meta;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::Meta), &results);
  }
  std::vector<Shape> shapes;
  for (const IValue& v : results) {
    TORCH_CHECK(v.isTensor(), op.schema().name(), " returns something else than tensors");
    const auto& t = v.toTensor();
    shapes.push_back({t.sizes().vec(), t.strides().vec(), t.scalar_type()});
  }
  return shapes;
}

// Arguments as the worker will see them; finds the one device that they are on.
Stack launched_arguments(const std::string& name, const IValue* arguments, size_t count, std::vector<Use>& uses, int& index) {
  Stack made(count);
  for (size_t i = 0; i < count; i++)
    made[i] = map_tensors(arguments[i], [&](const at::Tensor& t) -> at::Tensor {
      if (on_device(t)) {
        TORCH_CHECK(index < 0 || index == t.device().index(), name, ": Expected all tensors to be on the same device, but found sim:",
                    index, " and ", t.device());
        index = t.device().index();
        return alias(t, uses);
      }
      TORCH_CHECK(t.device().is_cpu() && (t.dim() == 0 || takes_host_index(name)), name,
                  ": Expected all tensors to be on the same device, but found sim and ", t.device());
      // the caller may change it before the worker gets there
      return t.unsafeGetTensorImpl()->is_wrapped_number() ? t : t.clone();
    });
  TORCH_CHECK(index >= 0, name, ": no tensor is on the device");
  return made;
}

bool writes_arguments(const c10::FunctionSchema& schema) {
  for (const auto& r : schema.returns())
    if (r.alias_info() && r.alias_info()->isWrite()) return true;
  return false;
}

// Results of an in-place or out variant: the written arguments, `out` in the size that it needs.
std::vector<IValue> written(const c10::FunctionSchema& schema, const IValue* arguments, const Stack& meta, Stack& launched,
                            std::vector<Use>& uses) {
  std::vector<IValue> results;
  for (size_t i = 0; i < meta.size(); i++) {
    const auto& info = schema.arguments()[i].alias_info();
    if (!info || !info->isWrite() || !arguments[i].isTensor() || !on_device(arguments[i].toTensor())) continue;
    const auto& given = arguments[i].toTensor();
    auto wanted = meta[i].toTensor().sizes();
    if (given.sizes() == wanted) continue;
    given.resize_(wanted);
    launched[i] = alias(given, uses);
  }
  for (const auto& r : schema.returns())
    for (size_t i = 0; i < schema.arguments().size(); i++) {
      const auto& info = schema.arguments()[i].alias_info();
      if (info && r.alias_info() && *info == *r.alias_info()) results.push_back(arguments[i]);
    }
  return results;
}

template <Rule rule>
void native(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto& name = schema.operator_name().name;
  size_t count = schema.arguments().size();
  if (rule == Rule::Meta) mask_to_index(*stack, count);
  const IValue* arguments = stack->data() + (stack->size() - count);
  int index = -1;
  std::vector<Use> uses;
  Stack launched = launched_arguments(name, arguments, count, uses, index);
  c10::DeviceGuard guard({kType, static_cast<c10::DeviceIndex>(index)});

  // shapes, and the mistakes that a caller made, are known at once
  std::vector<Shape> shapes;
  std::vector<IValue> results;
  std::vector<at::Tensor> aliases;
  if (rule == Rule::InPlace) {
    const auto& self = arguments[0].toTensor();
    TORCH_CHECK(at::IntArrayRef(quick_shape(Rule::Promote, arguments, count).sizes) == self.sizes(), name, ": output with shape ",
                self.sizes(), " doesn't match the broadcast shape");
    results.push_back(arguments[0]);
  } else {
    std::optional<Shape> quick;
    if (rule == Rule::Cat) quick = cat_shape(arguments[0], arguments[1].toInt());
    else if (rule == Rule::Product) quick = product_shape(arguments, count);
    else if (rule != Rule::Meta) quick = quick_shape(rule, arguments, count);
    Stack meta;
    if (quick) shapes = {*quick};
    else shapes = meta_shapes(op, arguments, count, meta);
    if (writes_arguments(schema)) results = written(schema, arguments, meta, launched, uses);
    else
      for (auto& s : shapes) {
        auto made = s.strides.size() == s.sizes.size() && !quick ? new_tensor(s.sizes, s.strides, s.dtype, index)
                                                                : new_tensor(s.sizes, s.dtype, index);
        aliases.push_back(alias(made, uses));
        results.emplace_back(std::move(made));
      }
  }
  launch(index, name.c_str(), std::move(uses), [op, launched = std::move(launched), aliases = std::move(aliases)] {
    Stack work = launched;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &work);
    for (size_t i = 0; i < aliases.size(); i++) {
      const auto& made = work[i].toTensor();
      TORCH_CHECK(made.sizes() == aliases[i].sizes() && made.scalar_type() == aliases[i].scalar_type(),
                  "the result has another shape or type than was foreseen");
      aliases[i].copy_(made);
    }
  });
  torch::jit::drop(*stack, count);
  for (auto& r : results) stack->push_back(std::move(r));
}

torch::CppFunction native_function(Rule rule) {
  switch (rule) {
    case Rule::Promote: return torch::CppFunction::makeFromBoxedFunction<&native<Rule::Promote>>();
    case Rule::Float: return torch::CppFunction::makeFromBoxedFunction<&native<Rule::Float>>();
    case Rule::Bool: return torch::CppFunction::makeFromBoxedFunction<&native<Rule::Bool>>();
    case Rule::Where: return torch::CppFunction::makeFromBoxedFunction<&native<Rule::Where>>();
    case Rule::Product: return torch::CppFunction::makeFromBoxedFunction<&native<Rule::Product>>();
    case Rule::Cat: return torch::CppFunction::makeFromBoxedFunction<&native<Rule::Cat>>();
    case Rule::InPlace: return torch::CppFunction::makeFromBoxedFunction<&native<Rule::InPlace>>();
    case Rule::Meta: break;
  }
  return torch::CppFunction::makeFromBoxedFunction<&native<Rule::Meta>>();
}

std::atomic<bool> all_on_device{false};

// Operators whose shapes torch tells without data run as a launch; false when it does not, with the stack as it was.
bool launched(const c10::OperatorHandle& op, Stack* stack) {
  for (const auto& r : op.schema().returns())
    if (r.type()->kind() != c10::TypeKind::TensorType) return false;
  Stack copy = *stack;
  try {
    native<Rule::Meta>(op, &copy);
  } catch (const std::exception&) {
    return false;  // the host's kernel finds the same mistake, if it was one
  }
  *stack = std::move(copy);
  return true;
}

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  if (all_on_device && launched(op, stack)) return;
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

}  // namespace

void run_all_on_device(bool on) { all_on_device = on; }

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  for (const auto& group : native_operators())
    for (const char* name : group.names) m.impl(name, native_function(group.rule));
}

}  // namespace sim
