"""NaN and overflow, long sequences, memory that runs out, threads, processes, checkpoints."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch
from tolerances import GRADIENTS32
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fusedrnn
from fusedrnn import op
from fusedrnn.backends.triton import matmul_precision
from fusedrnn.call import Masks, Operands, Spec

T, B, I, H = 6, 4, 3, 5
each_cell = pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
each_backend = pytest.mark.parametrize("backend", ["aten", "loop", "reference"])


def tensors(result):
    output, final = result
    return [output, *(final if isinstance(final, tuple) else (final,))]


@each_backend
@each_cell
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_stay_in_their_row(name, backend, poison):
    module = getattr(fusedrnn, name)(I, H, 2, bidirectional=True, backend=backend)
    lengths = torch.tensor([6, 4, 6, 2])
    clean = torch.randn(T, B, I)
    dirty = clean.clone()
    dirty[2, 1] = poison
    others = [0, 2, 3]
    for options in ({}, {"lengths": lengths}):
        one, two = tensors(module(clean, **options)), tensors(module(dirty, **options))
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a[:, others], b[:, others])
        if poison != poison:
            assert two[0][:4, 1].isnan().all()  # both directions, two layers
    d_output = torch.randn(T, B, 2 * H)
    gradients = []
    for x in (clean, dirty):
        x.requires_grad_()
        gradients.append(torch.autograd.grad(module(x)[0], x, d_output)[0])
    assert torch.equal(gradients[0][:, others], gradients[1][:, others])


@each_backend
@each_cell
def test_nan_and_infinity_are_torchs(name, backend):
    module = getattr(fusedrnn, name)(I, H, backend=backend)
    torchs = getattr(nn, name)(I, H)
    torchs.load_state_dict(module.state_dict())
    x = torch.randn(T, B, I)
    x[1, 0, 0], x[2, 1, 1], x[3, 2, 2] = float("inf"), -float("inf"), float("nan")
    for one, other in zip(tensors(module(x)), tensors(torchs(x)), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_overflow_is_torchs(backend, dtype):
    module = fusedrnn.RNN(1, 2, nonlinearity="relu", bias=False, dtype=dtype, backend=backend)
    torchs = nn.RNN(1, 2, nonlinearity="relu", bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight_ih_l0.fill_(1)
        module.weight_hh_l0.copy_(16 * torch.eye(2))  # exact in every dtype
    torchs.load_state_dict(module.state_dict())
    x = torch.ones(40, 1, 1, dtype=dtype)
    x[1:] = 0
    found, expected = module(x)[0], torchs(x)[0]
    # 16^t: representable up to t = 3 (float16) or 31 (the others); then infinite, and
    # 0 * inf = NaN from the other unit.
    last = 3 if dtype == torch.float16 else 31
    assert found[: last + 1].isfinite().all()
    assert found[last + 1].isinf().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_more_steps_than_65535():
    module = fusedrnn.GRU(1, 2)
    x = torch.randn(70_000, 1, 1)
    with torch.no_grad():
        output, h_n = module(x)
        torch.testing.assert_close(output[-1], h_n[0])
        torch.testing.assert_close(output[-50:], module(x[-500:])[0][-50:])  # long forgotten


@pytest.mark.parametrize("backend", ["aten", "auto", "reference"])
@pytest.mark.parametrize("B", [0, 1])
def test_empty_and_single_batches(backend, B):
    module = fusedrnn.LSTM(I, H, 2, bidirectional=True, backend=backend)
    x = torch.randn(T, B, I, requires_grad=True)
    output, (h_n, c_n) = module(x)
    assert output.shape == (T, B, 2 * H)
    assert h_n.shape == c_n.shape == (4, B, H)
    output.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


class OutOfMemory(TorchDispatchMode):
    """Lets `after` operators pass and raises at the next."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("simulated")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["aten", "reference", "custom op"])
def test_out_of_memory_leaves_the_module_usable(path):
    torch.manual_seed(1)
    module = fusedrnn.LSTM(I, H, 2, backend="aten" if path == "custom op" else path)
    x = torch.randn(T, B, I, requires_grad=True)
    hx = tuple(torch.zeros(1, B, H) for _ in range(2))
    spec = Spec("lstm", I, H, backend="reference")

    def step():
        if path == "custom op":
            weights = tuple(list(module.parameters())[:4])
            output = op.run(spec, Operands(x, hx, (), weights), Masks())[0]
        else:
            output = module(x)[0]
        return [output, *torch.autograd.grad(output.square().sum(), [x, module.weight_hh_l0])]

    expected = step()
    failures = 0
    for after in (0, 1, 2, 5, 10, 20, 40, 80, 160):
        try:
            with OutOfMemory(after):
                step()
        except torch.OutOfMemoryError:
            failures += 1
        for one, other in zip(step(), expected, strict=True):
            assert torch.equal(one, other)
    assert failures >= 3


@each_backend
def test_two_threads(backend):
    module = fusedrnn.LSTM(I, H, 2, bidirectional=True, backend=backend)
    inputs = [torch.randn(T, B, I, requires_grad=True) for _ in range(2)]

    def step(x):
        output = module(x)[0]
        return [output, torch.autograd.grad(output.square().sum(), x)[0]]

    expected = [step(x) for x in inputs]
    wrong, errors = [], []

    def work(i):
        try:
            for _ in range(20):
                wrong.extend(
                    (a - b).abs().max().item()
                    for a, b in zip(step(inputs[i]), expected[i], strict=True)
                    if not torch.equal(a, b)
                )
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not wrong


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = fusedrnn.LSTM(I, H, 2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * H, 1)

    def forward(self, x, lengths=None):
        return self.head(self.rnn(x, lengths=lengths)[0])


