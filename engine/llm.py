"""Text in, text out: `LLM(model).generate(prompts, SamplingParams(...))`, names as vLLM's.

Opens a model and runs an `LLMEngine` until requests end. Knows nothing of steps or blocks. Static
batching is the special case of one `generate` with all prompts.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from pathlib import Path
from types import TracebackType

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from engine.bindings import Engine, Library
from engine.config import EngineConfig, ModelConfig
from engine.errors import DeviceUnavailable, InvalidArgument
from engine.interrupts import Uninterrupted
from engine.llm_engine import LLMEngine
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.outputs import RequestOutput
from engine.request_checks import Prompt
from engine.room import Room, make_room
from engine.sampling_params import SamplingParams
from engine.tokenizer import Message, Tokenizer

# Told of long preparations: what, done, total (0: not known).
Report = Callable[[str, int, int], None]


class LLM:
    """A model, ready to answer. Close it, or use it in a with statement. One thread at a time.

    Args:
        model: a directory, a hub id, or one of `engine.models.model_names()`.
        device: "cuda", "cpu", or "auto": cuda where there is one.
        enable_prefix_caching: whether equal beginnings of prompts are computed once.
        async_scheduling: whether the next step is prepared while one is computed.
        report: told of long preparations.
        library: a loaded library; by default the one that make builds.
        **room: fields of `engine.room.Room`: max_model_len, max_num_seqs, ...

    Raises:
        CheckpointError: no such model, or one that cannot be run.
        InvalidArgument, OutOfMemory, DeviceUnavailable: the engine's own refusal.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        device: str = "auto",
        enable_prefix_caching: bool = True,
        async_scheduling: bool = True,
        report: Report | None = None,
        library: Library | None = None,
        **room: object,
    ) -> None:
        try:
            wishes = Room(**room)
        except TypeError as error:
            raise InvalidArgument(f"LLM has no such argument: {error}") from error
        directory = resolve(model, report)
        self.library = library or Library()
        self.model_config = ModelConfig.from_directory(directory)
        has_text = (directory / "tokenizer.json").exists()
        self.tokenizer = Tokenizer.from_directory(directory) if has_text else None
        self.runner = self._open(directory, device, wishes, report)
        self.engine_config = self.runner.engine_config
        try:
            self.engine = LLMEngine(
                self.runner,
                self.model_config,
                self.engine_config,
                self.tokenizer,
                enable_prefix_caching,
                async_scheduling=async_scheduling,
            )
        except BaseException:
            self.runner.close()
            raise
        self._names = itertools.count()
        self._inbox: dict[str, deque[RequestOutput]] = {}

    def _open(self, directory: Path, device: str, room: Room, report: Report | None) -> ModelRunner:
        """The model on the device asked for; "auto": on cuda first, then on the CPU."""

        def on_tensor(done: int, total: int, _: str) -> None:
            if report is not None:
                report("loading weights", done, total)

        devices = ("cuda", "cpu") if device == "auto" else (device,)
        for last, name in enumerate(devices, start=1):
            try:
                config = make_room(room, self.model_config, name, self._free_bytes)
                return ModelRunner(directory, config, self.library, on_tensor)
            except DeviceUnavailable:
                if last == len(devices):
                    raise
        raise AssertionError("no device was tried")

    def _free_bytes(self, config: EngineConfig) -> int:
        """What the device has left beside such an engine."""
        with Engine(self.library, self.model_config, config) as engine:
            return engine.free_memory()

    def generate(
        self,
        prompts: Prompt | Items[Prompt],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
        use_tqdm: bool = True,
        priority: Items[int] | None = None,
    ) -> list[RequestOutput]:
        """Answer prompts, all together.

        Args:
            prompts: one or a list; each a text, token ids, or a mapping with one of them.
            sampling_params: for all, or one for each.
            use_tqdm: show a progress bar, where stderr is a terminal.
            priority: one for each prompt; lower runs earlier.

        Returns:
            The finished outputs, in the order of the prompts.

        Raises:
            InvalidArgument: a prompt or parameter is illegal; then nothing was answered.
        """
        items = _as_list(prompts)
        params = _for_each(sampling_params, len(items), "sampling_params")
        priorities = _for_each(priority, len(items), "priority", default=0)
        names: list[str] = []
        try:
            for item, wanted, first in zip(items, params, priorities, strict=True):
                names.append(str(next(self._names)))
                self._add(names[-1], item, wanted, first, stream=False)
            with _Bar(len(names), use_tqdm) as bar:
                waiting = set(names)
                while waiting:
                    self._step()
                    done = {name for name in waiting if self._inbox[name]}
                    waiting -= done
                    bar.advance(len(done))
            return [self._inbox[name][0] for name in names]
        finally:
            self._forget(names)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Answer one prompt token by token; several streams may be read in turns.

        Yields:
            The answer so far, after each token; `delta` of its outputs is what is new. Leaving the
            iterator aborts the request.
        """
        name = str(next(self._names))
        self._add(name, prompt, sampling_params, 0, stream=True)
        answers = self._read(name)
        next(answers)  # a generator that has begun is told when it is left, even if nobody reads it
        return answers

    def chat(
        self,
        messages: Items[Message] | Items[Items[Message]],
        sampling_params: SamplingParams | Items[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer conversations: one, or a list of them; see `generate`."""
        if isinstance(messages, Mapping) or not isinstance(messages, Items):
            raise InvalidArgument(
                f"messages must be a list of messages, or of such lists, got {messages!r:.60}"
            )
        is_one = bool(messages) and not isinstance(messages[0], list | tuple)
        prompts = [self.encode_chat(each) for each in ([messages] if is_one else messages)]
        return self.generate(prompts, sampling_params, use_tqdm)

    def encode_chat(self, messages: Items[Message]) -> dict[str, list[int]]:
        """A conversation as a prompt, ready for the assistant's turn."""
        if self.tokenizer is None:
            raise InvalidArgument("messages need a tokenizer, and this model has none")
        return {"prompt_token_ids": self.tokenizer.encode_chat(messages)}

    def close(self) -> None:
        """Give everything back; closing twice is allowed."""
        self.runner.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _add(
        self, name: str, prompt: Prompt, params: SamplingParams | None, priority: int, stream: bool
    ) -> None:
        with Uninterrupted():
            self.engine.add_request(name, prompt, params, priority, stream)
            self._inbox[name] = deque()

    def _step(self) -> None:
        """One step; its outputs to whoever waits for them, whom Ctrl-C may not be."""
        with Uninterrupted():
            for output in self.engine.step():
                self._inbox[output.request_id].append(output)

    def _read(self, name: str) -> Iterator[RequestOutput]:
        """The outputs of a request, after a first item that is none."""
        try:
            yield None
            while True:
                while not self._inbox[name]:
                    self._step()
                output = self._inbox[name].popleft()
                yield output
                if output.finished:
                    return
        finally:
            self._forget([name])

    def _forget(self, names: list[str]) -> None:
        with Uninterrupted():
            self.engine.abort(names)
            for name in names:
                self._inbox.pop(name, None)


class _Bar:
    """A progress bar on stderr, where that is a terminal."""

    def __init__(self, total: int, is_wanted: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("requests"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not (is_wanted and console.is_terminal),
        )
        self._task = self._progress.add_task("requests", total=total)

    def advance(self, count: int) -> None:
        self._progress.advance(self._task, count)

    def __enter__(self) -> "_Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def _as_list(prompts: object) -> list:
    """Prompts as a list: token ids are one prompt, and so is a text or a mapping."""
    if (
        isinstance(prompts, list | tuple)
        and prompts
        and not isinstance(prompts[0], int | np.integer)
    ):
        return list(prompts)
    return [] if isinstance(prompts, list | tuple) and not prompts else [prompts]


def _for_each(value: object, count: int, name: str, default: object = None) -> list:
    """One value for each prompt."""
    if value is None:
        return [default] * count
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise InvalidArgument(f"{name} must be one or {count} (one for each), got {len(value)}")
    return list(value)
