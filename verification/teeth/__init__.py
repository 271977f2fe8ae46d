"""The kill matrix: every fault planted and built apart, and the suite run on it in level order.

`python -m verification.teeth` (make teeth) takes the hand catalogue, the bug museum and generated
faults, asks which check kills each first and whether it names the operator, and writes the record
from which docs/evidence.md is made. Results are kept by source hash and fault: a run goes on where
the last one stopped.
"""
