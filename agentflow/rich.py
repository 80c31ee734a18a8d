"""How agentflow's objects show themselves in notebooks: a card where a frontend takes HTML, text everywhere else.

The cards are drawn far above what they show, in ``notebook.py``, which is loaded, by its name, when one is asked for:
the records know nothing of it, and nobody who asks for no card waits for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, TypeVar

T = TypeVar("T")


class Rich:
    """Has a card; the names of its methods are IPython's protocol, which other notebooks speak too."""

    __slots__ = ()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """A card as HTML and as text; in a kernel with ipywidgets, with buttons for what waits for a person."""
        made: dict[str, Any] = import_module("agentflow.notebook").bundle(self)
        return made

    def _repr_html_(self) -> str:
        """The card alone."""
        made: str = import_module("agentflow.notebook").html(self)
        return made

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """The card in words, also where IPython has words of its own for lists and errors; inside others the repr."""
        alone = len(printer.stack) == 1 and not cycle
        printer.text(import_module("agentflow.notebook").words(self) if alone else repr(self))


class Listed(Rich, list[T]):
    """A list that shows its items as a table. To everything else it is a list."""

    __slots__ = ()

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        return Listed(found) if isinstance(index, slice) else found
