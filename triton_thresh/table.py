"""The op table of the README, from the registry."""

from __future__ import annotations

from .families import Gate, LearnedGate, Loss
from .registry import OPS

BEGIN, END = "<!-- ops: begin -->", "<!-- ops: end -->"


def op_table() -> str:
    """Three Markdown tables: gates with value and gradient, losses with element loss and weight, gradients with what passes."""
    gates = ["| gate | y | dy/dx |", "|---|---|---|"]
    losses = ["| loss | element loss | times |", "|---|---|---|"]
    gradients = ["| gradient | of what | passes |", "|---|---|---|"]
    for op in OPS.values():
        if isinstance(op, (Gate, LearnedGate)):
            gates.append(f"| `{op.name}` | {_cell(op.formula)} | {_cell(op.gradient)} |")
        elif isinstance(op, Loss):
            losses.append(f"| `{op.name}` | {_cell(op.formula)} | {_cell(op.weighing)} |")
        else:
            gradients.append(f"| `{op.name}` | {_cell(op.subject)} | {_cell(op.passes)} |")
    return "\n".join([*gates, "", *losses, "", *gradients])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def updated(readme: str) -> str:
    """A README with the table between its two markers made anew."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{op_table()}\n{END}{tail}"
