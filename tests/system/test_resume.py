"""Stop, keep nothing but token ids, go on in a new process: the same next tokens and logits.

The answer depends on tokens, parameters and seed alone, never on the cache that was lost.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.bindings import Library
from engine.llm import LLM
from engine.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parents[2]
ROOM = {"device": "cpu", "kv_cache_memory_bytes": 1 << 22, "block_size": 16, "num_threads": 1}
PROMPT = "A challenge that a course left open"

GO_ON = """
import json, sys
from engine import LLM, SamplingParams

asked = json.load(sys.stdin)
with LLM("toy", **asked["room"]) as llm:
    (output,) = llm.generate([asked["ids"]], SamplingParams(**asked["params"]), use_tqdm=False)
scores = {token: score.logprob.hex() for token, score in output.outputs[0].logprobs[0].items()}
print(json.dumps({"ids": output.outputs[0].token_ids, "first": scores}))
"""


def in_a_new_process(ids: list[int], **params) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", GO_ON],
        input=json.dumps({"room": ROOM, "ids": ids, "params": params}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("temperature", [0.0, 1.1], ids=["greedy", "drawn"])
@pytest.mark.parametrize("stopped_after", [1, 13])
def test_a_new_process_goes_on_where_the_old_one_stopped(
    library: Library, temperature: float, stopped_after: int
):
    params = {"temperature": temperature, "seed": 11, "ignore_eos": True, "logprobs": 3}
    with LLM("toy", library=library, **ROOM) as llm:
        (whole,) = llm.generate(PROMPT, SamplingParams(**params, max_tokens=24))
    answer = whole.outputs[0]
    kept = [*whole.prompt_token_ids, *answer.token_ids[:stopped_after]]

    rest = in_a_new_process(kept, **params, max_tokens=24 - stopped_after)

    assert rest["ids"] == list(answer.token_ids[stopped_after:])
    scores = answer.logprobs[stopped_after]
    assert rest["first"] == {str(token): s.logprob.hex() for token, s in scores.items()}
