"""Names of rules in the file format: a rule's class registers its own, and installed packages can bring more."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from quicksilver.errors import PlanError, QuickSilverError, first_line
from quicksilver.rules.retired import refuse_retired

GROUP = "quicksilver.rules"
"""The group of entry points by which packages say which rules they bring; an entry's name is its rule's."""

Rule = TypeVar("Rule")
View = TypeVar("View", contravariant=True)
Decision = TypeVar("Decision", covariant=True)
RuleClass = TypeVar("RuleClass", bound=type)
Answer = TypeVar("Answer")


class DecidingRule(ABC, Generic[View, Decision]):
    """Base of every kind of rule: it decides of rows in view, and is asked so that what is no decision is refused."""

    @abstractmethod
    def decide(self, view: View) -> Decision:
        """Return a decision about the rows in view, and what finding out cost.

        Each row's answer must depend on that row alone, and on nothing that is kept between calls.
        """

    def ask(self, view: View) -> Decision:
        """Return `decide(view)`; raise PlanError where that fails, or is no decision about the rows in view."""
        return self.checked(guarded(self.decide, view), view)

    def checked(self, decision: Any, view: object) -> Any:
        """Return a decision; raise PlanError where it is none about what is in view."""
        from quicksilver.core.signals import check_decision

        check_decision(type(self).__name__, decision, view)
        return decision


def guarded(method: Callable[..., Answer], *args: object) -> Answer:
    """Return what a rule's method returns; PlanError, naming the rule, for whatever it raises: it may be a user's."""
    try:
        return method(*args)
    except QuickSilverError:
        raise
    except Exception as error:
        owner, name = type(method.__self__).__name__, method.__name__  # type: ignore[attr-defined]
        raise PlanError(f"{owner}.{name} failed: {type(error).__name__}: {first_line(error)}") from error


class RuleTypes(Generic[Rule]):
    """The classes of one kind of rule, such as "halting rule", by their names; all derive from `base`."""

    def __init__(self, kind: str, base: type[Rule]) -> None:
        self.kind, self.base = kind, base
        self._classes: dict[str, type[Rule]] = {}
        self._names: dict[type, str] = {}

    def register(self, name: str) -> Callable[[RuleClass], RuleClass]:
        """Return a decorator that makes a class known as `name`, which a plan's JSON then gives as `type`.

        It goes above `@dataclass(frozen=True)`, whose fields are the other keys.

        Raises:
            PlanError: the name is taken, or the class cannot be a rule of this kind.
        """

        def add(cls: RuleClass) -> RuleClass:
            self._check(name, cls)
            before = self._classes.get(name)
            if before is not None:
                if (before.__module__, before.__qualname__) != (cls.__module__, cls.__qualname__):
                    owner = f"{before.__module__}.{before.__qualname__}"
                    raise PlanError(f"the {self.kind} {name!r} is {owner} already; {cls.__name__} needs another name")
                del self._names[before]  # its module was run again
            self._classes[name] = cls  # type: ignore[assignment]
            self._names[cls] = name
            return cls

        return add

    def get(self, name: str) -> type[Rule] | None:
        """Return the class of a name, imported if an installed package brings it; None where nobody knows it.

        Raises:
            PlanError: the package that brings it cannot be imported or does not register it, or several bring it.
        """
        if name not in self._classes:
            brought = [entry for entry in entry_points(group=GROUP) if entry.name == name]
            if len(brought) > 1:
                raise PlanError(f"{name!r} is brought by {' and '.join(map(_package, brought))}; uninstall all but one")
            for entry in brought:
                self._load(entry)
        return self._classes.get(name)

    def __iter__(self) -> Iterator[str]:
        """Give all names in order: of registered classes, and of those that installed packages bring."""
        return iter(sorted({entry.name for entry in entry_points(group=GROUP)} | self._classes.keys()))

    def classes(self) -> set[type[Rule]]:
        return set(self._names)

    def name_of(self, cls: type) -> str:
        """Return the name of a class; PlanError where it has none."""
        if cls not in self._names:
            decorator = f"@{self.kind.replace(' ', '_')}"
            raise PlanError(f"{cls.__name__} has no name that a plan could give: put {decorator}(NAME) above the class")
        return self._names[cls]

    def _load(self, entry: EntryPoint) -> None:
        try:
            entry.load()
        except (Exception, SystemExit) as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            raise PlanError(f"{_package(entry)} brings {entry.name!r} and cannot be imported: {why}") from error
        if entry.name not in self._classes:
            raise PlanError(f"{_package(entry)} brings {entry.name!r}, but {entry.value} registers no such {self.kind}")

    def _check(self, name: object, cls: object) -> None:
        if not isinstance(name, str) or not name:
            raise PlanError(f"a {self.kind}'s name must be a string that is not empty, got {name!r}")
        refuse_retired(self.kind, name, f"the name {name!r}")
        if not isinstance(cls, type) or not issubclass(cls, self.base):
            raise PlanError(f"the {self.kind} {name!r} must be a class derived from {self.base.__name__}, got {cls!r}")
        if "__dataclass_fields__" not in cls.__dict__:
            raise PlanError(
                f"the {self.kind} {name!r}: put @dataclass(frozen=True) above {cls.__name__}, below its name"
            )
        if any(field.name == "type" for field in fields(cls)):  # type: ignore[arg-type]
            raise PlanError(
                f"the {self.kind} {name!r}: no field of {cls.__name__} may be called 'type', the rule's own key"
            )
        if inspect.isabstract(cls):
            missing = ", ".join(sorted(cls.__abstractmethods__))  # type: ignore[attr-defined]
            raise PlanError(f"the {self.kind} {name!r}: {cls.__name__} lacks {missing}")
        if cls in self._names and self._names[cls] != name:
            raise PlanError(
                f"{cls.__name__} is the {self.kind} {self._names[cls]!r} already, and cannot be {name!r} too"
            )


def _package(entry: EntryPoint) -> str:
    return f"package {entry.dist.name!r}" if entry.dist is not None else f"the module of {entry.value!r}"
