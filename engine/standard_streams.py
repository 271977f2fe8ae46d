"""Standard input, output and error where whoever started a command has closed one of them.

Python has None there, which every command would have to ask for.
"""

import os
import sys


def open_closed_streams() -> None:
    """Reads nothing from a standard input that is closed, and writes to nowhere for the others."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # for the process's life
