"""Two processes under FSDP: thresholds of a JumpReLU wrapped apart are reduced over ranks in float32; what is kept is whole.

The processes run every case once and store what they saw. The tests compare it with one process.
"""

from __future__ import annotations

import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor, nn

import triton_thresh as tt

from .conftest import INTERPRETED

RANKS = 2
STEPS = 3
BOUND = 2e-3  # of the network's gradients about half are larger

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="once is enough"),
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
    pytest.mark.slow,
]


class Model(nn.Module):
    """An autoencoder that asks the activation for its count in the way that FSDP sees."""

    def __init__(self, parametrization: str) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 16), nn.Linear(16, 6)
        self.activation = tt.nn.JumpReLU(16, threshold=0.125, bandwidth=0.5, parametrization=parametrization)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, count = self.activation(self.encoder(x), return_l0=True)
        return self.decoder(kept), count


class Method(Model):
    """The same by the method."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, count = self.activation.l0(self.encoder(x))
        return self.decoder(kept), count


def model(kind: type[Model] = Model, parametrization: str = "raw", dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    return kind(parametrization).to(dtype)


def batch(step: int) -> Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))


def loss_of(net: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    prediction, count = net(x.to(dtype))
    return (prediction.float() - x).square().mean() + 0.01 * count.mean()


def fully_sharded(shape: tuple[int, ...] = (RANKS,), policy: bool = False) -> Callable[[nn.Module], nn.Module]:
    """FSDP2 as the docstring of JumpReLU has it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    def wrap(net: nn.Module) -> nn.Module:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
        fully_shard(net.activation, mesh=mesh)
        bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if policy else MixedPrecisionPolicy()
        return fully_shard(net, mesh=mesh, mp_policy=bf16)  # type: ignore[return-value]

    return wrap


def by_policy(strategy: str) -> Callable[[nn.Module], nn.Module]:
    """FSDP1 unit by unit."""
    from torch.distributed import fsdp

    def wrap(net: nn.Module) -> nn.Module:
        return fsdp.FullyShardedDataParallel(
            net,
            auto_wrap_policy=fsdp.wrap.ModuleWrapPolicy({tt.nn.JumpReLU}),
            sharding_strategy=fsdp.ShardingStrategy[strategy],
            use_orig_params=True,
            device_id=torch.device("cpu"),
        )

    return wrap


def by_hand(net: nn.Module) -> nn.Module:
    """FSDP1 that casts everything but the JumpReLU."""
    from torch.distributed import fsdp

    shared = {"use_orig_params": True, "device_id": torch.device("cpu")}
    net.activation = fsdp.FullyShardedDataParallel(net.activation, **shared)  # type: ignore[arg-type]
    return fsdp.FullyShardedDataParallel(net, mixed_precision=fsdp.MixedPrecision(torch.bfloat16), **shared)  # type: ignore[arg-type]


F32, BF16 = torch.float32, torch.bfloat16
# how it is wrapped; the dtype of the rest and of inputs; the model's arguments
CASES: dict[str, tuple[Callable[[], Callable[[nn.Module], nn.Module]], torch.dtype, torch.dtype, tuple[Any, ...]]] = {
    "FSDP2": (fully_sharded, F32, F32, (Model,)),
    "FSDP2, log, by the method": (fully_sharded, F32, F32, (Method, "log")),
    "FSDP2, replicated": (lambda: fully_sharded((RANKS, 1)), F32, F32, (Model,)),
    "FSDP2, bf16": (fully_sharded, BF16, BF16, (Model,)),
    "FSDP2, bf16 by policy": (lambda: fully_sharded(policy=True), F32, F32, (Model,)),
    "FSDP1": (lambda: by_policy("FULL_SHARD"), F32, F32, (Model, "log")),
    "FSDP1, replicated": (lambda: by_policy("NO_SHARD"), F32, F32, (Model,)),
    "FSDP1, bf16": (lambda: by_policy("FULL_SHARD"), BF16, BF16, (Model,)),
    "FSDP1, bf16 by policy": (lambda: by_hand, F32, F32, (Model,)),
    "DDP": (lambda: nn.parallel.DistributedDataParallel, F32, F32, (Model,)),
}
EXACT = [name for name, (_, rest, _, _) in CASES.items() if rest is F32 and "policy" not in name]
CAST = [name for name in CASES if name not in EXACT]


