"""compute-sanitizer over every kernel at boundary shapes; each lane first catches its own defect.

`lanes` runs the tool, `findings` reads what it said, `workload` is what runs under it;
`python -m verification.sanitizers` is `make sanitize`.
"""
