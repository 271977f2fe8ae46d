"""A planted fault changes something, whatever the width of the tap: else nobody can find it."""

import pytest
import torch

from engine.sources.toy import CONFIGS
from verification.localisation.faults import Place, faults_of_values


@pytest.mark.parametrize("name", faults_of_values())
@pytest.mark.parametrize("width", [64, 65, 127, 128, 192, 576])
def test_a_fault_of_values_changes_values(name: str, width: int):
    clean = torch.randn(4, width, generator=torch.Generator().manual_seed(width)).bfloat16()
    place = Place(("k", 0), CONFIGS["toy-gqa8"], (), None)

    damaged = faults_of_values()[name](clean.clone(), place)

    assert damaged.shape == clean.shape
    assert not torch.equal(damaged, clean)
    values = torch.cat((damaged.sort(1).values, clean.sort(1).values), 1)
    assert name != "swapped heads" or torch.equal(*values.chunk(2, 1))  # moved, none lost