def whole(shard: Tensor | None, like: Tensor, replicated: bool) -> Tensor:
    """A parameter, or its gradient, of all ranks, gathered without the pack."""
    if hasattr(shard, "full_tensor"):
        return shard.full_tensor().detach().clone()  # type: ignore[union-attr, no-any-return]
    parts: list[Any] = [None] * RANKS
    torch.distributed.all_gather_object(parts, torch.empty(0) if shard is None else shard.detach().flatten())
    return (parts[0] if replicated else torch.cat(parts)).view(like.shape)


def trained(name: str, rank: int) -> dict[str, Any]:
    """A few steps on this rank's half of each batch: whole gradients of the first, what was kept, the parameters at the end."""
    wrapping, rest, entered, (kind, *settings) = CASES[name]
    plain = model(kind, *settings, dtype=rest)
    net = wrapping()(copy.deepcopy(plain))
    replicated = name in {"FSDP1, replicated", "DDP"}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    record: dict[str, Any] = {"kept": [], "share": []}
    with tt.GradientThreshold(optimizer, BOUND, track_kept=True) as thresholded:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(net, batch(step).tensor_split(RANKS)[rank], entered).backward()
            if step == 0:
                pairs = zip(net.parameters(), plain.parameters(), strict=True)
                record["gradients"] = [whole(p.grad, like, replicated) for p, like in pairs]
                record["dtypes"] = [p.dtype for p in net.parameters()]
            pairs = zip(net.parameters(), plain.parameters(), strict=True)
            before = [whole(p.grad, like, replicated) for p, like in pairs]
            optimizer.step()
            record["kept"].append(thresholded.kept)
            record["share"].append(sum(int((g.abs() > BOUND).sum()) for g in before) / sum(g.numel() for g in before))
    pairs = zip(net.parameters(), plain.parameters(), strict=True)
    record["parameters"] = [whole(p, like, replicated) for p, like in pairs]
    return record


def projected(wrap: Callable[[nn.Module], nn.Module]) -> Tensor:
    """Thresholds below 0 lifted where they lie."""
    plain = model()
    net = wrap(copy.deepcopy(plain))
    activation = next(m for m in net.modules() if isinstance(m, tt.nn.JumpReLU))
    with torch.no_grad():
        activation.threshold.sub_(1)
    activation.project_()
    return whole(activation.threshold, plain.activation.threshold, False)


def loaded() -> list[Tensor]:
    """A checkpoint of 16-bit thresholds of the other name, spread as FSDP2 spreads, assigned to a model without memory."""
    from torch.distributed.tensor import Shard, distribute_tensor

    with torch.device("meta"):
        net = fully_sharded()(model(parametrization="log"))
    mesh = net.encoder.weight.device_mesh
    state = {k: distribute_tensor(v, mesh, [Shard(0)]) for k, v in model().half().state_dict().items()}
    state["activation.threshold"] = state["activation.threshold"].half()
    net.load_state_dict(state, assign=True)
    state["activation.threshold"] = distribute_tensor(torch.zeros(16), mesh, [Shard(0)])
    with pytest.raises(RuntimeError, match="without a logarithm"):
        net.load_state_dict(state, assign=True)
    return [net.activation.log_threshold.full_tensor().detach()]


def zero_redundancy(rank: int) -> dict[str, Any]:
    """The optimizer holds a part of the parameters on each rank; gradients are whole on both."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = nn.parallel.DistributedDataParallel(model())
    optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.1)
    bounds = [BOUND * (1 + i % 2) for i, _ in enumerate(net.parameters())]
    with tt.GradientThreshold(optimizer, bounds, track_kept=True) as thresholded:
        loss_of(net, batch(0).tensor_split(RANKS)[rank], F32).backward()
        gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        optimizer.step()
    count = sum(int((g.abs() > bound).sum()) for g, bound in zip(gradients, bounds, strict=True))
    return {"kept": [thresholded.kept], "share": [count / sum(g.numel() for g in gradients)]}


def partial_sums() -> None:
    """A gradient that is a sum over ranks yet to be made is refused, before anything is written."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial

    mesh = init_device_mesh("cpu", (RANKS,))
    p, q = (DTensor.from_local(torch.ones(4), mesh, [Partial()]) for _ in range(2))
    first = torch.ones(4, requires_grad=True)
    first.grad, p.grad = torch.full((4,), 0.1), q
    with pytest.raises(TypeError, match=r"parameters\[1\].grad is a DTensor with placements .*Partial"):
        tt.threshold_gradients_([first, p], 0.5)
    assert first.grad.eq(0.1).all()


