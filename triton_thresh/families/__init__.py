"""What the ops of a family have in common: their arguments' checks, the choice of a backend, the bytes they move."""

from typing import Union

from .gate import Gate
from .gradient import ForeachGate, GradientGate
from .learned import LearnedGate
from .loss import Loss

Op = Union[Gate, LearnedGate, Loss, GradientGate, ForeachGate]

__all__ = ["ForeachGate", "Gate", "GradientGate", "LearnedGate", "Loss", "Op"]
