"""A linear layer and its loss in one, a chunk of labels at a time: the logits of all labels are never in memory.

A chunk's logits are one product. The loss's slope is written over them; two further products make of it the chunk's part of the
weight's gradient and an addend of the input's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend, cells, checks, compiled, eager, losses, tuning
from .bases import Base
from .cells import Spec
from .checks import FLOATING, Operand, compute_dtype, describe, is_exporting
from .fused import Fused, parted, restored
from .launch import Kernel, blocks, device_code, pack_all, triton_dtype
from .rules import ByRank, Rule

OP = "linear_threshold_loss"
CHUNK_BYTES = 1 << 24  # of a chunk's logits
MULTIPLE = 64  # a chunk that is longer has a multiple of this many labels, so that its rows are aligned

ONE_GRADIENT = "only input, weight, bias and scale get a gradient; {name}.detach() drops its own"
NOT_RANKED = (
    "linear_threshold_loss: rule ByRank compares the losses of all elements, of which this op holds a chunk at a time; call "
    "threshold_loss with the logits"
)


# ------------------------------------------------------------------------------------------------------------ the target


class Marks(NamedTuple):
    """A target by its entries: label `labels[i]` of row `rows[i]`, with `values[i]` or True. A label of -1 is none."""

    labels: Tensor
    rows: Tensor
    values: Tensor | None


def _marked(target: Tensor, batch: int) -> Marks:
    """The entries of a sparse target."""
    if target.layout is torch.sparse_csr:
        lengths = target.crow_indices().diff()
        rows = torch.arange(batch, device=target.device).repeat_interleave(lengths, output_size=target._nnz())
        return Marks(target.col_indices().long(), rows, target.values())
    *leading, labels = target._indices().unbind()
    rows = torch.zeros_like(labels)
    for size, index in zip(target.shape, leading):
        rows = rows * size + index
    return Marks(labels, rows, target._values())


def _listed(labels: Tensor, batch: int) -> Marks:
    """The entries of a list of labels for each row."""
    rows = torch.arange(batch, device=labels.device).unsqueeze(1).expand(batch, labels.shape[-1])
    return Marks(labels.reshape(-1), rows.reshape(-1), None)


def _by_row(target: Tensor | None, labels: Tensor | None, batch: int) -> tuple[Tensor | None, Marks | None]:
    """The target with a row for each of the input's if it is dense, else its entries."""
    if target is None:
        assert labels is not None
        return None, _listed(labels, batch)
    if target.layout is not torch.strided:
        return None, _marked(target, batch)
    return target.reshape(batch, target.shape[-1]), None


def _strays(marks: Marks, count: int) -> Tensor:
    """True where a label is out of range."""
    return (marks.labels < -1) | (marks.labels >= count)


def _check_labels(marks: Marks, count: int) -> None:
    """Raise for a label out of range on a CPU, where looking costs nothing. On a device it makes the loss NaN."""
    strays = _strays(marks, count)
    if strays.any():
        first = int(strays.nonzero()[0])
        raise checks.OutOfRange(
            f"{OP}: labels has {int(marks.labels[first])} in row {int(marks.rows[first])}, expected labels from 0 to "
            f"{count - 1}, or -1 for none"
        )


def _filled(marks: Marks, batch: int, count: int) -> Tensor:
    """The whole target, dense: for the formula. Differentiable transforms see plain torch."""
    inside = (marks.labels >= 0) & (marks.labels < count)
    place = torch.where(inside, marks.rows * count + marks.labels, batch * count)
    values = torch.ones_like(place, dtype=torch.bool) if marks.values is None else marks.values
    flat = torch.zeros(batch * count + 1, dtype=values.dtype, device=place.device)
    return flat.scatter(0, place, values)[:-1].reshape(batch, count)


