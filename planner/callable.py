"""Why ``from planner import solve, sweep`` gives something to call, although ``planner.solve`` is a module too."""

from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that is called as its function of the same name.

    Importing a module makes it an attribute of its package, over a function of that name; so the module is both.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **options)
