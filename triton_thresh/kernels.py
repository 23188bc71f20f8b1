"""Points to the folder kernels/ beside the package, in a clone and in an editable install; a wheel holds the folder itself."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__path__ = [str(Path(__file__).parents[1] / "kernels")]

if TYPE_CHECKING:  # type checkers cannot follow the path

    def __getattr__(name: str) -> Any: ...
