"""The same question put to the whole suite, unabridged: verify_engine with one operator wrong.

For toys: prefill, decode, cache, known inputs, running free, logits and tokens, as `make verify`
runs them; only the prompts are few. Faults that look at nothing but an operator's values.
"""

from collections.abc import Iterator
from contextlib import closing

import torch

from engine.bindings import Library
from engine.config import ModelConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from verification.harness import EngineUnderTest, Subject, verify_engine
from verification.localisation.faults import Place, faults_of_values
from verification.localisation.faulty_runner import FaultyRunner
from verification.localisation.sweep import Planted
from verification.oracle import Reference
from verification.plan import Options, plan_groups, room_for
from verification.taps import TapKey, all_keys

OPTIONS = Options(decode_tokens=2, continuation_tokens=2, num_threads=1)
PROMPTS = (("few", [72, 101, 108, 108, 111, 44, 32, 119]), ("block", list(range(60, 79))))


def places(name: str) -> list[TapKey]:
    """Every tap of a toy."""
    return list(all_keys(ModelConfig.from_directory(resolve(name)).num_layers))


def plant(name: str, library: Library, keys: list[TapKey]) -> Iterator[Planted]:
    """What the suite names first for every fault of some places of a toy."""
    directory = resolve(name)
    config = ModelConfig.from_directory(directory)
    subject = Subject(
        name,
        "",
        Reference(directory, torch.bfloat16),
        Reference(directory, torch.float32),
    )
    groups = plan_groups(PROMPTS, config, OPTIONS)
    with closing(ModelRunner(directory, room_for(groups, OPTIONS), library)) as runner:
        for key in keys:
            for fault, damage in faults_of_values().items():
                place = Place(key, config, (), None)
                faulty = FaultyRunner(runner, key, damage, place)
                engine = EngineUnderTest(faulty, None, library.numerics_version, "")
                first = verify_engine(engine, subject, groups, OPTIONS).first_failure
                named = first and (first.operator, first.tap, first.layer)
                yield Planted(f"{fault}, whole suite", key, named, named)
