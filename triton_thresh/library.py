"""The fused losses, learned gates and gradient thresholding as ops of torch.library: what compilers, tracers and exporters hold.

An op shows a compiler a fake kernel and an autograd formula, and chooses the backend when it runs. Gates whose threshold does
not learn have none: traced, they are plain torch. Inductor fuses such a selection with its neighbours, where it moves no byte
of its own; as an op it would move 2s + 1/8 bytes an element each way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_exporting

from . import eager, foreach, layout, reference
from .backend import OP_DEVICES, is_plain, is_traced
from .dispatch import chosen, launcher
from .reference import LossSpec, Surrogate
from .rounding import round_to
from .rules import Numbers, Operand

if TYPE_CHECKING:
    from .learned import LearnedCall

NAMESPACE = "triton_thresh"

if "_library" in globals():  # this module is being reloaded
    globals()["_library"]._destroy()
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_ops = torch.ops.triton_thresh


def _define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Tensors reach the kernel with the strides that the fake kernel was shown: codes are read back by them."""
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def _decompose(name: str, formula: Callable[..., Any]) -> None:
    """`formula`, in plain torch, is what an exported program's `run_decompositions` puts in the place of the op.

    Torch asks the op wherever it traces; to compilers, which are to keep the op, the answer is that there is none. A kernel for
    CompositeImplicitAutograd would say the same, but Inductor refuses to call an op that has one.
    """

    def decomposed(*arguments: Any) -> Any:
        return formula(*arguments) if is_exporting() else NotImplemented

    getattr(_ops, name).default.decompose = decomposed


def _may_call_op(*gradients: Tensor) -> bool:
    """In backward. Else, to be differentiated again, transformed or exported, it takes a formula in plain torch."""
    if torch.is_grad_enabled() or is_exporting():
        return False
    return is_plain(*gradients) or is_traced(*gradients)


def _no_pull(ctx: Any, *_: Tensor) -> Any:
    raise RuntimeError(f"{NAMESPACE}: an op of a backward pass has no gradient; differentiate the forward op twice")


# ---------------------------------------------------------------------------------------------------------------- losses

# An operand is an entry of `tensors`, or where that is None of `numbers`; rule is the name of its class.
_SPEC = "Tensor?[] tensors, float[] numbers, str base, str rule, int base_count, int rule_count, str reduction"


def loss(spec: LossSpec, input: Tensor, target: Tensor, operands: Sequence[Operand]) -> Tensor:
    """A loss as an op, its gradient computed in the forward pass where autograd.Loss does so."""
    tensors = [v if isinstance(v, Tensor) else None for v in operands]
    numbers = [math.nan if isinstance(v, Tensor) else torch.sym_float(v) for v in operands]
    named = (spec.base, spec.rule.__name__, spec.base_count, spec.rule_count, spec.reduction)
    records = input.requires_grad and torch.is_grad_enabled()
    return _ops.loss.default(input, target, tensors, numbers, *named, spec.result, records)[0]  # type: ignore[no-any-return]


@functools.cache
def _specified(base: str, rule: str, base_count: int, rule_count: int, reduction: str, dtype: torch.dtype) -> LossSpec:
    (kind,) = (kind for kind in reference.RULES if kind.__name__ == rule)
    return LossSpec(base, kind, base_count, rule_count, reduction, dtype)


def _operands(input: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[float]) -> tuple[Operand, ...]:
    dtype = reference.compute_dtype(input.dtype)
    if all(tensor is None for tensor in tensors):
        return Numbers([round_to(number, dtype) for number in numbers])
    return tuple([round_to(number, dtype) if tensor is None else tensor for tensor, number in zip(tensors, numbers)])


def _loss_shell(spec: LossSpec, input: Tensor, records: bool) -> ModuleType:
    return launcher("launch") if chosen(spec.key, input, records)[0] == "triton" else eager


