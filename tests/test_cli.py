"""The command `pbs-attn` itself: help without torch, the version, Ctrl-C, settings, and errors
before a model loads."""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_model import SIZES, save_model, save_text

from pbs_attn import PBSConfig, _library, cli
from pbs_attn._arguments import PRESETS, read_config
from pbs_attn._errors import DemoError

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
ENTRY = "import sys; from _pbs_attn_cli import main; sys.exit(main())"
BENCHES = ("kernel", "pipeline", "chunks", "serve", "prefill", "quality", "scores", "long", "cpu")
WITH_DEVICE = tuple(bench for bench in BENCHES if bench not in ("serve", "cpu"))


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def python(*arguments, **options):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), **options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a model, with a text of 1100 tokens in it."""
    folder = tmp_path_factory.mktemp("tiny")
    save_model(folder, transformers.LlamaConfig(**SIZES))
    save_text(folder / "text.txt", torch.randint(100, (1100,)).tolist())
    return folder


# Starting


def test_the_command_is_installed_with_the_package():
    text = (ROOT / "pyproject.toml").read_text()
    module, function = re.search(r'^pbs-attn = "(\w+):(\w+)"$', text, re.MULTILINE).groups()
    assert callable(getattr(importlib.import_module(module), function))
    assert f'py-modules = ["{module}"]' in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        ("--help",),
        ("demo", "--help"),
        ("plot", "--help"),
        ("bench", "--help"),
        *(("bench", bench, "--help") for bench in BENCHES),
        ("demo", "--tokens", "many"),
    ],
    ids=" ".join,
)
def test_torch_is_imported_for_a_command_alone(arguments):
    code = f"""
import sys
from _pbs_attn_cli import main
sys.argv = ["pbs-attn", *{arguments}]
try:
    main()
finally:
    print("torch" in sys.modules)
"""
    result = python("-c", code)
    assert result.returncode == (2 if "many" in arguments else 0), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout.splitlines()[-1] == "False"
    assert len(result.stdout + result.stderr) > 20


def test_importing_the_package_registers_the_operators():
    code = "import pbs_attn, torch; print(torch.ops.pbs.attention.default.name())"
    assert python("-c", code).stdout == "pbs::attention\n"


@pytest.mark.parametrize("start", [("-m", "pbs_attn"), ("-c", ENTRY)], ids=["-m", "script"])
def test_version(start):
    try:
        version = importlib.metadata.version("pbs-attn")
    except importlib.metadata.PackageNotFoundError:
        version = "of sources that are not installed"
    assert python(*start, "--version").stdout == f"pbs-attn {version}\n"


def test_a_library_that_is_missing_is_told_in_one_line():
    code = f"import pathlib; pathlib.Path.exists = lambda path: False; {ENTRY}"
    result = python("-c", code, "demo")
    assert result.returncode == 2
    assert re.fullmatch(
        r"pbs-attn demo: libpbs.so must lie in .* found neither: .*\n", result.stderr
    )


# Ctrl-C


def with_sigint():
    """Restores SIGINT, which a child of a shell's background job would ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


