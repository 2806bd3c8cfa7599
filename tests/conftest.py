import functools
import os

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config):
    """Divides the cores among the workers of pytest-xdist. Otherwise, each would start a thread for
    every core, and references on the CPU would take several times as long."""
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // num_workers))


def has_gpu():
    """Whether there is a GPU that a build with CUDA has kernels for. This build may have none."""
    if not torch.cuda.is_available():
        return False
    from pbs_attn._library import runs_on

    return runs_on(torch.cuda.get_device_capability())


def pytest_collection_modifyitems(config, items):
    skips = {}
    if not has_gpu():
        skips["gpu"] = pytest.mark.skip(reason="no CUDA GPU that there are kernels for")
    if not config.getoption("--slow"):
        skips["slow"] = pytest.mark.skip(reason="--slow is not given")
    for item in items:
        for marker, skip in skips.items():
            if marker in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def op_modules(monkeypatch):
    """`op_modules(model)` -> two lists that grow while a transformers model runs: the modules that
    run the op, and all modules that run, by name (or `label(name, module)`)."""
    import pbs_attn.transformers as integration

    attention = integration.attention
    hooks = []

    def watch(model, label=lambda name, module: name):
        running, ran_op, ran = [], [], []

        def enter(entered, *_):
            running.append(entered)
            ran.append(entered)

        def leave(*_):
            running.pop()

        for name, module in model.named_modules():
            entering = functools.partial(enter, label(name, module))
            hooks.append(module.register_forward_pre_hook(entering))
            hooks.append(module.register_forward_hook(leave, always_call=True))

        def spy(*args, **kwargs):
            ran_op.append(running[-1])
            return attention(*args, **kwargs)

        monkeypatch.setattr(integration, "attention", spy)
        return ran_op, ran

    yield watch
    for hook in hooks:
        hook.remove()


@pytest.fixture
def op_layers(op_modules):
    """`op_layers(model)` -> a list to which each layer that runs the op adds its layer index."""

    def watch(model):
        ran_op, _ = op_modules(model, lambda name, module: getattr(module, "layer_idx", None))
        return ran_op

    return watch
