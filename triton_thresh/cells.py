"""The grid of losses: which base, rule and options a call asks for, and the loss as a formula in plain torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from .bases import BASES, Base, times
from .checks import Operand, cast, compute_dtype, round_to
from .launch import Packed, pack_all
from .rules import RULES, Element, Rule, Unweighted

_KINDS: Mapping[str, type[Any]] = MappingProxyType({kind.__name__: kind for kind in (*BASES, *RULES, Unweighted)})

# The options that a loss may have, in the order of their operands; the last of them select, and are compared as they are.
OPTIONS = ("weight", "label_smoothing", "least_positive", "divisor", "mask", "kept", "ignore_index")
SELECTING = ("mask", "kept", "ignore_index")
OPERAND, MISSING = -1, -2

# ------------------------------------------------------------------------------------------------------ what is computed


@dataclass(frozen=True, eq=False)
class Spec:
    """The loss that is computed; made by `_spec`, once each. Operands travel beside it: the base's, the rule's, the options'."""

    base: type[Base]
    base_fields: tuple[str, ...]
    base_static: tuple[tuple[str, str], ...]
    rule: type[Rule]
    rule_fields: tuple[str, ...]
    rule_static: tuple[tuple[str, str], ...]
    options: tuple[str, ...]  # some of OPTIONS
    stats: bool
    reduction: str
    result: torch.dtype

    @functools.cached_property
    def cell(self) -> str:
        """The name of base and rule."""
        return f"{self.base.snake_name()}.{self.rule.__name__}"

    @functools.cached_property
    def key(self) -> str:
        """The name in the tables of block sizes. A reduction never searches, so it has another than what is not reduced."""
        return self.cell + (".none" if self.reduction == "none" else "")

    @property
    def text(self) -> str:
        """The same for the schema of an op, less the result's dtype; made of what Dynamo can trace."""
        statics = [
            ",".join([f"{name}={value}" for name, value in pairs]) for pairs in (self.base_static, self.rule_static)
        ]
        base = f"{self.base.__name__}/{','.join(self.base_fields)}/{statics[0]}"
        rule = f"{self.rule.__name__}/{','.join(self.rule_fields)}/{statics[1]}"
        return f"{base}/{rule}/{','.join(self.options)}/{'stats' if self.stats else ''}/{self.reduction}"

    def parts(self, operands: Sequence[Operand]) -> tuple[Base, Rule, dict[str, Operand]]:
        """The base, the rule and the options, made of these operands."""
        first, second = len(self.base_fields), len(self.base_fields) + len(self.rule_fields)
        base = self.base(**dict(zip(self.base_fields, operands)), **_values(self.base_static))
        rule = self.rule(**dict(zip(self.rule_fields, operands[first:second])), **_values(self.rule_static))
        return base, rule, dict(zip(self.options, operands[second:]))

    @functools.cached_property
    def static(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The constants for which the device functions of base and rule are compiled.

        OPERAND stands for an operand, MISSING for None.
        """
        base, rule = (
            tuple(_constant(_values(pairs).get(name, OPERAND)) for name in kind.maybe_static())
            for kind, pairs in ((self.base, self.base_static), (self.rule, self.rule_static))
        )
        return base, (self.base.kind, *rule)


def _values(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Constants from their text. Dynamo takes a text for what it is, where it would leave a number open."""
    named = {"None": None, "True": True, "False": False}
    return {name: named[text] if text in named else int(text) for name, text in pairs}


def _constant(value: Any) -> Any:
    return MISSING if value is None else value


@functools.cache
def _spec(*fields: Any) -> Spec:
    return Spec(*fields)


@functools.cache
def from_text(text: str, result: torch.dtype) -> Spec:
    base, base_fields, base_static, rule, rule_fields, rule_static, options, stats, reduction = text.split("/")
    names = [tuple(part.split(",")) if part else () for part in (base_fields, rule_fields, options)]
    pairs = [[pair.partition("=") for pair in part.split(",") if pair] for part in (base_static, rule_static)]
    statics = [tuple((name, value) for name, _, value in part) for part in pairs]
    parts: Any = _KINDS[base], names[0], statics[0], _KINDS[rule], names[1], statics[1]
    return _spec(*parts, names[2], stats == "stats", reduction, result)


def specify(
    base: Base, rule: Rule, options: Mapping[str, Operand], stats: bool, reduction: str, result: torch.dtype
) -> tuple[Spec, tuple[Operand, ...]]:
    """The loss of a base, a rule and options, and the operands of all three in the order of the spec."""
    rule = rule.on(base)
    options = {name: options[name] for name in OPTIONS if name in options}
    bases, rules = base.operands(), rule.operands()
    make: Any = Spec if is_dynamo_compiling() else _spec  # Dynamo looks through a cache, and warns
    parts: Any = type(base), tuple(bases), base.static(), type(rule), tuple(rules), rule.static()
    spec = make(*parts, tuple(options), stats, reduction, result)
    return spec, (*bases.values(), *rules.values(), *options.values())


def rounded(operands: Sequence[Operand], dtype: torch.dtype) -> tuple[Operand, ...]:
    """Operands whose numbers are those that the compute type of `dtype` holds."""
    compute = compute_dtype(dtype)
    return tuple([value if isinstance(value, Tensor) else round_to(float(value), compute) for value in operands])


class Numbers(tuple[float, ...]):
    """Operands that are numbers alone, with what kernels take for them: for all but float64, which they compute in float32."""

    def parts(self, spec: Spec) -> tuple[Base, Rule, dict[str, Operand]]:
        """The parts of the loss whose operands these are: made once, because that takes as long as the loss of a small tensor."""
        found: dict[Spec, Any] = self.__dict__.setdefault("_parts", {})
        if spec not in found:
            found[spec] = spec.parts(self)
        return found[spec]  # type: ignore[no-any-return]

    @functools.cached_property
    def packed(self) -> Packed:
        return pack_all(self, None, (torch.float32,) * len(self))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def specify_numbers(
    base: Base, rule: Rule, reduction: str, dtype: torch.dtype, result: torch.dtype
) -> tuple[Spec, Numbers]:
    """Most calls have the same settings each time: this takes 7 of their 16 µs."""
    spec, operands = specify(base, rule, {}, False, reduction, result)
    compute = compute_dtype(dtype)
    return spec, Numbers([round_to(float(value), compute) for value in operands])


# --------------------------------------------------------------------------------------------------------------- counts


class LossStats(NamedTuple):
    """How a loss's predictions fared, as 0-dim int64 tensors on the device: no number is read by the host.

    Attributes:
        valid: elements that count: all of them, without a mask and an `ignore_index`.
        positive: those whose target is positive: above 0.5, or the rule's `target_threshold`; for a base of values, from the
            rule's `threshold` on.
        above: those whose prediction is at least the rule's `threshold`, or 0.5.
        above_positive: those that are both.

    Examples:
        >>> from triton_thresh import threshold_loss
        >>> x, y = torch.tensor([2.0, -1.0, 3.0]), torch.tensor([1.0, 1.0, 0.0])
        >>> loss, stats = threshold_loss(x, y, return_stats=True)
        >>> stats.precision, stats.recall
        (tensor(0.5000), tensor(0.5000))
    """

    valid: Tensor
    positive: Tensor
    above: Tensor
    above_positive: Tensor

    @property
    def precision(self) -> Tensor:
        """The share of predicted positives that are positive."""
        return self.above_positive / self.above

    @property
    def recall(self) -> Tensor:
        """The share of positives that are predicted positive."""
        return self.above_positive / self.positive

    @property
    def f1(self) -> Tensor:
        """The harmonic mean of precision and recall."""
        return 2 * self.above_positive / (self.above + self.positive)

    @property
    def accuracy(self) -> Tensor:
        """The share of valid elements that are predicted right."""
        wrong = self.above + self.positive - 2 * self.above_positive
        return (self.valid - wrong) / self.valid


# -------------------------------------------------------------------------------------------------------------- formula


def valid_of(options: Mapping[str, Operand], y: Tensor) -> Tensor | None:
    """True where an element counts: the mask, and no target to ignore; None for everywhere. `y` is the target as given."""
    valid = options.get("mask")
    if "ignore_index" in options:
        differs = _differs(y, options["ignore_index"])
        valid = differs if valid is None else differs & valid
    assert valid is None or isinstance(valid, Tensor)
    return valid


def _differs(y: Tensor, ignored: Operand) -> Tensor:
    """True where a target is not the one to ignore. NaN ignores NaN; among integers it ignores nothing."""
    if isinstance(ignored, Tensor):
        return torch.where(ignored == ignored, y != ignored.to(y.dtype), y == y)
    if ignored != ignored:
        return y == y
    return y != (ignored if y.is_floating_point() else int(ignored))  # torch compares an int without rounding y


def smoothed(options: Mapping[str, Operand], base: Base, y: Tensor) -> Tensor:
    """y (1 - e) + e / 2 for a label smoothing of e; NaN for a target outside [0, 1] where the base takes none."""
    share = options.get("label_smoothing")
    if share is None:
        return y
    smooth = y * (1 - share) + 0.5 * share
    return torch.where((y >= 0) & (y <= 1), smooth, torch.nan) if base.unit_targets else smooth


def chosen_of(options: Mapping[str, Operand], valid: Tensor | None) -> Tensor | None:
    """True where an element has a loss: it counts, and a rule kept it."""
    kept = options.get("kept")
    if kept is None:
        return valid
    assert isinstance(kept, Tensor)
    return kept if valid is None else kept & valid


def element_loss(spec: Spec, x: Tensor, y: Tensor, operands: Sequence[Operand], *, fast: bool = False) -> Tensor:
    """The weighted element loss in the compute type, in plain torch: differentiable."""
    dtype = compute_dtype(x.dtype)
    base, rule, options = wide_parts(spec, operands, dtype)
    chosen = chosen_of(options, valid_of(options, y)) if options else None
    x, y = cast(x, dtype), cast(y, dtype)
    weight = options.get("weight")
    if chosen is not None and not fast:  # what is left out may hold NaN, which would meet a gradient of 0
        x, y = torch.where(chosen, x, 0.5), torch.where(chosen, y, 0.5)
        weight = None if weight is None else torch.where(chosen, weight, 0)
    y = smoothed(options, base, y) if options else y
    loss = base.value(x, y) if fast else base.loss(x, y)
    factor = rule.weight(Element(base, x, y, loss, fast))
    if factor is not None:
        loss = times(loss, factor) if rule.slopes and not fast else loss * factor
    if weight is not None:
        loss = loss * weight
    return loss if chosen is None else torch.where(chosen, loss, 0)


def wide_parts(spec: Spec, operands: Sequence[Operand], dtype: torch.dtype) -> tuple[Base, Rule, dict[str, Operand]]:
    """The parts, their operands in the compute type but for those that select."""
    if type(operands) is Numbers:
        return operands.parts(spec)
    count = len(operands) - sum(name in SELECTING for name in spec.options)
    return spec.parts([wide(value, dtype) if i < count else value for i, value in enumerate(operands)])


def wide(value: Operand, dtype: torch.dtype) -> Operand:
    return cast(value, dtype) if isinstance(value, Tensor) else value


def divisor_of(spec: Spec, operands: Sequence[Operand], count: int, dtype: torch.dtype) -> Operand:
    """The divisor of a loss of `count` elements, in the compute type of `dtype`."""
    if spec.reduction != "mean":
        return 1.0
    if "divisor" not in spec.options:
        return count
    return wide(spec.parts(operands)[2]["divisor"], compute_dtype(dtype))


def formula(spec: Spec, x: Tensor, y: Tensor, operands: Sequence[Operand]) -> Tensor:
    """The loss in plain torch, differentiable in x and y, reduced and rounded once to the result's dtype."""
    loss = element_loss(spec, x, y, operands)
    if spec.reduction == "mean" and "divisor" not in spec.options:
        loss = loss.mean()
    elif spec.reduction != "none":
        loss = loss.sum() / divisor_of(spec, operands, x.numel(), x.dtype)
    return loss.to(spec.result)


def differentiable_gradient(spec: Spec, x: Tensor, y: Tensor, operands: Sequence[Operand], g: Tensor) -> Tensor:
    """d loss / dx times the upstream gradient: differentiable in x and in the gradient, and under any transform."""
    slope: Tensor = torch.func.grad(lambda x: element_loss(spec, x, y, operands).sum())(x)
    gradient = slope * (g.to(compute_dtype(x.dtype)) / divisor_of(spec, operands, x.numel(), x.dtype))
    _, _, options = spec.parts(operands)
    chosen = chosen_of(options, valid_of(options, y))
    if chosen is not None:  # g / 0 is infinite where nothing is valid
        gradient = torch.where(chosen, gradient, 0)
    return gradient.to(x.dtype)


def count_stats(spec: Spec, x: Tensor, y: Tensor, operands: Sequence[Operand]) -> Tensor:
    """The int64 counts of `LossStats`, in plain torch."""
    dtype = compute_dtype(x.dtype)
    base, rule, options = wide_parts(spec, operands, dtype)
    valid = valid_of(options, y)
    x, y = x.detach().to(dtype), smoothed(options, base, y.detach().to(dtype))
    least = next(iter(rule.operands().values())) if rule.decides else options["least_positive"]
    above = x >= least
    positive = y >= least if base.kind == "values" else y > getattr(rule, "target_threshold", 0.5)
    if valid is None:
        valid = torch.ones_like(above)
    valid = valid.expand(x.shape)
    return torch.stack([part.sum() for part in (valid, valid & positive, valid & above, valid & above & positive)])
