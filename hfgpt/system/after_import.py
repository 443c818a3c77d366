"""Running a function once a module of another package has been imported, without importing it."""

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class AfterImport(MetaPathFinder):
    """Calls a function once, as soon as a module has been imported; at once if it is there.

    The module may be imported from the middle of another one of the same packages, whose names are not all there yet.
    So the call waits until the outermost import of any of them is done.

    Args:
        module: to wait for.
        packages: whose imports are waited for; `module` is in one of them.
        call: what to call.
    """

    def __init__(self, module: str, packages: tuple[str, ...], call: Callable[[], None]) -> None:
        self.module, self.packages, self.call = module, packages, call
        self.depth = 0
        sys.meta_path.insert(0, self)
        self.done()

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Stand in for the loaders of modules of the packages, to be told when they are done."""
        if fullname.partition(".")[0] not in self.packages:
            return None
        spec = PathFinder.find_spec(fullname, path)  # type: ignore[arg-type]
        if spec is not None and spec.loader is not None:
            spec.loader = WatchedLoader(spec.loader, self)
        return spec

    def done(self) -> None:
        """Call, if this was the outermost import and the module is there."""
        if self.depth == 0 and self.module in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            self.call()


class WatchedLoader(Loader):
    """A module's own loader, which tells the finder when the module has run."""

    def __init__(self, loader: Loader, finder: AfterImport) -> None:
        self.loader, self.finder = loader, finder

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)  # `python -m` asks for `get_code`, others for `get_source`

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the module's own loader."""
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Give the module back to its own loader, and run it."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.finder.depth += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.depth -= 1
        self.finder.done()