class _Scatter:
    """Entries as the target of one chunk after the other: a scatter fills a buffer, and the same scatter clears it.

    On a CPU the entries are sorted by chunk once, so that each chunk has its own alone. A device takes all entries each time,
    since the bounds of a chunk's own would have to be read; those of other chunks go to a place behind the buffer.
    """

    def __init__(self, marks: Marks, batch: int, count: int, chunk: int) -> None:
        labels, rows, values = marks
        self._shape = batch, chunk
        self._own = torch.where((labels >= 0) & (labels < count), labels // chunk, -1).int()  # the number of its chunk
        self._places, self._values = rows * chunk + labels.remainder(chunk), values
        self._bounds: list[int] | None = None
        if labels.is_cpu:
            self._own, order = self._own.sort(stable=True)
            self._places, self._values = self._places[order], None if values is None else values[order]
            self._bounds = torch.searchsorted(self._own, torch.arange(blocks(count, chunk) + 1, device="cpu")).tolist()
        dtype = torch.bool if values is None else values.dtype
        self._buffer = torch.zeros(batch * chunk + 1, dtype=dtype, device=labels.device)

    def fill(self, start: int, width: int) -> Tensor:
        """The target of labels start to start + width."""
        number, values = start // self._shape[1], self._values
        if self._bounds is None:
            self._written = torch.where(self._own == number, self._places, self._buffer.numel() - 1)
        else:
            own = slice(self._bounds[number], self._bounds[number + 1])
            self._written, values = self._places[own], None if values is None else values[own]
        if values is None:
            self._buffer.index_fill_(0, self._written, True)
        else:
            self._buffer.index_copy_(0, self._written, values)
        return self._buffer.narrow(0, 0, self._buffer.numel() - 1).view(self._shape).narrow(1, 0, width)

    def clear(self) -> None:
        self._buffer.index_fill_(0, self._written, 0)


# ------------------------------------------------------------------------------------------------------------- the call


def run(
    input: Tensor,
    weight: Tensor,
    target: Tensor | None,
    rule: Rule | None,
    *,
    labels: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    base: Base | str,
    reduction: str,
    divisor: Operand | None,
    label_smoothing: float,
    chunk_size: int | None,
) -> Tensor:
    """Check the arguments, choose the way, go."""
    _check_layer(input, weight, bias, scale)
    count, leading = weight.shape[0], input.shape[:-1]
    batch = math.prod(leading)
    _check_target(input, count, target, labels)
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size > 0):
        raise ValueError(f"{OP}: chunk_size must be None or an integer above 0, got {chunk_size!r}")
    if checks.is_autocast(input.device.type):
        narrow = torch.get_autocast_dtype(input.device.type)
        input, weight = (t if t.dtype is torch.float64 else t.to(narrow) for t in (input, weight))
    if input.dtype != weight.dtype:
        raise TypeError(f"{OP}: weight has dtype {weight.dtype}, expected the input's {input.dtype} (or autocast)")
    spec, operands = _specified(input, weight, base, rule, reduction, divisor, label_smoothing)
    operands = tuple([_as_rows(value, leading, batch) for value in operands])
    input = input.reshape(batch, input.shape[-1])
    dense, marks = _by_row(target, labels, batch)
    tensors = (weight, bias, scale, dense, *(marks or ()), *operands)
    way = backend.way(input, *tensors, compiles=True)
    traced = way == "op" or (way == "formula" and backend.is_one_op(input, *tensors, everywhere=True))
    if way == "formula" and not traced:
        if marks is not None and marks.labels.is_cpu and backend.is_ordinary(marks.labels):
            _check_labels(marks, count)
        return formula(input, weight, bias, scale, dense, marks, operands, spec)
    records = torch.is_grad_enabled()
    wants = [records and t is not None and t.requires_grad for t in (input, weight, bias, scale)]
    found: tuple[Any, ...] = (input, weight, bias, scale, dense, *(marks or (None,) * 3))
    if traced:
        return _OP.op(*found, *losses.encoded(operands), spec.text, spec.result, chunk_size or 0, wants)[0]  # type: ignore[no-any-return]
    arguments = (*found, operands, spec, way, chunk_size or 0, wants)
    return _OP.record(*arguments) if any(wants) else _forward(*arguments)[0]


