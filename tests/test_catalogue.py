"""Each operation of kernels.h has a twin, a kernel, a line in both tables, and tests."""

import re

import pytest

from tests.tree import CSRC, ROOT, TESTS, c_sources, files


def catalogue() -> str:
    return (CSRC / "kernels" / "kernels.h").read_text()


# What fuses others, and where: null in the twin's table, whose operations it must equal to the bit.
FUSED = {
    "decode_workspace_bytes": "kernels/test_bits_decode_step.py",
    "open_decode_graphs": "kernels/test_bits_decode_batch.py",
    "close_decode_graphs": "kernels/test_bits_decode_batch.py",
    "decode_max_seqs": "kernels/test_bits_decode_step.py",
    "decode_step": "kernels/test_bits_decode_step.py",
    "linear_add": "kernels/test_bits_fused_linear.py",
    "gated_linear": "kernels/test_bits_fused_linear.py",
    "qkv_linear": "system/test_fused_prefill.py",
    "fused_min_tokens": "system/test_fused_prefill.py",
}


def operations() -> list[str]:
    """The operations of kernels.h: members of the table that compute something."""
    table = re.search(r"typedef struct Kernels \{(.*?)\} Kernels;", catalogue(), re.S)
    assert table is not None
    members = re.findall(r"^\s+\w+ \*(\w+);", table[1], re.M)
    plumbing = {
        "open_stream",
        "close_stream",
        "alloc",
        "free",
        "copy_in",
        "copy_out",
        "synchronize",
        "free_memory",
        "packed_bytes",
        "name",
    }
    return [name for name in members if name not in plumbing | FUSED.keys()]


# Where an operation is tested, when not in tests/twin/test_<operation>.py.
TESTED_IN = {
    "pack_weight": "system/test_weight_properties.py",  # load and read back
    "unpack_weight": "system/test_weight_properties.py",
    "gather_rows": "system/test_schedule_invariance.py",  # the wanted rows of the logits
    "linear_f32": "twin/test_linear.py",
    "write_kv_cache": "twin/test_kv_cache.py",
    "read_kv_cache": "twin/test_kv_cache.py",
    "fill_block": "twin/test_kv_cache.py",
    "tensor_core_step": "twin/test_tensor_core.py",
    "restore_logits": "twin/test_score_tokens.py",  # scores are those of unedited logits
}


class TestTheCatalogue:
    def test_it_is_not_empty(self):
        assert len(operations()) >= 17

    @pytest.mark.parametrize("operation", operations())
    @pytest.mark.parametrize("backend", ["twin", "cuda"])
    def test_each_backend_declares_each_operation(self, operation: str, backend: str):
        assert re.search(rf"\b{backend}_{operation}\b", catalogue())

    @pytest.mark.parametrize("operation", operations())
    def test_each_operation_has_a_twin_and_is_in_its_table(self, operation: str):
        table = (CSRC / "twin" / "twin_kernels.c").read_text()
        definition = re.compile(rf"^Status twin_{operation}\(", re.M)

        assert re.search(rf"\.{operation} = twin_{operation},", table)
        assert any(definition.search(path.read_text()) for path in files(CSRC / "twin", ".c"))

    @pytest.mark.parametrize("operation", operations())
    def test_each_operation_has_a_kernel_and_is_in_its_table(self, operation: str):
        table = (CSRC / "kernels" / "cuda_kernels.c").read_text()
        definition = re.compile(rf"Status cuda_{operation}\(")

        assert re.search(rf"\.{operation} = cuda_{operation},", table)
        assert any(definition.search(p.read_text()) for p in files(CSRC / "kernels", ".cu", ".c"))

    @pytest.mark.parametrize("operation", operations())
    def test_each_operation_has_its_tests(self, operation: str):
        place = TESTS / TESTED_IN.get(operation, f"twin/test_{operation}.py")

        assert place.exists(), f"{operation} has no test file"
        assert re.search(r"^\s*def test_", place.read_text(), re.M)

    @pytest.mark.parametrize("operation", sorted(FUSED))
    def test_a_fused_operation_is_the_gpus_alone_and_is_held_to_the_bits(self, operation: str):
        gpu_table = (CSRC / "kernels" / "cuda_kernels.c").read_text()
        twin_table = (CSRC / "twin" / "twin_kernels.c").read_text()

        assert f".{operation} = cuda_{operation}," in gpu_table
        assert operation not in twin_table
        assert (TESTS / FUSED[operation]).exists()

    def test_each_source_has_every_test_that_it_refers_to(self):
        for path in c_sources():
            for reference in re.findall(r"tests/[\w/]+\.py", path.read_text()):
                assert (ROOT / reference).exists(), f"{path.name} refers to {reference}"
