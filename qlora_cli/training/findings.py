"""What a check has found out so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from qlora_cli.errors import HubUnreachableError, RequestError

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Findings:
    """What has come up; a failure is noted down, and the check goes on with what does not need it."""

    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def attempt(self, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `action` returns, or None if it fails."""
        return self.attempt_or_miss("not checked", action, *args, **kwargs)

    def attempt_or_miss(self, missed: str, action: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """The same; `missed` says what is not known if the hub, which it needs, gives no answer."""
        try:
            return action(*args, **kwargs)
        except HubUnreachableError as error:
            self.notices.append(f"{missed}: {error}")
        except RequestError as error:
            self.problems.append(str(error))
        return None
