"""The tester, tested: plants one-line faults in the CPU twin; the suite must find and name them.

`python -m verification.mutants` runs the whole catalogue. Faults are data (catalogue.toml), each
with the operator that the suite must name; the judge is the suite itself, unchanged, run on the
faulty library.
"""
