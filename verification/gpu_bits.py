"""What a GPU record keeps of a model's bits, and how any device computes the same.

Three phases of each prompt: `prefill`, every tap of a free-running prefill, as in golden/;
`decode`, every tap of the last tokens taken one by one; `greedy`, what the steps without taps leave
behind, which on the GPU are the fused ones. Knows models, prompts and the engine; knows nothing of
files, cards or verdicts.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from engine.batch import Batch, SequenceSlice, build_batch
from engine.bindings import Library, Tap, TapPoint
from engine.config import EngineConfig, ModelConfig
from engine.model_runner import ModelRunner
from engine.models import model_names
from engine.sources import shape, smollm2
from verification.capture import capture, engine_config_for
from verification.goldens import bit_hash
from verification.prompts import (
    Prompt,
    PromptSpec,
    default_selection,
    encoder_for,
    prompts_for,
    to_prompt,
)
from verification.taps import all_keys

MODELS = model_names()  # every toy, SmolLM2, and Llama 3.2 1B's shape
HASH_DIGITS = 10  # of SHA-256: 40 bits tell a changed tap from an unchanged one, in a small file
NUM_DECODED = 4  # last tokens of a prompt that are decoded with taps
NUM_GREEDY = 16  # steps without taps

# Beyond 8192 tokens: every band of the scaled RoPE, nine segments of attention. Recorded of the toy
# of the fewest heads, for which the twin needs seconds; a GPU's own tests run it on every toy.
LONG_PROMPT = Prompt(
    "long-8300",
    "beyond 8192 tokens: 65 attention tiles in nine segments",
    tuple((i * i + 7 * (i // 61)) % 256 for i in range(8300)),
)
LONG_PROMPT_MODEL = "toy"
# Of a trained model: two segments, and a step of more tokens than a token budget of 2048.
TRAINED_PROMPT = PromptSpec(
    "long-2100",
    "a trained model over two attention segments",
    repeat=("The river turned the mill, and the miller counted sacks until noon. ", 1),
    num_tokens=2100,
)

# A trained model's prompts are all prefilled; of these few are decoded as well.
DECODED_OF_SMOLLM2 = ("len-1", "capital", "len-129", "len-513", TRAINED_PROMPT.id)
# The twin computes 1.2 GMAC per token of this model: as many tokens as a prompt may have here.
PROMPTS_OF_SHAPE = "len-1,len-17,len-129,len-512"

Hashes = dict[str, list[str]]  # tap -> a hash per layer
PromptBits = dict[str, Hashes]  # phase -> taps
Progress = Callable[[int, int, str], None]  # done, of how many, what


def recorded_prompts(name: str, directory: Path) -> tuple[Prompt, ...]:
    """The prompts of one model's record: those of its goldens or a few, and for some a long one."""
    config = ModelConfig.from_directory(directory)
    if name == shape.NAME:
        return prompts_for(name, directory, config.vocab_size, PROMPTS_OF_SHAPE)
    prompts = prompts_for(name, directory, config.vocab_size, default_selection(name))
    if name == smollm2.NAME:
        return (*prompts, to_prompt(TRAINED_PROMPT, encoder_for(directory), config.vocab_size))
    return (*prompts, LONG_PROMPT) if name == LONG_PROMPT_MODEL else prompts


def is_decoded(name: str, prompt_id: str) -> bool:
    """Whether the record of this model holds the decode phases of this prompt."""
    return name != smollm2.NAME or prompt_id in DECODED_OF_SMOLLM2


