"""
CUDA kernels of exeunt.
"""
from __future__ import annotations
__all__: list[str] = ['device_count', 'runtime_version']
def device_count() -> int:
    """
    CUDA devices that can be used now.
    """
def runtime_version() -> int:
    """
    CUDA runtime this module was built with.
    """
