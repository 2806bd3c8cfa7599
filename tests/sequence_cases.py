"""Test sequences: settings, lengths, inputs whose selection rounding does not change, and prompts
in chunks."""

import functools
from typing import NamedTuple

import reference as ref
import reference_sequences as ref_seq
import torch
from cases import Case, arguments_of, clustered_qkv
from pages import Pages, cu_seqlens
from tolerances import assert_within_twice, is_decided, sdpa_on

from pbs_attn import PBSConfig
from pbs_attn.ops import SEQUENCE_OPERATORS


def settings_of(config, **changed):
    """A case without lengths from a PBSConfig."""
    fields = {name: value for name, value in vars(config).items() if name in Case._fields}
    fields["threshold"] = config.resolved_threshold
    return Case(0, 0, batch=1)._replace(**fields | changed)


SMALL = Case(0, 0, batch=1, num_heavy=8, score="sampled", mass="block", threshold=0.08)
SHARED = SMALL._replace(
    num_q_heads=6, num_samples=5, select_per="kv_head", kv_block_size=64, segment_size=128
)
# Settings that attention_paged_ takes, too. Thresholds are those of short prompts.
IN_ORDER = {
    "small": SMALL,
    "shared": SHARED._replace(threshold=0.35),
    "sorted": SMALL._replace(
        num_heavy=None, window=1, dense_tail=1, block_size=64, head_dim=96, threshold=0.35
    ),
    "balanced": settings_of(PBSConfig.balanced(), threshold=0.15, window=1, dense_tail=0),
    "fast": settings_of(
        PBSConfig.fast(), num_q_heads=6, head_dim=128, threshold=0.15, window=0, dense_tail=9
    ),
}
SETTINGS = IN_ORDER | {
    "not causal": SMALL._replace(is_causal=False, scale=0.1),
    "paper": Case(0, 0, batch=1, permute_per="query_head", block_size=64, segment_size=128),
    "mean": Case(0, 0, batch=1, mass="causal", num_heavy=4, kv_block_size=64, head_dim=256),
    "mean, not causal": Case(0, 0, batch=1, mass="causal", is_causal=False, threshold=0.6),
}
# (Nq, Nkv) of sequences side by side; segments of 256 rows take longer ones.
LENGTHS = ((0, 0), (70, 70), (33, 150), (1, 131), (0, 90), (300, 300), (1, 1))
LONG = ((0, 90), (600, 600), (70, 831), (1, 513))
# The tokens that each step of a plan adds to each sequence.
PLANS = {
    "at once": ((301, 64, 1),),
    "segments": ((128, 256, 0), (128, 0, 128), (128, 128, 128)),
    "inside segments": ((100, 30, 1), (60, 0, 63), (1, 35, 64), (139, 200, 5)),
    "single tokens": ((127, 0, 1), (1, 255, 1), (1, 1, 126), (130, 1, 1)),
    "long": ((640, 300, 0), (389, 513, 70)),
}


class Ragged(NamedTuple):
    """Tensors of each sequence, (tokens, heads, head_dim)."""

    q: list
    k: list
    v: list

    @property
    def packed(self):
        """q, k, v and their cu_seqlens."""
        lengths = [[len(x) for x in tensors] for tensors in (self.q, self.k)]
        return *(torch.cat(x) for x in self), *map(cu_seqlens, lengths)


def draw(settings, lengths, dtype, seed=0):
    cases = [settings._replace(num_queries=nq, num_keys=nkv) for nq, nkv in lengths]
    found = [clustered_qkv(case, dtype, 1000 * seed + n) for n, case in enumerate(cases)]
    return Ragged(
        *([x[0].transpose(0, 1).contiguous() for x in xs] for xs in zip(*found, strict=True))
    )


def options_of(settings):
    return settings.kwargs("attention")


def is_settled(settings, sequences):
    """Whether rounding changes neither an order nor a selection."""
    return all(
        is_decided(
            s.masses, settings._replace(num_queries=s.q.shape[2], num_keys=s.k.shape[2])
        ).all()
        and orders_clearly(settings, s.scores)
        for s in sequences
    )


def orders_clearly(settings, scores):
    """Whether neighbours in rank whose order matters differ by a share of 3e-6."""
    num_sorted = scores.shape[-1] // settings.segment_size * settings.segment_size
    ranked = scores[..., :num_sorted].unflatten(-1, (-1, settings.segment_size))
    ranked = ranked.sort(-1, descending=True).values
    borders = torch.arange(1, settings.segment_size)
    if settings.num_heavy is not None:
        borders = torch.tensor([settings.num_heavy])
    above, below = ranked[..., borders - 1], ranked[..., borders]
    return bool((above > below * (1 + 3e-6)).all())


def lengths_for(settings):
    return LONG if settings.segment_size == 256 else LENGTHS


@functools.cache
def settled(name, dtype):
    """Sequences of some settings, and the results of the reference."""
    settings = SETTINGS[name]
    lengths = lengths_for(settings)
    for seed in range(200):
        tensors = draw(settings, lengths, dtype, seed)
        sequences = ref_seq.attention_varlen(*tensors.packed, **options_of(settings))
        if is_settled(settings, sequences):
            return tensors, sequences
    raise AssertionError(f"no inputs for {name} whose selection rounding cannot change")


