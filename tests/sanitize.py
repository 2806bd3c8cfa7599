"""Every kernel of the library on a GPU, at small shapes, for compute-sanitizer:

compute-sanitizer --tool memcheck python tests/sanitize.py
compute-sanitizer --tool racecheck python tests/sanitize.py
python tests/sanitize.py --coverage   # without it: fails if a kernel of the library did not run

There is one case for each element type, head dim, score and rule of mass of the library and
PBSConfig, and cases with shapes that reach rare paths.
"""

import argparse
import itertools
import re
import subprocess
import sys
import typing

import torch
from cases import Case, clustered_qkv, run_stages
from sequence_cases import draw, options_of, pages_for, steps

import pbs_attn
from pbs_attn import PBSConfig, _library
from pbs_attn.ops import HEAD_DIMS

ops = torch.ops.pbs
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16

RARE = [
    # Several tiles of query blocks per CTA, and several turns of the key stages.
    (Case(2048, 2048, num_q_heads=32, num_kv_heads=16, batch=4, segment_size=128), BFLOAT16),
    # Two groups of heads, the second one smaller; rows of 96 elements; incomplete last blocks.
    (Case(333, 1333, num_q_heads=7, num_kv_heads=1, head_dim=96, mass="causal"), FLOAT16),
    # Three groups of heads.
    (
        Case(
            1300,
            1300,
            num_q_heads=9,
            num_kv_heads=1,
            head_dim=128,
            block_size=128,
            kv_block_size=64,
            segment_size=256,
            permute_per="query_head",
        ),
        BFLOAT16,
    ),
    # Segments longer than a window of permute_kv, and than a warp sorts in registers.
    (
        Case(
            700,
            1800,
            num_q_heads=8,
            head_dim=128,
            block_size=128,
            segment_size=896,
            num_heavy=40,
            mass="causal",
        ),
        BFLOAT16,
    ),
    # Enough heads and parts that a separate kernel merges their states.
    (
        Case(128, 16384, num_q_heads=16, num_kv_heads=1, batch=1, block_size=128, segment_size=128),
        FLOAT16,
    ),
    # Sampled scores with four stacks per unit: several units per CTA, the last of each head
    # smaller.
    (
        Case(
            1500,
            1500,
            num_q_heads=80,
            num_kv_heads=10,
            head_dim=128,
            batch=2,
            kv_block_size=64,
            num_heavy=32,
            score="sampled",
            mass="block",
            threshold=0.02,
            num_samples=13,
            window=40,
            dense_tail=50,
        ),
        BFLOAT16,
    ),
    # The same with two stacks, and samples that query heads share; then one unit per CTA.
    (
        Case(
            1500,
            1500,
            num_q_heads=32,
            num_kv_heads=16,
            batch=1,
            score="sampled",
            mass="block",
            threshold=0.02,
            num_samples=32,
            select_per="kv_head",
        ),
        FLOAT16,
    ),
    (
        Case(
            700,
            1300,
            head_dim=256,
            is_causal=False,
            score="sampled",
            mass="block",
            threshold=0.02,
            num_samples=32,
        ),
        FLOAT16,
    ),
    # One stack for each of these heads. One stack per unit, whose own keys two parts of a CTA
    # share; then two and four per unit, without parts. Fewer stacks have four parts. The sm80
    # family, with two CTAs per multiprocessor, has four stacks per unit only with the most heads.
    *(
        (
            Case(
                40,
                300,
                num_q_heads=num_heads,
                num_kv_heads=num_heads,
                head_dim=head_dim,
                batch=2,
                score="sampled",
                mass="block",
                threshold=0.1,
            ),
            dtype,
        )
        for head_dim, dtype, num_heads in itertools.product(
            HEAD_DIMS, (BFLOAT16, FLOAT16), (100, 200, 450, 800)
        )
        if num_heads < 800 or head_dim <= 128
    ),
]


# Two calls for two sequences. In the second call, a sequence has segments in pages, own segments
# that it completes, and one that it does not complete.
CHUNKS = ((300, 40), (530, 217))


def rules():
    """(score, mass) of every kind that PBSConfig takes."""
    hints = typing.get_type_hints(PBSConfig)
    for score, mass in itertools.product(*(typing.get_args(hints[n]) for n in ("score", "mass"))):
        try:
            PBSConfig(score=score, mass=mass)
        except ValueError:
            continue
        yield score, mass


def cases():
    yield from RARE
    kv_block_sizes = itertools.cycle((32, 64, 128))
    segment_sizes = itertools.cycle((256, 256, 512))
    permutations = itertools.cycle(("kv_head", "query_head"))
    for head_dim, dtype, (score, mass) in itertools.product(
        HEAD_DIMS, (BFLOAT16, FLOAT16), list(rules())
    ):
        case = Case(
            300,
            700,
            num_q_heads=4,
            num_kv_heads=2,
            head_dim=head_dim,
            batch=1,
            block_size=128,
            kv_block_size=next(kv_block_sizes),
            segment_size=next(segment_sizes),
            permute_per=next(permutations),
            num_heavy=32,
            mass=mass,
            threshold=Case.threshold_for(mass, 0.1),
            score=score,
        )
        yield case, dtype


