"""Six small trainings: what each op does for its task, and that it is the formula written by hand."""

import argparse
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

DISTRIBUTIONS = {
    "torch": "torch", "numpy": "numpy", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "rich": "rich",
}  # fmt: skip
DISAGREE, CANNOT_RUN = 1, 2  # exit codes


def between(low: int, high: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        number = int(text)
        if not low <= number <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {number}")
        return number

    return whole


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m examples.demo", description=__doc__, epilog="example: make demo ARGS='--steps 100 --seed 1'"
    )
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    made.add_argument(
        "--backend",
        choices=("auto", "triton", "eager"),
        help="auto: Triton on a GPU, else eager torch (default: TRITON_THRESH_BACKEND, else auto)",
    )
    made.add_argument(
        "--seed", type=between(0, 2**32 - 1), default=0, help="of folds, weights, batches and noise (default: 0)"
    )
    made.add_argument("--steps", type=between(1, 10**6), default=400, help="of each training (default: 400)")
    made.add_argument("--out", type=Path, default=Path("demo-results"), help="folder (default: demo-results)")
    return made


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0 if the pack is the formula written by hand, 1 if it is not, 2 if the demo cannot run here."""
    args = parser().parse_args(argv)
    missing = [name for module, name in DISTRIBUTIONS.items() if find_spec(module) is None]
    if missing:
        return refuse(
            f"{' and '.join(missing)} missing. In this environment: pip install {' '.join(missing)}. "
            "Or run make demo, which makes an environment of its own."
        )

    import torch

    import triton_thresh as tt

    if args.device == "cuda" and not torch.cuda.is_available():
        return refuse("--device cuda: torch finds no GPU")
    device = torch.device("cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda")
    asked = args.backend or tt.get_backend()
    try:
        with tt.use_backend(asked):
            plan = tt.explain("threshold", torch.zeros(8, device=device), 0.5, 0.0)
        args.out.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError) as error:
        return refuse(str(error))

    from .compare import run_tasks
    from .report import publish

    started = time.perf_counter()
    with tt.use_backend(asked):
        results = run_tasks(seed=args.seed, steps=args.steps, device=device)
    setting = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "backend": plan.backend,
        "backend_because": plan.reason,
        "seed": args.seed,
        "steps": args.steps,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return 0 if publish(results, args.out, setting) else DISAGREE


def refuse(message: str) -> int:
    print(f"demo: {message}", file=sys.stderr)
    return CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main())
