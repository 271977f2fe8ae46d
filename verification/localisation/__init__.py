"""Plants one fault at every operator of every layer and asks whether the suite names it first.

`faults` are the faults, `faulty_runner` makes an engine whose one operator is wrong while all that
follows is real, `sweep` goes through every place of a model, `__main__` records the figures.
"""
