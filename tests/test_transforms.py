"""Derivatives, which no operator has, are refused in every transform. torch.vmap equals a loop."""

import pytest
import torch
from cases import operator_calls
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import pbs_attn
from pbs_attn._autograd import is_differentiated
from pbs_attn.ops import OPERATORS

NO_BACKWARD = "has no backward: inputs must not require grad in grad mode, got one that does"
NO_TANGENT = "has no derivative: inputs must not carry a forward-mode tangent, got one that does"


def operator_call(name):
    """A function of the tensors of a small call, and these tensors."""
    q = torch.randn(2, 4, 150, 64)
    k, v = torch.randn(2, 2, 2, 160, 64)
    config = pbs_attn.PBSConfig(
        block_size=32, segment_size=64, num_heavy=8, threshold=0.05, window=0, dense_tail=0
    )
    tensors, options = operator_calls(q, k, v, config)[name]

    def call(*tensors):
        found = getattr(torch.ops.pbs, name)(*tensors, **options)
        return found if isinstance(found, tuple) else (found,)

    return call, tuple(tensors.values())


def scalar_of(name, position=0):
    """The sum of what an operator gives, as a function of one of its tensors; and that tensor."""
    call, tensors = operator_call(name)

    def scalar(x):
        found = call(*tensors[:position], x, *tensors[position + 1 :])
        return torch.stack([part.float().sum() for part in found]).sum()

    return scalar, tensors[position]


def no_grad(call):
    with torch.no_grad():
        return call()


def inference(call):
    with torch.inference_mode():
        return call()


def dual(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, x))


def in_pairs(f, x):
    return vmap(f)(torch.stack([x, x]))


def scaled(f, x):
    """A function of one number, so that a Jacobian is small."""
    return lambda factor: f(factor * x)


def chain(f, x):
    """Tests a leaf that requires grad, and a tensor computed from it."""
    leaf = x.clone().requires_grad_()
    return f(leaf * 2)


REFUSED = {
    "chain": (NO_BACKWARD, chain),
    "grad": (NO_BACKWARD, lambda f, x: grad(f)(x)),
    "vjp": (NO_BACKWARD, lambda f, x: vjp(f, x)),
    "jacrev": (NO_BACKWARD, lambda f, x: jacrev(f)(x)),
    "hessian": (NO_BACKWARD, lambda f, x: hessian(scaled(f, x))(torch.ones(1))),
    "vmap of grad": (NO_BACKWARD, lambda f, x: in_pairs(grad(f), x)),
    "grad of vmap": (NO_BACKWARD, lambda f, x: grad(lambda y: in_pairs(f, y).sum())(x)),
    "vmap of chain": (NO_BACKWARD, lambda f, x: chain(lambda y: in_pairs(f, y), x)),
    "grad in no_grad": (NO_BACKWARD, lambda f, x: no_grad(lambda: grad(f)(x))),
    "grad in inference": (NO_BACKWARD, lambda f, x: inference(lambda: grad(f)(x))),
    "jvp": (NO_TANGENT, lambda f, x: jvp(f, (x,), (x,))),
    "jacfwd": (NO_TANGENT, lambda f, x: jacfwd(scaled(f, x))(torch.ones(1))),
    "linearize": (NO_TANGENT, lambda f, x: linearize(f, x)),
    "jvp of vmap": (NO_TANGENT, lambda f, x: jvp(lambda y: in_pairs(f, y), (x,), (x,))),
    "vmap of jvp": (NO_TANGENT, lambda f, x: in_pairs(lambda y: jvp(f, (y,), (y,))[1], x)),
    "jvp inside grad": (
        NO_TANGENT,
        lambda f, x: grad(lambda y: jvp(f, (x,), (x,))[1] * y.sum())(x),
    ),
    "grad inside jvp": (
        NO_TANGENT,
        lambda f, x: jvp(lambda y: grad(lambda z: f(y) * z.sum())(x), (x,), (x,)),
    ),
    "jvp in no_grad": (NO_TANGENT, lambda f, x: no_grad(lambda: jvp(f, (x,), (x,)))),
    "no_grad in jvp": (NO_TANGENT, lambda f, x: jvp(lambda y: no_grad(lambda: f(y)), (x,), (x,))),
    "jvp in inference": (NO_TANGENT, lambda f, x: inference(lambda: jvp(f, (x,), (x,)))),
    "dual": (NO_TANGENT, dual),
    "dual in no_grad": (NO_TANGENT, lambda f, x: no_grad(lambda: dual(f, x))),
    "vmap of dual": (NO_TANGENT, lambda f, x: dual(lambda y: in_pairs(f, y), x)),
}


