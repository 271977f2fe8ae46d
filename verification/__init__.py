"""The suite that proves the engine against Hugging Face transformers, operator by operator.

Only this package and its tests import torch and transformers; the engine never does.
"""

import os

import engine  # noqa: F401  first: with it Ctrl-C during the imports of a command is one line

# Before torch is imported: threads that spin while waiting would take the cores from the engine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
