"""The options of `python -m engine generate` and what it prints; `engine.generate` answers.

Decides what goes to stdout (the answer, as it comes) and to stderr (rates). Options of sampling
have the names and the limits of `SamplingParams`, which holds the one table.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engine.config import EngineConfig, ModelConfig
from engine.errors import DeviceUnavailable, InvalidArgument
from engine.generate import Generation, Timings, answer_length, room_for
from engine.llm_engine import LLMEngine
from engine.models import model_names, resolve
from engine.outputs import CompletionOutput, RequestOutput, TokenLogprobs
from engine.sampling_params import SamplingParams
from engine.tokenizer import Tokenizer

Progress = Callable[[str, int, int], None]  # what, done, total (0: not known)
# Makes a runner for a model directory.
RunnerFactory = Callable[[Path, EngineConfig, Progress], Any]

# Parameters of sampling that are one number: option, type, help. Their limits are SamplingParams'.
_NUMBERS: tuple[tuple[str, type, str], ...] = (
    ("temperature", float, "0: greedy (default)"),
    ("top-k", int, "only the k most likely tokens"),
    ("top-p", float, "only the most likely that hold this mass together"),
    ("min-p", float, "only those with this share of the most likely one's probability"),
    ("repetition-penalty", float, "divides the logits of tokens seen"),
    ("presence-penalty", float, "subtracted once from every token of the answer"),
    ("frequency-penalty", float, "subtracted once per occurrence in the answer"),
    ("seed", int, "of the draws (default: chosen, and told)"),
    ("n", int, "answers; more than one are printed when all have ended"),
    ("min-tokens", int, "nothing ends an answer before so many tokens"),
    ("logprobs", int, "score the tokens and so many alternatives; with --json"),
    ("prompt-logprobs", int, "the same for the prompt's tokens; with --json"),
)


def add_generate_parser(commands: Any) -> None:
    """Add `generate` to the command line's subcommands."""
    generate = commands.add_parser(
        "generate", help="answer one prompt", description="Answer one prompt."
    )
    generate.set_defaults(usage_error=generate.error)
    generate.add_argument("prompt", help="the prompt; - reads it from standard input")
    generate.add_argument(
        "--model",
        default="smollm2-135m",
        help=f"a directory, a hub id org/name, or one of {', '.join(model_names())} "
        "(default: %(default)s)",
    )
    style = generate.add_mutually_exclusive_group()
    style.add_argument(
        "--chat",
        action="store_const",
        const="chat",
        dest="style",
        help="the prompt is a user's message (default if the model has a chat template)",
    )
    style.add_argument(
        "--raw",
        action="store_const",
        const="raw",
        dest="style",
        help="the prompt is a text to go on with",
    )
    generate.add_argument(
        "--max-tokens", type=_positive, help="longest answer, in tokens (default: 256 if they fit)"
    )
    for name, kind, meaning in _NUMBERS:
        generate.add_argument(f"--{name}", type=kind, help=meaning)
    generate.add_argument(
        "--stop", action="append", help="the answer ends before this string; may be repeated"
    )
    generate.add_argument(
        "--stop-token-ids", type=int, action="append", metavar="ID", help="likewise with a token"
    )
    generate.add_argument(
        "--logit-bias", type=_bias, action="append", metavar="ID:BIAS", help="added to a logit"
    )
    generate.add_argument(
        "--ignore-eos", action="store_true", help="the model's end tokens do not end the answer"
    )
    generate.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: cuda where there is one (default)",
    )
    generate.add_argument(
        "--threads", type=_positive, default=0, help="CPU threads (default: every core)"
    )
    generate.add_argument(
        "--json", action="store_true", help="print one JSON object instead of the text"
    )


def run_generate(
    options: argparse.Namespace,
    make_runner: RunnerFactory | None,
    progress: Progress,
    on_ready: Callable[[], None],
) -> None:
    """Load, answer, print.

    Args:
        options: what the parser read.
        make_runner: what runs the model; None: `ModelRunner`.
        progress: told of long preparations.
        on_ready: called when they have ended.

    Raises:
        EngineError: no such model, a prompt or parameter that is refused, or a failed device.
    """
    if not options.json and (options.logprobs is not None or options.prompt_logprobs is not None):
        options.usage_error("--logprobs and --prompt-logprobs are shown by --json only")
    directory = resolve(options.model, progress)
    config = ModelConfig.from_directory(directory)
    tokenizer = Tokenizer.from_directory(directory)
    prompt_ids = _encode(tokenizer, _prompt_text(options.prompt), options.style)
    params = _params(options, answer_length(config, len(prompt_ids), options.max_tokens))

    def opened(device: str) -> Any:
        room = room_for(len(prompt_ids), params.max_tokens, device, options.threads, params.n)
        return (make_runner or _model_runner)(directory, room, progress)

    with _on_device(options.device, opened) as runner:
        on_ready()
        for name, count in runner.not_finite.items():
            print(f"warning: {name} has {count} NaN or infinite weights", file=sys.stderr)
        engine = LLMEngine(runner, config, runner.engine_config, tokenizer)
        generation = Generation(engine, prompt_ids, params)
        is_streamed = params.n == 1 and not options.json
        for output in generation:
            if is_streamed:
                print(output.outputs[0].delta, end="", flush=True)
        device = runner.engine_config.device
    if options.json:
        found = {"model": options.model, "device": device, **_as_json(output, generation.timings())}
        print(json.dumps(found, ensure_ascii=False, allow_nan=False))
        return
    if is_streamed:
        print(flush=True)
    else:
        for answer in output.outputs:
            print(f"[{answer.index}] {answer.text}", flush=True)
    seed = "" if params.is_greedy else f", seed {output.seed}"
    print(_summary(device, generation.timings()) + seed, file=sys.stderr)


