"""What Triton needs where it builds a kernel: a C compiler and Python's headers, for the code that launches it."""

import os
import shutil
import sysconfig
from pathlib import Path

FOUND_BY_TRITON = ("gcc", "clang")
"""What it looks for by itself, unless CC names another one."""


def c_compiler() -> str | None:
    """The path of the compiler for Triton: CC where it is set, gcc, clang, or the system's cc."""
    named = os.environ.get("CC")
    if named is not None:
        return shutil.which(named)
    return next((path for name in (*FOUND_BY_TRITON, "cc") if (path := shutil.which(name)) is not None), None)


def has_python_headers() -> bool:
    """Whether Python.h is where Triton takes it from."""
    scheme = sysconfig.get_default_scheme()
    # Debian's scheme names a folder for what an administrator installs; Python's own headers are not in it.
    include = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"]
    return (Path(include) / "Python.h").is_file()
