#!/usr/bin/env bash
# compressed-tensors 0.20.1, NVFP4: of the two scales beside a weight one multiplies and the other divides, though both are
# called scales. Twice `weight_scale` is twice the weight, twice `weight_global_scale` is half of it. ModelOpt's factor in
# the same place, `weight_scale_2`, multiplies: the two packages' files cannot be told apart by their values.
# Seen: "twice weight_scale: 2.0 times the weights; twice weight_global_scale: 0.5 times". Exits 0 while this is so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy psutil loguru compressed-tensors==0.20.1
"$work/venv/bin/python" - <<'PY'
import sys, torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True)
scheme = QuantizationScheme(targets=["Linear"], weights=args)
compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
packed = torch.randint(0, 256, (8, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

def weight(scale, factor):
    state = {
        "weight_packed": packed,
        "weight_scale": torch.full((8, 4), scale).to(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([factor]),
    }
    return compressor.decompress(state, scheme)["weight"].float()

plain = weight(4.0, 8.0)
some = plain != 0
by_scale, by_factor = ((w[some] / plain[some]).unique().tolist() for w in (weight(8.0, 8.0), weight(4.0, 16.0)))
print(f"twice weight_scale: {by_scale[0]} times the weights; twice weight_global_scale: {by_factor[0]} times")
sys.exit((by_scale, by_factor) != ([2.0], [0.5]))
PY
