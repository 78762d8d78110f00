"""PyTorch's own database of module tests, with our classes in the place of torch's.

`module_db` holds, for each module of torch.nn, constructor arguments, inputs, a reference
function and the mistakes that must raise. What PyTorch's suite checks of every entry is checked
here of ours, in training and evaluation mode and for every backend that a CPU has.
"""

import copy
import io
import pickle

import pytest
import torch
from tolerances import FLOOR
from torch.autograd import gradcheck, gradgradcheck
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_utils import freeze_rng_state
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

import fusedrnn

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
# The second entry of torch's RNN, GRU and LSTM, if any, has the same class: entries are listed.
ENTRIES = [info for info in module_db if info.name in {f"nn.{name}" for name in NAMES}]

every_entry = pytest.mark.parametrize("info", ENTRIES, ids=lambda info: info.name)
modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
backends = pytest.mark.parametrize("backend", ["auto", "reference"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def samples(info, dtype, training, *, requires_grad=False, device="cpu"):
    options = {"requires_grad": requires_grad, "training": training}
    found = info.module_inputs_func(info, device=device, dtype=dtype, **options)
    if info.name in ("nn.RNN", "nn.GRU"):
        # Packed input is behind a switch, for PyTorch's own tests of forward and backward.
        found = info.module_inputs_func(
            info, device=device, dtype=dtype, **options, with_packed_sequence=True
        )
    assert found
    return found


def build(info, sample, *, backend=None, torchs=False, device="cpu", dtype=torch.float64):
    kind = info.module_cls if torchs else getattr(fusedrnn, info.module_cls.__name__)
    arguments = sample.constructor_input
    extra = {} if torchs else {"backend": backend}
    return kind(*arguments.args, **arguments.kwargs, **extra, device=device, dtype=dtype)


def call(module, sample):
    return module(*sample.forward_input.args, **sample.forward_input.kwargs)


def floating(outputs):
    return [
        t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]


def assert_near(found, expected, dtype):
    """To FLOOR ulps of values of order one: torch's kernel and ours round differently."""
    for a, b in zip(floating(found), floating(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=0, atol=2 * FLOOR[dtype] * torch.finfo(dtype).eps)


def test_the_database_has_every_module():
    assert [f"nn.{name}" for name in sorted(NAMES)] == sorted(info.name for info in ENTRIES)
    for info in ENTRIES:
        assert set(info.dtypes) == {torch.float32, torch.float64}


@every_entry
@modes
@backends
@dtypes
def test_outputs_and_gradients(info, training, backend, dtype):
    for sample in samples(info, dtype, training, requires_grad=True):
        torchs = build(info, sample, torchs=True, dtype=dtype).train(training)
        ours = build(info, sample, backend=backend, dtype=dtype).train(training)
        ours.load_state_dict(torchs.state_dict())
        with freeze_rng_state():
            expected = call(torchs, sample)
        with freeze_rng_state():
            found = call(ours, sample)
        assert tree_flatten(found)[1] == tree_flatten(expected)[1]  # a tuple is not a list
        assert_near(found, expected, dtype)
        leaves = [t for t in floating(sample.forward_input.args) if t.requires_grad]
        cotangents = [torch.randn_like(t) for t in floating(expected)]
        pairs = [
            torch.autograd.grad(floating(out), [*leaves, *module.parameters()], cotangents)
            for out, module in ((found, ours), (expected, torchs))
        ]
        for a, b in zip(*pairs, strict=True):
            # A gradient sums over time, batch and units: a few times more terms.
            atol = 16 * FLOOR[dtype] * torch.finfo(dtype).eps
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


@every_entry
@modes
@backends
def test_the_databases_own_reference(info, training, backend):
    """No batch dimension, against the same module given a batch of one."""
    count = 0
    for sample in samples(info, torch.float64, training):
        packed = isinstance(sample.forward_input.args[0], torch.nn.utils.rnn.PackedSequence)
        if sample.reference_fn is None or packed:
            continue
        module = build(info, sample, backend=backend).train(training)
        arguments = copy.deepcopy(sample.forward_input)
        expected = sample.reference_fn(module, *arguments.args, **arguments.kwargs)
        assert_near(call(module, sample), expected, torch.float64)
        count += 1
    assert count


@every_entry
@modes
@backends
@pytest.mark.parametrize("order", [1, 2], ids=["grad", "gradgrad"])
def test_gradcheck(info, training, backend, order):
    check = gradcheck if order == 1 else gradgradcheck
    assert info.supports_gradgrad
    for number, sample in enumerate(samples(info, torch.float64, training, requires_grad=True)):
        # The second order is slow: a third of the samples, another third in the other mode.
        if order == 2 and number % 3 != training and number > 2:
            continue
        torch.manual_seed(number + 7)
        module = build(info, sample, backend=backend).train(training)
        values, spec = tree_flatten(sample.forward_input.args)
        parameters = dict(module.named_parameters())
        moving = [k for k, v in enumerate(values) if torch.is_tensor(v) and v.requires_grad]
        leaves = [*(values[k] for k in moving), *parameters.values()]
        shapes = [leaf.shape for leaf in leaves]

        def function(vector, module=module, values=values, spec=spec, parameters=parameters,
                     moving=moving, shapes=shapes):  # fmt: skip
            """One vector in, one out: a random direction then moves every leaf at once."""
            pieces = iter(vector.split([shape.numel() for shape in shapes]))
            tensors = iter([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)])
            own = [next(tensors) if k in moving else v for k, v in enumerate(values)]
            named = dict(zip(parameters, tensors, strict=True))
            outputs = torch.func.functional_call(module, named, tree_unflatten(own, spec))
            return torch.cat([t.flatten() for t in floating(outputs)])

        vector = torch.cat([leaf.detach().flatten() for leaf in leaves]).requires_grad_()
        assert check(function, vector, nondet_tol=info.gradcheck_nondet_tol, fast_mode=True)


@every_entry
@modes
@dtypes
def test_pickling(info, training, dtype):
    for sample in samples(info, dtype, training):
        module = build(info, sample, backend="reference", dtype=dtype).train(training)
        expected = call(module, sample)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        copies = [
            pickle.loads(pickle.dumps(module)),
            torch.load(buffer, weights_only=False),
            copy.deepcopy(module),
        ]
        for other in copies:
            assert type(other) is type(module)
            assert other.training == training
            assert other.backend == "reference"
            assert repr(other) == repr(module)
            for (name, a), (other_name, b) in zip(
                module.named_parameters(), other.named_parameters(), strict=True
            ):
                assert name == other_name
                assert torch.equal(a, b)
                assert a is not b
            for a, b in zip(floating(call(other, sample)), floating(expected), strict=True):
                assert torch.equal(a, b)


@every_entry
@modes
def test_repr_is_torchs(info, training):
    for sample in samples(info, torch.float32, training):
        ours, torchs = build(info, sample), build(info, sample, torchs=True)
        assert repr(ours) == repr(torchs)
        assert str(ours) == str(torchs)


@every_entry
@modes
@backends
def test_arguments_are_left_alone(info, training, backend):
    for sample in samples(info, torch.float64, training):
        module = build(info, sample, backend=backend).train(training)
        tensors = [t for t in tree_leaves(sample.forward_input.args) if torch.is_tensor(t)]
        tensors += list(module.parameters())
        before = [(t.clone(), t._version) for t in tensors]
        outputs = floating(call(module, sample))
        for t, (value, version) in zip(tensors, before, strict=True):
            assert torch.equal(t, value)
            assert t._version == version
        kept = [t.untyped_storage().data_ptr() for t in tensors]
        assert not any(o.untyped_storage().data_ptr() in kept for o in outputs)


@every_entry
@modes
@backends
def test_non_contiguous_tensors(info, training, backend):
    """Inputs and cotangents with strides of their own give the same gradients."""

    def spread(tensor):
        if not torch.is_tensor(tensor) or not tensor.is_floating_point() or tensor.dim() == 0:
            return tensor
        wide = torch.stack([tensor, tensor], dim=-1).detach()[..., 0]
        return wide.requires_grad_(tensor.requires_grad)

    for sample in samples(info, torch.float64, training, requires_grad=True):
        if isinstance(sample.forward_input.args[0], torch.nn.utils.rnn.PackedSequence):
            continue
        module = build(info, sample, backend=backend).train(training)
        results = []
        for args in (sample.forward_input.args, tree_map(spread, sample.forward_input.args)):
            torch.manual_seed(1)
            outputs = floating(module(*args))
            cotangents = [torch.randn_like(o) for o in outputs]
            if results:
                assert not any(t.is_contiguous() for t in floating(args))
                cotangents = [spread(c) for c in cotangents]
            leaves = [t for t in floating(args) if t.requires_grad]
            gradients = torch.autograd.grad(outputs, [*leaves, *module.parameters()], cotangents)
            results.append([*outputs, *gradients])
        assert_near(results[1], results[0], torch.float64)


@every_entry
@dtypes
def test_factory_arguments(info, dtype):
    """device= and dtype= reach every parameter, and the meta device allocates nothing."""
    for sample in samples(info, dtype, True):
        for device in ("cpu", "meta"):
            module = build(info, sample, device=device, dtype=dtype)
            assert all(p.device.type == device for p in module.parameters())
            assert all(p.dtype == dtype for p in module.parameters())
        kind = getattr(fusedrnn, info.module_cls.__name__)
        arguments = sample.constructor_input
        skipped = torch.nn.utils.skip_init(kind, *arguments.args, **arguments.kwargs, dtype=dtype)
        assert all(p.device.type == "cpu" and p.dtype == dtype for p in skipped.parameters())


@every_entry
@modes
@backends
def test_meta_device_gives_shapes(info, training, backend):
    for sample in samples(info, torch.float32, training):
        if isinstance(sample.forward_input.args[0], torch.nn.utils.rnn.PackedSequence):
            continue
        module = build(info, sample, backend=backend, dtype=torch.float32).train(training)
        expected = floating(call(module, sample))
        args = tree_map(
            lambda t: t.to("meta") if torch.is_tensor(t) else t, sample.forward_input.args
        )
        for a, b in zip(floating(module.to("meta")(*args)), expected, strict=True):
            assert a.device.type == "meta"
            assert a.shape == b.shape
            assert a.dtype == b.dtype


@every_entry
@modes
def test_casting_the_module(info, training):
    """.to(dtype), .half() and .double() leave a module that runs in that dtype."""
    for sample in samples(info, torch.float64, training)[:4]:
        module = build(info, sample, dtype=torch.float32).train(training)
        for name in ("bfloat16", "half", "float", "double"):
            assert getattr(module, name)() is module
        assert_near(call(module, sample), call(module, sample), torch.float64)


@every_entry
@modes
def test_initialisation_from_a_seed(info, training):
    """Same names, same order, same numbers drawn from the same generator."""
    for sample in samples(info, torch.float64, training):
        torch.manual_seed(3)
        torchs = build(info, sample, torchs=True)
        after = torch.get_rng_state()
        torch.manual_seed(3)
        ours = build(info, sample)
        assert torch.equal(torch.get_rng_state(), after)
        pairs = zip(ours.state_dict().items(), torchs.state_dict().items(), strict=True)
        for (name, a), (torch_name, b) in pairs:
            assert name == torch_name
            assert torch.equal(a, b)


ERRORS = [info for info in ENTRIES if info.module_error_inputs_func is not None]


@pytest.mark.parametrize("info", ERRORS, ids=lambda info: info.name)
@modes
@backends
@dtypes
def test_errors(info, training, backend, dtype):
    mistakes = info.module_error_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=False, training=training
    )
    kind = getattr(fusedrnn, info.module_cls.__name__)
    assert mistakes
    for mistake in mistakes:
        sample = mistake.module_error_input
        arguments = sample.constructor_input
        if mistake.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(mistake.error_type, match=mistake.error_regex):
                kind(*arguments.args, **arguments.kwargs)
            continue
        module = kind(*arguments.args, **arguments.kwargs, backend=backend).train(training)
        args = sample.forward_input
        # The type is torch's. The words are ours, except where torch's own cell runs the step.
        words = mistake.error_regex if issubclass(kind, torch.nn.RNNCellBase) else "expected .*got"
        words = "expected .*got" if backend == "reference" else words
        with pytest.raises(mistake.error_type, match=words):
            module(*args.args, **args.kwargs)
