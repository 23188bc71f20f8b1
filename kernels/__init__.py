"""Triton device code, installed as ``triton_thresh.kernels``: no torch, no host logic."""