def _loss(
    input: Tensor, target: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[float], *settings: Any
) -> tuple[Tensor, Tensor]:
    *named, records = settings
    if not input.numel():
        output, gradient = _loss_fake(input, target, tensors, numbers, *settings)
        return output.fill_(math.nan if "mean" in named else 0), gradient
    spec, operands = _specified(*named), _operands(input, tensors, numbers)
    fused = records and reference.is_fused(spec.reduction, input.dtype)
    shell = _loss_shell(spec, input, records)
    output, gradient = shell.loss_forward(spec, input, target, operands, want_gradient=fused)
    return output, input.new_empty(0) if gradient is None else gradient


def _loss_fake(input: Tensor, target: Tensor, tensors: Any, numbers: Any, *settings: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, dtype, records = settings
    output = torch.empty_like(input, dtype=dtype) if reduction == "none" else input.new_empty((), dtype=dtype)
    fused = records and reference.is_fused(reduction, input.dtype)
    return output, torch.empty_like(input) if fused else input.new_empty(0)


def _loss_formula(
    input: Tensor, target: Tensor, tensors: Sequence[Tensor | None], numbers: Sequence[float], *settings: Any
) -> tuple[Tensor, Tensor]:
    spec = _specified(*settings[:-1])
    loss = reference.loss(spec, input, target, _operands(input, tensors, numbers))
    return loss, _loss_fake(input, target, tensors, numbers, *settings)[1]


def _loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, target, tensors, ctx.numbers, *ctx.spec, records = inputs
    *_, reduction, _ = ctx.spec
    ctx.fused = records and reference.is_fused(reduction, input.dtype)
    ctx.save_for_backward(input, target, output[1], *tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _loss_pull(ctx: Any, gradient: Tensor, _: None) -> tuple[Any, ...]:
    """The gradient of forward times the upstream one: a new tensor, which compilers fuse into its consumer."""
    input, target, ahead, *tensors = ctx.saved_tensors
    if not _may_call_op(gradient):
        operands = _operands(input, tensors, ctx.numbers)
        dx = reference.loss_gradient(_specified(*ctx.spec), input, target, operands, gradient)
    elif ctx.fused:
        dtype = reference.compute_dtype(input.dtype)
        dx = (ahead.to(dtype) * gradient.to(dtype)).to(input.dtype)
    else:
        dx = _ops.loss_backward.default(gradient, input, target, tensors, ctx.numbers, *ctx.spec[:-1])
    whole = all(isinstance(tensor, Tensor) for tensor in tensors)  # a list of tensors: torch wants a list back
    return dx, None, [None] * len(tensors) if whole else None, *[None] * (2 + len(ctx.spec))


def _loss_backward(
    gradient: Tensor,
    input: Tensor,
    target: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[float],
    *named: Any,
) -> Tensor:
    if not input.numel():
        return torch.empty_like(input)
    spec, operands = _specified(*named, input.dtype), _operands(input, tensors, numbers)
    return _loss_shell(spec, input, True).loss_backward(spec, input, target, operands, gradient)  # type: ignore[no-any-return]


def _loss_backward_fake(gradient: Tensor, input: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(input)


_define(
    "loss",
    f"(Tensor input, Tensor target, {_SPEC}, ScalarType dtype, bool records) -> (Tensor loss, Tensor gradient)",
    _loss,
    _loss_fake,
)
_decompose("loss", _loss_formula)
_define(
    "loss_backward",
    f"(Tensor gradient, Tensor input, Tensor target, {_SPEC}) -> Tensor",
    _loss_backward,
    _loss_backward_fake,
)
torch.library.register_autograd(f"{NAMESPACE}::loss", _loss_pull, setup_context=_loss_setup, lib=_library)
torch.library.register_autograd(f"{NAMESPACE}::loss_backward", _no_pull, lib=_library)

# -------------------------------------------------------------------------------------------- gates whose threshold learns

# The threshold is a tensor or, where that is None, `number`. Codes are `bits` planes of packed bits, in memory whose size
# follows from the input's shape; `size` and `stride` are those of the dense tensor they belong to (None: contiguous).
_GATE = "Tensor? threshold, float number, str op, float[] constants, bool input_gradient, int bits"
_CODES = "Tensor codes, SymInt[] size, SymInt[]? stride"


def learned_gate(op: str, surrogate: Surrogate, input: Tensor, threshold: Operand) -> Any:
    """A gate whose threshold may learn, as an op: two bits an element for backward, one where only the input learns."""
    tensor = threshold if isinstance(threshold, Tensor) else None
    number = math.nan if isinstance(threshold, Tensor) else torch.sym_float(threshold)
    learns = tensor is not None and tensor.requires_grad
    bits = 0
    if torch.is_grad_enabled() and (learns or input.requires_grad):
        bits = 2 if learns or surrogate.input_gradient else 1
    output, count, _ = _ops.learned_gate.default(
        input, tensor, number, op, surrogate.constants, surrogate.input_gradient, bits
    )
    return (output, count) if surrogate.counts else output


class _Gate(NamedTuple):
    """The last arguments of every op on gates whose threshold may learn."""

    tensor: Tensor | None
    number: float
    op: str
    constants: Sequence[float]
    input_gradient: bool
    bits: int

    @property
    def threshold(self) -> Operand:
        return self.number if self.tensor is None else self.tensor

    def surrogate(self) -> Surrogate:
        """The call as plain torch computes it."""
        return _registered(self.op).surrogate(tuple(self.constants), self.input_gradient)  # type: ignore[no-any-return]

    @property
    def key(self) -> str:
        """Its name in the tables."""
        return _registered(self.op).learned_name  # type: ignore[no-any-return]

    def lowered(self, input: Tensor) -> tuple[LearnedCall, Operand]:
        """The call as the kernels' launcher takes it, and the threshold as it is compared."""
        constants = tuple(self.constants)
        return _registered(self.op).learned_call(input, self.threshold, constants, self.input_gradient)  # type: ignore[no-any-return]

    def rows(self, like: Tensor, device: torch.device) -> tuple[int, tuple[int, int]]:
        """How codes lie in their memory (learned.rows), whichever backend writes and whichever reads them."""
        if device.type not in OP_DEVICES or not like.numel():
            return max(1, -(-like.numel() // 8)), (0, 0)
        return launcher("learned").rows(*self.lowered(like), like, device)  # type: ignore[no-any-return]


def _registered(name: str) -> Any:
    from .registry import OPS

    return OPS[name]


def _dense(dtype: torch.dtype, size: Sequence[int], stride: Sequence[int] | None) -> Tensor:
    """A tensor without data."""
    if stride is None:
        return torch.empty(tuple(size), dtype=dtype, device="meta")
    return torch.empty_strided(tuple(size), tuple(stride), dtype=dtype, device="meta")


def _codes_of(input: Tensor, gate: _Gate, counts: bool) -> Tensor:
    """Memory for codes. Their rows are at most an eighth of the elements long, or as short as can be: learned._rows."""
    least = 16 + (input.shape[-1] if counts else 0)
    return input.new_empty(gate.bits * (input.numel() // 4 + least), dtype=torch.uint8)


def _learned_gate(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    gate = _Gate(*arguments)
    surrogate = gate.surrogate()
    codes = _codes_of(input, gate, surrogate.counts)
    if chosen(gate.key, input, gate.bits > 0)[0] == "triton":
        output, count, _ = launcher("learned").forward(*gate.lowered(input), input, gate.bits, codes)
        return output, input.new_empty(0) if count is None else count, codes
    planes = surrogate.codes(input, gate.threshold, *surrogate.constants)
    output = torch.empty_like(input).copy_(surrogate.value(input, gate.threshold, *surrogate.constants))
    count = input.new_empty(0)
    if surrogate.counts:
        count = reference.counted(planes[0], input.dtype).contiguous()
    if gate.bits:
        like = _dense(input.dtype, input.shape, None if surrogate.counts else output.stride())
        width, _ = gate.rows(like, input.device)
        flat = [torch.empty_strided(like.shape, like.stride(), dtype=p.dtype, device=p.device).copy_(p) for p in planes]
        layout.pack([p.as_strided((p.numel(),), (1,)) for p in flat[: gate.bits]], width, codes)
    return output, count, codes


def _learned_gate_fake(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    gate, count = _Gate(*arguments), input.new_empty(0)
    counts = gate.surrogate().counts
    if counts:
        count = input.new_empty(input.shape[:-1], dtype=reference.compute_dtype(input.dtype))
    return torch.empty_like(input), count, _codes_of(input, gate, counts)


def _learned_gate_formula(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    gate = _Gate(*arguments)
    surrogate = gate.surrogate()
    outputs = reference.straight_through(surrogate, input, gate.threshold)
    output, count = outputs if surrogate.counts else (outputs, input.new_empty(0))
    return output, count, _codes_of(input, gate, surrogate.counts)


def _learned_gate_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, *ctx.gate = inputs
    gate, (values, count, codes) = _Gate(*ctx.gate), output
    ctx.gate[0] = None
    ctx.counts = gate.surrogate().counts
    ctx.mark_non_differentiable(*([codes] if ctx.counts else [count, codes]))
    ctx.set_materialize_grads(False)
    ctx.packed = gate.bits >= (2 if ctx.needs_input_grad[1] or gate.input_gradient else 1) and not is_exporting()
    ctx.save_for_backward(codes if ctx.packed else input, gate.tensor)
    ctx.dtype, ctx.size, ctx.stride = input.dtype, input.shape, None if ctx.counts else values.stride()


def _learned_gate_pull(ctx: Any, gradient: Tensor | None, of_count: Tensor | None, _: None) -> tuple[Any, ...]:
    learns, nothing = ctx.needs_input_grad[1], [None] * 5
    if gradient is None and of_count is None:
        return None, None, *nothing
    saved, threshold = ctx.saved_tensors
    gate = _Gate(threshold, *ctx.gate[1:])
    upstream = [gradient, of_count] if ctx.counts else [gradient]
    if ctx.packed and _may_call_op(*(g for g in upstream if g is not None)):
        if gradient is None:
            gradient = of_count.new_zeros(ctx.size, dtype=ctx.dtype)  # type: ignore[union-attr]
        elif ctx.counts and of_count is None:
            of_count = gradient.new_zeros(ctx.size[:-1], dtype=reference.compute_dtype(ctx.dtype))
        dx, dt = _ops.learned_gate_backward.default(gradient, of_count, learns, saved, ctx.size, ctx.stride, *gate)
        return dx, dt if learns else None, *nothing
    surrogate = gate.surrogate()
    if ctx.packed:
        codes = _ops.learned_gate_codes.default(ctx.dtype, saved, ctx.size, ctx.stride, *gate)
    else:
        codes = surrogate.codes(saved, gate.threshold, *surrogate.constants)
    dx, each = reference.pull(surrogate, upstream, codes, gate.threshold, ctx.dtype)
    return dx, layout.summed(each, threshold.shape).to(threshold.dtype) if learns else None, *nothing


def _learned_gate_backward(
    gradient: Tensor, of_count: Tensor | None, learns: bool, codes: Tensor, size: Any, stride: Any, *arguments: Any
) -> tuple[Tensor, Tensor]:
    gate, like = _Gate(*arguments), _dense(gradient.dtype, size, stride)
    upstream = [gradient] if of_count is None else [gradient, of_count]
    if chosen(gate.key, gradient, True)[0] == "triton":
        launch, learned = launcher("launch"), launcher("learned")
        width, pattern = gate.rows(like, gradient.device)
        packed = learned.Codes(launch.Mask(codes, width, tuple(like.shape), like.stride()), pattern)
        shape = gate.tensor.shape if learns and gate.tensor is not None else None
        dx, dt = learned.backward(*gate.lowered(like), packed, upstream, shape)
    else:
        planes = _learned_gate_codes(gradient.dtype, codes, size, stride, *arguments)
        pulled, each = reference.pull(gate.surrogate(), upstream, planes, gate.threshold, gradient.dtype)
        dx = torch.empty_strided(like.shape, like.stride(), dtype=pulled.dtype, device=pulled.device).copy_(pulled)
        dt = layout.summed(each, gate.tensor.shape) if learns and gate.tensor is not None else None
    if dt is None or gate.tensor is None:
        return dx, gradient.new_empty(0)
    return dx, dt.to(gate.tensor.dtype).contiguous()


def _learned_gate_backward_fake(
    gradient: Tensor, of_count: Tensor | None, learns: bool, codes: Tensor, size: Any, stride: Any, *arguments: Any
) -> tuple[Tensor, Tensor]:
    threshold = _Gate(*arguments).tensor
    dx = gradient.new_empty(size) if stride is None else gradient.new_empty_strided(size, stride)
    if threshold is None or not learns:
        return dx, gradient.new_empty(0)
    return dx, gradient.new_empty(threshold.shape, dtype=threshold.dtype)


def _learned_gate_codes(
    dtype: torch.dtype, codes: Tensor, size: Any, stride: Any, *arguments: Any
) -> tuple[Tensor, Tensor]:
    gate, like = _Gate(*arguments), _dense(dtype, size, stride)
    width, _ = gate.rows(like, codes.device)
    flat = [layout.unpack(codes, width, plane, like.numel()) for plane in range(gate.bits)]
    low, *high = (plane.as_strided(like.shape, like.stride()) for plane in flat)
    return low, high[0] if high else torch.zeros_like(low)


def _learned_gate_codes_fake(
    dtype: torch.dtype, codes: Tensor, size: Any, stride: Any, *arguments: Any
) -> tuple[Tensor, Tensor]:
    low = codes.new_empty(size, dtype=torch.bool)
    if stride is not None:
        low = codes.new_empty_strided(size, stride, dtype=torch.bool)
    return low, torch.empty_like(low)


_define(
    "learned_gate",
    f"(Tensor input, {_GATE}) -> (Tensor, Tensor count, Tensor codes)",
    _learned_gate,
    _learned_gate_fake,
)
_decompose("learned_gate", _learned_gate_formula)
_define(
    "learned_gate_backward",
    f"(Tensor gradient, Tensor? count_gradient, bool learns, {_CODES}, {_GATE}) -> (Tensor dx, Tensor dt)",
    _learned_gate_backward,
    _learned_gate_backward_fake,
)
_define(
    "learned_gate_codes",
    f"(ScalarType dtype, {_CODES}, {_GATE}) -> (Tensor low, Tensor high)",
    _learned_gate_codes,
    _learned_gate_codes_fake,
)
torch.library.register_autograd(
    f"{NAMESPACE}::learned_gate", _learned_gate_pull, setup_context=_learned_gate_setup, lib=_library
)
torch.library.register_autograd(f"{NAMESPACE}::learned_gate_backward", _no_pull, lib=_library)

# ------------------------------------------------------------------------------------------------------------- gradients


def _threshold_gradients_(gradients: list[Tensor], threshold: Any, *, return_kept: bool = False) -> Tensor:
    """One threshold for all, or one for each; the kept fraction, or nothing."""
    if isinstance(threshold, list) and len(threshold) == 1:
        (threshold,) = threshold
    kept = foreach.keep_large_in_(gradients, gradients, "threshold_gradients_", threshold, return_kept)
    return gradients[0].new_empty(0) if kept is None else kept


def _threshold_gradients_fake(gradients: list[Tensor], threshold: Any, *, return_kept: bool = False) -> Tensor:
    return gradients[0].new_empty(() if return_kept else 0, dtype=torch.float32 if return_kept else None)


for _overload, _kind in (("", "float[]"), (".Tensor", "Tensor")):
    _define(
        f"threshold_gradients_{_overload}",
        f"(Tensor(a!)[] gradients, {_kind} threshold, *, bool return_kept=False) -> Tensor",
        _threshold_gradients_,
        _threshold_gradients_fake,
    )
