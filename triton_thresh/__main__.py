"""Command line: ``python -m triton_thresh ops | explain | info | tune``."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch

import triton_thresh as tt

from . import backend, measured, tune, tuning
from .families import ForeachGate, Gate, GradientGate, LearnedGate
from .table import op_table, updated


def info(args: argparse.Namespace) -> int:
    """Versions, where it is installed, tables of block sizes, and what would run on each device."""
    print(f"triton_thresh {tt.__version__} in {Path(tt.__file__).parent}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    if backend.has_triton():
        import triton

        print(f"triton {triton.__version__}{' (interpreter)' if backend.interpreting() else ''}")
    else:
        print("triton is not installed: every op runs in eager torch")
    print(f"backend asked for: {tt.get_backend()}")
    print(f"block sizes shipped for: {', '.join(measured.shipped_devices()) or 'no GPU yet'}")
    print(f"block sizes found by searches: {measured.cache_folder()}; a search may run: {_yes(tuning.may_search())}")
    for device in (torch.device("cpu"), *_gpus()):
        name = ""
        if device.type != "cpu":
            own = str(torch.get_device_module(device).get_device_name(device))
            shipped, found = (len(table(own).entries) for table in (measured.shipped, measured.cached))
            name = f" {own}, {shipped} block sizes shipped and {found} found"
        try:
            print(f"{device}{name}: {' ('.join(backend.choose(device))})")
        except RuntimeError as error:
            print(f"{device}{name}: nothing runs; {error}")
    return 0


def _yes(so: bool) -> str:
    return "yes" if so else "no"


def _gpus() -> list[torch.device]:
    modules = [(kind, getattr(torch, kind, None)) for kind in sorted(backend.TRITON_DEVICES)]
    return [torch.device(kind, i) for kind, module in modules if module for i in range(module.device_count())]


def explain(args: argparse.Namespace) -> int:
    """What an op would do with a random input."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    input = torch.rand(args.numel, dtype=getattr(torch, args.dtype), device=device, requires_grad=True)
    op = tt.ops()[args.op]
    if isinstance(op, (Gate, LearnedGate, GradientGate)):
        print(tt.explain(args.op, input, 0.5))
    elif isinstance(op, ForeachGate):
        input.grad = torch.randn_like(input)
        print(tt.explain(args.op, [input], 0.5))
    elif args.op == "threshold_loss":
        print(tt.explain(args.op, input, input.detach(), tt.ByPrediction()))
    else:
        print(tt.explain(args.op, input, input.detach(), 0.5))
    return 0


def ops(args: argparse.Namespace) -> int:
    """The table of ops, printed or written into a README between its markers."""
    if args.write:
        args.write.write_text(updated(args.write.read_text()))
    else:
        print(op_table())
    return 0


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and run the command."""
    parser = argparse.ArgumentParser(prog="python -m triton_thresh", description=tt.__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("ops", help=ops.__doc__)
    command.add_argument("--write", type=Path, metavar="README")
    command.set_defaults(run=ops)
    command = commands.add_parser("info", help=info.__doc__)
    command.set_defaults(run=info)
    command = commands.add_parser("explain", help=explain.__doc__)
    command.add_argument("op", choices=list(tt.ops()))
    command.add_argument("--numel", type=int, default=1 << 20)
    command.add_argument("--dtype", default="float32", choices=["float16", "bfloat16", "float32", "float64"])
    command.add_argument("--device")
    command.set_defaults(run=explain)
    command = commands.add_parser("tune", help=tune.__doc__, description=tune.__doc__)
    tune.add_arguments(command)
    command.set_defaults(run=tune.run)
    args = parser.parse_args(argv)
    return int(args.run(args))


if __name__ == "__main__":
    sys.exit(main())
