"""Satisfies SGLang's imports of GPU-only packages on a machine without a GPU.

SGLang 0.5.23 imports these packages unconditionally and calls none of them on CPU. They are replaced by hollow modules
whose members raise when called, so that a call that does happen is an error that names itself. Remove once SGLang
imports on CPU without them.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types

GPU_ONLY = frozenset(
    {"sgl_kernel", "torchvision", "torchaudio", "flashinfer", "flash_attn", "cutlass", "decord", "av", "timm"}
)


class _Hollow(type):
    """A class made up on the fly: it may be named, annotated with and inherited from, but never called."""

    def __call__(cls, *args: object, **kwargs: object) -> object:
        raise RuntimeError(f"{cls.__module__}.{cls.__name__} is a GPU library's and does not exist on this machine")

    def __getattr__(cls, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _hollow(cls.__module__, f"{cls.__name__}.{name}")


def _hollow(module: str, name: str) -> type:
    return _Hollow(name, (), {"__module__": module})


class _HollowModule(types.ModuleType):
    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return _hollow(self.__name__, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in GPU_ONLY:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _HollowModule(spec.name)

    def exec_module(self, module):
        module.__version__ = "0.0.0"


sys.meta_path.insert(0, _Finder())
