"""What an attached model has in common, decoder or encoder: exits are put on it once, and taken off without a trace."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from exeunt.calibration import Calibration

__all__ = ["Plug"]

_Own = TypeVar("_Own", bound="Plug")

#: Modules of which something is replaced: exits on a part of a model are exits on the model.
_attached: weakref.WeakSet[Any] = weakref.WeakSet()


class Plug:
    """Sets attributes of a model's modules, each with its undoing.

    Attributes
    ----------
    model : nn.Module
        The model.

    Examples
    --------
    >>> import types, torch
    >>> from exeunt.plug import Plug
    >>> class Doubled(Plug):
    ...     def __init__(self, model):
    ...         self.model = model
    ...         self._put_on()
    ...
    ...     def _install(self):
    ...         self._set(self.model, "forward", types.MethodType(lambda this, x: 2 * x, self.model))
    >>> model = torch.nn.Identity()
    >>> with Doubled(model):
    ...     model(torch.ones(1))
    tensor([2.])
    >>> model(torch.ones(1))
    tensor([1.])
    """

    model: Any
    _undo: list[Callable[[], None]]

    @staticmethod
    def _refuse_twice(model: Any) -> None:
        if any(module in _attached for module in model.modules()):
            raise ValueError(f"attach: expected a model without exits, got a {type(model).__name__} that has them")

    @staticmethod
    def _loaded(calibration: Calibration | str | os.PathLike[str] | None) -> Calibration | None:
        """A calibration that may be given as a path."""
        if calibration is None or isinstance(calibration, Calibration):
            return calibration
        return Calibration.load(calibration)

    def _put_on(self) -> None:
        """Install; what fails halfway leaves nothing behind."""
        self._undo = []
        try:
            self._install()
        except BaseException:
            self.detach()
            raise

    def _install(self) -> None:
        raise NotImplementedError

    def __enter__(self: _Own) -> _Own:
        """Return itself; the exits are already on."""
        return self

    def __exit__(self, *exc: object) -> None:
        """Detach."""
        self.detach()

    def detach(self) -> None:
        """Restore the model; calling it again does nothing."""
        while self._undo:
            self._undo.pop()()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Set an instance attribute, to be undone."""
        present, old = name in vars(owner), vars(owner).get(name)
        value.__func__.__name__ = name  # by which a pickled copy finds the method of its own class

        def undo() -> None:
            if present:
                setattr(owner, name, old)
            else:
                delattr(owner, name)
            _attached.discard(owner)

        setattr(owner, name, value)
        _attached.add(owner)
        self._undo.append(undo)
