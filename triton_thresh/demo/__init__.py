"""The demo: six short trainings, each with the pack, with the same formula by hand, and without it."""

import argparse
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

DISTRIBUTIONS = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}
DISAGREE, CANNOT_RUN = 1, 2  # exit codes


def between(low: int, high: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        number = int(text)
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {number}")
        return number

    return whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument(
        "--backend",
        choices=("auto", "triton", "eager"),
        help="auto: Triton on a GPU, else eager torch (default: TRITON_THRESH_BACKEND, else auto)",
    )
    parser.add_argument(
        "--seed", type=between(0, 2**32 - 1), default=0, help="of splits, weights, batches and noise (default: 0)"
    )
    parser.add_argument("--steps", type=between(1, 10**6), default=400, help="of each training (default: 400)")
    parser.add_argument("--out", type=Path, default=Path("demo-results"), help="folder (default: demo-results)")


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 if the pack follows the formula written by hand, 1 if it does not, 2 if the demo cannot run here."""
    missing = [name for module, name in DISTRIBUTIONS.items() if find_spec(module) is None]
    if missing:
        return refuse(f"{' and '.join(missing)} missing: pip install {' '.join(missing)}")

    import torch

    from ..backend import choose, get_backend, use_backend

    if args.device == "cuda" and not torch.cuda.is_available():
        return refuse("--device cuda: torch finds no GPU")
    device = torch.device("cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda")
    asked = args.backend or get_backend()
    try:
        with use_backend(asked):
            backend, why = choose(device)
        args.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError) as error:
        return refuse(str(error))

    from .report import publish
    from .train import train_all

    started = time.perf_counter()
    results = train_all(device, asked, args.seed, args.steps)
    setting = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "backend": backend,
        "backend_because": why,
        "seed": args.seed,
        "steps": args.steps,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return 0 if publish(results, args.out, setting) else DISAGREE


def refuse(message: str) -> int:
    print(f"triton_thresh demo: {message}", file=sys.stderr)
    return CANNOT_RUN


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="triton_thresh demo", description=__doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))