def test_data_parallel_without_a_gpu():
    model = Model()
    x = torch.randn(B, T, I)
    assert torch.equal(nn.DataParallel(model)(x), model(x))


def test_data_parallel_replicas():
    """What nn.DataParallel makes for each GPU: parameters that are plain attributes."""
    module = fusedrnn.LSTM(I, H, 2)
    replica = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters():
        setattr(replica, name, parameter.view_as(parameter))
    x = torch.randn(T, B, I)
    output = replica(x)[0]
    assert torch.equal(output, module(x)[0])
    output.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("path", ["aten", "reference", "dropout"])
def test_checkpoint(path, reentrant):
    options = {"dropout": 0.5} if path == "dropout" else {"backend": path}
    module = fusedrnn.GRU(I, H, 2, **options)
    x = torch.randn(T, B, I, requires_grad=True)
    lengths = torch.tensor([6, 4, 1, 2])

    def gradients(call):
        module.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        call(x).square().sum().backward()
        return [x.grad, *(p.grad for p in module.parameters())]

    def forward(x):
        return module(x, lengths=lengths)[0]

    found = gradients(lambda x: checkpoint(forward, x, use_reentrant=reentrant))
    for one, other in zip(found, gradients(forward), strict=True):
        assert torch.equal(one, other)


@each_backend
@each_cell
def test_another_default_device(name, backend):
    """torch.set_default_device is for new tensors of the program, not for our index arithmetic."""
    module = getattr(fusedrnn, name)(I, H, 2, bidirectional=True, backend=backend)
    x, lengths = torch.randn(T, B, I), torch.tensor([6, 2, 0, 5])
    packed = nn.utils.rnn.pack_padded_sequence(x, [6, 5, 5, 2])
    expected = tensors(module(x, lengths=lengths)), module(packed)[0].data
    with torch.device("meta"):
        found = tensors(module(x, lengths=lengths)), module(packed)[0].data
    assert all(map(torch.equal, found[0], expected[0]))
    assert torch.equal(found[1], expected[1])


def test_threads_leave_the_precision_of_matrix_products_as_it_was():
    """One thread enters while another is inside, and leaves after it."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    on_a_gpu = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32)
    inside, entered, left = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def late():
        inside.wait(60)
        with matmul_precision(on_a_gpu, "tf32"):
            entered.set()
            seen.append(settings.fp32_precision)
            left.wait(60)

    thread = threading.Thread(target=late)
    thread.start()
    with matmul_precision(on_a_gpu, "tf32"):
        inside.set()
        entered.wait(0.2)  # time to go wrong in
    left.set()
    thread.join(60)
    assert seen == ["tf32"]
    assert settings.fp32_precision == before


def distributed_worker(rank, path):
    """One of two processes: DDP and FSDP2 must give the gradients of the whole batch."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.manual_seed(0)
    x, lengths = torch.randn(4, T, I), torch.tensor([6, 2, 3, 0])
    model = Model()
    model(x, lengths).square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    own = slice(2 * rank, 2 * rank + 2)

    def check(gradients):
        for name, exact in expected.items():
            torch.testing.assert_close(gradients[name], exact, **GRADIENTS32)

    model.zero_grad()
    ddp = nn.parallel.DistributedDataParallel(model)
    ddp(x[own], lengths[own]).square().mean().backward()
    check({n: p.grad for n, p in model.named_parameters()})

    model.zero_grad()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model.rnn, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):  # sharded again after the first
        model.zero_grad()
        model(x[own], lengths[own]).square().mean().backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        check({n: g.full_tensor() for n, g in gradients.items()})
    assert model.rnn.weight_hh_l0.to_local().shape[0] == 4 * H // 2
    dist.barrier()  # neither leaves while the other still needs it
    # Straight out: Gloo's threads outlive destroy_process_group, and one of them that wants
    # Python's lock while the interpreter winds up aborts the process (pytorch/pytorch#190489).
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch.distributed is missing")
def test_ddp_and_fsdp2(tmp_path):
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(distributed_worker, (str(tmp_path / "store"),), nprocs=2)


@pytest.mark.parametrize("direction", ["reverse", "alternate"])
@each_cell
def test_one_step_in_reverse_with_the_batch_first(name, direction):
    """Where both layouts have the same strides, rows must not change places."""
    module = getattr(fusedrnn, name)(I, H, 2, batch_first=True, direction=direction)
    x = torch.randn(B, 1, I)
    hx = torch.randn(2, B, H)
    hx = (hx, torch.randn(2, B, H)) if name == "LSTM" else hx
    found = tensors(module(x, hx))
    module.backend = "reference"
    for a, b in zip(found, tensors(module(x, hx)), strict=True):
        torch.testing.assert_close(a, b)


@each_cell
def test_a_step_leaves_the_state_in_memory_of_its_own(name):
    """So that the output may be changed in place."""
    module = getattr(fusedrnn, name)(I, H)
    stream = module.stream()
    x = torch.randn(B, I)
    with torch.no_grad():
        for step in (lambda: module.step(x), lambda: module(x[None]), lambda: (stream.step(x), 0)):
            output, state = step()
            state = stream.state if isinstance(state, int) else state
            h = state[0] if isinstance(state, tuple) else state
            before = h.clone()
            output.fill_(7)
            assert torch.equal(h, before)
