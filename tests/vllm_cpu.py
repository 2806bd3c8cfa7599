"""The vLLM plugin end to end on a CPU: a small random model whose prefill takes PBS with threshold
1 gives the log-probabilities of vLLM's own attention. Network: 127.0.0.1 only.

python tests/vllm_cpu.py                 # everything; tests/vllm_cpu.sh makes the environment
python tests/vllm_cpu.py chunks server   # some scenarios
"""

import argparse
import asyncio
import contextlib
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch
from tiny_model import SIZES, VOCABULARY, save_model

SETTINGS = {"threshold": 1.0, "min_tokens": 512}
PBS = {"attention_backend": "CUSTOM", "additional_config": {"pbs_attn": SETTINGS}}
COUNTER = "pbs_attn_prefill_tokens_total"
# Both backends compute in float32, vLLM's with a faster exponential. If keys are out of place or
# blocks are left out, log-probabilities differ by more than 0.1.
TOLERANCE = 2e-3
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def prompt(length, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (length,), generator=generator).tolist()


PREFIX = prompt(2560, 100)
MIXED = [prompt(length, seed) for seed, length in enumerate((3000, 700, 50, 1500))]
CACHED = [[PREFIX + prompt(300, 101)], [PREFIX + prompt(500, 102), PREFIX + prompt(20, 103)]]
LONG_ANSWERS = [prompt(700, 200 + i) for i in range(8)]


