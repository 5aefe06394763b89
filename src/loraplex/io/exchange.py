"""Exchanges two names of a file system in one step, if the system can."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Any

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# The errors of kernels and file systems that can't do it: the caller renames twice instead.
_CAN_NOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


def _find() -> Any:
    """`renameat2` of glibc 2.28 and later, or None."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function


_renameat2 = _find()


def exchange(one: Path, other: Path) -> bool:
    """Exchange the files or folders of two names of one file system, in one step.

    Returns:
        False, with nothing done, if the system can't do it.

    Raises:
        OSError: as `os.rename`.
    """
    if _renameat2 is None:
        return False
    sys.audit("os.rename", os.fspath(one), os.fspath(other), -1, -1)
    if _renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CAN_NOT:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))
