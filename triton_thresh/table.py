"""The op table of the README, from the registry."""

from __future__ import annotations

from .registry import OPS, Gate, LearnedGate

BEGIN, END = "<!-- ops: begin -->", "<!-- ops: end -->"


def op_table() -> str:
    """Two Markdown tables: gates with value and gradient, losses with element loss and weight."""
    gates = ["| gate | y | dy/dx |", "|---|---|---|"]
    losses = ["| loss | element loss | times |", "|---|---|---|"]
    for op in OPS.values():
        if isinstance(op, (Gate, LearnedGate)):
            gates.append(f"| `{op.name}` | {_cell(op.formula)} | {_cell(op.gradient)} |")
        else:
            losses.append(f"| `{op.name}` | {_cell(op.formula)} | {_cell(op.weighing)} |")
    return "\n".join([*gates, "", *losses])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def updated(readme: str) -> str:
    """A README with the table between its two markers made anew."""
    head, rest = readme.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n{op_table()}\n{END}{tail}"