class Engine:
    """Runs vllm.LLM during a with block."""

    def __init__(self, folder, **options):
        from vllm import LLM

        common = {"dtype": "float32", "enforce_eager": True, "max_model_len": 4096, "seed": 0}
        common |= {"max_num_seqs": 16, "disable_log_stats": False}
        self.llm = LLM(model=str(folder), **(common | options))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.llm.llm_engine.engine_core.shutdown()

    def run(self, prompts, max_tokens=4, of_prompts=False):
        """For each prompt, the tokens and log-probabilities of its outputs, those of the prompt
        first, and the number of cached tokens."""
        from vllm import SamplingParams

        wanted = {"logprobs": 0, "prompt_logprobs": 0} if of_prompts else {"logprobs": 0}
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **wanted)
        outputs = self.llm.generate(
            [{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False
        )
        results = []
        for ids, output in zip(prompts, outputs, strict=True):
            (answer,) = output.outputs
            pairs = list(zip(ids[1:], (output.prompt_logprobs or [])[1:], strict=False))
            pairs += zip(answer.token_ids, answer.logprobs, strict=True)
            results.append(
                {
                    "tokens": list(answer.token_ids),
                    "logprobs": [table[token].logprob for token, table in pairs],
                    "cached": output.num_cached_tokens,
                }
            )
        return results

    def metric(self, name):
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)


def pbs_tokens():
    import prometheus_client

    value = prometheus_client.REGISTRY.get_sample_value(COUNTER, {"route": "pbs"})
    return value or 0


def worst_difference(result, other):
    """The largest difference of log-probabilities."""
    pairs = zip(result["logprobs"], other["logprobs"], strict=True)
    return max(abs(a - b) for a, b in pairs)


def assert_equal(results, expected, what):
    for result, other in zip(results, expected, strict=True):
        assert result["tokens"] == other["tokens"], what
        worst = worst_difference(result, other)
        assert worst < TOLERANCE, f"{what}: log-probabilities differ by {worst}"


def dense(folder):
    """The results of vLLM's own attention: prompts in one piece, nothing cached, no preemption."""
    before = pbs_tokens()
    options = {"max_num_batched_tokens": 8192, "enable_prefix_caching": False}
    with Engine(folder, **options) as engine:
        results = {
            "mixed": engine.run(MIXED, of_prompts=True),
            "cached": [engine.run(prompts) for prompts in CACHED],
            "long": engine.run(LONG_ANSWERS, max_tokens=100),
        }
    assert pbs_tokens() == before
    return results


def check_engine(folder, expected, **options):
    """Chunks, mixed batches, cached prefixes and preemption in one engine."""
    before = pbs_tokens()
    with Engine(folder, max_num_batched_tokens=1024, **options, **PBS) as engine:
        assert_equal(engine.run(MIXED, of_prompts=True), expected["mixed"], "mixed")
        for prompts, other in zip(CACHED, expected["cached"], strict=True):
            results = engine.run(prompts)
            assert_equal(results, other, "cached prefixes")
        assert [result["cached"] for result in results] == [len(PREFIX)] * 2
        assert engine.metric("vllm:num_preemptions") == 0
        results = engine.run(LONG_ANSWERS, max_tokens=100)
        assert_equal(results, expected["long"], "preemption")
        assert engine.metric("vllm:num_preemptions") > 0
    # Of 14.000 prompt tokens, most are in chunks of a block or more of prompts over min_tokens.
    assert pbs_tokens() - before > 9000


def chunks(folder, expected):
    """Blocks of whole segments, which are ordered in place."""
    check_engine(folder, expected, block_size=256, num_gpu_blocks_override=24)


def small_blocks(folder, expected):
    """Blocks of half a segment, which keep their order."""
    check_engine(folder, expected, block_size=128, num_gpu_blocks_override=48)


def tensor_parallel(folder, expected):
    """Two ranks."""
    with environment(VLLM_CPU_OMP_THREADS_BIND="0|1" if os.cpu_count() > 1 else "0|0"):
        options = {"tensor_parallel_size": 2, "block_size": 256, "max_num_batched_tokens": 1024}
        before = pbs_tokens()
        with Engine(folder, **options, **PBS) as engine:
            assert_equal(engine.run(MIXED, of_prompts=True), expected["mixed"], "two ranks")
        assert 3000 < pbs_tokens() - before < sum(map(len, MIXED))  # of one rank


def probe(folder, expected):
    """The code that `bench serve` runs in workers. It measures the density of a call, and sets
    thresholds."""
    from pbs_attn.bench import serving_worker
    from pbs_attn.bench.serving_engine import densities_of

    options = {"block_size": 256, "max_num_batched_tokens": 1024, **PBS}
    allowed = environment(VLLM_ALLOW_INSECURE_SERIALIZATION="1")
    with allowed, Engine(folder, **options) as engine:
        start = functools.partial(serving_worker.start_probe, thresholds=(0.2, 1.0))
        engine.llm.apply_model(start)
        assert_equal(engine.run(MIXED, of_prompts=True), expected["mixed"], "counted")
        (_, density), (_, whole) = densities_of(engine.llm.apply_model(serving_worker.stop_probe))
        assert whole == 1 and 0.1 < density < 0.9
        engine.llm.apply_model(functools.partial(serving_worker.set_threshold, threshold=0.2))
        sparse = engine.run(MIXED, of_prompts=True)
        worst = max(map(worst_difference, sparse, expected["mixed"]))
        assert worst > TOLERANCE, f"threshold 0.2: log-probabilities differ by {worst}"


def server(folder, expected):
    """32 requests at once from the openai client. None is lost, and all have the results of single
    requests."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"dtype": "float32", "block-size": 256, "max-model-len": 4096, "max-num-seqs": 16}
    options |= {"max-num-batched-tokens": 1024, "host": "127.0.0.1", "port": port}
    options |= {"attention-backend": "CUSTOM", "served-model-name": "tiny"}
    options |= {"additional-config": json.dumps(PBS["additional_config"])}
    # `vllm serve` asks for the metadata of a package named vllm, which vllm-cpu is not.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", f"--model={folder}"]
    command += [f"--{name}={value}" for name, value in options.items()] + ["--enforce-eager"]
    log = folder / "server.log"
    with log.open("w") as file, environment(VLLM_LOGGING_LEVEL="INFO"):
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until_up(process, port, log)
        asyncio.run(ask(port))
        metrics = get(port, "metrics")
        (line,) = (x for x in metrics.splitlines() if x.startswith(f'{COUNTER}{{route="pbs"}}'))
        assert float(line.split()[-1]) > 10000, line
        text = log.read_text()
        assert "PBS: 2 of 2 attention layers" in text and "are ordered in place" in text
    finally:
        process.terminate()
        process.wait(60)


async def ask(port):
    import openai

    client = openai.AsyncOpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300
    )
    lengths = [40 + (i * 37 % 32) * 90 for i in range(32)]  # 40 to 2830, in no order
    prompts = [prompt(length, 300 + i) for i, length in enumerate(lengths)]

    async def one(ids, salt):
        result = await client.completions.create(
            model="tiny", prompt=ids, max_tokens=6, temperature=0, logprobs=0,
            extra_body={"cache_salt": salt, "ignore_eos": True, "return_token_ids": True},
        )  # fmt: skip
        (choice,) = result.choices
        return {"tokens": choice.token_ids, "logprobs": choice.logprobs.token_logprobs}

    alone = [await one(ids, "alone") for ids in prompts]
    together = await asyncio.gather(*(one(ids, "together") for ids in prompts))
    assert_equal(together, alone, "server")
    again = await asyncio.gather(*(one(ids, "together") for ids in prompts))
    assert_equal(again, alone, "server, from the cache")


def get(port, path):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=10) as response:
        return response.read().decode()


def wait_until_up(process, port, log):
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            get(port, "health")
            return
        time.sleep(0.5)
    raise AssertionError(log.read_text())


@contextlib.contextmanager
def environment(**variables):
    old = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


SCENARIOS = {f.__name__: f for f in (chunks, small_blocks, tensor_parallel, probe, server)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", nargs="*", default=list(SCENARIOS), help=", ".join(SCENARIOS))
    names = parser.parse_args().scenario
    import transformers

    with tempfile.TemporaryDirectory() as name, environment(**ENVIRONMENT):
        folder = Path(name)
        save_model(folder, transformers.LlamaConfig(**SIZES, max_position_embeddings=8192))
        expected = timed("dense", dense, folder) if names != ["server"] else None
        for name in names:
            timed(name, SCENARIOS[name], folder, expected)


def timed(name, function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    print(f"{name}: passed in {time.perf_counter() - start:.0f} s", flush=True)
    return result


if __name__ == "__main__":
    main()
