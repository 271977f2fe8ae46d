from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verification.mutants.build import ROOT
from verification.mutants.catalogue import CatalogueError
from verification.mutants.faults import CPU, GPU, Edit
from verification.teeth import checks
from verification.teeth.c_mutations import is_statement, mutable_lines, mutations
from verification.teeth.generate import (
    NOT_POLICY,
    generated,
    lines_of,
    load_equivalents,
    load_survivors,
    sources,
    with_equivalents,
)
from verification.teeth.python_mutations import mutations_of


def of_c(line: str, can_delete: bool = True) -> set[str]:
    return {mutation.after for mutation in mutations(line, can_delete)}


def of_python(source: str) -> set[str]:
    return {mutation.after for _, mutation in mutations_of(source)}


class TestC:
    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ("if (a < b) break;", {"if (a <= b) break;", "if (b < a) break;", "(void)0;"}),
            ("x = y - 2;", {"x = y + 2;", "x = y - 3;", "(void)0;"}),
            ("x[i] = 0.5f;", {"x[i + 1] = 0.5f;", "x[i] = (0.5f * 1.01f);", "(void)0;"}),
            ("__syncthreads();", {"(void)0;"}),
            ("bits ^ 0x10u", {"bits | 0x10u", "bits ^ 0x11u"}),
            ("if (!a && b)", {"if (a && b)", "if (!a || b)"}),
            ("f(a, b);", {"f(b, a);", "(void)0;"}),
            ('fail("a < b")', set()),
            ("float *x;", set()),
            ("return a;", set()),
            ("int n = 4;", {"int n = 5;"}),
            ("__global__ void __launch_bounds__(256, 1)", set()),
            ("__shared__ bf16 rope[kTokens][4];", set()),
            ("int n[kMost - 1];", {"int n[kMost + 1];"}),
            ("const float v[2] = {x[i]};", {"const float v[2] = {x[i + 1]};"}),
            ("auto at = [&](int i) {", set()),
            ("return v[i];", {"return v[i + 1];"}),
            ("f<<<n, 8, 0, (cudaStream_t)s>>>(a);", {"f<<<n, 9, 0, (cudaStream_t)s>>>(a);"}),
        ],
    )
    def test_each_kind_of_mutation(self, line: str, expected: set[str]):
        assert of_c(line) == expected

    def test_a_continued_line_is_not_left_out(self):
        assert "(void)0;" not in of_c("+ b);", can_delete=False)
        assert not is_statement("g(a, b));")
        assert not is_statement("const float *p = x;")
        assert not is_statement("Status launch_it(const Step &step, cudaStream_t stream);")
        assert not is_statement("int tap_width(TapPoint point);")
        assert not is_statement("kernel<<<rows, kThreads, 0, stream>>>(out, in);")
        assert is_statement("launch_it(step, stream);")
        assert is_statement("*out = f(a, b);")

    def test_comments_and_the_preprocessor_are_left_alone(self):
        text = "// a < b\n#define N 1\n_Static_assert(1 < 2, x);\nint a = 1;\nint a = 1;\n"

        assert list(mutable_lines(text)) == [("int a = 1;", 0, True), ("int a = 1;", 1, True)]


class TestPython:
    @pytest.mark.parametrize(
        ("body", "expected"),
        [
            ("return a < 1", {"return a <= 1", "return a < 2"}),
            ("return a - b", {"return a + b", "return (b - a)"}),
            ("return a is None", {"return a is not None"}),
            ("return x[i]", {"return x[i + 1]"}),
            ("self.count += 1", {"self.count -= 1", "self.count += 2", "pass"}),
            ("self.drop(a)", {"pass"}),
            ("return f(a, b)", {"return f(b, a)"}),
            ("return max(a, b)", {"return min(a, b)"}),
            ("return a and not b", {"return a or not b", "return a and  b"}),
            ("assert a < 1", set()),
            ("return zip(a, strict=True)", set()),
        ],
    )
    def test_each_kind_of_mutation(self, body: str, expected: set[str]):
        assert of_python(f"def f(self, a, b, i, x):\n    {body}\n") == expected

    def test_signatures_annotations_docstrings_and_imports_are_left_alone(self):
        source = (
            '"""1 < 2."""\nimport a\n\n@b(1)\ndef f(\n    x: int = 1,\n) -> int | None:\n'
            '    """1 < 2."""\n    y: int = 1\n    pass\n'
        )

        assert of_python(source) == set()


