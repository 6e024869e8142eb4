"""What the service says of itself: a JSON object a line on standard error, or text for people."""

from __future__ import annotations

import json
import logging
import math
import os
import select
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, suppress
from datetime import UTC, datetime
from typing import Any, Final, Literal, NamedTuple

import structlog
from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.stdlib import ExtraAdder, ProcessorFormatter
from structlog.typing import EventDict, Processor, WrappedLogger

from ebpfstream.descriptors import SharedOutput
from ebpfstream.options import check_choice
from ebpfstream.text import encodable, printable

Level = Literal["debug", "info", "warning", "error"]
Format = Literal["auto", "json", "text"]

MOST: Final = 10
"""Records from one place that are written within `WINDOW`; what comes beyond is counted."""
WINDOW: Final = 10.0
"""Seconds."""

_OURS: Final = "ebpfstream"
_MOST_PLACES: Final = 1000
_CLOSING: Final = 1.0  # seconds that the last lines may take

_extra: Final = ExtraAdder()
_handler: _Handler | None = None


def configure(level: str = "info", format: Format = "auto", *, fd: int = 2) -> AbstractContextManager[object]:
    """Write what is logged, with `logging` or structlog, to a descriptor: `ebpfstream`'s from `level` on.

    Of other libraries (but aiokafka), and of Python's warnings, from "warning" on at least.  `format` is "json",
    "text", or "auto": text on a terminal, JSON elsewhere.  Leaving the context that is returned is `close`.  Raises
    ArgumentError.

    Nothing here waits for whoever reads.  Records for which there is no room are left out, and the next one that is
    written says how many (`unwritten`).  So it is with records of one logger, level and text (the template, without its
    values) that come more often than `MOST` in `WINDOW` seconds (`suppressed`).
    """
    global _handler
    check_choice("format", format, Format)
    set_level(level)
    close()
    _handler = _Handler(_Writer(fd), _formatter(format, terminal=os.isatty(fd)))
    logging.getLogger().addHandler(_handler)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    context = ExitStack()
    context.callback(close)
    return context


def set_level(level: str) -> None:
    """Log from this level on.  Raises ArgumentError."""
    check_choice("level", level, Level)
    ours = logging.getLogger(_OURS)
    ours.setLevel(level.upper())
    logging.getLogger().setLevel(max(ours.level, logging.WARNING))
    # What KafkaSink says once, its library says many times a second.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


def close() -> None:
    """Say what was left out, and write no more.  Waits a second at most for whoever reads."""
    global _handler
    if _handler is not None:
        handler, _handler = _handler, None
        logging.getLogger().removeHandler(handler)
        logging.captureWarnings(False)
        handler.close()


# --- which records, and that it never waits


class _Place(NamedTuple):
    """Where a record comes from, as far as that can be told: all of one place say the same of different things."""

    logger: str
    level: int
    template: str


class _Count:
    """Records of one place since `begin`."""

    def __init__(self, begin: float) -> None:
        self.begin = begin
        self.passed = 0
        self.suppressed = 0


class _Handler(logging.Handler):
    """Called by one thread at a time (logging.Handler.handle)."""

    def __init__(
        self, writer: _Writer, formatter: logging.Formatter, clock: Callable[[], float] = time.monotonic
    ) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._writer = writer
        self._clock = clock
        self._counts: dict[_Place, _Count] = {}
        self._unwritten = 0
        self._closed = False

    def emit(self, record: logging.LogRecord) -> None:
        if self._closed:  # a thread is late
            return
        place = _place(record)
        now = self._clock()
        count = self._counts.get(place)
        if count is None:
            if len(self._counts) >= _MOST_PLACES:
                self._forget(now)
            count = self._counts[place] = _Count(now)
        elif now - count.begin >= WINDOW:
            count.begin, count.passed = now, 0
        if count.passed >= MOST:
            count.suppressed += 1
            return
        count.passed += 1
        if self._write(record, count.suppressed):
            count.suppressed = 0

    def _forget(self, now: float) -> None:
        """Places of which nothing has come for long, or else the one that came first."""
        old = [place for place, count in self._counts.items() if now - count.begin >= WINDOW]
        for place in old or [next(iter(self._counts))]:
            self._tell(place, self._counts.pop(place))

    def _tell(self, place: _Place, count: _Count) -> None:
        if count.suppressed:
            record = logging.LogRecord(
                place.logger, place.level, "", 0, "left out: %s", (place.template,), None
            )
            self._write(record, count.suppressed)

    def _write(self, record: logging.LogRecord, suppressed: int = 0) -> bool:
        """Whether the record is written, or begun."""
        left_out = {"suppressed": suppressed, "unwritten": self._unwritten}
        told = {name: count for name, count in left_out.items() if count}
        try:
            line = self.format(_with(record, told))
        except Exception as error:  # whatever was logged, and however wrongly: the service goes on
            line = self.format(_with(_unformatted(record, error), told))
        if self._writer.write(line.encode() + b"\n"):
            self._unwritten = 0
            return True
        self._unwritten += 1
        return False

    def close(self) -> None:
        """Tell what was left out, as far as it can be written soon."""
        self.acquire()
        try:
            if not self._closed:
                self._closed = True
                self._writer.patient_until = time.monotonic() + _CLOSING
                for place, count in self._counts.items():
                    self._tell(place, count)
                if self._unwritten:
                    message = "some records could not be written"
                    self._write(logging.LogRecord(_OURS, logging.WARNING, "", 0, message, (), None))
                self._writer.close()
        finally:
            self.release()
        super().close()


