"""`pbs-attn bench kernel` on the CPU, and the lists of blocks that it makes."""

import sys
import types

import pytest
import torch
from safetensors.torch import save_file

import pbs_attn
from pbs_attn import cli
from pbs_attn._errors import BenchError
from pbs_attn._rows import read_rows
from pbs_attn.bench import contestants, kernel
from pbs_attn.bench.shapes import SHAPES, Shape
from pbs_attn.bench.stages import heavy_hitters, paper_with
from pbs_attn.masks import candidate_blocks
from pbs_attn.ops import HEAD_DIMS

pytest.importorskip("tqdm")


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", Shape("llama", 128, 256, 3, 4, 2, 64, 100))


def options(**others):
    return kernel.Options(preset="tiny", rounds=1, device="cpu", **others)


def test_rows(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    rows = kernel.run(
        options(
            tokens=(1024,),
            densities=(0.2, 1.0),
            kv_block_sizes=(128, 32),
            csv=str(path),
            picture=str(tmp_path / "rates.png"),
        )
    )
    assert read_rows(path) == rows
    assert (tmp_path / "rates.png").stat().st_size > 10_000
    assert "pbs_tflops  sdpa_dense_tflops" in capsys.readouterr().out
    assert [row["kv_block_size"] for row in rows] == ["128", "32"] * 2
    assert rows[0]["density"] == rows[1]["density"] < "0.8"
    for row in rows:
        # 8 query blocks see 36 key blocks; 4 heads, 2 products of 128 x D a key
        done = 4 * 4 * 128 * 64 * float(row["density"]) * 36 * 128
        rate = done / float(row["pbs_ms"]) / 1e9
        assert float(row["pbs_tflops"]) == pytest.approx(rate, rel=0.01)
        is_densest = row["density"] == "1.0000" and row["kv_block_size"] == "128"
        assert bool(row["sdpa_dense_ms"]) == is_densest
        assert not row["flex_ms"] and not row["cudnn_dense_ms"]


def test_uneven_lists_visit_as_much_as_even_ones(monkeypatch):
    monkeypatch.setattr(kernel, "UNEVEN_TOKENS", 4096)
    uneven, even = kernel.run(options(tokens=(), uneven=True))
    assert (uneven["lists"], even["lists"]) == ("uneven", "even")
    assert float(uneven["density"]) == pytest.approx(float(even["density"]), abs=0.02)


def test_real_activations(tmp_path):
    q, k, v = (x.float() for x in heavy_hitters(1024, 2, 1, "cpu", 64))
    path = tmp_path / "layer.safetensors"
    save_file(dict(zip("qkv", (q, k, v), strict=True)), path)
    (row,) = kernel.run(options(tokens=(), activations=(str(path),)))
    chosen = pbs_attn.select(q, k, v, config=paper_with(128))
    density = pbs_attn.density(chosen.block_mask, 1024, 1024, config=paper_with(128))
    density = density.mean().item()
    assert float(row["density"]) == pytest.approx(density, abs=1e-4)
    assert (row["lists"], row["q_heads"], row["kv_heads"]) == ("layer", "4", "2")
    save_file({"q": q, "k": k}, path)
    with pytest.raises(BenchError, match="--activations must have q, k and v"):
        kernel.run(options(activations=(str(path),)))
    save_file({"q": q, "k": k.repeat(1, 3, 1, 1), "v": v}, path)
    with pytest.raises(BenchError, match="must divide 2 KV heads, got 3"):
        kernel.run(options(activations=(str(path),)))


@pytest.mark.parametrize("width", [128, 64, 32])
def test_lists_hold_their_share_of_candidates_only(width):
    config = paper_with(width)
    candidates, _ = candidate_blocks(4096, 4096, config=config)
    columns = torch.arange(4096 // width)
    is_candidate = columns < candidates[:, None]
    selected = kernel.random_list(4096, 4, 0.3, config, "cpu")
    assert not (selected & ~is_candidate).any()
    assert selected[..., 2:, : 128 // width].all()  # the first 128 keys
    wide = kernel.random_list(4096, 4, 0.3, paper_with(128), "cpu")
    assert torch.equal(selected.sum(-1) * width, wide.sum(-1) * 128)
    assert (
        0.2
        < wide[..., 1:].sum() / (4 * (candidates - 128 // width).clamp(min=0).sum() * width / 128)
        < 0.4
    )


def test_flex_gets_the_lists():
    """The diagonal as the only blocks with a mask, all others whole."""
    selected = kernel.random_list(1024, 4, 0.4, paper_with(128), "cpu")
    visited = selected | kernel.own_blocks(1024, paper_with(128))
    mask = contestants.flex_block_mask(visited, 1024)
    assert torch.equal(mask.to_dense().bool(), visited)
    diagonal = pbs_attn.lists_to_mask(mask.kv_num_blocks, mask.kv_indices, 8)
    assert torch.equal(pbs_attn.mask_to_bool(diagonal, 8), torch.eye(8).bool().expand(1, 4, 8, 8))
    assert mask.BLOCK_SIZE == (128, 128)
    rows = torch.arange(1024)
    assert torch.equal(mask.mask_mod(0, 0, rows[:, None], rows), torch.ones(1024, 1024).tril() > 0)


@pytest.fixture
def dynamo_config():
    """The limit of recompilations is as before after the test."""
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_dense_flex_is_causal_attention_and_waits_for_its_first_call(monkeypatch, dynamo_config):
    """With torch.compile replaced by nothing: FlexAttention then asks its mask for every pair."""
    compiled = []

    def compile(function, **options):
        compiled.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    q, k, v = (torch.randn(1, heads, 700, 64) for heads in (4, 2, 2))
    call = contestants.flex_dense(q, k, v)
    assert not compiled
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    for _ in range(2):
        torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)
    # The first compilation is ours; FlexAttention without its kernel has some of its own.
    assert compiled[0] == {"dynamic": False, "fullgraph": True}
    assert [options.get("dynamic") for options in compiled].count(False) == 1
    assert torch._dynamo.config.recompile_limit > 20  # shapes of a search for the crossover


def test_dense_flex_visits_every_causal_block(monkeypatch, dynamo_config):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    q, k, v = (torch.randn(1, heads, 700, 64) for heads in (4, 2, 2))
    monkeypatch.setattr(contestants, "flex_block_mask", lambda visited, num_tokens: visited)
    monkeypatch.setattr(
        "torch.nn.attention.flex_attention.flex_attention",
        lambda *tensors, block_mask, **options: (block_mask, options),
    )
    visited, options = contestants.flex_dense(q, k, v)()
    assert torch.equal(visited, torch.ones(1, 1, 6, 6).tril() > 0)
    assert options == {"enable_gqa": True}


class OnGpu:
    """Of a tensor, what dense_calls asks for."""

    device = torch.device("cuda")


@pytest.mark.parametrize("fails", [False, True])
def test_dense_calls_on_a_gpu(fails, monkeypatch, capsys):
    def flex_dense(*tensors):
        def call():
            if fails:
                raise RuntimeError("no kernel")

        return call

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(contestants, "sdpa_through", lambda backend: lambda *tensors: None)
    monkeypatch.setattr(contestants, "flash4", lambda *tensors: lambda: None)
    monkeypatch.setattr(contestants, "flex_dense", flex_dense)
    names = list(contestants.dense_calls(OnGpu(), OnGpu(), OnGpu()))
    always = ["cudnn_dense", "flash_dense", "fa4_dense"]
    assert names == always if fails else names == [*always, "flex_dense"]
    assert set(names) <= set(kernel.DENSE)
    said = "flex_dense is left out: no kernel\n" if fails else ""
    assert capsys.readouterr().err == said
    assert list(contestants.dense_calls(OnGpu(), OnGpu(), OnGpu(), ("flash",))) == ["flash_dense"]


def test_nothing_compiles_for_a_cpu(monkeypatch):
    def compile(*args, **options):
        raise AssertionError("torch.compile was called")

    monkeypatch.setattr(torch, "compile", compile)
    q, k, v = (torch.randn(1, 2, 300, 64) for _ in range(3))
    calls = contestants.dense_calls(q, k, v)
    assert list(calls) == ["sdpa_dense"]
    calls["sdpa_dense"]()
    assert contestants.dense_calls(q, k, v, ()) == {}


def test_answers_on_the_same_lists_must_agree():
    out = torch.randn(1, 2, 64, 64)
    kernel._require_same_answer(out, out + 1e-3)
    with pytest.raises(BenchError, match="must agree on the same lists, got a difference of"):
        kernel._require_same_answer(out, out + 0.1)


def test_flash4_gets_the_lists(monkeypatch):
    """The calls that FlashAttention-4 gets, by a stand-in with its signature."""
    calls = []

    def forward(q, k, v, causal, block_sparse_tensors=None):
        calls.append((q.shape, causal, block_sparse_tensors))

    assert contestants.flash4(*(torch.zeros(1, 2, 256, 64) for _ in range(3))) is None
    for name, content in (
        ("flash_attn", {}),
        ("flash_attn.cute", {}),
        ("flash_attn.cute.block_sparsity", {"BlockSparseTensorsTorch": dict}),
        ("flash_attn.cute.interface", {"_flash_attn_fwd": forward}),
    ):
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    tensors = [torch.zeros(1, 2, 256, 64) for _ in range(3)]
    visited = torch.tensor([[[True, False], [False, True]]]).expand(1, 2, 2, 2)
    contestants.flash4(*tensors)()
    contestants.flash4(*tensors, visited)()
    (dense_shape, dense_causal, no_lists), (_, sparse_causal, lists) = calls
    assert (dense_shape, dense_causal, no_lists) == ((1, 256, 2, 64), True, None)
    assert not sparse_causal
    assert lists["full_block_cnt"].tolist() == [[[1, 1]] * 2]
    assert lists["full_block_idx"][0, 0, :, 0].tolist() == [0, 1]
    assert not lists["mask_block_cnt"].any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tokens", "1000"], "--tokens must be multiples of 128 from 512 on, got 1000"),
        (["--tokens"], "--tokens must name a length where there are no --activations"),
        (["--head-dims", "64", "80"], f"--head-dims must be of {HEAD_DIMS}, got (64, 80)"),
        (["--densities", "0"], "--densities must lie in (0, 1], got [0.0]"),
        (["--rounds", "0"], "--rounds must be positive, got 0"),
        (["--activations", "/no/file"], "--activations must have q, k and v, got /no/file: "),
        (["--picture", "/no/such/folder/x.png"], "the folder of /no/such/folder/x.png must exist"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, words, capsys):
    assert cli.main(["bench", "kernel", "--device", "cpu", *arguments]) == 2
    assert f"pbs-attn bench: {words}" in capsys.readouterr().err.splitlines()[-1]
