"""The tests of tests/kernels/test_extremes.py on the eager backend."""

from .kernels.test_extremes import *  # noqa: F403 - the tests are run here too
from .on_eager import device, on_the_eager_backend  # noqa: F401 - fixtures
