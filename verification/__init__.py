"""The suite that proves the engine against Hugging Face transformers, operator by operator.

Only this package and its tests import torch and transformers; the engine never does.
"""
