"""Call back when a module has been imported: now if it is there, else at the end of its first import.

Used to patch httpx, httpx2 and LangGraph only in apps that use them: nothing is imported for the patch. The module
keeps its own loader and spec. Called by `hook` and `attach`.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Callback = Callable[[ModuleType], None]


def on_import(name: str, callback: Callback) -> None:
    """Call `callback(module)` once the module `name` has been executed; an exception in it fails that import."""
    module = sys.modules.get(name)
    if module is not None:
        callback(module)
    else:
        sys.meta_path.insert(0, _Finder(name, callback))


class _Finder(MetaPathFinder):
    """Lets the finders behind it find the module, and wraps the loader they give; gone after the first import."""

    def __init__(self, name: str, callback: Callback) -> None:
        self.name = name
        self.callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find is not None else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec, spec.loader, self)
                return spec
        return None


class _Loader(Loader):
    """Gives the module its own loader back, executes it, then calls back."""

    def __init__(self, spec: ModuleSpec, loader: Loader, finder: _Finder) -> None:
        self.spec = spec
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.spec.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
        self.finder.callback(module)