def _params(options: argparse.Namespace, max_tokens: int) -> SamplingParams:
    """The sampling that the options ask for; greedy by default."""
    names = [name.replace("-", "_") for name, _, _ in _NUMBERS] + ["stop", "stop_token_ids"]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    bias = None if options.logit_bias is None else dict(options.logit_bias)
    return SamplingParams(
        **({"temperature": 0.0} | given),
        logit_bias=bias,
        max_tokens=max_tokens,
        ignore_eos=options.ignore_eos,
    )


def _on_device(device: str, opened: Callable[[str], Any]) -> Any:
    """The model on the device asked for; on its own account cuda first, then the CPU."""
    if device != "auto":
        return opened(device)
    try:
        return opened("cuda")
    except DeviceUnavailable:
        return opened("cpu")  # asked for whatever there is: no GPU here is not an error


def _model_runner(directory: Path, engine_config: EngineConfig, progress: Progress) -> Any:
    # Here, not above: wrong use and --help must work where the library is not built yet.
    from engine.model_runner import ModelRunner

    def on_tensor(done: int, total: int, name: str) -> None:
        progress("loading weights", done, total)

    return ModelRunner(directory, engine_config, progress=on_tensor)


def _prompt_text(argument: str) -> str:
    """The prompt itself, from the command line or from standard input."""
    text = argument
    if argument == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"prompt must be UTF-8, is not at byte {error.start}") from error
    if not text:
        raise InvalidArgument("prompt must have at least 1 character, got 0")
    return text


def _encode(tokenizer: Tokenizer, prompt: str, style: str | None) -> list[int]:
    """Token ids of the prompt: a message if the model knows them, unless raw text was asked for."""
    if style == "chat" or (style is None and tokenizer.has_chat_template):
        return tokenizer.encode_chat([{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt, add_bos=tokenizer.adds_bos)


def _as_json(output: RequestOutput, timings: Timings) -> dict[str, Any]:
    """One answer's fields by themselves, several under "outputs"."""
    answers = [_answer_as_json(answer) for answer in output.outputs]
    found = answers[0] if len(answers) == 1 else {"outputs": answers}
    if output.prompt_logprobs is not None:
        found["prompt_logprobs"] = [_logprobs_as_json(each) for each in output.prompt_logprobs]
    return found | {
        "seed": output.seed,
        "timings": {
            **asdict(timings),
            "prefill_tokens_per_second": timings.prefill_tokens_per_second,
            "decode_tokens_per_second": timings.decode_tokens_per_second,
        },
    }


def _answer_as_json(answer: CompletionOutput) -> dict[str, Any]:
    found = {
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if answer.logprobs is not None:
        found["cumulative_logprob"] = _number(answer.cumulative_logprob)
        found["logprobs"] = [_logprobs_as_json(each) for each in answer.logprobs]
    return found


def _logprobs_as_json(logprobs: TokenLogprobs | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    return {
        str(token_id): asdict(logprob) | {"logprob": _number(logprob.logprob)}
        for token_id, logprob in logprobs.items()
    }


def _number(value: float) -> float | None:
    """A score; null where logits were not finite, as JSON has no NaN."""
    return value if math.isfinite(value) else None


def _summary(device: str, timings: Timings) -> str:
    """One line: tokens and tokens per second of both phases."""
    parts = [
        f"prefill {timings.num_prompt_tokens} tokens"
        + _shown_rate(timings.prefill_tokens_per_second),
        f"decode {timings.num_new_tokens} tokens" + _shown_rate(timings.decode_tokens_per_second),
    ]
    return f"[{device}] " + ", ".join(parts)


def _shown_rate(rate: float | None) -> str:
    return "" if rate is None else f" at {rate:.1f} tokens/s"


def _positive(text: str) -> int:
    """An argument that must be an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _bias(text: str) -> tuple[int, float]:
    """ID:BIAS."""
    token_id, _, bias = text.partition(":")
    try:
        return int(token_id), float(bias)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be ID:BIAS, got {text!r}") from error
