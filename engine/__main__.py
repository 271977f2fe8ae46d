"""The command line: `python -m engine generate --model NAME "a prompt"`, and `bench`.

Decides options, what goes to stdout (the answer) and what to stderr (progress, timings, errors),
and the exit code: 0 done, 1 the engine refused or failed, 2 wrong use, 130 interrupted. Knows
nothing of how an answer is made.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from engine.bench_command import add_bench_parser, run_bench
from engine.config import EngineConfig, ModelConfig
from engine.errors import DeviceUnavailable, EngineError, InvalidArgument
from engine.generate import Answer, GreedyDecoder, Timings, answer_length, room_for
from engine.models import model_names, resolve
from engine.tokenizer import Tokenizer

EXIT_ENGINE_ERROR = 1
EXIT_INTERRUPTED = 130

# Makes a runner for a model directory; told of progress as (what, done, total).
RunnerFactory = Callable[[Path, EngineConfig, Callable[[str, int, int], None]], Any]


class ProgressBar:
    """Shows long preparations on stderr while they last; silent where stderr is no terminal."""

    def __init__(self) -> None:
        """Prepare; nothing is shown before the first report."""
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def report(self, what: str, done: int, total: int) -> None:
        """Say how far a piece of work is; units are the caller's."""
        if what not in self._tasks:
            self._progress.start()
            self._tasks[what] = self._progress.add_task(what, total=total)
        self._progress.update(self._tasks[what], completed=done, total=total)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._progress.stop()


def main(arguments: Sequence[str] | None = None, make_runner: RunnerFactory | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None: those of the process.
        make_runner: what runs the model; None: `ModelRunner`.

    Returns:
        The exit code. Wrong use leaves through SystemExit(2), as argparse does.
    """
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters of the answer
    bar = ProgressBar()
    try:
        if options.command == "bench":
            run_bench(options, bar.report)
        else:
            _generate(options, make_runner or _model_runner, bar)
    except BrokenPipeError:
        # The reader has gone; the interpreter must not complain about it when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_ENGINE_ERROR
    except (EngineError, OSError, MemoryError) as error:
        bar.close()
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        return EXIT_ENGINE_ERROR
    except KeyboardInterrupt:
        bar.close()
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        bar.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m engine", description="Run Llama models.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser(
        "generate", help="answer one prompt, greedily", description="Answer one prompt, greedily."
    )
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
    add_bench_parser(commands)
    return parser


def _generate(options: argparse.Namespace, make_runner: RunnerFactory, bar: ProgressBar) -> None:
    """Load, answer, print."""
    directory = resolve(options.model, bar.report)
    config = ModelConfig.from_directory(directory)
    tokenizer = Tokenizer.from_directory(directory)
    prompt_ids = _encode(tokenizer, _prompt_text(options.prompt), options.style)
    max_tokens = answer_length(config, len(prompt_ids), options.max_tokens)

    opened = _open_runner(make_runner, directory, options, len(prompt_ids), max_tokens, bar)
    with opened.runner as runner:
        bar.close()
        for name, count in runner.not_finite.items():
            print(f"warning: {name} has {count} NaN or infinite weights", file=sys.stderr)
        decoder = GreedyDecoder(
            runner, opened.engine_config, prompt_ids, max_tokens, config.eos_token_ids
        )
        stream = tokenizer.stream()
        for token_id in decoder:
            piece = stream.push(token_id)
            if not options.json:
                print(piece, end="", flush=True)
        if not options.json:
            print(stream.finish(), flush=True)
    answer = decoder.answer()
    device = opened.engine_config.device
    if options.json:
        print(json.dumps(_as_json(options.model, device, tokenizer, answer), ensure_ascii=False))
    else:
        print(_summary(device, answer.timings), file=sys.stderr)


@dataclass(frozen=True)
class _Opened:
    """A runner and the room it was given."""

    runner: Any
    engine_config: EngineConfig


def _open_runner(
    make_runner: RunnerFactory,
    directory: Path,
    options: argparse.Namespace,
    num_prompt_tokens: int,
    max_tokens: int,
    bar: ProgressBar,
) -> _Opened:
    """The model on the device asked for; on its own account cuda first, then the CPU."""
    if options.device == "auto":
        engine_config = room_for(num_prompt_tokens, max_tokens, "cuda", options.threads)
        try:
            return _Opened(make_runner(directory, engine_config, bar.report), engine_config)
        except DeviceUnavailable:
            pass  # asked for whatever there is: no GPU here is not an error
    device = "cpu" if options.device == "auto" else options.device
    engine_config = room_for(num_prompt_tokens, max_tokens, device, options.threads)
    return _Opened(make_runner(directory, engine_config, bar.report), engine_config)


def _model_runner(
    directory: Path, engine_config: EngineConfig, progress: Callable[[str, int, int], None]
) -> Any:
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


def _as_json(model: str, device: str, tokenizer: Tokenizer, answer: Answer) -> dict[str, Any]:
    timings = answer.timings
    return {
        "model": model,
        "device": device,
        "text": tokenizer.decode(answer.token_ids),
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "timings": {
            **asdict(timings),
            "prefill_tokens_per_second": timings.prefill_tokens_per_second,
            "decode_tokens_per_second": timings.decode_tokens_per_second,
        },
    }


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
    value = int(text)  # argparse turns ValueError into wrong use
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
