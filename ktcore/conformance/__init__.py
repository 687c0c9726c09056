"""The conformance kit: what a vendor runs to learn whether large models run right on its device beside the CPU experts.

    pytest --pyargs ktcore.conformance --backend NAME [--level N] [--seed S] [--report out.json] [--case ID]

How it works, in six steps:

1. `levels/` lists the cases. A case has a stable id ("L2.linear.Q4_K.one-token"), a level, an operator and a check.
2. `target.py` finds the backend and loads its implementations through the same seam as the engine does; what the
   backend does not bring is answered by the references and counted.
3. `data/` makes every input on the CPU from a hash of the case's id and the seed, so that any case runs alone.
4. `truth/` computes the answer in float64 on the dequantised weights, and the error that torch itself makes in the
   precision that the backend declares. A backend may be a few times worse than that, no more (`tolerance.py`).
5. `runner.py` turns what happened into one of six statuses. Gaps that a vendor knows of live in the vendor's package
   (`expectations.py`): permanent ones with a reason, temporary ones with an issue; an unexpected pass is a failure.
6. `report.py` keeps the result as JSON; `compare.py` tells what changed; `render/` makes the matrix.
"""

from ktcore.conformance.expectations import Expectations, ExpectedFailure, NotSupported, Precision
from ktcore.conformance.status import Mode, Status

__all__ = ["Expectations", "ExpectedFailure", "Mode", "NotSupported", "Precision", "Status"]
