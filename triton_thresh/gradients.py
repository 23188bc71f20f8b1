"""Gradient thresholding: of one tensor in backward, or of the gradients of many parameters in place."""

from __future__ import annotations

import functools
import itertools
import math
import numbers
import struct
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Union

import torch
from torch import Tensor
from torch.jit._trace import is_tracing

from . import backend, checks, gates, layout, reference, tuning
from .checks import FLOATING, Operand, as_float, check_number, check_real, compute_dtype, is_exporting, round_to
from .fused import define
from .launch import Kernel, device_code, triton_dtype
from .registry import KEEP_LARGE
from .tuning import Config

Thresholds = Union[float, list[float], Tensor]
"""A number or 0-dim tensor for all parameters, or a list or 1-dim tensor with one for each."""

SMALL = 1024  # elements; on a CPU smaller tensors are joined: two copies cost less than a call
ORDINARY = {Tensor, torch.nn.Parameter}
ALIGNMENT = 16


# ---------------------------------------------------------------------------------------------- of one tensor, in backward


class _Backward(torch.autograd.Function):
    """The identity, as a view; backward runs the gate on the gradient, on the backend that forward chose (None: the formula)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, threshold: Operand, chosen: str | None) -> Tensor:
        _keep(ctx, threshold, chosen)
        return input.view_as(input)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        threshold = ctx.saved_tensors[0] if ctx.number is None else ctx.number
        if ctx.backend is None:
            return reference.keep_large(gradient, threshold), None, None
        with backend.use_backend(ctx.backend):  # backward may run on another thread
            return gates.run(KEEP_LARGE, gradient, (threshold,)), None, None


class _TransformedBackward(torch.autograd.Function):
    """For torch.func transforms and forward-mode AD, which reject the cheaper form above."""

    backward = _Backward.backward

    @staticmethod
    def forward(input: Tensor, threshold: Operand, chosen: None) -> Tensor:
        return input.clone()  # batched forward-mode AD takes no view

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, *inputs[1:])

    @staticmethod
    def jvp(ctx: Any, input: Tensor, *rest: Any) -> Tensor:
        return input.clone()

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], input: Tensor, threshold: Operand, chosen: None
    ) -> tuple[Tensor, int]:
        """The output is batched if the threshold is: else its gradients would be added first and thresholded then."""
        batched, other = in_dims[:2]
        input = input.expand(info.batch_size, *input.shape) if batched is None else input.movedim(batched, 0)
        if other is not None:
            assert isinstance(threshold, Tensor)
            threshold = threshold.movedim(other, 0)
            if threshold.dim() == 1:
                threshold = threshold.to(input.dtype)  # as a 0-dim tensor is
            threshold = threshold.reshape(len(threshold), *[1] * (input.dim() - threshold.dim()), *threshold.shape[1:])
        return _TransformedBackward.apply(input, threshold, chosen), 0  # type: ignore[no-untyped-call]


def _keep(ctx: Any, threshold: Operand, chosen: str | None) -> None:
    ctx.save_for_backward(*([threshold] if isinstance(threshold, Tensor) else []))
    ctx.number, ctx.backend = None if isinstance(threshold, Tensor) else threshold, chosen


def threshold_grad(op: str, input: Tensor, threshold: Operand) -> Tensor:
    """Check the arguments; a view of the input, whose backward runs the gate."""
    checks.check_input(op, input, KEEP_LARGE.dtypes)
    threshold = checks.check_operand(op, "threshold", threshold, input)
    way = backend.way(input, threshold)
    ordinary = way in ("triton", "eager")
    if ordinary and not (input.requires_grad and torch.is_grad_enabled()):
        return input.view_as(input)
    compiling = torch.compiler.is_compiling()
    if is_tracing() or is_exporting():  # their programs hold no gradient of one's own
        return input.view_as(input)
    if not ordinary and not isinstance(threshold, Tensor):
        threshold = checks.held(threshold, input.dtype, input.device)
    if compiling:
        # Dynamo drops the backward of a Function on the argument of torch.func.grad itself. On a view of it, it keeps it.
        input = input.view_as(input)
    function = _Backward if compiling or ordinary or way == "op" else _TransformedBackward
    return function.apply(input, threshold, backend.get_backend() if ordinary else None)  # type: ignore[no-any-return, no-untyped-call]


# ------------------------------------------------------------------------------------------ of many parameters: arguments


class Group(NamedTuple):
    """Gradients of one dtype and device, the places of their parameters, and whether kernels may have them.

    `spread` says over which ranks the rest of them lies: what `_spread` found.
    """

    gradients: list[Tensor]
    places: list[int]
    ordinary: bool
    spread: Any = None


def check_parameters(op: str, parameters: object) -> list[Tensor]:
    """`parameters` as a list: a tensor, or an iterable of tensors."""
    if isinstance(parameters, Tensor):
        return [parameters]
    if not isinstance(parameters, Iterable):
        hint = "; pass its parameters()" if isinstance(parameters, torch.nn.Module) else ""
        raise TypeError(
            f"{op}: parameters must be a tensor or an iterable of tensors, got {type(parameters).__name__}{hint}"
        )
    found = list(parameters)
    if not set(map(type, found)) <= ORDINARY:
        for place, parameter in enumerate(found):
            if not isinstance(parameter, Tensor):
                hint = "; pass parameters(), without names" if isinstance(parameter, (str, tuple)) else ""
                raise TypeError(f"{op}: parameters[{place}] must be a tensor, got {type(parameter).__name__}{hint}")
    return found


def check_thresholds(op: str, threshold: object, count: int) -> Thresholds:
    """`threshold` as a number or 0-dim tensor, or a list or 1-dim tensor of `count`."""
    if isinstance(threshold, Tensor):
        check_real(op, "threshold", threshold)
        if threshold.requires_grad:
            raise ValueError(
                f"{op}: threshold requires grad, but this op has no gradient to give it; pass threshold.detach()"
            )
        if threshold.dim() > 1:
            raise ValueError(
                f"{op}: threshold has shape {tuple(threshold.shape)}, expected a number, a 0-dim tensor or one per parameter"
            )
        if threshold.dim() == 0:
            return threshold
    elif not isinstance(threshold, (list, tuple)):
        if not isinstance(threshold, numbers.Real):
            raise TypeError(
                f"{op}: threshold must be a number, a tensor, or a list with a number for each parameter, "
                f"got {type(threshold).__name__} {threshold!r}"
            )
        return float(as_float(op, "threshold", check_number(op, "threshold", threshold)))
    if len(threshold) != count:
        raise ValueError(
            f"{op}: threshold has {len(threshold)} entries for {count} parameters, expected one number, or one per parameter"
        )
    if isinstance(threshold, Tensor):
        return threshold
    if set(map(type, threshold)) <= {float, int}:
        return [float(as_float(op, "threshold", value)) for value in threshold]
    names = [f"threshold[{place}]" for place in range(count)]
    return [float(as_float(op, name, check_number(op, name, value))) for name, value in zip(names, threshold)]


def _groups(gradients: list[Tensor], places: list[int], plain: bool, spread: dict[int, Any]) -> list[Group]:
    ordinary = plain and set(map(type, gradients)) <= ORDINARY
    ordinary = ordinary and not any(map(Tensor.is_inference, gradients)) and not any(map(Tensor.is_neg, gradients))
    if ordinary and not spread and len({g.dtype for g in gradients}) == 1 and len({g.device for g in gradients}) == 1:
        return [Group(gradients, places, True)]
    kinds: dict[object, Group] = {}
    for g, place in zip(gradients, places):
        ordinary, over = plain and type(g) in ORDINARY and not g.is_inference() and not g.is_neg(), spread.get(place)
        group = kinds.setdefault((g.dtype, g.device, ordinary, over), Group([], [], ordinary, over))
        group.gradients.append(g)
        group.places.append(place)
    return list(kinds.values())


def _check_gradients(op: str, group: Group) -> None:
    """Every gradient is strided, of a floating dtype, and may be changed in place."""
    gradients = group.gradients
    common = group.ordinary and gradients[0].dtype in FLOATING and {g.layout for g in gradients} == {torch.strided}
    if common and all(map(Tensor.is_contiguous, gradients)):
        return
    for g, place in zip(gradients, group.places):
        name = f"parameters[{place}].grad"
        if g.layout is not torch.strided:
            raise TypeError(f"{op}: {name} has layout {g.layout}, expected a dense (strided) gradient")
        if g.dtype not in FLOATING:
            raise TypeError(f"{op}: {name} has dtype {g.dtype}, expected float16, bfloat16, float32 or float64")
        if torch.compiler.is_compiling():
            continue
        if torch._debug_has_internal_overlap(g) == 1:
            raise RuntimeError(
                f"{op}: {name} has elements that share memory (shape {tuple(g.shape)}, strides {g.stride()}) and cannot be "
                "changed in place; clone() it first"
            )
        if g.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(f"{op}: {name} is an inference tensor and cannot be changed in place; clone() it first")


def _check_apart(op: str, group: Group) -> None:
    """No two gradients share memory: with a threshold each, the result would depend on their order."""
    if not group.ordinary or group.gradients[0].is_meta:
        return
    filled = [(g, place) for g, place in zip(group.gradients, group.places) if layout.is_dense(g) and g.numel()]
    spans = sorted((g.data_ptr(), g.numel() * g.itemsize, place) for g, place in filled)
    for (start, size, one), (following, _, other) in itertools.pairwise(spans):
        if following < start + size:
            raise ValueError(
                f"{op}: parameters[{min(one, other)}].grad and parameters[{max(one, other)}].grad share memory, expected one "
                "threshold for all, not one per parameter"
            )


def _thresholds_of(op: str, group: Group, thresholds: Any, on_triton: bool) -> list[float] | Tensor:
    """A number for each gradient, or a tensor on their device.

    A CPU tensor is read, except in traced calls and in Triton's interpreter.
    """
    device = group.gradients[0].device
    if isinstance(thresholds, Tensor):
        if thresholds.device.type != "cpu" and device.type == "cpu":
            raise RuntimeError(
                f"{op}: threshold is on {thresholds.device}, expected cpu, where parameters[{group.places[0]}].grad is"
            )
        if not group.ordinary or thresholds.device.type != "cpu" or (on_triton and device.type == "cpu"):
            return thresholds.to(device, non_blocking=True)
        thresholds = thresholds.tolist()
    if isinstance(thresholds, list):
        return [float(thresholds[place]) for place in group.places]
    return [float(thresholds)] * len(group.places)


# --------------------------------------------------------------------------------------------------------------- ranks

FLATTENED = "_fsdp_flattened"  # the attribute by which FullyShardedDataParallel marks the parameters that it shards


def _local(op: str, gradients: list[Tensor], places: list[int]) -> tuple[list[Tensor], dict[int, Any]]:
    """This rank's part of gradients that are DTensors, as those of fully_shard are, and how each is spread over the ranks.

    The latter is its mesh, and for each dimension of the mesh True if the ranks along it hold the same, not parts.
    """
    if set(map(type, gradients)) <= ORDINARY or not torch.distributed.is_available():
        return gradients, {}
    from torch.distributed.tensor import DTensor

    spread = {}
    for g, place in zip(gradients, places):
        if isinstance(g, DTensor):
            if any(p.is_partial() for p in g.placements):
                raise TypeError(
                    f"{op}: parameters[{place}].grad is a DTensor with placements {g.placements}, a sum that is not whole yet; "
                    "redistribute() it first"
                )
            spread[place] = g.device_mesh, tuple(p.is_replicate() for p in g.placements)
    return [g.to_local() if isinstance(g, DTensor) else g for g in gradients], spread


def _over_ranks(pair: Tensor, spread: Any) -> Tensor:
    """The sum over the ranks among which gradients are spread."""
    if spread == FLATTENED:
        torch.distributed.all_reduce(pair)
        return pair
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, replicated = spread
    placements = [Replicate() if same else Partial() for same in replicated]
    whole: Tensor = DTensor.from_local(pair.to(mesh.device_type), mesh, placements, run_check=False).full_tensor()
    return whole


# --------------------------------------------------------------------------------------------------------------- eager


def _write(tensors: Sequence[Tensor], threshold: float | Tensor, lean: bool) -> list[Tensor]:
    """reference.keep_large in place, and how many elements each kept.

    If `lean`, a kernel of torch writes the same bits for a number, and nothing is counted.
    """
    if lean and isinstance(threshold, float) and not math.isnan(threshold):
        rounded = round_to(threshold, tensors[0].dtype)
        for x in tensors:
            torch.hardshrink(x, rounded, out=x)
        return []
    counts = []
    for x in tensors:
        large = reference.is_large(x, threshold)
        x.copy_(torch.where(large, x, 0))
        counts.append(large.sum())
    return counts


def _eager_(group: Group, thresholds: Sequence[float | Tensor], count: bool) -> list[Tensor]:
    """Run torch's own ops. On a CPU small gradients of one shape are joined."""
    lean = group.ordinary and not count
    if not (group.ordinary and group.gradients[0].device.type == "cpu"):
        return [kept for g, t in zip(group.gradients, thresholds) for kept in _write([g], t, lean)]
    alike: dict[tuple[float | Tensor, torch.Size], list[Tensor]] = defaultdict(list)
    for g, t in zip(group.gradients, thresholds):
        alike[t, g.shape].append(g)
    counts = []
    for (t, shape), members in alike.items():
        small = len(members) > 1 and len(shape) > 0 and shape.numel() <= SMALL
        if small and all(map(Tensor.is_contiguous, members)):
            joined = torch.cat(members)
            counts += _write([joined], t, lean)
            torch.split_with_sizes_copy(joined, [shape[0]] * len(members), out=members)
        else:
            counts += _write(members, t, lean)
    return counts


