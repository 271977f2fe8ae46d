"""Says what a failed operator did instead: tries known wrong variants on the very same inputs.

`scene` is what the operator read, the files named after operations hold the variants, `library`
lists them and `fit` decides whether one explains the output. Nothing here enters a verdict.
"""
