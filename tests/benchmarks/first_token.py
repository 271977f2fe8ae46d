"""A process that answers once: how long from its start until the first token, and in which parts.

Prints JSON with seconds. `python -m tests.benchmarks.first_token MODEL_DIRECTORY DEVICE STARTED`,
STARTED being time.time() of whoever started it.
"""

import json
import sys
import time

PROMPT_TOKENS = 128


def main() -> None:
    """See the module."""
    directory, device, started = sys.argv[1], sys.argv[2], float(sys.argv[3])
    from engine.generate import Generation, room_for  # within the time that is measured
    from engine.llm_engine import LLMEngine
    from engine.model_runner import ModelRunner
    from engine.sampling_params import SamplingParams

    imported = time.time()
    room = room_for(PROMPT_TOKENS, 16, device)
    with ModelRunner(directory, room) as runner:
        loaded = time.time()
        prompt = [i * 37 % runner.config.vocab_size for i in range(PROMPT_TOKENS)]
        engine = LLMEngine(runner, runner.config, room)
        params = SamplingParams(temperature=0, max_tokens=16)
        next(iter(Generation(engine, prompt, params)))
        first = time.time()
    parts = {"import": imported - started, "load": loaded - imported, "prefill": first - loaded}
    print(json.dumps({**parts, "total": first - started}))


if __name__ == "__main__":
    main()
