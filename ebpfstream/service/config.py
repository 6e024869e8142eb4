"""The configuration of the service: read, checked, and handed on as what sources and sinks are made of.

Alone in needing pydantic (the extra `service`): importing this raises ImportError without it.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ebpfstream import redaction
from ebpfstream.catalogue import EVENT_TYPES
from ebpfstream.codec import selection
from ebpfstream.conditions import condition
from ebpfstream.errors import ArgumentError
from ebpfstream.filters import Filters
from ebpfstream.kernel import buffers
from ebpfstream.options import Seconds, Size
from ebpfstream.program_file import ProgramFile
from ebpfstream.readymade import CALLS
from ebpfstream.service import readers
from ebpfstream.service.clashes import clashes
from ebpfstream.service.endpoint import DEFAULT_LISTEN, parse_listen
from ebpfstream.service.instance import FOLDER
from ebpfstream.service.logs import Format, Level
from ebpfstream.service.problems import Known, Problem, SeveralProblemsError, sink_problems, translated
from ebpfstream.service.toml_lines import Lines, TomlError, dotted, loads
from ebpfstream.sink import Sink, open_sink
from ebpfstream.sink_url import SinkURL
from ebpfstream.syscall_names import number_of

EXAMPLE: Final = Path(__file__).with_name("example.toml")
"""A configuration to begin with: all keys, and what they mean."""

GATHERED: Final = 0.05
"""Seconds that events gather before they are read: nobody waits for the single one, and at 200 a second each of them
then costs a sixth of the CPU that it takes with a stream's own 2 ms."""

Kind = Literal["execve", "syscalls", "program"]
"""Where events come from: a ready-made stream, or a program of one's own."""

# Keys that not all kinds of sources have.
_KINDS_OF: Final[dict[str, tuple[str, ...]]] = {
    "filters": tuple(EVENT_TYPES),
    "buffer": tuple(EVENT_TYPES),
    "overload": tuple(EVENT_TYPES),
    "failed": ("execve",),
    "calls": ("syscalls",),
    "ignore": ("syscalls",),
    "result": ("syscalls",),
    "file": ("program",),
    "attach": ("program",),
    "output": ("program",),
    "cflags": ("program",),
}


class ConfigError(ArgumentError):
    """A configuration that cannot be used; the message has a line for each problem: `FILE:LINE: KEY: what is wrong`."""


def _pattern(value: str) -> str:
    redaction.Redaction([value])
    return value


def _call(value: Any) -> str | int:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ArgumentError(f"{readers.shown(value)} is no system call: give a name, or a number")
    number_of(value, CALLS)
    return value


def _endpoint(value: str) -> str:
    if value:
        parse_listen(value)
    return value


def _hook(value: Any) -> str:
    ProgramFile(Path(), [readers.text(value)])  # says what is none
    return str(value)