def paged_cases():
    """(case, dtype, page size, layout of the caches)."""
    sizes = itertools.cycle((256, 512, 1024))
    layouts = itertools.cycle(("nhd", "hnd", "apart"))
    block_sizes = itertools.cycle((32, 64, 128))
    selections = itertools.cycle(("query_head", "kv_head"))
    for head_dim, dtype in itertools.product(HEAD_DIMS, (BFLOAT16, FLOAT16)):
        case = Case(
            0,
            0,
            head_dim=head_dim,
            batch=1,
            block_size=128,
            kv_block_size=next(block_sizes),
            segment_size=256,
            num_heavy=32,
            score="sampled",
            mass="block",
            threshold=0.1,
            num_samples=16,
            select_per=next(selections),
        )
        yield case, dtype, next(sizes), next(layouts)


def attend_with_a_long_mask(device):
    """A mask of more than 2^19 words, so that a separate kernel counts the selected blocks
    (order.cu). Heads with one query each reach that with the least work."""
    num_heads, num_keys = 4096, 131073
    q = torch.randn(1, num_heads, 1, 64, device=device, dtype=BFLOAT16)
    k = torch.randn(1, 1, num_keys, 64, device=device, dtype=BFLOAT16)
    words = torch.zeros(1, num_heads, 1, 129, device=device, dtype=torch.int32)
    words[..., 127] = 1
    return ops.attend(q, k, k, k, k, words, block_size=32, segment_size=32)


def run(case, dtype, device):
    q, k, v = (x.to(device) for x in clustered_qkv(case, dtype, seed=0))
    found = run_stages(case, q, k, v)
    # Entries that are not rows, and float32.
    perm = found.perm.clone()
    perm[0, 0, 5], perm[0, 0, -1] = -3, 10**6
    if device == "cuda":  # elsewhere they raise
        ops.permute_kv(k.float(), v.float(), perm, **case.kwargs("permute_kv"))
    mass = "earlier" if case.mass == "earlier" else "causal"
    by_means = case._replace(score="mean", mass=mass, select_per="query_head", threshold=0.1)
    ops.select_blocks(
        q.float(), k.float(), found.k_mean, found.perm, **by_means.kwargs("select_blocks")
    )
    # The whole operator leaves out results that no stage reads.
    ops.attention(q, k, v, **case.kwargs("attention"))
    if device == "cuda":
        torch.cuda.synchronize()


def run_paged(case, dtype, page_size, layout, device):
    """Runs ordered pages over both calls, then copies out of pages, and numbers that are not pages.
    Packed sequences run only the kernels of `run`."""
    lengths = [(sum(chunks),) * 2 for chunks in zip(*CHUNKS, strict=True)]
    tensors = draw(case, lengths, dtype)
    pages = pages_for(case, CHUNKS, dtype, page_size, layout=layout).clone(device)
    small = pages_for(case, CHUNKS, dtype, 48, layout=layout).clone(device)
    options = options_of(case)
    for step in steps(CHUNKS, tensors, pages, small):
        q, out = step.q.to(device), step.q.to(device)
        tables = [pages.block_table]
        if device == "cuda":  # elsewhere they raise
            tables.append(tables[0].clone())
            tables[1][:, 0] = torch.tensor([-7, 2**31 - 1])
        where = step.cu_seqlens_q, step.seq_lens
        for table in tables:
            ops.attention_paged_(q, pages.k, pages.v, out, *where, table, **options)
        ops.attention_paged(q, small.k, small.v, *where, small.block_table, **options)
    if device == "cuda":
        torch.cuda.synchronize()


def built_kernels():
    """Mangled names of all kernels in the library."""
    command = ["cuobjdump", "-elf", str(_library._path())]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\.text\.(_Z\w+)", listing))


def demangle(names):
    """Demangled names without the parameters, whose types a profiler writes differently."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
    ).stdout
    return {simplify(name) for name in text.splitlines()}


def simplify(name):
    name = re.sub(r"\(anonymous namespace\)::|<unnamed>::|^void |_GLOBAL__N__\w+::", "", name)
    return re.sub(r"\s|\(.*", "", name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--coverage", action="store_true")
    args = parser.parse_args()
    activities = [torch.profiler.ProfilerActivity.CUDA] if args.coverage else []
    with torch.profiler.profile(activities=activities) if activities else torch.no_grad() as seen:
        for case, dtype in cases():
            run(case, dtype, args.device)
            print(case, dtype, flush=True)
        for paged in paged_cases():
            run_paged(*paged, args.device)
            print("in pages:", *paged, flush=True)
        attend_with_a_long_mask(args.device)
    if args.coverage:
        ran = {simplify(event.key) for event in seen.key_averages()}
        missing = demangle(built_kernels()) - ran
        print(f"{len(missing)} kernels of {pbs_attn.__version__} did not run:", *sorted(missing))
        sys.exit(bool(missing))


if __name__ == "__main__":
    main()
