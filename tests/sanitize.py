"""Every stage on a GPU, at small shapes that reach all paths of its kernels, for compute-sanitizer:

compute-sanitizer --tool memcheck python tests/sanitize.py
compute-sanitizer --tool racecheck python tests/sanitize.py
"""

import argparse

import torch
from cases import Case, clustered_qkv, run_stages

import pbs_attn  # noqa: F401  registers torch.ops.pbs

ops = torch.ops.pbs
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16
CASES = [
    # Several tiles of query blocks and several turns of the key stages a CTA.
    (Case(2048, 2048, num_heads=32, num_kv_heads=16, batch=4, segment_size=128), BFLOAT16),
    # Two groups of heads, the second one smaller; rows of 96 elements; incomplete last blocks.
    (Case(333, 1333, num_heads=7, num_kv_heads=1, head_dim=96, mass="causal"), FLOAT16),
    # Three groups of heads.
    (
        Case(
            1300,
            1300,
            num_heads=9,
            num_kv_heads=1,
            head_dim=128,
            block_size=128,
            kv_block_size=64,
            segment_size=256,
            permute_per="query_head",
        ),
        BFLOAT16,
    ),
    # Segments longer than a window of permute_kv.
    (
        Case(
            700,
            1800,
            num_heads=8,
            head_dim=128,
            block_size=128,
            segment_size=512,
            num_heavy=40,
            mass="causal",
        ),
        BFLOAT16,
    ),
    (Case(600, 1500, head_dim=256, permute_per="query_head"), FLOAT16),
    # Sampled scores: several units a CTA, the last of each head with fewer stacks than warpgroups.
    (
        Case(
            1500,
            1500,
            num_heads=80,
            num_kv_heads=10,
            head_dim=128,
            batch=2,
            kv_block_size=64,
            num_heavy=32,
            mass="causal",
            score="sampled",
            num_samples=13,
        ),
        BFLOAT16,
    ),
    (Case(700, 1300, head_dim=256, is_causal=False, score="sampled", num_samples=32), FLOAT16),
]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    device = parser.parse_args().device
    for case, dtype in CASES:
        q, k, v = (x.to(device) for x in clustered_qkv(case, dtype, seed=0))
        found = run_stages(case, q, k, v)
        # Entries that are no rows, and float32.
        perm = found.perm.clone()
        perm[0, 0, 5], perm[0, 0, 300] = -3, 10**6
        if device == "cuda":  # elsewhere they raise
            ops.permute_kv(k.float(), v.float(), perm, **case.kwargs("permute_kv"))
        means = case._replace(score="mean", mass="earlier").kwargs("select_blocks")
        ops.select_blocks(q.float(), k.float(), found.k_mean, found.perm, **means)
        if device == "cuda":
            torch.cuda.synchronize()
        print(case, flush=True)


if __name__ == "__main__":
    main()