_Text = Annotated[str, BeforeValidator(readers.text)]
_Flag = Annotated[bool, BeforeValidator(readers.flag)]
_Whole = Annotated[int, BeforeValidator(readers.whole)]
_Size = Annotated[int, BeforeValidator(readers.reads(Size))]
_Seconds = Annotated[float, BeforeValidator(readers.reads(Seconds))]
_Pattern = Annotated[str, BeforeValidator(readers.text), AfterValidator(_pattern)]
_Call = Annotated[str | int, BeforeValidator(_call)]
_Hook = Annotated[str, BeforeValidator(_hook)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _keys(model: type[BaseModel]) -> list[str]:
    """As they stand in the file."""
    return [field.alias or name for name, field in model.model_fields.items()]


class ServiceConfig(_Table):
    """`[service]`: the process as a whole."""

    name: Annotated[str, BeforeValidator(readers.name)] = Field(default=None, validate_default=True)
    """What it is called; the stem of the file's name."""
    deadline: _Seconds = 10.0
    """Seconds to deliver what has been read, on the way out."""
    drop_privileges: _Flag = True
    user: Annotated[str | None, BeforeValidator(readers.user)] = None
    """Who to go on as, once everything is attached: a name or a number."""
    log_level: Annotated[Level, BeforeValidator(readers.reads(Level))] = "info"
    log_format: Annotated[Format, BeforeValidator(readers.reads(Format))] = "auto"
    listen: Annotated[_Text, AfterValidator(_endpoint)] = DEFAULT_LISTEN
    """Where metrics and health are; empty: nowhere."""
    lock_folder: Annotated[Path, BeforeValidator(readers.text)] = FOLDER

    @field_validator("name", mode="before")
    @classmethod
    def _of_the_file(cls, value: object, info: ValidationInfo) -> object:
        return info.context["path"].stem if value is None and info.context else value

    @field_validator("user")
    @classmethod
    def _becomes_it(cls, user: str | None, info: ValidationInfo) -> str | None:
        if user is not None and not info.data.get("drop_privileges", True):
            raise ArgumentError("nobody becomes it with drop_privileges = false: leave one of them out")
        return user

    @field_validator("lock_folder")
    @classmethod
    def _from_the_root(cls, folder: Path) -> Path:
        if not folder.is_absolute():
            raise ArgumentError(f"{str(folder)!r} is no path from the root: give one such as /run/ebpfstream")
        return folder


class FilterConfig(_Table):
    """`[source.filters]`: what the kernel is to leave out; see `ebpfstream.Filters`."""

    pid: _Whole | None = None
    ppid: _Whole | None = None
    uid: _Whole | None = None
    gid: _Whole | None = None
    comm: _Text | None = None
    cgroup: _Text | None = None
    exclude_self: _Flag = True

    @field_validator("pid", "ppid", "uid", "gid", "comm")
    @classmethod
    def _possible(cls, value: Any, info: ValidationInfo) -> Any:
        Filters(**{str(info.field_name): value})
        return value


class SinkConfig(_Table):
    """`[[source.sink]]`: where events go; all keys but these are options of the sink."""

    model_config = ConfigDict(extra="allow")

    address: _Text
    name: Annotated[str, BeforeValidator(readers.name)] = Field(default=None, validate_default=True)
    """What it is called in statistics and messages; the scheme of its address."""

    @field_validator("name", mode="before")
    @classmethod
    def _of_the_address(cls, value: object, info: ValidationInfo) -> object:
        address = info.data.get("address", "sink:")
        return address.partition(":")[0] or "sink" if value is None else value

    @model_validator(mode="after")
    def _checked(self) -> SinkConfig:
        if found := sink_problems(self.address, self.options, _KNOWN):
            raise SeveralProblemsError(found)
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What is given beside the address, as TOML has it."""
        return dict(self.model_extra or {})

    @property
    def scheme(self) -> str:
        """The kind of sink, such as file."""
        return SinkURL.parse(self.address).scheme

    def make(self) -> Sink:
        """A new sink that has this name, not yet open.  Raises ArgumentError."""
        sink = open_sink(self.address, **self.options)
        sink.name = self.name
        return sink


class SourceConfig(_Table):
    """`[[source]]`: a stream, what stands between, and its sinks."""

    kind: Annotated[Kind, BeforeValidator(readers.reads(Kind))]
    name: Annotated[str, BeforeValidator(readers.name)] = Field(default=None, validate_default=True)
    """What it is called; its kind."""
    where: _Text | None = None
    fields: Annotated[dict[str, str] | None, BeforeValidator(readers.fields)] = None
    """The names in JSON by those of the fields, in their order; None: all."""
    redact: _Flag = False
    redact_patterns: Annotated[tuple[_Pattern, ...], BeforeValidator(readers.listed)] = ()
    buffer: Annotated[buffers.Kind, BeforeValidator(readers.reads(buffers.Kind))] = "auto"
    buffer_size: _Size = buffers.SIZE
    overload: Annotated[
        Literal["lose", "sample"], BeforeValidator(readers.reads(Literal["lose", "sample"]))
    ] = "lose"
    latency: _Seconds = GATHERED
    failed: _Flag = False
    calls: Annotated[tuple[_Call, ...], BeforeValidator(readers.listed)] = ()
    ignore: Annotated[tuple[_Call, ...], BeforeValidator(readers.listed)] = ()
    result: _Flag = False
    file: Path | None = Field(default=None, validate_default=True)
    """The program's text, from the root or from where the process was when the configuration was read."""
    attach: Annotated[tuple[_Hook, ...], BeforeValidator(readers.listed)] = ()
    output: _Text | None = None
    cflags: Annotated[tuple[_Text, ...], BeforeValidator(readers.listed)] = ()
    filter_config: Annotated[FilterConfig, BeforeValidator(readers.table("source.filters"))] = Field(
        default=FilterConfig(), alias="filters"
    )
    sinks: Annotated[
        tuple[SinkConfig, ...],
        BeforeValidator(readers.tables("source.sink", "there is none: add a table [[source.sink]]")),
    ] = Field(alias="sink")

    @field_validator("name", mode="before")
    @classmethod
    def _of_the_kind(cls, value: object, info: ValidationInfo) -> object:
        return info.data.get("kind", "source") if value is None else value

    @field_validator("where")
    @classmethod
    def _holds_or_not(cls, where: str | None, info: ValidationInfo) -> str | None:
        event_type = EVENT_TYPES.get(info.data.get("kind", ""))
        if where is not None and event_type is not None:
            condition(event_type, where)
        return where

    @field_validator("fields")
    @classmethod
    def _of_the_type(cls, fields: dict[str, str] | None, info: ValidationInfo) -> dict[str, str] | None:
        event_type = EVENT_TYPES.get(info.data.get("kind", ""))
        if fields is not None and (event_type is not None or not fields):
            selection(event_type or EVENT_TYPES["execve"], fields)
        return fields

    @field_validator("buffer_size")
    @classmethod
    def _possible(cls, size: int, info: ValidationInfo) -> int:
        buffers.check("perf" if info.data.get("kind") == "program" else info.data.get("buffer", "auto"), size)
        return size

    @field_validator("ignore")
    @classmethod
    def _not_all(cls, ignore: tuple[str | int, ...], info: ValidationInfo) -> tuple[str | int, ...]:
        calls = {number_of(call, CALLS) for call in info.data.get("calls", ())}
        if calls and calls <= {number_of(call, CALLS) for call in ignore}:
            raise ArgumentError("all calls that are named are to be ignored: nothing is left to trace")
        return ignore

    @field_validator("file", mode="before")
    @classmethod
    def _is_there(cls, value: object, info: ValidationInfo) -> Path | None:
        if value is None:
            if info.data.get("kind") == "program":
                raise ArgumentError('kind = "program" needs the file of its text: give one such as "hello.c"')
            return None
        path = Path(readers.text(value))
        if info.context:
            path = info.context["path"].absolute().parent / path
        try:
            if path.is_file():
                return path
        except OSError as error:
            raise ArgumentError(f"{str(path)!r} cannot be read: {error.strerror}") from None
        raise ArgumentError(
            f"there is no file {str(path)!r}: give a path from the root, or from the folder of the configuration"
        )

    # The last one is called first.
    @field_validator("filter_config", *(key for key in _KINDS_OF if key != "filters"), mode="before")
    @classmethod
    def _of_this_kind(cls, value: object, info: ValidationInfo) -> object:
        kind = info.data.get("kind")
        key = str(cls.model_fields[str(info.field_name)].alias or info.field_name)
        if value is not None and kind is not None and kind not in _KINDS_OF[key]:
            kinds = " or ".join(f'"{other}"' for other in _KINDS_OF[key])
            raise ArgumentError(f'{key} is for kind = {kinds}, not "{kind}"')
        return value

    @property
    def filters(self) -> dict[str, Any]:
        """What the kernel is to leave out, as a tracer takes it, and Filters."""
        return {} if self.kind == "program" else self.filter_config.model_dump()

    @property
    def stream_options(self) -> dict[str, Any]:
        """Beside `filters`, what the stream is made with: by the tracer, or for a program by `BPF.events`."""
        names = {
            "execve": ("buffer", "buffer_size", "overload", "latency", "failed"),
            "syscalls": ("buffer", "buffer_size", "overload", "latency", "ignore", "result"),
            # A size can be given for a perf buffer alone, and which buffer it is the text says.
            "program": ("latency", *({"buffer_size"} & self.model_fields_set)),
        }
        return {name: getattr(self, name) for name in names[self.kind]}

    def condition(self, event_type: type[Any]) -> Callable[[Any], bool] | None:
        """What `forward` takes as `where`.  Raises ArgumentError for fields that the type does not have."""
        return None if self.where is None else condition(event_type, self.where)

    def redaction(self) -> bool | list[str]:
        """What `forward` takes as `redact`."""
        return redaction.wanted(self.redact, self.redact_patterns)


class Config(_Table):
    """The whole file."""

    service: Annotated[ServiceConfig, BeforeValidator(readers.table("service"))] = Field(
        default_factory=dict, validate_default=True
    )
    sources: Annotated[
        tuple[SourceConfig, ...],
        BeforeValidator(readers.tables("source", "there is none: add a table [[source]]")),
    ] = Field(alias="source")


_KNOWN: Final = Known(
    {
        (): _keys(Config),
        ("service",): _keys(ServiceConfig),
        ("source",): _keys(SourceConfig),
        ("source", "filters"): _keys(FilterConfig),
        ("source", "sink"): _keys(SinkConfig),
    },
    _KINDS_OF,
)


def load(path: Path) -> Config:
    """Read a file.  Raises ConfigError, with all problems at once."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: there is no such file: `ebpfstream config init {path}` makes one"
        ) from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: this is a folder: give a file in it") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read: {error.strerror}; give this user the right to, or another file"
        ) from error
    try:
        return parse(data.decode("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: this is no UTF-8 (byte {data[error.start]:#04x}): save the file as UTF-8"
        ) from None


def parse(text: str, path: Path) -> Config:
    """The configuration that a file's text is; `path` is where it stands.  Raises ConfigError."""
    try:
        data = loads(text)
    except TomlError as error:
        raise ConfigError(f"{path}:{error.line}: {error}") from None
    lines = Lines(text)
    found: list[Problem] = []
    config = None
    try:
        config = Config.model_validate(data, context={"path": path})
    except ValidationError as error:
        found += translated(error.errors(include_url=False), data, _KNOWN)
    found += clashes(data, lines)
    if config is None or found:
        placed = sorted(((lines.of(key), dotted(key), text) for key, text in found), key=itemgetter(0))
        raise ConfigError("\n".join(f"{path}:{line}: {key}: {text}" for line, key, text in placed))
    return config
