"""docs/recipes.md: its files are run by its commands, each in a process of its own."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from doc_tables import ROOT
from tiny_model import SIZES, VOCABULARY, save_model

import pbs_attn
import pbs_attn.transformers

transformers = pytest.importorskip("transformers")

PAGE = (ROOT / "docs" / "recipes.md").read_text()
SECTIONS = dict(re.findall(r"^#{2,3} (.+?)\n(.*?)(?=^#{2,3} |\Z)", PAGE, re.M | re.S))
# The recipes whose files a recipe reads.
NEEDS = {"AOTInductor": ["torch.export"], "C++": ["AOTInductor", "TorchScript"]}
MODEL = "path/to/model"

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install 'pbs-attn[ruler]'",
)
# With transformers 4 a compiled prefill has a mask, as docs/transformers.md says.
needs_transformers_5 = pytest.mark.skipif(
    int(transformers.__version__.split(".")[0]) < 5, reason="the recipe is for transformers 5"
)


def blocks(language, text=PAGE):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def files():
    """name -> text, by the first line of each block."""
    found = {}
    for block in [block for kind in ("python", "cpp", "yaml") for block in blocks(kind)]:
        name = re.match(r"(?:#|//) (\w+\.\w+)\n", block)[1]
        assert name not in found, name
        found[name] = block
    return found


def command_of(section):
    (command,) = blocks("bash", SECTIONS[section])
    return command


def words(num_tokens):
    return " ".join(f"w{i}" for i in torch.randint(VOCABULARY, (num_tokens,)).tolist())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With the files of the page, and what it says that the user has."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, text in files().items():
        (folder / name).write_text(text)
    save_model(folder / MODEL, transformers.LlamaConfig(**SIZES))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / MODEL)
    tokenizer.eos_token = "w0"  # lm-eval begins each document with it
    tokenizer.save_pretrained(folder / MODEL)
    (folder / "prompt.txt").write_text(words(1536))
    documents = [json.dumps({"text": words(2500)}) for _ in range(2)]
    (folder / "documents.jsonl").write_text("\n".join(documents))
    return folder


def run(command, folder):
    """What a shell prints, with this Python and without GPU and network."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    options = {"capture_output": True, "text": True, "cwd": folder, "env": environment}
    done = subprocess.run(["bash", "-euc", command], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def recipe(folder):
    """Runs the commands of a section, once those of the sections that it needs have been run."""
    ran = {}

    def run_once(section):
        for needed in NEEDS.get(section, []):
            run_once(needed)
        if section not in ran:
            ran[section] = run(command_of(section), folder)
        return ran[section]

    return run_once


def test_every_file_is_run():
    commands = "\n".join(blocks("bash"))
    names = {name for name in files() if not re.search(rf"\b{re.escape(name)}\b", commands)}
    assert names == {"layer.py", "long_documents.yaml"}
    assert "from layer import Layer" in files()["save_export.py"]
    assert "--tasks long_documents --include_path ." in commands


@pytest.mark.parametrize(
    "section",
    [
        "torch.compile",
        "torch.export",
        pytest.param("AOTInductor", marks=needs_compiler),
        "TorchScript",
    ],
)
def test_recipe(recipe, section):
    """The files compare by themselves."""
    assert "assert" in SECTIONS[section]
    recipe(section)


@pytest.mark.slow  # torch's headers take half a minute to compile
@needs_compiler
@pytest.mark.skipif(torch.version.cuda is not None, reason="it is for a CPU build of torch")
def test_cpp(recipe):
    said = recipe("C++")
    assert said == "[2, 4, 1024, 64] equal\n"
    assert f"It prints `{said.strip()}`" in SECTIONS["C++"]


WITHOUT_IMPORT = """
import importlib.util
from pathlib import Path
import torch

loads = {
    "layer.pt2": lambda path: torch.export.load(path).module(),
    "layer.pt": torch.jit.load,
    "layer_aoti.pt2": torch._inductor.aoti_load_package,
}
q, (k, v) = torch.randn(1, 4, 300, 64), torch.randn(2, 1, 2, 300, 64)
for name, load in loads.items():
    try:
        load(name)(q, k, v)
    except RuntimeError:
        continue
    raise AssertionError(name)
torch.ops.load_library(Path(importlib.util.find_spec("pbs_attn").origin).parent / "libpbs.so")
for name, load in loads.items():
    assert load(name)(q, k, v).shape == q.shape
q.requires_grad_()
torch.jit.load("layer.pt")(q, k, v).sum().backward()
assert q.grad is None
"""


@needs_compiler
def test_without_the_import(recipe, folder):
    """No file finds the operators by itself, and the library alone does not refuse gradients."""
    for section in ("TorchScript", "AOTInductor"):
        recipe(section)
    (folder / "without_import.py").write_text(WITHOUT_IMPORT)
    run("python without_import.py", folder)


def test_files_leave_out_defaults(recipe, folder):
    recipe("torch.export")
    recipe("TorchScript")
    program = torch.export.load(folder / "layer.pt2")
    (node,) = [n for n in program.graph.nodes if n.target is torch.ops.pbs.attention.default]
    assert (len(node.args), dict(node.kwargs)) == (3, {"threshold": 0.01})
    names = [a.name for a in torch.ops.pbs.attention.default._schema.arguments]
    behind = names[names.index("threshold") + 1 :]
    assert len(behind) > 5
    code = torch.jit.load(str(folder / "layer.pt")).code
    assert "threshold=0.01" in code and not [name for name in behind if name in code]


def test_script_does_not_take_the_function():
    with pytest.raises(torch.jit.frontend.NotSupportedError):
        torch.jit.script(pbs_attn.attention)


@needs_transformers_5
def test_export_of_a_model(folder):
    """And a prompt shorter than min_tokens is refused."""
    assert command_of("A model of transformers") == "python export_model.py\n"
    shorter = """
exec(compile(open("export_model.py").read(), "export_model.py", "exec"))
try:
    program.module()(ids[:, :1000])
except Exception as error:
    assert "1024" in str(error), error
else:
    raise AssertionError("a short prompt was taken")
"""
    (folder / "export_shorter.py").write_text(shorter)
    run("python export_shorter.py", folder)


def routes_in(text):
    """(route, calls, reason) of each row of the table that routes() prints, sorted."""
    rows = re.findall(r"^pbs_attn +(\w+) +(\d+) +0 +(.+)$", text, re.M)
    return sorted((route, int(calls), reason) for route, calls, reason in rows)


@needs_lm_eval
def test_lm_eval(folder):
    """Two documents of 2500 tokens are two windows each, of 2048 tokens and less."""
    said = run(command_of("lm-eval"), folder)
    assert re.search(r"\|long_documents\|.*\|word_perplexity\|.*\|\s*\d+\.\d+\|", said)
    assert routes_in(said) == [("pbs", 8, "causal prefill")]


@needs_lm_eval
def test_batches_of_lm_eval(folder):
    """Scores of the shorter prompt depend on its padding with PBS, and not if dense; generated text
    never does."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def requests(kind, arguments):
        return [Instance(kind, {}, pair, nth) for nth, pair in enumerate(arguments)]

    texts = [words(num_tokens) for num_tokens in (1900, 1300)]
    scored = requests("loglikelihood", [(text[:-40], text[-40:]) for text in texts])
    asked = requests("generate_until", [(text, {"until": [], "max_gen_toks": 4}) for text in texts])
    scores, answers = {}, {}
    for name in ("sdpa", "pbs_attn"):
        for batch_size in (1, 2):
            pbs_attn.transformers.register(config=pbs_attn.PBSConfig(threshold=0.05))
            options = {"attn_implementation": name, "batch_size": batch_size, "device": "cpu"}
            model = HFLM(pretrained=str(folder / MODEL), **options)
            found = model.loglikelihood(scored, disable_tqdm=True)
            scores[name, batch_size] = torch.tensor([score for score, _ in found])
            answers[name, batch_size] = model.generate_until(asked, disable_tqdm=True)
    reasons = [count.reason for count in pbs_attn.transformers.routes() if count.route == "pbs"]
    assert "causal prefill of one sequence of a padded or packed batch" in reasons
    assert answers["pbs_attn", 1] == answers["pbs_attn", 2]
    dense, pbs = ((scores[name, 2] - scores[name, 1]).abs() for name in ("sdpa", "pbs_attn"))
    assert dense.max() < 1e-3 and pbs[0] < 1e-3
    assert pbs[1] > 0.1


@pytest.mark.parametrize(
    "argument",
    [
        'tp_plan="auto"',
        pytest.param(
            'distributed_config=DistributedConfig(tp_plan="auto")',
            marks=[pytest.mark.slow, needs_transformers_5],
        ),
    ],
)
def test_tensor_parallelism(folder, argument):
    """On two processes, beside one."""
    text = files()["parallel.py"]
    assert text.count('tp_plan="auto"') == 1
    text = text.replace('tp_plan="auto"', argument)
    imported = "from transformers.distributed import DistributedConfig\n"
    (folder / "parallel.py").write_text((imported if "Config(" in argument else "") + text)
    assert argument in SECTIONS["Tensor parallelism"]
    said = run(command_of("Tensor parallelism"), folder)
    steps = ("sdpa", 6, "a decode step has one query")
    assert routes_in(said) == [("pbs", 4, "causal prefill"), steps]
    logits, tokens = torch.load(folder / "parallel.pt")

    pbs_attn.transformers.register()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder / MODEL, attn_implementation="pbs_attn")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / MODEL)
    ids = tokenizer((folder / "prompt.txt").read_text(), return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits, atol=1e-3, rtol=1e-3)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)[0, -4:]
    assert torch.equal(tokens, expected)