def work(rank: int, folder: str) -> None:
    """What each process runs; spawn imports this module."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=Path(folder, "rendezvous").as_uri(),
        rank=rank,
        world_size=RANKS,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        records: dict[str, Any] = {name: trained(name, rank) for name in CASES}
        records["ZeroRedundancyOptimizer"] = zero_redundancy(rank)
        records["projected"] = [projected(fully_sharded()), projected(by_policy("FULL_SHARD"))]
        records["loaded"] = loaded()
        partial_sums()
        torch.save(records, Path(folder, f"rank{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        torch.multiprocessing.spawn(work, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


def alone(name: str) -> tuple[list[Tensor], list[Tensor]]:
    """One process: the mean of both halves' gradients in the first step, and the parameters at the end."""
    _, rest, entered, (kind, *settings) = CASES[name]
    net = model(kind, *settings, dtype=rest)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    first = []
    with tt.GradientThreshold(optimizer, BOUND):
        for step in range(STEPS):
            halves = []
            for half in batch(step).tensor_split(RANKS):
                optimizer.zero_grad()
                loss_of(net, half, entered).backward()
                halves.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
            for p, a, b in zip(net.parameters(), *halves, strict=True):
                p.grad = (a + b) / 2
            first = first or [p.grad.clone() for p in net.parameters() if p.grad is not None]
            optimizer.step()
    return first, [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("name", EXACT)
def test_trains_as_one_process(name: str, records: list[dict[str, Any]]) -> None:
    gradients, parameters = alone(name)
    for record in records:
        torch.testing.assert_close(record[name]["gradients"], gradients)
        torch.testing.assert_close(record[name]["parameters"], parameters)


@pytest.mark.parametrize("name", CAST)
def test_thresholds_of_a_16_bit_model_stay_wide(name: str, records: list[dict[str, Any]]) -> None:
    """Their gradients are the mean of what each half of the batch gives, in float32."""
    _, rest, _, (kind, *settings) = CASES[name]
    names = [n for n, _ in model().named_parameters()]
    place = names.index("activation.threshold")
    if rest is BF16:
        net = model(kind, *settings, dtype=rest)
        gradients, _ = alone(name)
        expected = gradients[place]
    else:  # cast by the wrapper: as autocast of the weights by hand
        net = model(kind, *settings, dtype=BF16)
        halves = []
        for half in batch(0).tensor_split(RANKS):
            net.zero_grad()
            loss_of(net, half, BF16).backward()
            halves.append(net.activation.threshold.grad.clone())  # type: ignore[union-attr]
        expected = (halves[0] + halves[1]) / 2
    assert expected.count_nonzero() > expected.numel() // 2
    for record in records:
        assert record[name]["dtypes"] == [F32 if i == place else rest for i in range(len(names))]
        assert torch.equal(record[name]["gradients"][place], expected)
        assert not torch.equal(record[name]["parameters"][place], net.activation.threshold.detach())


@pytest.mark.parametrize("name", [*CASES, "ZeroRedundancyOptimizer"])
def test_kept_is_whole(name: str, records: list[dict[str, Any]]) -> None:
    for record in records:
        for kept, share in zip(record[name]["kept"], record[name]["share"], strict=True):
            assert type(kept) is Tensor
            assert kept.dtype is torch.float32
            assert kept.item() == torch.tensor(share).item()
            assert 0 < share < 1


def test_projection_where_parameters_are_spread(records: list[dict[str, Any]]) -> None:
    for record in records:
        for found in record["projected"]:
            assert torch.equal(found, torch.zeros(16))


def test_checkpoint_assigned_to_meta(records: list[dict[str, Any]]) -> None:
    for record in records:
        (found,) = record["loaded"]
        assert found.dtype is torch.float32
        assert torch.equal(found, torch.full((16,), 0.125).log())


def test_ranks_agree(records: list[dict[str, Any]]) -> None:
    first, second = records
    for name in CASES:
        assert all(
            torch.equal(a, b) for a, b in zip(first[name]["parameters"], second[name]["parameters"], strict=True)
        )