@pytest.mark.parametrize("transform", REFUSED)
@pytest.mark.parametrize("name", OPERATORS)
def test_derivatives_are_refused(name, transform):
    message, differentiate = REFUSED[transform]
    with pytest.raises(RuntimeError, match=f"pbs::{name} {message}"):
        differentiate(*scalar_of(name))


@pytest.mark.parametrize("name", OPERATORS)
def test_derivatives_are_refused_for_every_tensor(name):
    _, tensors = operator_call(name)
    for position, tensor in enumerate(tensors):
        if tensor.is_floating_point():
            for transform in ("grad", "jvp", "dual"):
                message, differentiate = REFUSED[transform]
                with pytest.raises(RuntimeError, match=message):
                    differentiate(*scalar_of(name, position))


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("transform", ["grad", "jvp", "dual", "jvp of vmap"])
def test_derivatives_are_refused_when_compiled(name, transform):
    message, differentiate = REFUSED[transform]
    scalar, x = scalar_of(name)
    for compiled in (
        lambda: torch.compile(lambda y: differentiate(scalar, y), backend="aot_eager")(x),
        lambda: differentiate(torch.compile(scalar, backend="aot_eager"), x),
    ):
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=message):
            compiled()


def constant(f, x, y):
    return f(y.detach()) + 0 * y.sum()


