#!/usr/bin/env bash
# compressed-tensors 0.18.0 packs codes of 3, 5, 6 and 7 bits in another way than 0.17.1, and reads files of the older
# way without an error, as other values. Neither the tensors nor quantization_config say which way a file has.
# Seen: "3 bits: 26 words a row before, 24 now; 0.18.0 reads 0.17.1's file without an error, 3468 of 4096 codes wrong"
# and likewise for 5, 6 and 7 bits; 4 and 8 bits stay as they were. Exits 0 while this is so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy psutil compressed-tensors==0.17.1
"$work/venv/bin/pip" install -q --no-deps --target "$work/new" compressed-tensors==0.18.0
cat > "$work/pack.py" <<'PY'
import sys, torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
saved = {}
for bits in range(3, 9):
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (16, 256), dtype=torch.int8, generator=torch.Generator().manual_seed(bits))
    saved[bits] = (codes, pack_to_int32(codes, bits))
torch.save(saved, sys.argv[1])
PY
cat > "$work/read.py" <<'PY'
import sys, torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
as_expected = True
for bits, (codes, packed) in torch.load(sys.argv[1]).items():
    wrong = int((unpack_from_int32(packed, bits, codes.shape) != codes).sum())
    before, now = packed.shape[1], pack_to_int32(codes, bits).shape[1]
    print(f"{bits} bits: {before} words a row before, {now} now; 0.18.0 reads 0.17.1's file without an error, "
          f"{wrong} of {codes.numel()} codes wrong")
    as_expected &= (wrong == 0 and before == now) if 32 % bits == 0 else (wrong > 0 and before > now)
sys.exit(not as_expected)
PY
"$work/venv/bin/python" "$work/pack.py" "$work/packed.pt"
PYTHONPATH="$work/new" "$work/venv/bin/python" "$work/read.py" "$work/packed.pt"