class _Writer:
    """Writes lines, as far as there is room; StdoutSink waits for that, and this does not."""

    def __init__(self, fd: int) -> None:
        self._output: SharedOutput | None = None
        with suppress(OSError):  # there is no standard error
            self._output = SharedOutput(fd)
        self._rest = b""
        """What has to be written before anything else: the end of a line."""
        self.patient_until = 0.0
        """The time, on the monotonic clock, until which it may wait for room."""

    def write(self, line: bytes) -> bool:
        """Whether the line is written, or begun: then its end comes before the next one."""
        self._rest = self._rest[self._written(self._rest) :]
        if self._rest:
            return False
        written = self._written(line)
        self._rest = line[written:] if written else b""
        return written > 0

    def _written(self, data: bytes) -> int:
        done = 0
        output = self._output
        while output is not None and done < len(data):
            if output.asks_first and not self._has_room(output):
                break
            try:
                done += output.some(data[done:])
            except BlockingIOError:
                if not self._has_room(output):
                    break
            except OSError:  # nobody reads any more, or a disk is full
                break
        return done

    def _has_room(self, output: SharedOutput) -> bool:
        poll = select.poll()
        poll.register(output.fd, select.POLLOUT)
        return bool(poll.poll(max(self.patient_until - time.monotonic(), 0) * 1000))

    def close(self) -> None:
        """Write what is left of a line, if that can be soon."""
        self._written(self._rest)
        if self._output is not None:
            self._output.close()


# --- what a record looks like


def _place(record: logging.LogRecord) -> _Place:
    template: object = record.msg
    if _is_from_structlog(record) and isinstance(template, dict):
        template = template.get("event")
    return _Place(
        record.name, record.levelno, template if isinstance(template, str) else type(template).__name__
    )


def _is_from_structlog(record: logging.LogRecord) -> bool:
    return hasattr(record, "_logger")  # set by ProcessorFormatter.wrap_for_formatter()


def _with(record: logging.LogRecord, fields: dict[str, int]) -> logging.LogRecord:
    record = logging.makeLogRecord(record.__dict__)
    if _is_from_structlog(record) and isinstance(record.msg, dict):
        record.msg = record.msg | fields
    else:
        record.__dict__.update(fields)
    return record


def _unformatted(record: logging.LogRecord, error: Exception) -> logging.LogRecord:
    message, values = "cannot be formatted: %s: %s", (_place(record).template, type(error).__name__)
    return logging.LogRecord(
        record.name, record.levelno, record.pathname, record.lineno, message, values, None
    )


def _formatter(format: Format, terminal: bool) -> logging.Formatter:
    render: list[Processor] = [_plain, _json_line]
    if format == "text" or (format == "auto" and terminal):
        colours = terminal and not os.environ.get("NO_COLOR")
        render = [_shown, ConsoleRenderer(colors=colours, exception_formatter=plain_traceback)]
    return ProcessorFormatter(
        foreign_pre_chain=[_with_extra],
        processors=[structlog.processors.format_exc_info, _in_order, *render],
    )


def _with_extra(logger: WrappedLogger, method: str, fields: EventDict) -> EventDict:
    """What `extra=` gave; nothing of that takes the place of the event."""
    return {**_extra(logger, method, {"_record": fields["_record"]}), **fields}


def _in_order(logger: WrappedLogger, method: str, fields: EventDict) -> EventDict:
    record: logging.LogRecord = fields.pop("_record")
    del fields["_from_structlog"]
    time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
    first = {
        "timestamp": time.replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "event": fields.pop("event"),
        "logger": record.name,
    }
    return first | {name: value for name, value in fields.items() if name not in first}


def _plain(logger: WrappedLogger, method: str, fields: EventDict) -> EventDict:
    """For JSON."""
    return {encodable(name): _value(value, encodable) for name, value in fields.items()}


def _json_line(logger: WrappedLogger, method: str, fields: EventDict) -> str:
    # What is not printable is in strings, and so the escapes are JSON's.
    return printable(json.dumps(fields, ensure_ascii=False))


def _shown(logger: WrappedLogger, method: str, fields: EventDict) -> EventDict:
    """For people: a line with the time of day, without what is for programs.

    Lines of an exception are indented, so that none of them looks like another record.
    """
    exception = fields.pop("exception", None)
    fields["timestamp"] = f"{datetime.fromisoformat(fields['timestamp']).astimezone():%H:%M:%S}"
    if str(fields["logger"]).startswith(_OURS):
        del fields["logger"]
    shown: EventDict = {
        _printable(name): _value(value, _printable)
        for name, value in fields.items()
        if not isinstance(value, Mapping)
    }
    if exception is not None:
        lines = str(exception).split("\n")
        shown["exception"] = "\n".join(f"  {_printable(line)}" for line in lines)
    return shown


def _printable(text: str) -> str:
    return printable(encodable(text))


def _value(value: object, text: Callable[[str], str]) -> Any:
    """The value as JSON can have it, its strings each made by `text`."""
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, Mapping):
        return {text(str(name)): _value(one, text) for name, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_value(one, text) for one in value]
    return text(str(value))