def _check_layer(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None) -> None:
    for name, value in (("input", input), ("weight", weight), ("bias", bias), ("scale", scale)):
        if value is None and name in ("bias", "scale"):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor, got {describe(value)}")
        checks.check_input(OP, value, FLOATING, jagged=False, name=name)
        if value.device != input.device:
            raise RuntimeError(f"{OP}: {name} is on {value.device}, expected {input.device}, where the input is")
    if input.dim() == 0:
        raise ValueError(f"{OP}: input has shape (), expected (..., features)")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"{OP}: weight has shape {tuple(weight.shape)}, expected (labels, {input.shape[-1]}) for an input of shape "
            f"{tuple(input.shape)}"
        )
    if bias is not None and bias.shape not in ((), (weight.shape[0],)):
        raise ValueError(f"{OP}: bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},) or ()")
    if scale is not None and scale.dim():
        raise ValueError(f"{OP}: scale has shape {tuple(scale.shape)}, expected ()")


def _check_target(input: Tensor, count: int, target: Tensor | None, labels: Tensor | None) -> None:
    if (target is None) == (labels is None):
        given = "neither" if target is None else "both"
        raise ValueError(
            f"{OP}: expected one of target (dense or sparse) and labels (a list for each row), got {given}"
        )
    leading = tuple(input.shape[:-1])
    if target is None:
        name, device = "labels", _check_lists(labels, leading)
    else:
        name, device = "target", _check_entries(target, leading, count)
    if device != input.device:
        raise RuntimeError(f"{OP}: {name} is on {device}, expected {input.device}, where the input is")


def _check_lists(labels: object, leading: tuple[int, ...]) -> torch.device:
    """The device of `labels`, a list of positive labels for each row."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{OP}: labels must be a tensor, got {describe(labels)}")
    if labels.dtype is not torch.int64:
        raise TypeError(
            f"{OP}: labels has dtype {labels.dtype}, expected int64: the numbers of each row's positive labels"
        )
    if labels.layout is not torch.strided:
        raise TypeError(f"{OP}: labels has layout {labels.layout}, expected a dense (strided) tensor")
    if labels.dim() != len(leading) + 1 or tuple(labels.shape[:-1]) != leading:
        raise ValueError(
            f"{OP}: labels has shape {tuple(labels.shape)}, expected {_shaped(leading, 'any')} for the rows of the input"
        )
    return labels.device


def _check_entries(target: object, leading: tuple[int, ...], count: int) -> torch.device:
    """The device of `target`, which has an entry for each label of each row, or is sparse."""
    if not isinstance(target, Tensor):
        raise TypeError(f"{OP}: target must be a tensor, got {describe(target)}")
    if target.layout not in (torch.strided, torch.sparse_coo, torch.sparse_csr):
        raise TypeError(f"{OP}: target has layout {target.layout}, expected a dense, sparse COO or sparse CSR tensor")
    if target.dtype not in checks.REAL:
        raise TypeError(f"{OP}: target has dtype {target.dtype}, expected a real dtype")
    if tuple(target.shape) != (*leading, count):
        raise ValueError(
            f"{OP}: target has shape {tuple(target.shape)}, expected {_shaped(leading, count)} (no broadcasting)"
        )
    is_coo = target.layout is torch.sparse_coo
    if (is_coo and target.dense_dim()) or (target.layout is torch.sparse_csr and target.dim() != 2):
        raise TypeError(
            f"{OP}: target is sparse in some of its dimensions, expected a COO tensor sparse in all, or CSR"
        )
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{OP}: target requires grad, but {ONE_GRADIENT.format(name='target')}; threshold_loss with the logits gives it"
        )
    return target.device


def _shaped(leading: Sequence[int], last: object) -> str:
    return f"({', '.join(map(str, (*leading, last)))}{'' if leading else ','})"


def _specified(
    input: Tensor,
    weight: Tensor,
    base: Base | str,
    rule: Rule | None,
    reduction: str,
    divisor: Operand | None,
    smoothing: float,
) -> tuple[Spec, Sequence[Operand]]:
    """The loss to compute and its operands; an error names what cannot be."""
    checks.check_reduction(OP, reduction)
    if reduction == "none":
        raise ValueError(
            f"{OP}: reduction must be 'mean' or 'sum', got 'none': the element losses are as many as the logits; "
            "threshold_loss(logits, target, reduction='none') gives them"
        )
    if isinstance(rule, ByRank):
        raise ValueError(NOT_RANKED)
    loss, weighing = losses.checked_parts(OP, base, rule, None)
    logits = input.detach().new_empty(()).expand(*input.shape[:-1], weight.shape[0])  # for the checks: no memory
    asked = losses.given_options({"divisor": divisor, "label_smoothing": smoothing})
    extra = losses.checked_options(OP, logits, logits, loss, reduction, asked)
    loss, weighing = losses.checked_fields(OP, loss, weighing, logits, ONE_GRADIENT)
    spec, operands = cells.specify(loss, weighing, extra, False, reduction, checks.result_dtype(input))
    return spec, cells.rounded(operands, input.dtype)


def _as_rows(value: Operand, leading: Sequence[int], batch: int) -> Operand:
    """An operand of one dimension at most, or with a row for each of the input's."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    return value.expand(*leading, value.shape[-1]).reshape(batch, value.shape[-1])