# ----------------------------------------------------------------------------------------------------------------- call


def _on_triton(op: str, group: Group) -> bool:
    """True if a kernel runs; may raise. None does while a CUDA graph is captured: its table would have to outlive the graph."""
    first = group.gradients[0]
    device = first.device
    if not group.ordinary or backend.choose(device)[0] != "triton":
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


@torch.no_grad()
def threshold_gradients_(op: str, parameters: object, threshold: object, return_kept: bool) -> Tensor | None:
    """Zero what is not large of every gradient, in place. All that can raise does before anything is written."""
    listed = check_parameters(op, parameters)
    return _in_place([p.grad for p in listed], listed, op, threshold, return_kept)


def _in_place(
    gradients: Sequence[Tensor | None], listed: Sequence[Tensor], op: str, threshold: object, return_kept: bool
) -> Tensor | None:
    """`threshold_gradients_` for the gradients of the parameters listed; some may be missing."""
    thresholds = check_thresholds(op, threshold, len(listed))
    places = [place for place, g in enumerate(gradients) if g is not None]
    present, spread = _local(op, [g for g in gradients if g is not None], places)
    flattened = return_kept and any(hasattr(p, FLATTENED) for p in listed)
    if flattened:
        spread |= {place: FLATTENED for place in places if hasattr(listed[place], FLATTENED)}
    groups = _groups(present, places, backend.is_ordinary(thresholds), spread) if places else []
    counts = _in_groups(op, groups, thresholds, return_kept)
    return _fraction(listed, groups, counts, flattened) if return_kept else None


