"""`attend` on lists of blocks, beside other block-sparse kernels on the same lists and dense
kernels.

A list keeps each 128-row key block before the own segment of the query block with probability p.
Block 0 and the own segment are always kept. Lists of narrower key blocks visit as many keys. Rates
count 4 * 128 * D operations for every key that a block of 128 queries visits, and count the
diagonal block whole. The time of dense kernels does not depend on the list, so they run beside the
densest list only. The column `lists` gives the source of the lists: `random`; `uneven`, in which
one head is 30 times as dense as the others, and `even`, which has as many blocks spread evenly; or
the file of real queries, keys and values for which the paper's selection made the list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

import pbs_attn
from pbs_attn import PBSConfig, plot
from pbs_attn._errors import BenchError
from pbs_attn._inputs import choose_device
from pbs_attn._rows import Row, check_outputs
from pbs_attn.masks import candidate_blocks
from pbs_attn.ops import HEAD_DIMS

from .contestants import BLOCK, dense_calls, sparse_calls
from .options import UNEVEN_TOKENS
from .options import KernelOptions as Options
from .report import (
    RowFile,
    as_table,
    check_rounds,
    check_shares,
    require_packages,
    say_where,
)
from .shapes import SHAPES, Shape, check_activations, check_preset, load_activations
from .stages import paper_with
from .timing import Call, clock_for, interleaved_medians

SPARSE = ("pbs", "fa4_sparse", "flex")
DENSE = ("sdpa_dense", "flash_dense", "cudnn_dense", "fa4_dense", "flex_dense")


@dataclasses.dataclass(frozen=True)
class Case:
    """One input and its lists; `selected` (1, Hq, query blocks, key blocks) is bool."""

    lists: str
    tensors: list[torch.Tensor]  # q, k, v
    permuted: list[torch.Tensor]  # k, v
    selected: torch.Tensor
    config: PBSConfig
    with_dense: bool


def run(options: Options) -> list[Row]:
    """Measures, prints a table, and writes the files that `options` names.

    Returns:
        One row for each case: milliseconds (median of the rounds) and TFLOP/s of each contestant.

    Raises:
        BenchError, DemoError: if an option is wrong or a package is missing.
    """
    _check(options)
    from tqdm import tqdm

    device = choose_device(options.device)
    file = RowFile(options.csv, device)
    with torch.inference_mode(), tqdm(total=_num_cases(options), desc="kernel", unit="row") as bar:
        for case in _cases(options, device):
            bar.set_postfix_str(f"{case.lists}, {case.tensors[0].shape[2]} tokens")
            file.add({"preset": options.preset} | _measure(options, case))
            bar.update()
    print(format_rows(file.rows))
    picture = options.picture if options.tokens else None  # the picture shows random lists
    if picture:
        title = f"{options.preset}, {file.about_run['device']}"
        plot.draw_rates(file.rows, picture, title=title)
    say_where([options.csv, picture])
    return file.rows


def format_rows(rows: list[Row]) -> str:
    """A table of the rates of all contestants that ran."""
    rates = [f"{name}_tflops" for name in (*SPARSE, *DENSE)]
    rates = [name for name in rates if any(row[name] for row in rows)]
    return as_table(
        rows, ("lists", "tokens", "head_dim", "dtype", "kv_block_size", "density", *rates)
    )


def _check(options: Options) -> None:
    require_packages("safetensors", "tqdm")
    check_preset(options.preset)
    for tokens in options.tokens:
        if tokens < 512 or tokens % BLOCK:
            raise BenchError(f"--tokens must be multiples of {BLOCK} from 512 on, got {tokens}")
    if not set(options.head_dims or ()) <= set(HEAD_DIMS):
        raise BenchError(f"--head-dims must be of {HEAD_DIMS}, got {options.head_dims}")
    if not (options.tokens or options.activations or options.uneven):
        raise BenchError("--tokens must name a length where there are no --activations")
    check_shares("--densities", options.densities)
    check_rounds(options.rounds)
    check_activations(options.activations, [SHAPES[options.preset]])
    check_outputs([options.csv], [options.picture])


def _num_cases(options: Options) -> int:
    random = len(options.head_dims or (0,)) * len(options.dtypes or (0,)) * len(options.tokens)
    random *= len(options.densities) * len(options.kv_block_sizes)
    return random + 2 * options.uneven + len(options.activations) * len(options.kv_block_sizes)


def _cases(options: Options, device: str) -> Iterator[Case]:
    shape = SHAPES[options.preset]
    dtypes = options.dtypes or ("float32" if device == "cpu" else "bfloat16",)
    for head_dim in options.head_dims or (shape.head_dim,):
        for dtype in dtypes:
            of_dim = dataclasses.replace(shape, head_dim=head_dim)
            for num_tokens in options.tokens:
                yield from _random_cases(options, of_dim, num_tokens, dtype, device)
    if options.uneven:
        yield from _uneven_cases(shape, dtypes[0], device)
    for path in options.activations:
        yield from _activation_cases(options, shape, path, device)


def _random_cases(
    options: Options, shape: Shape, num_tokens: int, dtype: str, device: str
) -> Iterator[Case]:
    tensors = _random_tensors(shape, num_tokens, dtype, device)
    for p in options.densities:
        for kv_block_size in options.kv_block_sizes:
            config = paper_with(kv_block_size)
            selected = random_list(num_tokens, shape.num_q_heads, p, config, device)
            with_dense = p == max(options.densities)
            yield Case("random", tensors, tensors[1:], selected, config, with_dense)


def _uneven_cases(shape: Shape, dtype: str, device: str) -> Iterator[Case]:
    """First the last head visits 30 times as many blocks as each other head; then all heads share
    the same number evenly."""
    tensors = _random_tensors(shape, UNEVEN_TOKENS, dtype, device)
    config = paper_with(BLOCK)
    uneven = torch.full((shape.num_q_heads, 1, 1), 0.02, device=device)
    uneven[-1] = 0.6
    for lists, p in (("uneven", uneven), ("even", uneven.mean())):
        selected = random_list(UNEVEN_TOKENS, shape.num_q_heads, p, config, device)
        yield Case(lists, tensors, tensors[1:], selected, config, with_dense=False)


def _activation_cases(options: Options, shape: Shape, path: str, device: str) -> Iterator[Case]:
    """Real queries, keys and values with the paper's selection, repeated to the number of heads."""
    q, k, v = load_activations(path, shape, device)
    for kv_block_size in options.kv_block_sizes:
        config = paper_with(kv_block_size)
        chosen = pbs_attn.select(q, k, v, config=config)
        selected = pbs_attn.mask_to_bool(chosen.block_mask, -(-k.shape[2] // kv_block_size))
        permuted = [chosen.k_perm, chosen.v_perm]
        yield Case(Path(path).stem, [q, k, v], permuted, selected, config, with_dense=True)


def _random_tensors(shape: Shape, num_tokens: int, dtype: str, device: str) -> list[torch.Tensor]:
    heads = (shape.num_q_heads, shape.num_kv_heads, shape.num_kv_heads)
    generator = torch.Generator(device).manual_seed(num_tokens)
    return [
        torch.randn(1, h, num_tokens, shape.head_dim, generator=generator, device=device).to(
            getattr(torch, dtype)
        )
        for h in heads
    ]


def random_list(
    num_tokens: int, num_q_heads: int, p: float | torch.Tensor, config: PBSConfig, device: str
) -> torch.Tensor:
    """Returns the selected candidates, (1, heads, query blocks, key blocks), bool. p is one number
    for all heads, or (heads, 1, 1). With key blocks narrower than 128 rows, every query block
    visits as many keys as with 128 rows, also at random."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(width: int) -> torch.Tensor:
        """Uniform in [0, 1) where a key block is a candidate, 2 elsewhere."""
        shape = (1, num_q_heads, num_tokens // BLOCK, num_tokens // width)
        values = torch.rand(shape, generator=generator, device=device)
        values[..., : BLOCK // width] = -1  # the first 128 keys, always
        of_width = dataclasses.replace(config, kv_block_size=width)
        candidates, _ = candidate_blocks(num_tokens, num_tokens, config=of_width)
        columns = torch.arange(shape[-1], device=device)
        return values.masked_fill_(columns >= candidates.to(device)[:, None], 2)

    selected = noise(BLOCK) < p
    if config.key_block_size == BLOCK:
        return selected
    counts = selected.sum(-1, keepdim=True) * (BLOCK // config.key_block_size)
    values = noise(config.key_block_size)
    last = values.sort(-1).values.gather(-1, (counts - 1).clamp(min=0))
    return (values <= last) & (counts > 0)


def own_blocks(num_tokens: int, config: PBSConfig) -> torch.Tensor:
    """The own segments up to the diagonal, as blocks of 128 rows: (query blocks, key blocks),
    bool."""
    candidates, own = candidate_blocks(num_tokens, num_tokens, config=config)
    columns = torch.arange(num_tokens // BLOCK)
    return (columns >= candidates[:, None]) & (columns < (candidates + own)[:, None])


def _measure(options: Options, case: Case) -> Row:
    q, k, v = case.tensors
    num_q_heads, num_tokens, head_dim = q.shape[1:]
    width = case.config.key_block_size
    words = pbs_attn.bool_to_mask(case.selected)
    own = own_blocks(num_tokens, paper_with(BLOCK))
    calls: dict[str, Call] = {
        "pbs": lambda: torch.ops.pbs.attend(q, k, v, *case.permuted, words, kv_block_size=width)[0]
    }
    if width == BLOCK:
        # The other kernels take K and V in one order, so the own segment is in the list too.
        calls |= sparse_calls(q, k, v, case.selected | own.to(q.device))
        if case.permuted[0] is k and "flex" in calls:
            _require_same_answer(calls["pbs"](), calls["flex"]())
        if case.with_dense:
            calls |= dense_calls(q, k, v)
    times = interleaved_medians(calls, options.rounds, clock_for(q.device, options.budget_ms))
    visited_keys = case.selected.sum().item() * width + own.sum().item() * BLOCK * num_q_heads
    sparse, dense = 4 * BLOCK * head_dim * visited_keys, 2 * num_tokens**2 * head_dim * num_q_heads
    density = pbs_attn.density(words, num_tokens, num_tokens, config=case.config).mean()
    row = {
        "lists": case.lists,
        "tokens": str(num_tokens),
        "q_heads": str(num_q_heads),
        "kv_heads": str(k.shape[1]),
        "head_dim": str(head_dim),
        "dtype": str(q.dtype).removeprefix("torch."),
        "kv_block_size": str(width),
        "density": f"{density:.4f}",
    }
    for name in (*SPARSE, *DENSE):
        done, ms = dense if name in DENSE else sparse, times.get(name)
        row[f"{name}_ms"] = f"{ms:.4f}" if ms else ""
        row[f"{name}_tflops"] = f"{done / ms / 1e9:.4g}" if ms else ""
    return row


def _require_same_answer(out: torch.Tensor, other: torch.Tensor) -> None:
    error = ((out - other).norm() / other.norm()).item()
    if not error < 0.01:
        raise BenchError(
            f"attend and FlexAttention must agree on the same lists, got a difference of {error}"
        )