def room_for(prompts: Sequence[Prompt], device: str) -> EngineConfig:
    """Room to prefill the longest of these prompts in one step and to decode on from its end."""
    room = engine_config_for(prompts, device)
    longest = room.max_seq_len + NUM_GREEDY
    return replace(room, max_seq_len=longest, num_blocks=-(-longest // room.block_size))


def model_bits(
    name: str,
    directory: Path,
    prompts: Sequence[Prompt],
    device: str,
    library: Library | None = None,
    progress: Progress | None = None,
) -> dict[str, PromptBits]:
    """What the record keeps of some prompts, computed on one device.

    Args:
        name: of the model.
        directory: its files.
        prompts: any of recorded_prompts.
        device: "cpu" (the twin) or "cuda".
        library: a loaded library; by default the one that make builds.
        progress: told how many prompts are done, of how many, and what is under way.
    """
    bits = {}
    with ModelRunner(directory, room_for(prompts, device), library) as runner:
        for done, prompt in enumerate(prompts):
            if progress is not None:
                progress(done, len(prompts), f"{name} on {device}: {prompt.id}")
            bits[prompt.id] = {"prefill": _prefill(runner, prompt)}
            if is_decoded(name, prompt.id):
                bits[prompt.id] |= {
                    "decode": _decode(runner, prompt),
                    "greedy": _greedy(runner, prompt),
                }
    return bits


def short(digest: str) -> str:
    """A SHA-256 as the record keeps it."""
    return digest[:HASH_DIGITS]


def _prefill(runner: ModelRunner, prompt: Prompt) -> Hashes:
    hashes: Hashes = {}
    for (tap, _), values in capture(runner, prompt).items():
        hashes.setdefault(tap, []).append(short(bit_hash(tap, values)))
    return hashes


def _decode(runner: ModelRunner, prompt: Prompt) -> Hashes:
    """The last tokens one by one; the cache still holds what the prefill wrote before them."""
    keys = list(all_keys(runner.config.num_layers))
    rows: dict[tuple[str, int], list[np.ndarray]] = {key: [] for key in keys}
    num_tokens = len(prompt.token_ids)
    for position in range(max(0, num_tokens - NUM_DECODED), num_tokens):
        batch = _one_token(runner, prompt, position)
        buffers = {key: runner.tap_buffer(TapPoint[key[0]], batch) for key in keys}
        runner.forward(batch, [Tap(TapPoint[t], layer, out=b) for (t, layer), b in buffers.items()])
        for key, buffer in buffers.items():
            rows[key].append(buffer)
    hashes: Hashes = {}
    for (tap, _), values in rows.items():
        hashes.setdefault(tap, []).append(_hash(np.concatenate(values)))
    return hashes


def _greedy(runner: ModelRunner, prompt: Prompt) -> Hashes:
    """From the last token on without taps: token ids, last logits, K and V of the new slots."""
    last = len(prompt.token_ids) - 1
    logits = np.empty((1, runner.config.vocab_size), np.float32)
    ids = runner.engine.decode(_one_token(runner, prompt, last), NUM_GREEDY, logits)
    slots = np.arange(last, last + NUM_GREEDY, dtype=np.int32)  # blocks lie in order
    kv = [runner.read_kv(layer, slots) for layer in range(runner.config.num_layers)]
    return {
        "token_ids": [_hash(ids)],
        "logits": [_hash(logits)],
        "k_cache": [_hash(k) for k, _ in kv],
        "v_cache": [_hash(v) for _, v in kv],
    }


def _one_token(runner: ModelRunner, prompt: Prompt, position: int) -> Batch:
    """One step of the prompt's sequence, whose block table reaches to the end of the room."""
    room = runner.engine_config
    blocks = list(range(room.num_blocks))
    part = SequenceSlice([prompt.token_ids[position]], position, blocks)
    batch = build_batch([part], room.block_size, logits="last")
    return replace(batch, block_tables=np.array([blocks], np.int32))


def _hash(values: np.ndarray) -> str:
    return short(hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest())


def differences(found: Mapping[str, PromptBits], recorded: Mapping[str, PromptBits]) -> list[str]:
    """Where two computations of the same prompts differ, in forward order within each phase.

    Args:
        found, recorded: by prompt id; both must hold the same prompts, phases, taps and layers.
    """
    if found.keys() != recorded.keys():
        return [f"other prompts: {sorted(found.keys() ^ recorded.keys())}"]
    places = []
    for prompt_id, phases in recorded.items():
        for phase, taps in phases.items():
            mine = found[prompt_id].get(phase, {})
            for layer in range(max(map(len, taps.values()))):
                for tap, hashes in taps.items():
                    other = mine.get(tap, [])
                    if (
                        layer < len(hashes)
                        and other[layer : layer + 1] != hashes[layer : layer + 1]
                    ):
                        places.append(f"prompt {prompt_id}, {phase}, {tap}, layer {layer}")
        if extra := sorted(found[prompt_id].keys() - phases.keys()):
            places.append(f"prompt {prompt_id}: the record has no phase {extra[0]}")
    return places


def num_taps(bits: Mapping[str, PromptBits]) -> int:
    """Hashes in all."""
    return sum(
        len(hashes)
        for phases in bits.values()
        for taps in phases.values()
        for hashes in taps.values()
    )
