"""One root; each child is named for what the caller has to do."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_DETAIL = 500  # characters of a dead letter's detail


class MeterstreamError(Exception):
    """Root of every error that the project raises on purpose."""


class ConfigError(MeterstreamError):
    """The operator has to change a setting or an argument; exit 2."""


class RetryLater(MeterstreamError):
    """Nothing is wrong with the input; try the same again when the other side is back."""


class InvalidMessage(MeterstreamError):
    """The bytes cannot be taken: dead-letter them with the reason and go on.

    Attributes:
        reason: one of `schemas.closed_lists.DeadLetterReason`.
        detail: what was wrong, for a person: it may quote the bytes, so it is cut, and text whatever they are.
    """

    def __init__(self, reason: str, detail: str) -> None:
        self.reason = reason
        self.detail = detail.encode(errors="backslashreplace").decode()[:LONGEST_DETAIL]
        super().__init__(f"{reason}: {self.detail}")


class BadLog(MeterstreamError):
    """A log file has a line that its format does not allow; mend the file or ask to keep going."""


class ContractBroken(MeterstreamError):
    """A promise between our own parts does not hold: a bug, stop and report."""


class StateLost(MeterstreamError):
    """State that a query relies on is gone; follow the repair that the message names."""


@contextmanager
def exits() -> Iterator[None]:
    """Ends a command as its users expect: our errors become one line and an exit code.

    Raises:
        SystemExit: 2 wrong use, 1 a problem, 130 interrupted.
    """
    try:
        yield
    except MeterstreamError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2 if isinstance(error, ConfigError | BadLog) else 1) from error
    except KeyboardInterrupt as error:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from error
