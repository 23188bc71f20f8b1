"""What `explain` says the kernels save is what autograd's saved tensors hold."""

from __future__ import annotations

import torch

from ..test_saved import WHOLE, calls, check


def test_triton(device: torch.device) -> None:
    with torch.device(device):
        for call in calls(WHOLE, torch.bfloat16):
            told = check(call)
            assert told.backend == "triton"
            assert told.forward_bytes is not None