INTERRUPTING = """
import importlib.abc, os, signal, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("demo", "pbs_attn.cli"),
        ("demo", "torch"),
        ("demo", "numpy"),
        ("demo", "transformers.models.llama.configuration_llama"),  # becomes another error there
        ("bench kernel", "pbs_attn.bench.kernel"),
        ("bench quality", "torch"),
        ("plot rates x.csv x.png", "pbs_attn.plot"),
    ],
)
def test_ctrl_c_during_imports(command, module, tiny):
    arguments = command.split()
    if command == "demo":
        arguments += ["--model", tiny, "--text", tiny / "text.txt", "--tokens", "1024"]
    code = INTERRUPTING.format(module=module) + ENTRY
    result = python("-c", code, *arguments, preexec_fn=with_sigint)
    assert result.returncode == 130, result.stderr
    *before, last = result.stderr.splitlines()
    assert last == f"pbs-attn {arguments[0]}: interrupted"
    assert all(line.startswith("loading ") for line in before)


@pytest.mark.parametrize(
    ("start", "arguments", "sign"),
    [
        (("-c", ENTRY), ("demo",), "run 1 of"),
        (("-m", "pbs_attn"), ("demo",), "run 1 of"),
        (("-c", ENTRY), ("bench", "kernel", "--device", "cpu", "--csv", "", "--picture", ""), "%"),
    ],
)
def test_ctrl_c_at_work(start, arguments, sign, tiny, tmp_path):
    """As soon as the first bar shows."""
    if arguments[0] == "demo":
        files = "--model", str(tiny), "--text", str(tiny / "text.txt"), "--continue", "2000"
        arguments = *arguments, *files, "--tokens", "1024"
    process = subprocess.Popen(
        [sys.executable, *start, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment(),
        preexec_fn=with_sigint,
    )
    seen = ""
    while sign not in seen:
        seen += process.stderr.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert err.endswith(f"pbs-attn {arguments[0]}: interrupted\n")
    assert "Traceback" not in err
    assert out == ""


# Help


def subparsers():
    found, todo = [], [cli.make_parser()]
    while todo:
        parser = todo.pop()
        found.append(parser)
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                todo += action.choices.values()
    return found


@pytest.mark.parametrize("parser", subparsers(), ids=lambda parser: parser.prog)
def test_help_names_options_that_are_there(parser):
    named = set(re.findall(r"(?<!\w)--[a-z][a-z-]+", parser.format_help()))
    if parser.prog == "pbs-attn plot":
        named -= {"--heads-csv"}  # of the bench that made the rows
    assert named <= set(parser._option_string_actions), parser.prog
    assert "(default: )" not in parser.format_help()


# Settings


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ((), PBSConfig()),
        (("--settings", "default"), PBSConfig()),
        (("--settings", "fast"), PBSConfig.fast()),
        (("--settings", "accurate"), PBSConfig.accurate()),
        (("--settings", "paper"), PBSConfig.paper()),
        (
            ("--num-samples", "4", "--settings", "fast"),
            PBSConfig(select_per="kv_head", threshold=0.01, num_samples=4),
        ),
        (
            ("--settings", "accurate", "--score", "mean", "--mass", "causal"),
            PBSConfig(score="mean", mass="causal", num_samples=32),
        ),
        (
            ("--select-per", "kv_head", "--window", "0", "--dense-tail", "1"),
            PBSConfig(select_per="kv_head", window=0, dense_tail=1),
        ),
        (("--num-heavy", "all", "--threshold", "0.05"), PBSConfig(num_heavy=None, threshold=0.05)),
        (
            ("--settings", "paper", "--kv-block-size", "64", "--threshold", "0.8"),
            dataclasses.replace(PBSConfig.paper(), kv_block_size=64, threshold=0.8),
        ),
    ],
)
def test_single_options_change_a_preset(arguments, config):
    args = cli.parse(["demo", *arguments])
    assert read_config(args, args.settings) == config


def test_a_change_that_does_not_fit_the_preset_is_refused(capsys):
    assert cli.main(["demo", "--settings", "paper", "--mass", "block"]) == 2
    assert 'mass must be "earlier" or "causal" with score "mean"' in capsys.readouterr().err


def test_quality_starts_from_the_same_presets():
    from pbs_attn.bench import quality

    assert PRESETS.items() <= quality.SETTINGS.items()
    args = cli.parse(["bench", "quality", "--settings", "fast", "--num-samples", "4"])
    assert args.settings == ["fast"]
    assert read_config(args) == PBSConfig(num_samples=4)


# Refused before a model loads


@pytest.mark.parametrize(
    ("command", "file", "message"),
    [
        ("demo", "--text no/file", "text must be a readable UTF-8 file, got no/file"),
        ("demo", "--text short.txt", "text must give at least 1024 tokens, got 50"),
        ("demo", "--csv folder", "csv must be a file in a folder that can be written, got folder"),
        ("demo", "--output folder.png", "output must be a file in a folder that can be written"),
        ("demo", "--model ./no/folder", "model must be a folder that exists where it is a path"),
        ("bench prefill", "--text no/file", "text must be a readable UTF-8 file, got no/file"),
        ("bench prefill", "--text short.txt", "short.txt must have 1024 tokens, got 50"),
        ("bench prefill", "--csv folder", "folder must be a file that can be written"),
        ("bench prefill", "--model /no/folder", "model must be a folder that exists where"),
        ("bench quality", "--texts no/file", "text must be a readable UTF-8 file, got no/file"),
        ("bench quality", "--texts short.txt", "short.txt must have 2048 tokens, got 50"),
        ("bench quality", "--csv folder", "folder must be a file that can be written"),
        ("bench quality", "--heads-csv folder", "folder must be a file that can be written"),
        ("bench quality", "--model no/fol/der", "model must be a folder that exists where"),
    ],
)
def test_files_are_refused_before_weights_are_read(
    command, file, message, tiny, tmp_path, monkeypatch, capsys
):
    def read_weights(*args, **options):
        raise AssertionError("the weights were read first")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read_weights)
    monkeypatch.chdir(tmp_path)
    save_text(tmp_path / "short.txt", range(50))
    for folder in ("folder", "folder.png"):
        (tmp_path / folder).mkdir()
    tokens = "2048" if command.endswith("quality") else "1024"
    arguments = [*command.split(), "--model", str(tiny), "--tokens", tokens, "--device", "cpu"]
    assert cli.main([*arguments, *file.split()]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"pbs-attn {arguments[0]}: {message}")


def test_a_threshold_needs_a_model(capsys):
    assert cli.main(["bench", "prefill", "--threshold", "0.1", "--device", "cpu"]) == 2
    assert "--threshold must be used with --model" in capsys.readouterr().err


# Packages and GPU support that are missing


def without(monkeypatch, missing):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == missing else find(name)
    )


def test_plot_without_matplotlib_names_the_extra(monkeypatch, capsys):
    without(monkeypatch, "matplotlib")
    rows = ROOT / "benchmarks" / "results" / "kernel_h200.csv"
    assert cli.main(["plot", "rates", str(rows), "x.png"]) == 2
    assert capsys.readouterr().err == (
        "pbs-attn plot: the plot needs matplotlib, which is not installed: "
        "pip install 'pbs-attn[plot]'\n"
    )


@pytest.mark.parametrize(("command", "extra"), [("demo", "demo"), ("bench quality", "bench")])
def test_models_without_gguf_name_the_extra_of_the_command(command, extra, monkeypatch, tmp_path):
    without(monkeypatch, "gguf")
    model = tmp_path / "model.gguf"
    model.touch()
    args = cli.parse([*command.split(), "--model", str(model), "--device", "cpu"])
    with pytest.raises(DemoError, match=rf"gguf.*'pbs-attn\[{extra}\]'"):
        args.run(args)


@pytest.mark.parametrize("command", ["demo", *(f"bench {bench}" for bench in WITH_DEVICE)])
def test_gpu_support_that_is_left_out_is_said(command, monkeypatch, capsys):
    line = "the GPU is idle: build again with nvcc"
    monkeypatch.setattr(_library, "missing_gpu_support", lambda: line, raising=False)

    def load(*args, **options):
        raise DemoError("far enough")

    places = [
        f"bench.{bench}.RowFile" for bench in ("kernel", "pipeline", "chunks", "scores", "long")
    ]
    for place in ("demo.read_text", "bench.prompts.read_text", *places):
        monkeypatch.setattr(f"pbs_attn.{place}", load)
    monkeypatch.setattr("pbs_attn.bench.prefill._register", load)
    arguments = [*command.split(), "--device"]
    for device, expected in (("auto", [line]), ("cpu", [])):
        assert cli.main([*arguments, device]) == 2
        *said, last = capsys.readouterr().err.splitlines()
        assert said == expected
        assert last.endswith("far enough")
