"""Stand-ins for torch_npu's operators of mixtures of experts, by op-plugin's pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.vendors.npu_checks import FLOATS, HALVES, check, contiguous, dtype, shape


class ExpertOperators:
    """Gating, sorting, grouped products, and adding up."""

    run: Callable[..., None]

    def npu_moe_gating_top_k_softmax(
        self, x: torch.Tensor, finished: torch.Tensor | None = None, k: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Softmax, then the k largest; not renormalised. `row_idx` is column-major."""
        name = "MoeGatingTopKSoftmax"
        dtype(name, "x", x, *FLOATS)
        check(name, finished is None and 0 < k <= min(1024, x.shape[-1]) and x.dim() == 2, f"k {k} of {list(x.shape)}")
        out = torch.empty(x.shape[0], k, dtype=x.dtype, device=x.device)
        ids, rows = (torch.empty(x.shape[0], k, dtype=torch.int32, device=x.device) for _ in range(2))

        def kernel(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            scores = x.float().softmax(-1)
            found = _first_highest(scores, k)
            order = torch.arange(k)[None] * x.shape[0] + torch.arange(x.shape[0])[:, None]
            return scores.gather(1, found), found, order

        self.run(name, kernel, [x], [out, ids, rows])
        return out, ids, rows

    def npu_moe_gating_top_k(
        self,
        x: torch.Tensor,
        k: int,
        *,
        bias: torch.Tensor | None = None,
        k_group: int = 1,
        group_count: int = 1,
        group_select_mode: int = 0,
        renorm: int = 0,
        norm_type: int = 0,
        out_flag: bool = False,
        routed_scaling_factor: float = 1.0,
        eps: float = 1e-20,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """DeepSeek's gate: scores, plus a bias for the choice, best groups, k largest, weights without the bias."""
        name = "MoeGatingTopK"
        dtype(name, "x", x, *FLOATS)
        check(name, x.dim() == 2 and x.shape[1] <= 2048 and x.shape[1] % group_count == 0, f"x {list(x.shape)}")
        check(name, renorm == 0 and norm_type in (0, 1) and group_select_mode in (0, 1), "a mode that there is not")
        size = x.shape[1] // group_count
        check(name, group_count == 1 or size > 2, f"groups of {size}")
        check(name, group_count == 1 or -(-size // 32) * 32 * group_count <= 2048, f"{group_count} groups of {size}")
        check(name, 1 <= k <= size * k_group and 1 <= k_group <= group_count, f"k {k}, groups kept {k_group}")
        if bias is not None:
            dtype(name, "bias", bias, x.dtype)
            shape(name, "bias", bias, x.shape[1])
        out = torch.empty(x.shape[0], k, dtype=x.dtype, device=x.device)
        ids = torch.empty(x.shape[0], k, dtype=torch.int32, device=x.device)

        def kernel(x: torch.Tensor, b: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
            scores = x.float().sigmoid() if norm_type else x.float().softmax(-1)
            choice = scores if b is None else scores + b.float()
            if group_count > 1:
                grouped = choice.unflatten(1, (group_count, size))
                best = grouped.topk(2, -1).values.sum(-1) if group_select_mode else grouped.amax(-1)
                out_of = torch.ones_like(best, dtype=torch.bool).scatter_(1, _first_highest(best, k_group), False)
                choice = grouped.masked_fill(out_of[..., None], float("-inf")).flatten(1)
            found = _first_highest(choice, k)
            weights = scores.gather(1, found)
            if norm_type:
                weights = weights / (weights.sum(-1, keepdim=True) + eps)
            return weights * routed_scaling_factor, found

        self.run(name, kernel, [x, bias], [out, ids])
        return out, ids, torch.empty(0, device=x.device)

    def npu_moe_init_routing_v2(
        self,
        x: torch.Tensor,
        expert_idx: torch.Tensor,
        *,
        active_num: int = -1,
        expert_capacity: int = -1,
        expert_num: int = -1,
        drop_pad_mode: int = 0,
        expert_tokens_num_type: int = 0,
        expert_tokens_num_flag: bool = False,
        quant_mode: int = -1,
        active_expert_range: Sequence[int] = (),
        row_idx_type: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows sorted by expert, stably; where each of [T, k] went; counts of rows."""
        name = "MoeInitRoutingV3"
        dtype(name, "x", x, *FLOATS)
        dtype(name, "expert_idx", expert_idx, torch.int32)
        contiguous(name, x=x, expert_idx=expert_idx)
        check(name, expert_idx.dim() == 2 and expert_idx.shape[0] == x.shape[0], f"ids {list(expert_idx.shape)}")
        n = expert_idx.numel()
        check(name, drop_pad_mode == 0 and quant_mode == -1 and expert_capacity == -1, "a mode that there is not here")
        check(name, active_num == n and list(active_expert_range) == [0, expert_num], "all rows and experts are active")
        check(name, expert_tokens_num_flag and expert_tokens_num_type == 1 and row_idx_type == 0, "counts, type 0 rows")
        rows = torch.empty(n, x.shape[1], dtype=x.dtype, device=x.device)
        places = torch.empty(n, dtype=torch.int32, device=x.device)
        counts = torch.empty(expert_num, dtype=torch.int64, device=x.device)

        def kernel(x: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
            flat = ids.flatten().long()
            assert bool(((flat >= 0) & (flat < expert_num)).all()), "an expert that there is not"
            order = flat.argsort(stable=True)
            where = torch.empty_like(order).scatter_(0, order, torch.arange(n))
            return x[order // ids.shape[1]], where, torch.bincount(flat, minlength=expert_num)

        self.run(name, kernel, [x, expert_idx], [rows, places, counts])
        return rows, places, counts, torch.empty(0, device=x.device)

    def npu_grouped_matmul(
        self,
        x: Sequence[torch.Tensor],
        weight: Sequence[torch.Tensor],
        *,
        antiquant_scale: Sequence[torch.Tensor] | None = None,
        antiquant_offset: Sequence[torch.Tensor] | None = None,
        group_list: torch.Tensor | None = None,
        split_item: int = 0,
        group_type: int | None = None,
        group_list_type: int = 0,
        act_type: int = 0,
    ) -> list[torch.Tensor]:
        """Rows of each group through their own matrix."""
        name = "GroupedMatmulV4"
        lists: list[Any] = [x, weight, antiquant_scale or [], antiquant_offset or []]
        check(name, all(isinstance(v, list) for v in lists), "tensor arguments are lists")
        check(name, len(x) == len(weight) == 1, "one tensor of each")
        assert group_list is not None
        rows, banks = x[0], weight[0]
        dtype(name, "x", rows, *HALVES)
        dtype(name, "group_list", group_list, torch.int64)
        check(name, (split_item, group_type, group_list_type, act_type) == (2, 0, 1, 0), "modes of one result, counts")
        contiguous(name, x=rows, weight=banks)
        e, k = banks.shape[:2]
        n = banks.shape[2] * (8 if banks.dtype is torch.int32 else 1)
        shape(name, "group_list", group_list, e)
        shape(name, "x", rows, rows.shape[0], k)
        check(name, e <= 1024 and max(k, n) <= 65535, f"{e} groups of [{k}, {n}]")
        group, extra = 0, []
        if banks.dtype is torch.int32:
            assert antiquant_scale is not None
            assert antiquant_offset is not None, "an offset of zeros must be given"
            extra = [antiquant_scale[0], antiquant_offset[0]]
            groups = extra[0].shape[1]
            check(name, k % groups == 0, f"{groups} groups of K {k}")
            group = k // groups
            for tensor in extra:
                dtype(name, "antiquant", tensor, rows.dtype)
                shape(name, "antiquant", tensor, e, groups, n)
        else:
            dtype(name, "weight", banks, rows.dtype)
            check(name, antiquant_scale is None and antiquant_offset is None, "scales of a plain weight")
        out = torch.empty(rows.shape[0], n, dtype=rows.dtype, device=rows.device)

        def kernel(rows: torch.Tensor, counts: torch.Tensor, banks: torch.Tensor, *quant: torch.Tensor) -> torch.Tensor:
            from tests.vendors.npu_standin import dequantised

            made, start = torch.zeros(rows.shape[0], n), 0
            for i, count in enumerate(counts.tolist()):
                if count:
                    matrix = dequantised(banks[i], quant[0][i], quant[1][i], group) if quant else banks[i].float()
                    made[start : start + count] = rows[start : start + count].float() @ matrix
                start += count
            return made

        self.run(name, kernel, [rows, group_list, banks, *extra], [out])
        return [out]

    def npu_moe_token_unpermute(
        self,
        permuted_tokens: torch.Tensor,
        sorted_indices: torch.Tensor,
        probs: torch.Tensor | None = None,
        padded_mode: bool = False,
        restore_shape: Any = None,
    ) -> torch.Tensor:
        """out[t] = sum over j of probs[t, j] * permuted_tokens[sorted_indices[t * k + j]]."""
        name = "MoeTokenUnpermute"
        dtype(name, "permuted_tokens", permuted_tokens, *FLOATS)
        dtype(name, "sorted_indices", sorted_indices, torch.int32)
        assert probs is not None
        dtype(name, "probs", probs, permuted_tokens.dtype)
        check(name, not padded_mode and restore_shape is None, "padded mode is not supported")
        check(name, probs.numel() == sorted_indices.numel() == permuted_tokens.shape[0], "one share a row")
        check(name, probs.shape[1] <= 512, f"top {probs.shape[1]}")
        out = torch.empty(probs.shape[0], permuted_tokens.shape[1], dtype=permuted_tokens.dtype, device=probs.device)

        def kernel(rows: torch.Tensor, places: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
            found = rows.float()[places.long()].unflatten(0, tuple(shares.shape))
            return (found * shares.float()[..., None]).sum(1)

        self.run(name, kernel, [permuted_tokens, sorted_indices, probs], [out])
        return out


def _first_highest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Where the highest of each row are, of equals the first.

    AscendC's page of Sort32, by which these operators sort 32 values at a time, says that of equal scores the one with
    the lower index comes first. What MrgSort does with equals of two queues its page leaves open: not verified.
    """
    return values.argsort(dim=-1, descending=True, stable=True)[:, :count]