def assert_sequences(out, sequences, scale=None):
    """Compares all sequences together, because some have so few rows that torch's own error on them
    is a matter of chance. `out` is (total Nq, Hq, D)."""
    assert len(out) == sum(s.q.shape[2] for s in sequences)
    found = out.split([s.q.shape[2] for s in sequences])
    of_torch, exact = [], []
    for part, s in zip(found, sequences, strict=True):
        q, k, v, visited = (x.to(out.device) for x in (s.q, s.k, s.v, s.visited))
        assert (ref_seq.as_batch(part)[~visited.any(-1)] == 0).all()
        of_torch.append(sdpa_on(q, k, v, visited, scale=scale)[0].transpose(0, 1))
        exact.append(s.out.to(out.device)[0].transpose(0, 1))
    if sequences:
        assert_within_twice(out, torch.cat(of_torch), torch.cat(exact), "out")


def assert_same(found, expected):
    """Equal bit for bit, with equal dtypes; NaN equals NaN."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def dense(q, k, v):
    """Causal attention to every key, to replace the result of the reference for a sequence."""
    q, k, v = map(ref_seq.as_batch, (q, k, v))
    visited = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    visited = visited.expand(1, q.shape[1], -1, -1)
    out, _ = ref.masked_attention(q, k, v, visited)
    return ref_seq.Sequence(q, k, v, None, None, None, visited, out)


def in_pages(tensors, page_size, layout):
    """The keys of all sequences in pages, and the arguments of attention_paged except q."""
    num_heads, head_dim = tensors.k[0].shape[1:]
    lengths, dtype = list(map(len, tensors.k)), tensors.k[0].dtype
    pages = Pages(lengths, num_heads, head_dim, dtype, page_size, layout=layout)
    for n, (k, v) in enumerate(zip(tensors.k, tensors.v, strict=True)):
        pages.write(n, 0, k, v)
    q, _, _, cu_seqlens_q, _ = tensors.packed
    return q, pages.k, pages.v, cu_seqlens_q, torch.tensor(lengths), pages.table


def sequence_calls(q, k, v, config):
    """Like cases.operator_calls, for the operators of sequences. The first of two sequences has one
    query and 70 keys."""
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    lengths = [len(q) - 1, len(k) - 70]
    cu_q, cu_k = cu_seqlens([1, lengths[0]]), cu_seqlens([70, lengths[1]])
    tensors = Ragged(
        list(q.split([1, lengths[0]])), *(list(x.split([70, lengths[1]])) for x in (k, v))
    )
    names = ("q", "k_cache", "v_cache", "cu_seqlens_q", "seq_lens", "block_table")
    paged = dict(zip(names, in_pages(tensors, config.segment_size, "nhd"), strict=True))
    # torch's own tests compare the written tensors, and NaN would never be equal.
    paged |= {name: paged[name].nan_to_num(0.0) for name in names[1:3]}
    pool = paged | {"out": torch.zeros_like(q)}
    names = arguments_of("attention_paged_", False)
    in_order = {name: pool[name] for name in names if name in pool}  # k and v are optional
    varlen = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    calls = dict(zip(SEQUENCE_OPERATORS, (varlen, paged, in_order), strict=True))
    return {op: (tensors, config.op_kwargs(op)) for op, tensors in calls.items()}


# Prompts in chunks


class Step(NamedTuple):
    """The chunks of one call."""

    q: torch.Tensor
    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    firsts: list  # position of the first query of each sequence


def pages_for(settings, plan, dtype, page_size, **how):
    sizes = settings.num_kv_heads, settings.head_dim, dtype, page_size
    return Pages([sum(chunks) for chunks in zip(*plan, strict=True)], *sizes, **how)


def steps(plan, tensors, *caches):
    """The steps of a plan, whose keys and values have just been written to all caches."""
    firsts = [0] * len(plan[0])
    for chunks in plan:
        lasts = [first + chunk for first, chunk in zip(firsts, chunks, strict=True)]
        for n, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
            for pages in caches:
                pages.write(n, first, tensors.k[n][first:last], tensors.v[n][first:last])
        q = [x[first:last] for x, first, last in zip(tensors.q, firsts, lasts, strict=True)]
        yield Step(torch.cat(q), cu_seqlens(chunks), torch.tensor(lasts), firsts)
        firsts = lasts


@functools.cache
def settled_chunks(name, plan_name, dtype):
    """Tensors of the sequences of a plan. Rounding changes no selection of their chunks."""
    settings, plan = IN_ORDER[name], PLANS[plan_name]
    lengths = [(sum(chunks),) * 2 for chunks in zip(*plan, strict=True)]
    for seed in range(200):
        tensors = draw(settings, lengths, dtype, seed)
        pages = pages_for(settings, plan, dtype, 256)
        found = [
            ref_seq.attention_paged_(
                step.q, pages.k, pages.v, *step[1:3], pages.table, **options_of(settings)
            )
            for step in steps(plan, tensors, pages)
        ]
        if all(is_settled(settings, sequences) for sequences in found):
            return tensors
    raise AssertionError(f"no inputs for {name}, {plan_name} that rounding cannot change")