def _in_groups(op: str, groups: list[Group], thresholds: Thresholds, count: bool) -> list[list[Tensor]]:
    """Check all, then write. Returns what each group kept, if it is counted."""
    one_each = isinstance(thresholds, list) or (isinstance(thresholds, Tensor) and thresholds.dim() > 0)
    for group in groups:
        _check_gradients(op, group)
        if one_each:
            _check_apart(op, group)
    backends = [_on_triton(op, group) for group in groups]
    each = [_thresholds_of(op, group, thresholds, on_triton) for group, on_triton in zip(groups, backends)]
    return [
        _launched(op, group.gradients, own, group.places, count=count)
        if on_triton
        else _eager_(group, _entries(group, own), count)
        for group, own, on_triton in zip(groups, each, backends)
    ]


def _entries(group: Group, thresholds: list[float] | Tensor) -> Sequence[float | Tensor]:
    """The threshold of each gradient of a group."""
    if not isinstance(thresholds, Tensor):
        return thresholds
    entries = thresholds.unbind() if thresholds.dim() else ()
    return [entries[place] if entries else thresholds for place in group.places]


def _fraction(parameters: Sequence[Tensor], groups: list[Group], counts: list[list[Tensor]], flattened: bool) -> Tensor:
    """Kept elements over all, of all ranks, as float32 on the device of the first gradient; NaN where there are none.

    Where FSDP flattened parameters, every rank takes part in the sum, also one that holds no part of them.
    """
    device = groups[0].gradients[0].device if groups else parameters[0].device if parameters else None
    totals: dict[Any, tuple[list[Tensor], list[int]]] = {FLATTENED: ([], [])} if flattened else {}
    for group, found in zip(groups, counts):
        kept, numels = totals.setdefault(group.spread, ([], []))
        kept += [count.to(device) for count in found]
        numels += [g.numel() for g in group.gradients]
    zero = torch.zeros((), dtype=torch.int64, device=device)
    pairs = []
    for spread, (kept, numels) in totals.items():
        pair = torch.stack([torch.stack(kept).sum() if kept else zero, torch.full_like(zero, sum(numels))])
        pairs.append(pair if spread is None else _over_ranks(pair, spread).to(device))
    some, all_ = torch.stack(pairs).sum(0) if pairs else (zero, zero)
    return some.to(torch.float32) / all_


