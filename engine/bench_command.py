"""The options of `python -m engine bench` and what it prints; `engine.bench` measures.

Decides the workloads that the two subcommands mean. Knows nothing of steps or clocks.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from engine.bench import Workload, pure_steps, report, serve


def add_bench_parser(commands: Any) -> None:
    """Add `bench` with its two kinds to the command line's subcommands."""
    bench = commands.add_parser(
        "bench", help="measure serving", description="Measure serving with random token ids."
    )
    kinds = bench.add_subparsers(dest="kind", required=True)
    throughput = kinds.add_parser(
        "throughput", help="many requests: tokens per second, TTFT, ITL under load"
    )
    throughput.add_argument("--num-prompts", type=int, default=64, help="requests (%(default)s)")
    throughput.add_argument(
        "--request-rate",
        type=float,
        default=math.inf,
        help="Poisson arrivals per second (default: all at once)",
    )
    throughput.add_argument(
        "--batching",
        choices=("continuous", "static", "both"),
        default="continuous",
        help="static: groups of max-num-seqs, one after another (default: %(default)s)",
    )
    latency = kinds.add_parser("latency", help="one batch of equal requests: TTFT and ITL")
    latency.add_argument("--batch-size", type=int, default=1, help="requests (%(default)s)")
    for kind, lengths in ((throughput, ("128:1024", "128")), (latency, ("512", "128"))):
        kind.add_argument("--input-len", type=_lengths, default=lengths[0], help="N or FROM:TO")
        kind.add_argument("--output-len", type=_lengths, default=lengths[1], help="N or FROM:TO")
        kind.add_argument("--model", default="smollm2-135m", help="as generate's (%(default)s)")
        kind.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        kind.add_argument("--max-num-seqs", type=int, help="sequences that run at once")
        kind.add_argument("--max-num-batched-tokens", type=int, help="token budget of a step")
        kind.add_argument("--max-model-len", type=int, help="tokens of the longest sequence")
        kind.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
        kind.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
        kind.add_argument("--seed", type=int, default=0, help="of the workload (%(default)s)")
        kind.add_argument("--json", action="store_true", help="print one JSON object")


def run_bench(options: argparse.Namespace, progress: Callable[[str, int, int], None]) -> None:
    """Open the model, measure, print.

    Raises:
        EngineError: as `engine.llm.LLM` raises, or an illegal workload.
    """
    # Here, not above: wrong use and --help must work where the library is not built yet.
    from engine.llm import LLM

    is_latency = options.kind == "latency"
    workload = Workload(
        num_prompts=options.batch_size if is_latency else options.num_prompts,
        input_len=options.input_len,
        output_len=options.output_len,
        request_rate=math.inf if is_latency else options.request_rate,
        seed=options.seed,
        temperature=options.temperature,
    )
    most = options.max_num_seqs
    if most is None and is_latency:
        most = options.batch_size
    batching = "continuous" if is_latency else options.batching
    with LLM(
        options.model,
        device=options.device,
        report=progress,
        max_num_seqs=most,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len,
        num_threads=options.threads,
        enable_prefix_caching=False,  # random prompts share nothing
    ) as llm:
        vocab_size = llm.model_config.vocab_size
        serve(llm.engine, _warm_up(workload).requests(vocab_size))
        requests = workload.requests(vocab_size)
        is_all_at_once = math.isinf(workload.request_rate)  # else the time is that of arrivals
        pure = pure_steps(llm.engine, requests) if is_all_at_once else None
        results = {}
        for kind in ("static", "continuous"):
            if batching in (kind, "both"):
                group = llm.engine_config.max_num_seqs if kind == "static" else None
                found = serve(llm.engine, requests, workload.temperature, group)
                if pure is not None:
                    found["pure"] = asdict(pure)
                    found["pure_share"] = pure.seconds_for(requests) / found["seconds"]
                results[kind] = found
        device = llm.engine_config.device
    if options.json:
        print(json.dumps({"model": options.model, "device": device, **results}, allow_nan=False))
        return
    for kind, found in results.items():
        print(report(f"[{device}] {options.model} {kind if not is_latency else 'latency'}", found))


def _warm_up(workload: Workload) -> Workload:
    """Two requests as short as the shortest of the workload, at most: they fit where it does."""
    size = min(16, workload.input_len[0])
    answer = min(4, workload.output_len[0])
    return Workload(2, (size, size), (answer, answer))


def _lengths(text: str) -> tuple[int, int]:
    """N or FROM:TO."""
    low, _, high = text.partition(":")
    try:
        return int(low), int(high or low)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be N or FROM:TO, got {text!r}") from error
