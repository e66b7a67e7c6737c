"""A plugin of pytest's: nbval's kernels listen on files, see kernels.py."""

import nbval.kernel  # type: ignore[import-untyped]

from tests.support.kernels import on_files

nbval.kernel.KernelManager = on_files
