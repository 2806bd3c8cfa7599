"""Functions that `bench serve` runs on the model inside the workers of vLLM. They set weights and
the thresholds of PBS. vLLM passes them to the workers by name."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Sequence

import torch

from pbs_attn._errors import BenchError
from pbs_attn.masks import candidate_blocks

ops = torch.ops.pbs
LOGIT_STD = 3.0  # of attention logits; plain random weights would give all keys equal weight
Counts = dict[float, tuple[float, float]]  # by threshold: pairs of blocks visited, and all of them


def set_weights(model: torch.nn.Module) -> int:
    """Sets random weights whose attention logits have a standard deviation of LOGIT_STD. The inputs
    of a layer are normalised, so those of queries and of keys have its square root. Returns the
    number of weights."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                weight.fill_(LOGIT_STD**0.5)
            elif "norm" in name:
                weight.fill_(1)
            elif "embed" in name:
                weight.normal_(0, 1)
            elif weight.ndim == 2:
                gain = LOGIT_STD if "qkv_proj" in name else 1.0
                weight.normal_(0, (gain / weight.shape[1]) ** 0.5)
    return sum(weight.numel() for weight in model.parameters())


def set_threshold(model: torch.nn.Module, threshold: float) -> None:
    """Sets the threshold of all layers that take PBS.

    Raises:
        BenchError: if no layer takes PBS.
    """
    num_layers = 0
    for module in model.modules():
        impl = getattr(module, "impl", None)
        if getattr(impl, "pbs_reason", "no layer of PBS") is None:
            config = dataclasses.replace(impl.pbs_settings.config, threshold=threshold)
            impl.pbs_settings = dataclasses.replace(impl.pbs_settings, config=config)
            impl.pbs_chunk_config = dataclasses.replace(config, dense_tail=0)
            num_layers += 1
    if not num_layers:
        raise BenchError("layers of the model must take PBS, got none: the log has the reasons")


class Probe:
    """Replaces attention_paged_, and counts what it would visit at each of the thresholds."""

    def __init__(self, attend, thresholds: Sequence[float]):
        self.attend = attend
        self.visited = dict.fromkeys(thresholds, 0.0)
        self.total = 0.0

    def __call__(
        self, q, k_cache, v_cache, out, cu_seqlens_q, seq_lens, block_table, *own_kv,
        scale=None, config,
    ):  # fmt: skip
        """Takes the arguments of attention_paged_."""
        places = (k_cache, seq_lens, block_table)
        before = keys_in_pages(*places)
        self.attend(
            q, k_cache, v_cache, out, cu_seqlens_q, seq_lens, block_table, *own_kv,
            scale=scale, config=config,
        )  # fmt: skip
        after = keys_in_pages(*places)
        borders = itertools.pairwise(cu_seqlens_q.tolist())
        for (first, last), k, k_ordered in zip(borders, before, after, strict=True):
            if last > first:
                self._count(q[first:last].transpose(0, 1)[None], k, k_ordered, scale, config)

    def _count(self, q, k, k_ordered, scale, config) -> None:
        """Counts one sequence. Queries see their own segment in its original order, and select
        among the other segments in their new order."""
        (_, num_q_heads, num_queries, _), num_keys = q.shape, k.shape[2]
        candidates, own = candidate_blocks(num_queries, num_keys, config=config)
        self.total += num_q_heads * (candidates + own).sum().item()
        num_blocks = -(-num_keys // config.key_block_size)
        # Sampled scores do not read the means.
        k_mean = q.new_zeros((1, k.shape[1], num_blocks, k.shape[3]), dtype=torch.float32)
        for threshold in self.visited:
            settings = dataclasses.replace(config, threshold=threshold).op_kwargs("select_blocks")
            _, counts = ops.select_blocks(q, k, k_mean, None, k_ordered, scale=scale, **settings)
            self.visited[threshold] += counts.sum().item() + num_q_heads * own.sum().item()

    def counts(self) -> Counts:
        return {threshold: (visited, self.total) for threshold, visited in self.visited.items()}


def keys_in_pages(k_cache, seq_lens, block_table) -> list[torch.Tensor]:
    """A copy of the keys of each sequence, (1, KV heads, keys, head_dim)."""
    found = []
    for num_keys, table in zip(seq_lens.tolist(), block_table, strict=True):
        pages = table[: -(-num_keys // k_cache.shape[1])].long()
        found.append(k_cache[pages].flatten(0, 1)[:num_keys].transpose(0, 1)[None])
    return found


def start_probe(model: torch.nn.Module, thresholds: Sequence[float]) -> None:
    """Counts in every layer until `stop_probe`."""
    impl = _impl()
    impl.attention_paged_ = Probe(impl.attention_paged_, thresholds)


def stop_probe(model: torch.nn.Module) -> Counts:
    """Returns what the layers of this worker have visited since `start_probe`.

    Raises:
        BenchError: if nothing called attention_paged_.
    """
    impl = _impl()
    probe = impl.attention_paged_
    impl.attention_paged_ = probe.attend
    if not probe.total:
        raise BenchError("layers must take PBS in ordered pages, got no call: see the log")
    return probe.counts()


def _impl():
    """The module of the plugin in which its layers look up the operator. It imports vLLM."""
    return importlib.import_module("pbs_attn.integrations.vllm.impl")