class TestTheSample:
    def test_every_source_of_the_twin_the_model_and_the_policy_is_in_it(self):
        names = {each.edit.file for each in generated(ROOT, CPU, 100)}

        assert names == {name for name in sources(ROOT, CPU) if _lines(name)}
        assert {"csrc/twin/linear.c", "csrc/model/forward.c", "engine/scheduler.py"} <= names

    def test_every_kernel_is_in_the_gpus(self):
        names = {each.edit.file for each in generated(ROOT, GPU, 100)}

        assert {"csrc/kernels/linear_many.cu", "csrc/kernels/decode_step.cuh"} <= names
        assert not names & set(sources(ROOT, CPU))

    def test_a_kernels_arithmetic_is_held_to_its_test_without_a_device_first(self):
        for file, test in checks.HOST_TESTS.items():
            asked = checks.for_generated(file, GPU, ROOT)

            assert asked[0] == checks.tests(test) and (ROOT / file).exists()
            later = asked[1 : asked.index(checks.tests(checks.CUDA_FAULTS))]
            assert later and all(check.request["marks"] == checks.GPU_MARK for check in later)

    def test_every_kernel_meets_the_rules_of_ptx_where_it_is_compiled(self):
        def ruled(name: str) -> list[str]:
            asked = checks.for_generated(f"csrc/kernels/{name}", GPU, ROOT)
            labels = [check.label for check in asked if check.request["marks"] != checks.GPU_MARK]
            rule = f"{checks.PTX_RULE}["
            return [label[len(rule) : -1] for label in labels if label.startswith(rule)]

        assert ruled("argmax.cu") == ["argmax"]
        assert ruled("decode_linear.cuh") == ["decode_step"]
        split = ["gated_linear", "linear_add", "linear_many", "qkv_linear"]
        assert ruled("linear_ring.cuh") == ["decode_batch_many", *split]
        assert all(ruled(Path(f).name) for f in sources(ROOT, GPU) if ".cu" in f)
        assert checks.compiled_into("csrc/model/decode.c", ROOT) == ()
        assert f"def {checks.PTX_RULE.partition('::')[2]}(" in (ROOT / checks.PTX_RULES).read_text()

    def test_what_shares_memory_by_barriers_meets_racecheck_last(self):
        for name, case in checks.RACED.items():
            (file,) = [f for f in sources(ROOT, GPU) if f.rpartition("/")[2].startswith(f"{name}.")]
            last = checks.for_generated(file, GPU, ROOT)[-1]

            assert last.label == f"{checks.RACE}[{case}]"
            assert last.request["marks"] == checks.GPU_MARK
            assert f'"{case}": ' in (ROOT / checks.RACES).read_text()

    def test_what_is_no_policy_exists(self):
        assert [n for n in NOT_POLICY if not (ROOT / "engine" / f"{n}.py").exists()] == []

    def test_the_same_seed_gives_the_same_sample_and_another_gives_another(self):
        first, again, other = (generated(ROOT, CPU, 50, seed) for seed in (1, 1, 2))

        assert first == again
        assert {e.edit for e in first} != {e.edit for e in other}

    def test_without_a_count_every_line_is_in_it_once(self):
        everything = generated(ROOT, CPU, None)
        places = [(e.edit.file, e.edit.before, e.edit.occurrence) for e in everything]

        assert len(set(places)) == len(places) == sum(_lines(n) for n in sources(ROOT, CPU))

    def test_every_mutation_of_every_line_applies_and_changes_that_line_alone(self):
        for device in (CPU, GPU):
            for each in generated(ROOT, device, None):
                text = (ROOT / each.edit.file).read_text(encoding="utf-8")
                changed = each.edit.apply(text)
                number = int(each.id.split(":")[1].split()[0])
                before, after = text.split("\n"), changed.split("\n")
                differing = [i + 1 for i in range(len(before)) if before[i] != after[i]]
                assert differing == [number], each.id


def _lines(name: str) -> int:
    return len(lines_of(name, (ROOT / name).read_text(encoding="utf-8")))


class TestAnEdit:
    def test_one_that_is_not_there_is_refused_by_file_and_line(self):
        with pytest.raises(CatalogueError, match="x.py has 1 lines, must be more than 1, that say"):
            Edit("x.py", "a", "b", 1).apply("  a\n")

    def test_the_wanted_occurrence_is_changed_and_its_indent_kept(self):
        assert Edit("x.py", "a", "b", 1).apply("a\n  a\na\n") == "a\n  b\na\n"

    @settings(max_examples=50)
    @given(st.text("ab\n ", max_size=30))
    def test_without_an_occurrence_the_text_must_be_there_once(self, text: str):
        edit = Edit("x.py", "ab", "ba")

        if text.count("ab") == 1:
            assert edit.apply(text) == text.replace("ab", "ba")
        else:
            with pytest.raises(CatalogueError, match="must be once"):
                edit.apply(text)


class TestEquivalents:
    def test_every_listed_one_applies_and_is_planted_all_the_same(self):
        listed = load_equivalents()
        for device in (CPU, GPU):
            planted = with_equivalents([], listed, ROOT, device)
            for each in planted:
                each.edit.apply((ROOT / each.edit.file).read_text(encoding="utf-8"))

        mine = {file for device in (CPU, GPU) for file in sources(ROOT, device)}
        assert {each.edit.file for each in listed} <= mine

    def test_every_known_survivor_applies(self):
        for each in load_survivors():
            each.edit.apply((ROOT / each.edit.file).read_text())

    @pytest.mark.parametrize("reason", ["", "equivalent", "is so"])
    def test_one_without_a_reason_is_refused(self, tmp_path, reason: str):
        path = tmp_path / "equivalent.toml"
        path.write_text(
            f'[[equivalent]]\nfile = "a"\nbefore = "b"\nafter = "c"\nreason = "{reason}"\n'
        )

        with pytest.raises(CatalogueError, match="no reason"):
            load_equivalents(path)
