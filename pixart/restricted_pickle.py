"""The base of unpicklers that run no code of a pickle: every operation that could is decided by a method.

A subclass says by `find_class` what a name stands for, by `call` and `create` what may be called, and by `set_state`
what may be given attributes. It is the implementation in Python, whose operations can be overridden.
"""

import pickle
from collections.abc import Mapping
from typing import Any

PythonUnpickler: Any = pickle._Unpickler


class RefusedPickleError(pickle.UnpicklingError):
    """A pickle has something that is not loaded, which the message names."""


class RestrictedUnpickler(PythonUnpickler):
    """Unpickler that calls, creates and changes nothing but what a subclass allows.

    Raises RefusedPickleError, which names the cause, for anything else.
    """

    dispatch = PythonUnpickler.dispatch.copy()
    appendable: tuple[type, ...] = (list,)  # types of objects that may be appended to

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name of a module stands for, without importing it."""
        raise RefusedPickleError(f"it refers to {module}.{name}, which is not allowed")

    def call(self, function: Any, arguments: Any, named: Mapping[str, Any]) -> Any:
        """Return the value of a function that a pickle calls."""
        raise RefusedPickleError(f"it calls {str(function)[:80]}, which is not allowed")

    def create(self, cls: Any, arguments: Any, named: Mapping[str, Any]) -> Any:
        """Return an object of a class that a pickle creates without calling the class."""
        return self.call(cls, arguments, named)

    def set_state(self, target: Any, state: Any) -> None:
        """Give an object the attributes that a pickle has for it."""
        raise RefusedPickleError(f"it sets attributes of {type(target).__name__}, which is not allowed")

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments, {})

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.create(self.stack[-1], arguments, {})

    def load_newobj_ex(self) -> None:
        named, arguments = self.stack.pop(), self.stack.pop()
        self.stack[-1] = self.create(self.stack[-1], arguments, named)

    def _instantiate(self, function: Any, arguments: Any) -> None:
        self.append(self.call(function, arguments, {}))

    def load_build(self) -> None:
        state = self.stack.pop()
        self.set_state(self.stack[-1], state)

    def load_append(self) -> None:
        value = self.stack.pop()
        self.extend([value])

    def load_appends(self) -> None:
        self.extend(self.pop_mark())

    def extend(self, values: list[Any]) -> None:
        """Append to the object on top of the stack."""
        target = self.stack[-1]
        if not isinstance(target, self.appendable):
            raise RefusedPickleError(f"it appends to {type(target).__name__}, which is not allowed")
        for value in values:
            target.append(value)  # type: ignore[attr-defined]

    def load_extension(self) -> None:
        raise RefusedPickleError("it refers to objects of a registry, which is not allowed")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends
    for operation in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[operation[0]] = load_extension