# --------------------------------------------------------------------------------------------------------------- Triton


def _bits_of(value: float) -> int:
    """The bits of a float64 as an int64."""
    (found,) = struct.unpack("q", struct.pack("d", value))
    return int(found)


def _int64(values: Iterable[int]) -> Tensor:
    return torch.frombuffer(array("q", values), dtype=torch.int64)


def _table(tensors: Sequence[Tensor], thresholds: Sequence[int], chunk: int) -> tuple[Tensor, int]:
    """The table that the kernel reads, on the device, and the number of its programs: built on the host, moved by one copy."""
    itemsize, device = tensors[0].element_size(), tensors[0].device
    addresses, numels = _int64(map(Tensor.data_ptr, tensors)), _int64(map(Tensor.numel, tensors))
    ends = torch.where(numels > 0, addresses % ALIGNMENT // itemsize + numels, 0)
    programs = (ends + (chunk - 1)) // chunk
    last = programs.cumsum(0)
    total = int(last[-1])
    rows = torch.stack([addresses, numels, last - programs, _int64(thresholds)], dim=1).view(-1)
    owners = torch.repeat_interleave(programs, output_size=total)
    table = torch.empty(len(rows) + total, dtype=torch.int64, device="cpu", pin_memory=device.type != "cpu")
    torch.cat([rows, owners], out=table)
    return table.to(device, non_blocking=True), total


@functools.cache
def _kernel(dtype: torch.dtype, config: Config) -> Kernel:
    return Kernel(
        device_code("foreach").inplace,
        num_warps=config.num_warps,
        FUNCTION=device_code("pointwise").keep_large,
        DTYPE=triton_dtype(dtype),
        COMPUTE=triton_dtype(compute_dtype(dtype)),
        COLS=config.block,
    )


def _launched(
    op: str,
    tensors: Sequence[Tensor],
    thresholds: Sequence[float] | Tensor,
    places: Sequence[int],
    *,
    count: bool,
) -> list[Tensor]:
    """Zero what is not large. With `count`, returns how many elements are kept, as an int64 tensor.

    `thresholds` has a number for each tensor, or is a tensor on their device: a 0-dim one, or one that `places` index.
    """
    dtype, device = tensors[0].dtype, tensors[0].device
    dense = tensors if all(map(Tensor.is_contiguous, tensors)) else [layout.dense(tensor) for tensor in tensors]
    if isinstance(thresholds, Tensor):
        pointer, own = thresholds.to(dtype).contiguous(), places if thresholds.dim() else [0] * len(places)
    else:
        rounded = {t: _bits_of(round_to(t, dtype)) for t in set(thresholds)}
        pointer, own = None, list(map(rounded.__getitem__, thresholds))
    numel = sum(map(Tensor.numel, dense))
    config = tuning.choose("gate", op, dtype, numel, device).config
    table, programs = _table(dense, own, 8 * config.block)
    kept = torch.empty(programs, dtype=torch.int32, device=device) if count else None
    if programs:
        _kernel(dtype, config)(programs, table, len(dense), pointer, kept)
    if dense is not tensors:
        for tensor, copy in zip(tensors, dense):
            if copy is not tensor:
                tensor.copy_(copy)
    torch.autograd.graph.increment_version(tensors)
    return [] if kept is None else [kept.sum(dtype=torch.int64)]


# ----------------------------------------------------------------------------------------------------------------- plan


def plan_one(op: str, input: Tensor, threshold: Operand) -> backend.Plan:
    """The plan of `threshold_grad`: all of it in backward, where the gate reads and writes the gradient."""
    checks.check_input(op, input, KEEP_LARGE.dtypes)
    checks.check_operand(op, "threshold", threshold, input)
    made = gates.plan(KEEP_LARGE, input.detach(), threshold)
    if not (input.requires_grad and torch.is_grad_enabled()):
        return made._replace(forward_bytes=0, backward_bytes=0, saved_bytes=0)
    kept = layout.total_bytes([threshold]) if isinstance(threshold, Tensor) else 0
    return made._replace(forward_bytes=0, backward_bytes=made.forward_bytes, saved_bytes=kept)


def plan_many(op: str, parameters: object, threshold: object) -> backend.Plan:
    """The plan of `threshold_gradients_`: all gradients' bytes, the backend and block size of those like the first."""
    listed = check_parameters(op, parameters)
    check_thresholds(op, threshold, len(listed))
    gradients = [p.grad for p in listed if p.grad is not None]
    operands = [threshold] if isinstance(threshold, Tensor) else []
    moved = 2 * layout.total_bytes(gradients) + layout.total_bytes(operands), 0, 0
    if not gradients:
        return backend.Plan("eager", "no parameter has a gradient", None, None, None, *moved)
    first = gradients[0]
    way = backend.way(first, *operands)
    numel = sum(g.numel() for g in gradients if (g.dtype, g.device) == (first.dtype, first.device))
    choice = tuning.choose("gate", op, first.dtype, numel, first.device) if way == "triton" else None
    return backend.planned("formula" if way == "op" else way, first.device, choice, False, *moved)


# ---------------------------------------------------------------------------------------------------------------- traced


def _traced_(gradients: list[Tensor], threshold: Any, *, return_kept: bool = False) -> Tensor:
    """`_in_place` as an op: its threshold is one for all, or one for each. Returns the kept fraction, or an empty tensor."""
    if isinstance(threshold, list) and len(threshold) == 1:
        (threshold,) = threshold
    kept = _in_place(gradients, gradients, "threshold_gradients_", threshold, return_kept)
    return gradients[0].new_empty(0) if kept is None else kept


def _fake(gradients: list[Tensor], threshold: Any, *, return_kept: bool = False) -> Tensor:
    return gradients[0].new_empty(() if return_kept else 0, dtype=torch.float32 if return_kept else None)


for _overload, _kind in (("", "float[]"), (".Tensor", "Tensor")):
    define(
        f"threshold_gradients_{_overload}",
        f"(Tensor(a!)[] gradients, {_kind} threshold, *, bool return_kept=False) -> Tensor",
        _traced_,
        _fake,
    )