# Modes in which f(x) is computed without a derivative that would have to flow through it.
ALLOWED = {
    "grad of another": lambda f, x: grad(lambda y: f(x) * y.sum())(torch.ones(1))[0],
    "jvp of another": lambda f, x: jvp(lambda y: f(x) * y.sum(), *[(torch.ones(1),)] * 2)[1],
    "grad of a constant": lambda f, x: vjp(lambda y: constant(f, x, y), x)[0],
    "jvp of a constant": lambda f, x: jvp(lambda y: constant(f, x, y), (x,), (x,))[0],
    "no_grad in grad": lambda f, x: vjp(lambda y: no_grad(lambda: f(y)) + 0 * y.sum(), x)[0],
    "chain in no_grad": lambda f, x: no_grad(lambda: chain(f, x / 2)),
    "grad of another in no_grad": lambda f, x: no_grad(
        lambda: chain(lambda z: grad(lambda y: f(z) * y.sum())(torch.ones(1))[0], x / 2)
    ),
    "plain beside a dual": lambda f, x: dual(lambda y: f(x) + 0 * y.sum(), x),
    "vmap": lambda f, x: in_pairs(f, x)[0],
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@pytest.mark.parametrize("transform", ALLOWED)
@pytest.mark.parametrize("name", OPERATORS)
def test_what_is_not_differentiated_works(name, transform):
    scalar, x = scalar_of(name)
    want = scalar(x)
    found = ALLOWED[transform](scalar, x)
    torch.testing.assert_close(found.detach(), want)


@pytest.mark.parametrize("transform", [*REFUSED, *ALLOWED])
def test_is_differentiated_agrees(transform):
    """The function that decides outside of operators looks through all levels at once."""
    answers = []

    def ask(x):
        answers.append(is_differentiated(torch.ones(1), x))
        return x.sum()

    _, differentiate = REFUSED.get(transform, (None, ALLOWED.get(transform)))
    differentiate(ask, torch.randn(3))
    # linearize calls once without tangents.
    assert any(answers) == (transform in REFUSED)
    assert is_differentiated(torch.ones(1)) is False


def test_is_differentiated_where_forward_mode_is_off():
    x = torch.randn(3)
    with forward_ad.dual_level(), forward_ad._set_fwd_grad_enabled(False):
        assert not is_differentiated(forward_ad.make_dual(x, x))
    with forward_ad.dual_level():
        x = forward_ad.make_dual(x, x)
        with torch.inference_mode():  # torch drops tangents there
            assert not is_differentiated(x)


def test_is_differentiated_breaks_no_graph():
    def f(x):
        return x + 1 if is_differentiated(x) else x + 2

    x = torch.zeros(3)
    for function, argument, want in (
        (f, x, 2),
        (f, x.clone().requires_grad_(), 1),
        (lambda x: jvp(f, (x,), (x,))[0], x, 1),
        (lambda x: grad(lambda y: f(y).sum())(x) + vjp(f, x)[0], x, 2),
        (torch.no_grad()(vmap(f)), x, 2),
        (lambda x: dual(f, x), x, 1),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert compiled(argument).tolist() == [want] * 3


# vmap


@pytest.fixture
def no_fallback():
    """The fallback of torch, a loop with a warning, is an error."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


SIZE = 3
IN_DIMS = {
    "first": lambda n, ndim: 0,
    "second": lambda n, ndim: 1,
    "last": lambda n, ndim: -1,
    "all kinds": lambda n, ndim: (n + 1) % (ndim + 1),
    "some": lambda n, ndim: (1, None)[n % 2],
    "one": lambda n, ndim: None if n else 2,
}


def vmapped(tensor, in_dim):
    """A tensor with one more dimension, of SIZE, whose slices differ."""
    if in_dim is None:
        return tensor
    return torch.stack([tensor.roll(shift, 2) for shift in range(SIZE)]).movedim(0, in_dim)


def loop(call, tensors, in_dims):
    """One call per slice, with slices as the operators take them."""
    results = []
    for n in range(SIZE):
        slices = [
            t if d is None else t.select(d, n).contiguous()
            for t, d in zip(tensors, in_dims, strict=True)
        ]
        results.append(call(*slices))
    return tuple(map(torch.stack, zip(*results, strict=True)))


def assert_same(found, want):
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", IN_DIMS)
@pytest.mark.parametrize("name", OPERATORS)
def test_vmap_is_a_loop(name, kind, no_fallback, recwarn):
    call, tensors = operator_call(name)
    in_dims = tuple(IN_DIMS[kind](n, tensor.dim()) for n, tensor in enumerate(tensors))
    inputs = [vmapped(tensor, in_dim) for tensor, in_dim in zip(tensors, in_dims, strict=True)]
    want = loop(call, inputs, in_dims)
    assert torch.is_grad_enabled()
    assert_same(vmap(call, in_dims)(*inputs), want)
    assert_same(vmap(call, in_dims, chunk_size=2)(*inputs), want)
    moved = vmap(call, in_dims, out_dims=-1)(*inputs)
    assert_same([out.movedim(-1, 0) for out in moved], want)
    assert not recwarn.list


@pytest.mark.parametrize("name", OPERATORS)
def test_nested_vmap_is_two_loops(name, no_fallback):
    call, tensors = operator_call(name)
    first, *others = tensors
    grid = torch.stack([torch.stack([first.roll(a + b, 2) for a in (0, 3)]) for b in (0, 1, 2)])
    found = vmap(vmap(lambda x: call(x, *others)), in_dims=0, out_dims=1)(grid)
    for b in range(3):
        for a in range(2):
            assert_same([part[a, b] for part in found], call(grid[b, a], *others))


@pytest.mark.parametrize("name", OPERATORS)
def test_vmap_compiles(name, no_fallback):
    call, tensors = operator_call(name)
    inputs = [vmapped(tensor, 0) for tensor in tensors]
    compiled = torch.compile(vmap(call), fullgraph=True, backend="aot_eager")
    assert_same(compiled(*inputs), loop(call, inputs, (0,) * len(inputs)))


def test_vmap_under_autocast(no_fallback):
    call, tensors = operator_call("attention")
    inputs = [vmapped(tensor, 0) for tensor in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(vmap(call)(*inputs), loop(call, inputs, (0, 0, 0)))


def test_errors_under_vmap_are_the_operators_own():
    call, (q, k, v) = operator_call("attention")
    with pytest.raises(RuntimeError, match=r"q must have 4 dimensions .*, got 3"):
        vmap(call)(q, k, v)
    with pytest.raises(RuntimeError, match="k must have size 4 in dimension 0"):
        vmap(call, (0, None, None))(torch.stack([q, q]), k[:1], v[:1])
