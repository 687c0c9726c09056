// The vendor's own kernels: each is one launch, whatever it does inside. They stand where a real backend has its fused
// kernels, compute in float32 with ATen on the worker thread, and never wait for the host.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "tensors.h"

namespace sim {
namespace {

using at::Tensor;
using std::optional;

at::Tensor activate(const Tensor& x, const std::string& name) {
  if (name == "silu") return at::silu(x);
  if (name == "relu") return at::relu(x);
  return at::gelu(x, "tanh");
}

void check_activation(const std::string& name) {
  TORCH_CHECK(name == "silu" || name == "relu" || name == "gelu_tanh", "sim has no activation ", name);
}

Tensor rms_norm(const Tensor& x, const optional<Tensor>& weight, double eps) {
  auto out = new_tensor(x.sizes(), at::kFloat, x.device().index());
  std::vector<Use> uses;
  auto a = alias(x, uses), o = alias(out, uses);
  Tensor w = weight ? alias(*weight, uses) : Tensor();
  launch(x.device().index(), "rms_norm", std::move(uses), [=] {
    auto v = a.to(at::kFloat);
    auto y = v * at::rsqrt(v.square().mean(-1, true) + eps);
    o.copy_(w.defined() ? y * w : y);
  });
  return out;
}

Tensor rope(const Tensor& x, const Tensor& positions, const Tensor& freq, double factor, bool interleaved) {
  TORCH_CHECK(x.dim() == 3 && positions.dim() == 1 && positions.size(0) == x.size(0) && 2 * freq.size(0) <= x.size(2),
              "rope: x ", x.sizes(), ", positions ", positions.sizes(), ", frequencies ", freq.sizes());
  auto out = new_tensor(x.sizes(), at::kFloat, x.device().index());
  std::vector<Use> uses;
  auto a = alias(x, uses), p = alias(positions, uses), f = alias(freq, uses), o = alias(out, uses);
  launch(x.device().index(), "rope", std::move(uses), [=] {
    int64_t half = f.size(0);
    auto angle = p.to(at::kFloat).unsqueeze(1) * f.unsqueeze(0);
    auto cos = (angle.cos() * factor).unsqueeze(1), sin = (angle.sin() * factor).unsqueeze(1);
    o.copy_(a);
    auto first = [&](const Tensor& t) { return interleaved ? t.slice(-1, 0, 2 * half, 2) : t.slice(-1, 0, half); };
    auto second = [&](const Tensor& t) { return interleaved ? t.slice(-1, 1, 2 * half, 2) : t.slice(-1, half, 2 * half); };
    auto u = first(a).to(at::kFloat), v = second(a).to(at::kFloat);
    first(o).copy_(u * cos - v * sin);
    second(o).copy_(v * cos + u * sin);
  });
  return out;
}

Tensor gated(const Tensor& gate, const Tensor& up, std::string activation) {
  check_activation(activation);
  TORCH_CHECK(gate.sizes() == up.sizes(), "gated: ", gate.sizes(), " and ", up.sizes());
  auto out = new_tensor(gate.sizes(), at::kFloat, gate.device().index());
  std::vector<Use> uses;
  auto g = alias(gate, uses), u = alias(up, uses), o = alias(out, uses);
  launch(gate.device().index(), "gated", std::move(uses), [=] { o.copy_(activate(g, activation) * u); });
  return out;
}

void append(const Tensor& rows, const Tensor& slots, const Tensor& first, const Tensor& second) {
  TORCH_CHECK(first.size(0) == slots.size(0) && second.size(0) == slots.size(0) &&
                  first[0].numel() + second[0].numel() == rows.size(1),
              "append: rows of ", rows.size(1), " values do not take ", first.sizes(), " and ", second.sizes());
  std::vector<Use> uses;
  auto r = alias(rows, uses), s = alias(slots, uses), a = alias(first, uses), b = alias(second, uses);
  launch(rows.device().index(), "append", std::move(uses), [=] {
    auto row = at::cat({a.reshape({a.size(0), -1}), b.reshape({b.size(0), -1})}, 1);
    Tensor(r).index_copy_(0, s, row.to(r.scalar_type()));
  });
}

// One sequence: q [tq, heads, dk], k [len, kv_heads, dk], v [len, kv_heads, dv] -> [tq, heads, dv].
// chosen: int [tq, n], the keys that a query sees, -1 for none; undefined: all of those up to itself.
Tensor attend_one(const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t window, const Tensor& chosen) {
  int64_t tq = q.size(0), heads = q.size(1), len = k.size(0), kv = k.size(1), group = heads / kv;
  auto qq = q.view({tq, kv, group, -1}).permute({1, 0, 2, 3}).reshape({kv, tq * group, -1});
  auto scores = (at::bmm(qq, k.permute({1, 2, 0})) * scale).view({kv, tq, group, len});
  auto i = at::arange(len - tq, len).unsqueeze(1), j = at::arange(len).unsqueeze(0);
  auto hidden = j > i;
  if (window) hidden = hidden | (j <= i - window);
  if (chosen.defined()) {
    auto at = chosen.to(at::kLong);
    auto named = at::zeros({tq, len + 1}, at::kBool).scatter(1, at.masked_fill(at < 0, len), true).slice(1, 0, len);
    hidden = hidden | named.logical_not();
  }
  scores = scores.masked_fill(hidden.view({1, tq, 1, len}), -std::numeric_limits<float>::infinity());
  auto weights = at::softmax(scores, -1).view({kv, tq * group, len});
  return at::bmm(weights, v.permute({1, 0, 2})).view({kv, tq, group, -1}).permute({1, 0, 2, 3}).reshape({tq, heads, -1});
}

// The rows of the first `length` tokens of a sequence, whose pages are `pages`.
Tensor rows_of(const Tensor& rows, const Tensor& pages, int64_t length, int64_t page_size) {
  auto position = at::arange(length);
  auto page = pages.to(at::kLong).index_select(0, position.div(page_size, "floor"));
  return rows.index_select(0, page * page_size + position.remainder(page_size)).to(at::kFloat);
}

// rows [slots, width] holds key and value of every head, or (latent) one row whose first `value_dim` are the value.
// What changes from step to step is device memory, so that a captured launch reads it anew: sequence i has the queries
// q_start[i] .. q_start[i + 1] and context[i] cached tokens, in the pages table[i].
Tensor attend(const Tensor& q, const Tensor& rows, const Tensor& table, const Tensor& q_start, const Tensor& context,
              int64_t page_size, double scale, int64_t kv_heads, int64_t value_dim, bool latent, int64_t window,
              const optional<Tensor>& chosen) {
  TORCH_CHECK(q.dim() == 3 && table.dim() == 2 && q_start.numel() == context.numel() + 1 &&
                  table.size(0) == context.numel() && page_size > 0, "attend: q ", q.sizes(), ", table ", table.sizes());
  for (auto& t : {table, q_start, context}) TORCH_CHECK(t.scalar_type() == at::kInt && t.is_contiguous(), "attend: int32");
  auto out = new_tensor({q.size(0), q.size(1), value_dim}, at::kFloat, q.device().index());
  std::vector<Use> uses;
  auto a = alias(q, uses), r = alias(rows, uses), t = alias(table, uses), s = alias(q_start, uses),
       c = alias(context, uses), o = alias(out, uses);
  Tensor named = chosen ? alias(*chosen, uses) : Tensor();
  launch(q.device().index(), "attend", std::move(uses), [=] {
    int64_t dk = a.size(2);
    auto starts = s.const_data_ptr<int>(), lengths = c.const_data_ptr<int>();
    TORCH_CHECK(starts[c.numel()] == a.size(0), "attend: ", starts[c.numel()], " queries of ", a.size(0));
    for (int64_t i = 0; i < c.numel(); i++) {
      int64_t length = lengths[i];
      auto part = rows_of(r, t[i], length, page_size);
      auto k = latent ? part.unsqueeze(1) : part.slice(1, 0, kv_heads * dk).view({length, kv_heads, dk});
      auto v = latent ? part.slice(1, 0, value_dim).unsqueeze(1)
                      : part.slice(1, kv_heads * dk).view({length, kv_heads, value_dim});
      auto query = a.slice(0, starts[i], starts[i + 1]).to(at::kFloat);
      Tensor sees = named.defined() ? named.slice(0, starts[i], starts[i + 1]) : Tensor();
      if (query.size(0)) o.slice(0, starts[i], starts[i + 1]).copy_(attend_one(query, k, v, scale, window, sees));
    }
  });
  return out;
}

// The `top_k` keys with the highest scores for each query, rising, then -1; of equal ones the earlier. Sequences as for
// attend, rows [slots, dim]: score = sum over heads of weight * relu(q . key).
Tensor choose(const Tensor& q, const Tensor& weights, const Tensor& rows, const Tensor& table, const Tensor& q_start,
              const Tensor& context, int64_t page_size, int64_t top_k) {
  TORCH_CHECK(q.dim() == 3 && weights.sizes() == q.sizes().slice(0, 2) && q_start.numel() == context.numel() + 1 &&
                  table.size(0) == context.numel() && page_size > 0 && top_k > 0, "choose: q ", q.sizes());
  for (auto& t : {table, q_start, context}) TORCH_CHECK(t.scalar_type() == at::kInt && t.is_contiguous(), "choose: int32");
  auto out = new_tensor({q.size(0), top_k}, at::kInt, q.device().index());
  std::vector<Use> uses;
  auto a = alias(q, uses), w = alias(weights, uses), r = alias(rows, uses), t = alias(table, uses),
       s = alias(q_start, uses), c = alias(context, uses), o = alias(out, uses);
  launch(q.device().index(), "choose", std::move(uses), [=] {
    auto starts = s.const_data_ptr<int>(), lengths = c.const_data_ptr<int>();
    Tensor(o).fill_(-1);
    for (int64_t i = 0; i < c.numel(); i++) {
      int64_t length = lengths[i], tokens = starts[i + 1] - starts[i], most = std::min(top_k, length);
      if (!tokens) continue;
      auto keys = rows_of(r, t[i], length, page_size);
      auto each = at::matmul(a.slice(0, starts[i], starts[i + 1]), keys.t()).relu();
      auto scores = (each * w.slice(0, starts[i], starts[i + 1]).unsqueeze(2)).sum(1);
      auto own = at::arange(length - tokens, length).unsqueeze(1);
      scores = scores.masked_fill(at::arange(length).unsqueeze(0) > own, -std::numeric_limits<float>::infinity());
      auto best = std::get<1>(scores.sort(true, -1, true)).slice(1, 0, most);
      auto rising = std::get<0>(best.masked_fill(best > own, length).sort(-1));
      o.slice(0, starts[i], starts[i + 1]).slice(1, 0, most).copy_(rising.masked_fill(rising == length, -1));
    }
  });
  return out;
}

Tensor experts(const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& gate, const Tensor& up,
               const Tensor& down, std::string activation, bool weight_on_input) {
  check_activation(activation);
  TORCH_CHECK(x.dim() == 2 && ids.sizes() == weights.sizes() && ids.size(0) == x.size(0) && gate.size(2) == x.size(1),
              "experts: x ", x.sizes(), ", ids ", ids.sizes(), ", weights ", weights.sizes());
  auto out = new_tensor(x.sizes(), at::kFloat, x.device().index());
  std::vector<Use> uses;
  auto a = alias(x, uses), c = alias(ids, uses), w = alias(weights, uses), g = alias(gate, uses), u = alias(up, uses),
       d = alias(down, uses), o = alias(out, uses);
  launch(x.device().index(), "experts", std::move(uses), [=] {
    int64_t tokens = a.size(0), k = c.size(1), count = g.size(0);
    auto chosen = c.contiguous();
    auto factors = w.to(at::kFloat).contiguous();
    std::vector<std::vector<int64_t>> rows(static_cast<size_t>(count));
    for (int64_t i = 0; i < tokens * k; i++) {
      int64_t e = chosen.const_data_ptr<int64_t>()[i];
      TORCH_CHECK(e < count, "expert id ", e, " of ", count);
      if (e >= 0) rows[static_cast<size_t>(e)].push_back(i);
    }
    o.zero_();
    for (int64_t e = 0; e < count; e++) {
      auto& mine = rows[static_cast<size_t>(e)];
      if (mine.empty()) continue;
      auto at_choice = at::tensor(mine, at::kLong);
      auto token = at_choice.div(k, "floor");
      auto factor = factors.view(-1).index_select(0, at_choice).unsqueeze(1);
      auto in = a.index_select(0, token).to(at::kFloat);
      if (weight_on_input) in = in * factor;
      auto y = at::mm(activate(at::mm(in, g[e].t()), activation) * at::mm(in, u[e].t()), d[e].t());
      Tensor(o).index_add_(0, token, weight_on_input ? y : y * factor);
    }
  });
  return out;
}

}  // namespace

TORCH_LIBRARY(ktcore_sim, m) {
  m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor");
  m.def("rope(Tensor x, Tensor positions, Tensor freq, float factor, bool interleaved) -> Tensor");
  m.def("gated(Tensor gate, Tensor up, str activation) -> Tensor");
  m.def("append(Tensor(a!) rows, Tensor slots, Tensor first, Tensor second) -> ()");
  m.def("attend(Tensor q, Tensor rows, Tensor table, Tensor q_start, Tensor context, int page_size, float scale, "
        "int kv_heads, int value_dim, bool latent, int window, Tensor? chosen=None) -> Tensor");
  m.def("choose(Tensor q, Tensor weights, Tensor rows, Tensor table, Tensor q_start, Tensor context, int page_size, "
        "int top_k) -> Tensor");
  m.def("experts(Tensor x, Tensor ids, Tensor weights, Tensor gate, Tensor up, Tensor down, str activation, "
        "bool weight_on_input) -> Tensor");
}

TORCH_LIBRARY_IMPL(ktcore_sim, PrivateUse1, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rope", rope);
  m.impl("gated", gated);
  m.impl("append", append);
  m.impl("attend", attend);
  m.impl("choose", choose);
  m.impl("experts", experts);
}

}  // namespace sim