# ------------------------------------------------------------------------------------------------------------- formula


def formula(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    dense: Tensor | None,
    marks: Marks | None,
    operands: Sequence[Operand],
    spec: Spec,
) -> Tensor:
    """The loss in plain torch, with all logits: differentiable in input, weight, bias and scale, twice and under transforms."""
    with compiled.no_autocast(input):
        logits = F.linear(input, weight)
        compute = compute_dtype(input.dtype)
        logits = _affine(logits.to(compute), bias, scale)
        if dense is None:
            assert marks is not None
            dense = _filled(marks, *logits.shape)
        loss = cells.formula(spec, logits, dense, operands)
        return loss if marks is None else torch.where(_strays(marks, weight.shape[0]).any(), math.nan, loss)


def _affine(logits: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    if scale is not None:
        logits = logits * scale.to(logits.dtype)
    return logits if bias is None else logits + bias.to(logits.dtype)


# --------------------------------------------------------------------------------------------------- chunk after chunk


def _chunk_of(input: Tensor, count: int, chunk: int) -> int:
    """How many labels a chunk has."""
    if not chunk:
        chunk = CHUNK_BYTES // (max(input.shape[0], 1) * input.element_size())
        chunk = chunk // MULTIPLE * MULTIPLE or max(chunk, 1)
    return max(1, min(chunk, count))


def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    dense: Tensor | None,
    labels: Tensor | None,
    rows: Tensor | None,
    values: Tensor | None,
    operands: Sequence[Operand],
    spec: Spec,
    way: str,
    chunk: int,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The loss and the gradients wanted, for an upstream gradient of 1; in float16 not yet divided for the mean.

    They are in the compute type but for the weight's, which is in float32 for float16 alone.
    """
    if way == "op":
        way = backend.choose(input.device, True)[0]
    marks = None if labels is None or rows is None else Marks(labels, rows, values)
    with torch.no_grad(), compiled.no_autocast(input):
        return _Loop(input.detach(), weight.detach(), bias, scale, operands, spec, way, chunk, wants).run(dense, marks)


class _Loop:
    """The chunks of a call, one after the other. The attributes stay the same from chunk to chunk."""

    def __init__(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        operands: Sequence[Operand],
        spec: Spec,
        way: str,
        chunk: int,
        wants: Sequence[bool],
    ) -> None:
        self.input, self.weight, self.spec = input, weight, spec
        self.batch, self.count = input.shape[0], weight.shape[0]
        self.compute = compute_dtype(input.dtype)
        self.bias, self.scale = (None if t is None else t.detach().to(self.compute) for t in (bias, scale))
        self.operands = operands
        self.chunk = _chunk_of(input, self.count, chunk)
        self.wants = wants
        self.sum_chunk = {"triton": self._on_triton, "inductor": self._on_inductor}.get(way, self._on_eager)
        self.factor = (
            None if input.dtype is torch.float16 else _factor(spec, operands, self.batch * self.count, input.dtype)
        )

    def run(
        self, dense: Tensor | None, marks: Marks | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        input, weight, batch, count, compute = self.input, self.weight, self.batch, self.count, self.compute
        of_input, of_weight, of_bias, of_scale = self.wants
        new = functools.partial(torch.empty, dtype=compute, device=input.device)
        scatter = None
        if marks is not None:
            if input.is_cpu:
                _check_labels(marks, count)
            scatter = _Scatter(marks, batch, count, self.chunk)
        d_input = torch.zeros_like(input, dtype=compute) if of_input or of_scale else None
        wide = _weight_gradient_dtype(input.dtype)
        d_weight = torch.empty((count, input.shape[1]), dtype=wide, device=input.device) if of_weight else None
        d_bias = new(count) if of_bias else None
        scaled = input if self.scale is None or not of_weight else (input * self.scale).to(input.dtype)
        buffer = torch.empty(batch * self.chunk, dtype=input.dtype, device=input.device)
        sums = []
        for start in range(0, count, self.chunk):
            width = min(self.chunk, count - start)
            rows = weight.narrow(0, start, width)
            part = buffer.narrow(0, 0, batch * width).view(batch, width)
            torch.mm(input, rows.t(), out=part)
            target = dense.narrow(1, start, width) if scatter is None else scatter.fill(start, width)  # type: ignore[union-attr]
            sums.append(self.sum_chunk(part, target, [self._sliced(v, start, width) for v in self.operands], start))
            if scatter is not None:
                scatter.clear()
            if d_input is not None:
                _add_product(part, rows, d_input)
            if d_weight is not None:
                _product(part.t(), scaled, d_weight.narrow(0, start, width))
            if d_bias is not None:
                _sum_rows(part, d_bias.narrow(0, start, width))
        d_scale = (d_input * input.to(compute)).sum() if of_scale and d_input is not None else None
        if not of_input:
            d_input = None
        elif self.scale is not None and d_input is not None:
            d_input *= self.scale
        if d_bias is not None and self.bias is not None and self.bias.dim() == 0:
            d_bias = d_bias.sum()
        return self._loss(sums, marks), d_input, d_weight, d_bias, d_scale

    def _loss(self, sums: Sequence[Tensor], marks: Marks | None) -> Tensor:
        total = (
            torch.stack([part.sum() for part in sums]).sum() if sums else self.input.new_zeros((), dtype=self.compute)
        )
        if self.spec.reduction == "mean":
            total = total / cells.divisor_of(self.spec, self.operands, self.batch * self.count, self.input.dtype)
        if marks is not None and not marks.labels.is_cpu:
            total = torch.where(_strays(marks, self.count).any(), math.nan, total)
        return total.to(self.spec.result)

    def _sliced(self, value: Operand, start: int, width: int) -> Operand:
        """An operand as it meets a chunk."""
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[-1] != self.count or self.count == 1:
            return value
        return value.narrow(-1, start, width)

    def _on_eager(self, part: Tensor, target: Tensor, operands: Sequence[Operand], start: int) -> Tensor:
        """The sum of a chunk's loss; the slope is written over the chunk if it is wanted."""
        return self._in_slices(part, target, operands, self._bias_of(part, start), self.scale)

    def _bias_of(self, part: Tensor, start: int) -> Tensor | None:
        return None if self.bias is None else self._sliced(self.bias, start, part.shape[1])  # type: ignore[return-value]

    def _in_slices(
        self, part: Tensor, target: Tensor, operands: Sequence[Operand], bias: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=part.device)
        for x, y, own, *values in eager.slices([part, target, 0.0 if bias is None else bias, *operands], part):
            logits = _affine_(x.to(self.compute), own if bias is not None else None, scale)
            loss, slope = eager.loss_and_slope(self.spec, logits, y, values, want_slope=any(self.wants))
            assert loss is not None
            total += loss.sum()
            self._write(slope, x)
        return total

    def _write(self, slope: Tensor | None, part: Tensor) -> None:
        if slope is None:
            return
        if self.factor is None:
            part.copy_(slope)
        else:
            torch.mul(slope, self.factor, out=part)

    def _on_inductor(self, part: Tensor, target: Tensor, operands: Sequence[Operand], start: int) -> Tensor:
        """The same from one pass that Inductor wrote."""
        logits = _affine_(part.to(self.compute), self._bias_of(part, start), self.scale)
        engine, options = losses.engine(self.spec), compiled.Options("sum", self.compute)
        found = engine.value_and_gradient(logits, (target, *operands), options, gradient=any(self.wants))
        if found is None:
            part.copy_(logits)
            return self._in_slices(part, target, operands, None, None)
        self._write(found[1], part)
        return found[0]

    def _on_triton(self, part: Tensor, target: Tensor, operands: Sequence[Operand], start: int) -> Tensor:
        """The chunk's partial sums; the slope is written over the chunk if it is wanted."""
        bias = self._bias_of(part, start)
        given, places = list(operands), []
        for value in (self.scale, bias, self.factor):
            places.append(None if value is None else len(given))
            given += [] if value is None else [value]
        packed, kinds = pack_all(given, part, (self.compute,) * len(given))
        config = losses.choose(self.spec, part).config
        programs, width = blocks(part.numel(), config.block), part.shape[1]
        if target.stride(1) != 1 and width > 1:
            target = target.contiguous()
        strided = target.shape[0] > 1 and target.stride(0) != width
        partials = torch.empty(programs, dtype=self.compute, device=part.device)
        tile = tuning.tile(config, part.dtype.itemsize, tuning.lanes(part.device))
        kernel = _kernel(
            self.spec, target.dtype, kinds, tuple(places), strided, any(self.wants), self.compute, config, tile
        )
        if programs:
            kernel(programs, part, target, partials, part.numel(), width, target.stride(0), packed)
        return partials


@functools.cache
def _kernel(
    spec: Spec,
    target: torch.dtype,
    kinds: tuple[int, ...],
    places: tuple[int | None, ...],
    strided: bool,
    writes: bool,
    compute: torch.dtype,
    config: tuning.Config,
    tile: int,
) -> Kernel:
    known = losses.constants(spec, target)
    names = ("BASE", "BASE_COUNT", "BASE_STATIC", "RULE", "RULE_COUNT", "RULE_STATIC", "UNIT", "SMOOTHING")
    return Kernel(
        device_code("loss").descend,
        num_warps=config.num_warps,
        KINDS=kinds,
        **{name: known[name] for name in names},
        **dict(zip(("SCALE", "BIAS", "FACTOR"), places)),
        STRIDED=strided,
        WRITES=writes,
        COMPUTE=triton_dtype(compute),
        TILE=tile,
        BLOCK=config.block,
    )


def _affine_(logits: Tensor, bias: Tensor | None, scale: Tensor | None) -> Tensor:
    """`_affine` in place."""
    if scale is not None:
        logits *= scale
    if bias is not None:
        logits += bias
    return logits


def _weight_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the weight's gradient until backward: float32 for float16, in which it is not yet divided for the mean."""
    return torch.float32 if dtype is torch.float16 else dtype


def _factor(spec: Spec, operands: Sequence[Operand], count: int, dtype: torch.dtype) -> Operand | None:
    """1 / divisor; None for 1."""
    if spec.reduction != "mean":
        return None
    divisor = cells.divisor_of(spec, operands, count, dtype)
    return 1 / divisor if isinstance(divisor, Tensor) or divisor else math.nan


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out = left right. float16 factors of a float32 product are widened where the device does not add in float32 by itself."""
    if out.dtype is left.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda:
        torch.mm(left, right, out_dtype=out.dtype, out=out)
    else:
        torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _sum_rows(part: Tensor, out: Tensor) -> None:
    """out = the sum of the rows. On a GPU torch.sum takes twice the memory of a float32 chunk, four times of a bfloat16 one."""
    if part.is_cuda:
        _product(part.t(), torch.ones_like(part.narrow(1, 0, 1)), out.unsqueeze(1))
    else:
        torch.sum(part, 0, dtype=out.dtype, out=out)


def _add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out += left right."""
    if out.dtype is left.dtype:
        out.addmm_(left, right)
    elif left.is_cuda:
        out += torch.mm(left, right, out_dtype=out.dtype)
    else:
        out += torch.mm(left, right) if left.dtype is torch.bfloat16 else torch.mm(left.float(), right.float())


# ---------------------------------------------------------------------------------------------- autograd, eager and traced


def _setup(ctx: Any, arguments: tuple[Any, ...], outputs: tuple[Any, ...]) -> None:
    *tensors, operands, ctx.spec, ctx.way, ctx.chunk, ctx.wants = arguments
    _, *gradients = outputs
    if ctx.traced:
        ctx.mark_non_differentiable(*gradients)
    ctx.numbers, others = parted(operands)
    ctx.spent = False
    ctx.save_for_backward(*tensors, *gradients, *others)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    """The first backward takes the gradients that forward made; later ones recompute them from the saved inputs."""
    saved = ctx.saved_tensors
    given, gradients, others = saved[:8], list(saved[8:12]), saved[12:]
    operands = restored(ctx.numbers, others) if others else ctx.numbers
    spec: Spec = ctx.spec
    last = not (torch.is_grad_enabled() or is_exporting())
    if not (last and (backend.is_ordinary(g) or backend.is_one_op(g, everywhere=True))):
        return _differentiated(given, operands, spec, ctx.wants, g)
    if not ctx.traced and ctx.spent:
        arguments = (*given, operands, spec, ctx.way, ctx.chunk, ctx.wants)
        gradients = list(_forward(*arguments)[1:])
    ctx.spent = True
    input, weight = given[:2]
    factor = g
    if input.dtype is torch.float16:
        own = _factor(spec, operands, input.shape[0] * weight.shape[0], input.dtype)
        factor = g.float() if own is None else g.float() * own
    found: list[Tensor | None] = []
    for like, gradient, wanted in zip(given, gradients, ctx.wants):
        if not wanted:
            found.append(None)
        elif ctx.traced:
            found.append((gradient * factor.to(gradient.dtype)).to(like.dtype))
        else:
            found.append(losses.rescaled(gradient, factor, ctx.way).to(like.dtype))
    return tuple(found)


def _differentiated(
    given: Sequence[Any], operands: Sequence[Operand], spec: Spec, wants: Sequence[bool], g: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients by the formula, with all logits: differentiable, and under any transform."""
    tensors = list(given[:4])
    dense, labels, rows, values = given[4:8]
    marks = None if labels is None else Marks(labels, rows, values)
    at = [i for i in range(4) if wants[i]]

    def loss(*wanted: Tensor) -> Tensor:
        for i, tensor in zip(at, wanted):
            tensors[i] = tensor
        input, weight, bias, scale = tensors
        return formula(input, weight, bias, scale, dense, marks, operands, spec)

    pull: Any = torch.func.vjp(loss, *[tensors[i] for i in at])[1]
    found = iter(pull(g))
    return tuple([next(found) if wanted else None for wanted in wants])


def _decode(*flat: Any) -> tuple[Any, ...]:
    *given, tensors, numbers, text, result, chunk, wants = flat
    return *given, losses.decoded(given[0], tensors, numbers), cells.from_text(text, result), "op", chunk, wants


def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *_, result, _, wants = rest
    compute, wide = compute_dtype(input.dtype), _weight_gradient_dtype(input.dtype)
    none = input.new_empty(0)
    return (
        input.new_empty((), dtype=result),
        torch.empty_like(input, dtype=compute) if wants[0] else none,
        input.new_empty(weight.shape, dtype=wide) if wants[1] else none.clone(),
        input.new_empty(bias.shape, dtype=compute) if wants[2] and bias is not None else none.clone(),
        input.new_empty((), dtype=compute) if wants[3] else none.clone(),
    )


def _formula_of_op(*flat: Any) -> tuple[Tensor, ...]:
    input, weight, bias, scale, dense, labels, rows, values, operands, spec, *_ = _decode(*flat)
    marks = None if labels is None else Marks(labels, rows, values)
    loss = formula(input, weight, bias, scale, dense, marks, operands, spec)
    return loss, *_fake(*flat)[1:]


_OP = Fused(
    "linear_loss",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? target, Tensor? labels, Tensor? rows, Tensor? values, "
    f"{losses.TRACED}, ScalarType dtype, int chunk, bool[] wants) -> "
    "(Tensor loss, Tensor d_input, Tensor d_weight, Tensor d_bias, Tensor d_scale)",
    forward=_forward,
    fake=_fake,
    setup=_setup,
    backward=_backward,
    decode=_decode,
    formula=_formula_of_op,
    outputs=5,
)
