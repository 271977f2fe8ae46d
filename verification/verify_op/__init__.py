"""Holds one operation of a stranger's shared object to every check of that operation.

`process` runs the object where its crash harms nobody, `passes` feeds it transformers' inputs and
the probes, `cases` boundary shapes and structured values, `trial` judges, `__main__` prints.
"""
