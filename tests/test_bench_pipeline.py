"""`pbs-attn bench pipeline`: the parts that need no GPU."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from cases import Case, clustered_qkv
from doc_tables import RESULTS, table_with

import pbs_attn
from pbs_attn import PBSConfig, cli
from pbs_attn._errors import BenchError
from pbs_attn._rows import BEFORE_ATTEND, STAGES, read_rows
from pbs_attn.bench import contestants, eager, floors, gpu_profile, pipeline, stages
from pbs_attn.bench.options import DENSITIES, PAPER_DENSITIES
from pbs_attn.bench.settings import density_at, name_of
from pbs_attn.bench.shapes import Shape

ops = torch.ops.pbs
CUDA_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"


@pytest.mark.parametrize(
    "case",
    [
        Case(640, 640, permute_per="query_head"),
        Case(600, 600, permute_per="query_head", num_q_heads=2, num_kv_heads=1, threshold=0.6),
        Case(333, 333, permute_per="query_head", batch=1, segment_size=128, kv_block_size=64),
        Case(100, 100, permute_per="query_head", num_kv_heads=4, threshold=1.0),
    ],
    ids=str,
)
def test_eager_pipeline_selects_what_the_ops_select(case):
    q, k, v = clustered_qkv(case, torch.float32, seed=0)
    config = dataclasses.replace(
        PBSConfig.paper(case.threshold),
        block_size=case.block_size,
        kv_block_size=case.kv_block_size,
        segment_size=case.segment_size,
    )
    chosen = pbs_attn.select(q, k, v, config=config)
    k_perm, v_perm, mask = eager.before_attend(q, k, v, case.threshold, config)
    assert torch.equal(k_perm, chosen.k_perm)
    assert torch.equal(v_perm, chosen.v_perm)
    assert torch.equal(pbs_attn.bool_to_mask(mask), chosen.block_mask)
    assert mask.any()


def test_eager_stages_one_by_one_are_the_pipeline():
    case = Case(300, 300, permute_per="query_head")
    q, k, v = clustered_qkv(case, torch.float32, seed=0)
    config = dataclasses.replace(PBSConfig.paper(), block_size=32, segment_size=64)
    calls = eager.stage_calls(q, k, v, 0.9, config)
    assert tuple(calls) == BEFORE_ATTEND
    mask = eager.before_attend(q, k, v, 0.9, config)[2]
    assert torch.equal(calls["select_blocks"](), mask)


def test_floors_by_hand():
    """Two segments, the second one incomplete: 3 query blocks, of which the last has candidates."""
    config = PBSConfig.paper()
    problem = floors.Problem(
        num_tokens=300,
        num_q_heads=4,
        num_kv_heads=2,
        num_perm_heads=2,
        head_dim=64,
        element_size=2,
        density=0.8,
        config=config,
    )
    q, k = 300 * 4 * 64 * 2, 300 * 2 * 64 * 2
    k_mean = 2 * 3 * 64 * 4
    expected = {
        "score_keys": (2 * 256 * 2 * 64 * 2, 2 * 2 * 128 * 256 * 64 * 4),
        "sort_segments": (2 * 300 * 8, 0),
        "permute_kv": (4 * k + k_mean, 0),
        "select_blocks": (q + k_mean + 4 * 3 * (1 + 1) * 4, 2 * 64 * 4 * 2),
        # Own pairs: 1, 2 and 1; candidates: 2 for the last query block.
        "attend": (2 * q + 4 * k, 4 * 128 * 128 * 64 * (0.8 * 4 * 6)),
    }
    assert list(expected) == list(STAGES) == [stage.__name__ for stage in floors.STAGES]
    for stage in floors.STAGES:
        assert stage(problem) == pytest.approx(expected[stage.__name__]), stage.__name__
    sampling = {"score": "sampled", "mass": "block", "num_samples": 16, "permute_per": "kv_head"}
    sampled = dataclasses.replace(config, threshold=None, **sampling)
    longer = problem._replace(num_tokens=512, config=sampled)
    # 16 of 128 queries; the first segment's 256 keys, by those of the last two query blocks; fp8
    # products count half.
    q, k, mask_and_counts = 512 * 4 * 64 * 2, 512 * 2 * 64 * 2, 4 * 4 * (1 + 1) * 4
    product = 64 * 16 * 256
    assert floors.select_blocks(longer) == (q // 8 + k + mask_and_counts, 4 * 2 * product)
    shared = dataclasses.replace(sampled, select_per="kv_head")
    found = floors.select_blocks(longer._replace(config=shared))
    assert found == (k // 8 + k + mask_and_counts, 2 * 2 * product)
    tail = dataclasses.replace(sampled, dense_tail=1)
    assert floors.select_blocks(longer._replace(config=tail)).operations == 4 * product
    assert floors.floors_ms(problem, "another card") == {}
    times = floors.floors_ms(problem, "NVIDIA H200")
    assert times["permute_kv"] == pytest.approx(1e3 * expected["permute_kv"][0] / 4.3e12)
    assert times["score_keys"] == pytest.approx(1e3 * expected["score_keys"][1] / 680e12)


def test_every_kernel_has_a_stage():
    sources = [*CUDA_SOURCES.rglob("*.cu"), *CUDA_SOURCES.rglob("*.cuh")]
    declared = r"__global__\s+void\s+(?:__\w+__\s*\((?:[^()]|\([^()]*\))*\)\s*)*(\w+)\("
    text = "\n".join(source.read_text() for source in sources)
    kernels = re.findall(declared, text)
    assert len(kernels) == len(re.findall(r"^[^/\n]*__global__", text, re.MULTILINE)) > 0
    assert {gpu_profile.stage_of(f"pbs::cuda::{kernel}()") for kernel in kernels} == {
        *STAGES,
        gpu_profile.PAGES,
    }


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        (
            "pbs::cuda::(anonymous namespace)::select_blocks_mean_kernel(pbs::cuda::Args)",
            "select_blocks",
        ),
        (
            "void pbs::cuda::(anonymous namespace)::score_keys_sums_kernel<cutlass::half_t, 64>"
            "(pbs::cuda::(anonymous namespace)::ScoreArgs)",
            "score_keys",
        ),
        ("void pbs::cuda::attend_kernel<pbs::cuda::Traits<128> >(pbs::cuda::Args)", "attend"),
        (
            "pbs::cuda::(anonymous namespace)::copy_pages_kernel(pbs::CopyPagesParams)",
            gpu_profile.PAGES,
        ),
        ("void at::native::elementwise_kernel<4>(int)", gpu_profile.OTHER),
        ("Memset (Device)", gpu_profile.OTHER),
    ],
)
def test_stage_of_a_kernel(name, stage):
    assert gpu_profile.stage_of(name) == stage


def test_unknown_kernels_are_refused():
    with pytest.raises(ValueError, match="name must begin with its stage"):
        gpu_profile.stage_of("void pbs::cuda::(anonymous namespace)::new_kernel<3>(int)")


def gpu_calls():
    """Two calls, 1000 us apart: one kernel after the other, attend beside order; a memset."""
    kernels = [
        ("score_keys_sums_kernel", 0, 10),
        ("score_keys_importance_kernel", 12, 20),
        ("sort_segments_kernel", 21, 25),
        ("permute_kv_kernel", 26, 30),
        ("select_blocks_mean_kernel", 31, 40),
        ("attend_order_kernel", 41, 50),
        ("attend_kernel", 42, 100),
    ]
    events = [{"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 500}]
    for first in (0, 1000):
        events.append({"cat": "gpu_memset", "name": "Memset (Device)", "ts": first + 102, "dur": 1})
        for name, start, end in kernels:
            name = f"void pbs::cuda::(anonymous namespace)::{name}<4>(int)"
            ts = first + start
            events.append({"cat": "kernel", "name": name, "ts": ts, "dur": end - start})
    return gpu_profile.gpu_work({"traceEvents": events})


def test_profile_of_several_calls():
    found = gpu_profile.summarize(gpu_calls(), calls=2)
    assert found.launches == 8
    assert found.gaps_ms == pytest.approx(0.008)  # the pause between the calls is none of it
    of_stage = dict(zip(STAGES, (0.018, 0.004, 0.004, 0.009, 0.059), strict=True))
    assert found.stage_ms == pytest.approx(
        of_stage | {gpu_profile.PAGES: 0, gpu_profile.OTHER: 0.001}
    )
    without = [work for work in gpu_calls() if "permute" not in work.name]
    with pytest.raises(ValueError, match="must contain kernels of permute_kv"):
        gpu_profile.summarize(without, calls=2)
    with pytest.raises(ValueError, match="launches must be a multiple of 2 calls, got 15"):
        gpu_profile.summarize(gpu_calls()[1:], calls=2)


def pipeline_options(**others):
    fixed = {"presets": ("tiny",), "tokens": (1024,), "rounds": 1, "device": "cpu"}
    return pipeline.Options(**fixed | others)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(pipeline.SHAPES, "tiny", Shape("llama", 128, 256, 3, 4, 2, 64, 100))


def test_pipeline_rows(tiny, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    options = pipeline_options(
        permute_per=("kv_head", "query_head"),
        kv_block_sizes=(64,),
        densities=(0.8,),
        eager=True,
        crossover=False,
        csv=str(path),
        picture=str(tmp_path / "stages.png"),
    )
    rows = pipeline.run(options)
    assert read_rows(path) == rows
    assert (tmp_path / "stages.png").stat().st_size > 10_000
    assert capsys.readouterr().out.split()[: len(pipeline.TABLE)] == list(pipeline.TABLE)
    of_gpu = {"gaps_ms", "launches", "extra_gib", "eager_extra_gib", "crossover"}
    of_gpu |= {*pipeline.stage_columns("kernel_ms"), *pipeline.stage_columns("floor_ms")}
    of_gpu |= {"flash_dense_ms", "cudnn_dense_ms", "fa4_dense_ms", "flex_dense_ms"}
    of_gpu |= {"gpu_family", "driver"}
    for row, permute_per in zip(rows, options.permute_per, strict=True):
        assert {column for column, value in row.items() if not value} == of_gpu
        assert (row["permute_per"], row["kv_block_size"]) == (permute_per, "64")
        assert float(row["density"]) == pytest.approx(0.8, abs=0.05)
        before = sum(float(row[f"{stage}_ms"]) for stage in BEFORE_ATTEND)
        assert float(row["before_attend_ms"]) == pytest.approx(before, abs=2e-4)
        speedup = float(row["sdpa_dense_ms"]) / float(row["attention_ms"])
        assert float(row["speedup"]) == pytest.approx(speedup, abs=2e-3)


def test_what_a_gpu_adds_to_a_row(monkeypatch):
    """Profiler and memory of a GPU replaced; everything else as it runs there."""
    monkeypatch.setattr(pipeline, "extra_gib", lambda call, *_: 0.5 * len(call()))
    monkeypatch.setattr(
        pipeline, "profile_call", lambda call: gpu_profile.summarize(gpu_calls(), calls=2)
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    tensors = stages.heavy_hitters(1024, 4, 2, "cpu")
    made = stages.Pipeline(*tensors, stages.paper_with(None))
    made.set_threshold(0.9)
    options = pipeline_options(eager=True)
    values = pipeline._gpu_values(options, made, pipeline.problem_of(made, 0.8))
    row = pipeline.as_row(values)
    assert row["launches"] == "8"
    assert float(row["before_attend_kernel_ms"]) == pytest.approx(0.035)
    assert float(row["gaps_ms"]) == pytest.approx(0.008)
    assert float(row["attend_floor_ms"]) > 0
    assert (row["extra_gib"], row["eager_extra_gib"]) == ("0.500", "1.500")
    with pytest.raises(ValueError, match=r"every value must have a column, got \['speed'\]"):
        pipeline.as_row({"speed": 1.0})


@pytest.mark.parametrize("first", [512, 768, 2560, 4352, 8192])
def test_shortest_win(first):
    asked = []

    def wins(length):
        asked.append(length)
        return length >= first

    assert pipeline.shortest_win(wins, 256, 65536) == first
    assert len(set(asked)) == len(asked) < 12
    assert pipeline.shortest_win(lambda length: False, 256, 65536) is None


def test_crossover_goes_into_the_rows(tiny, monkeypatch):
    monkeypatch.setattr(pipeline, "_wins", lambda *options: options[-1] >= 1280)
    (row,) = pipeline.run(pipeline_options())
    assert row["crossover"] == "1280"
    monkeypatch.undo()
    monkeypatch.setitem(pipeline.SHAPES, "tiny", Shape("llama", 128, 256, 3, 4, 2, 64, 100))
    slow = {"sdpa_dense": lambda: torch.rand(2000, 2000) @ torch.rand(2000, 2000)}
    monkeypatch.setattr(pipeline, "dense_calls", lambda *inputs: slow)
    (row,) = pipeline.run(pipeline_options())
    assert row["crossover"] == "512"


@pytest.mark.parametrize(
    ("settings", "name", "permute_per", "kv_block_size", "density"),
    [
        (None, "balanced", "kv_head", "32", 0.48),
        ("default", "balanced", "kv_head", "32", 0.48),
        ("fast", "fast", "kv_head", "32", 0.48),
        ("accurate", "accurate", "kv_head", "32", 0.48),
        ("paper", "paper", "query_head", "128", 0.76),
    ],
)
def test_settings_say_order_blocks_and_density(
    settings, name, permute_per, kv_block_size, density, tiny
):
    given = {} if settings is None else {"settings": settings}
    (row,) = pipeline.run(pipeline_options(tokens=(2048,), crossover=False, **given))
    found = row["selection"], row["permute_per"], row["kv_block_size"]
    assert found == (name, permute_per, kv_block_size)
    assert float(row["density"]) == pytest.approx(density, abs=0.03)


def test_the_crossover_is_that_of_the_settings(tiny, monkeypatch):
    """Each length at the density that goes with the settings, in their blocks."""
    asked = []

    def reach(made, density):
        asked.append((made.q.shape[2], made.config, density))
        return made.set_threshold(made.config.resolved_threshold)

    monkeypatch.setattr(pipeline, "reach", reach)
    monkeypatch.setattr(pipeline, "LONGEST_CROSSOVER", 1024)
    never = {"sdpa_dense": lambda: None}
    monkeypatch.setattr(pipeline, "dense_calls", lambda *inputs: never)
    for settings, config, densities in (
        ("default", PBSConfig(), (1.0, 0.96)),
        ("paper", PBSConfig.paper(), (0.94, 0.85)),
    ):
        asked.clear()
        pipeline.run(pipeline_options(tokens=(512,), settings=settings))
        lengths = (512, 1024, 512)  # the last one is the row's
        assert [(length, made.key_block_size) for length, made, _ in asked] == [
            (length, config.key_block_size) for length in lengths
        ]
        assert all(made.score == config.score for _, made, _ in asked)
        expected = [*densities, densities[0]]
        assert [density for *_, density in asked] == pytest.approx(expected)


def test_eager_stages_take_a_threshold_of_the_papers_mass():
    tensors = [x.float() for x in stages.heavy_hitters(1024, 4, 2, "cpu", 64)]
    for config, threshold in ((PBSConfig(), 0.9), (PBSConfig.paper(), 0.7)):
        made = stages.Pipeline(*tensors, config)
        made.set_threshold(0.01 if config.mass == "block" else 0.7)
        assert pipeline._eager_inputs(made)[3] == threshold


def test_densities_of_the_paper_between_and_beyond_its_table():
    def at(num_tokens):
        return density_at(num_tokens, "paper")

    for num_tokens, density in PAPER_DENSITIES.items():
        assert at(num_tokens) == density
    assert at(11585) == pytest.approx((0.58 + 0.49) / 2, abs=1e-4)
    assert at(4096) == pytest.approx(0.67)
    assert at(524288) == pytest.approx(0.12)
    assert (at(64), at(2**24)) == (1.0, 0.05)


def test_densities_of_the_presets_between_and_beyond_their_table():
    """Those of the committed rows; below, as many keys a query as at 8192 tokens."""
    rows = read_rows(RESULTS / "pipeline_balanced_h100.csv")
    assert len(rows) == 6
    for row in rows:
        found = density_at(int(row["tokens"]), "balanced")
        assert found == pytest.approx(float(row["density"]), abs=3e-4)
    for num_tokens, density in DENSITIES.items():
        for settings in ("default", "balanced", "fast", "accurate"):
            assert density_at(num_tokens, settings) == density
        if 512 < num_tokens < 8192:
            assert density * num_tokens == pytest.approx(0.12 * 8192)
    (said,) = table_with({"512", "1048576"})
    assert {int(length): float(said[length]) for length in said if length != "tokens"} == DENSITIES
    assert density_at(11585, "default") == pytest.approx((0.12 + 0.07) / 2, abs=1e-4)
    assert density_at(524288, "default") == pytest.approx((0.018 + 0.01) / 2)
    lengths = [2**power for power in range(6, 25)]
    found = [density_at(num_tokens, "default") for num_tokens in lengths]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (1.0, 0.01)


def test_contestants_that_fail_are_named(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def fails():
        raise RuntimeError("no kernel\nfor this shape")

    kept = contestants.keep_running({"good": lambda: 1, "absent": None, "bad": fails})
    assert list(kept) == ["good"]
    assert capsys.readouterr().err == "bad is left out: no kernel for this shape\n"


@pytest.mark.parametrize("bench", ["pipeline", "cpu", "long", "prefill"])
def test_settings_that_there_are_not_are_told_in_one_line(bench, capsys):
    arguments = ["bench", bench, "--settings", "fast", "--permute-per", "query_head"]
    assert cli.main(arguments) == 2
    words = "--permute-per must be kv_head with --settings fast, got query_head"
    assert capsys.readouterr().err == f"pbs-attn bench: {words}\n"
    with pytest.raises(BenchError, match=r"--settings must be of default, .*, got quick"):
        name_of("quick")


def test_paper_is_still_a_choice_and_selection_is_none(capsys):
    assert cli.parse(["bench", "pipeline", "--settings", "paper"]).settings == "paper"
    with pytest.raises(SystemExit):
        cli.parse(["bench", "pipeline", "--selection", "paper"])
