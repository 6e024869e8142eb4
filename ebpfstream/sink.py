"""The contract of sinks, and how a sink is found by its address."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable
from importlib.metadata import EntryPoint, entry_points
from math import inf
from types import TracebackType
from typing import Any, ClassVar, Final, Literal, Self, TypedDict

from ebpfstream.batch import EventBatch
from ebpfstream.errors import ArgumentError
from ebpfstream.names import did_you_mean, near
from ebpfstream.options import Seconds, Size, check_choice
from ebpfstream.sink_url import SinkURL

ENTRY_POINTS: Final = "ebpfstream.sinks"
"""The group of entry points by which packages offer sinks: scheme = "module:Class"."""

CLOSING: Final = 5.0
"""Seconds that a sink may take to close, unless told otherwise."""

WhenFull = Literal["block", "drop_newest", "drop_oldest", "spill", "fail"]
"""What becomes of a batch for which a sink's queue has no room."""


class Delivery(TypedDict, total=False):
    """How a sink is fed; every sink takes these as keyword arguments."""

    when_full: WhenFull
    """While the queue has no room: "block" (the default) reads nothing more for any sink, so that the kernel's buffer
    fills, and then loses; "drop_newest" and "drop_oldest" drop what comes, or what waits the longest, and count it;
    "spill" goes on in the spool until that is empty; "fail" ends the forwarding with QueueFullError."""
    queue_size: Size
    """Bytes of events, as they were in the kernel's buffer, that may wait for this sink (8 MiB)."""
    retry_for: Seconds
    """How long a batch is offered again to a sink that is unavailable, until it counts as failed (for ever)."""
    dead_letters: str | None
    """A file to which events are appended that the sink will never take, each with the reason, as JSON lines."""
    spool: str | None
    """A folder, for this sink alone, that holds what there is no room for in memory (`when_full="spill"`), or
    everything (`durable`).  What has not arrived at the end stays there, and the next life of the program goes on with
    it.  It is to be given events of the same type again."""
    durable: bool
    """Whether events are in the spool before they count as accepted, so that SIGKILL loses none of them."""
    spool_size: Size
    """Bytes that the spool may hold (1 GiB); when it is full, the oldest events are dropped, and counted."""
    spool_fsync: Literal["never", "batch"] | Seconds
    """When the disk has what is in the spool, should the machine crash: "never" leaves it to the kernel (the default),
    "batch" before events count as accepted, or so many seconds later."""


class Sink(ABC):
    """Where events go.  What follows is what every sink promises, and `ebpfstream.testing.SinkCompliance` checks.

    **Life.**  `open`, then any number of `send`, `flush` and `reopen`, then `aclose`; one after the other, in one task.
    An `open` that raises or is cancelled leaves nothing open, and `aclose` is not called then.  A sink that has been
    closed is not opened again: another object for the same destination goes on behind what is there.

    **What is sent** is an EventBatch.  It is the sink's to keep for as long as it likes, and nobody changes it.  It may
    hold losses (`batch.lost`), which belong before its events and are records of their own; and nothing but losses.

    **Acknowledging.**  When `send` returns None, the batch has arrived: the class says where.  It may return an
    awaitable instead: then the batch has been taken, and has arrived when the awaitable returns.  They are awaited in
    the order of their batches.  A sink bounds what it has taken and not acknowledged, by waiting in `send`.

    **Failing.**  `send` raises, and leaves the sink as ready as it was:

    - SinkUnavailableError: not now.  The rest of the batch, without the `taken` events that have arrived, is offered
      again, as often as need be; with `taken` 0 none of its losses have arrived either, or the sink remembers them.
    - SinkRejectedError: never.  What it names goes to the dead letters; the others have arrived.
    - DecodeError: a record does not fit its type.  Nothing of the batch has arrived; it is offered again without it.
    - SinkClosedError: the other end is gone for good; any other SinkError: the sink cannot go on.  Forwarding ends.

    An awaitable raises SinkRejectedError, or what ends the forwarding: whoever sends ahead repeats by itself, in the
    old order.  Errors of a library or of the system never come out as they are.

    **Cancelling.**  Each method may be cancelled at any await.  A batch whose `send` was cancelled has arrived as a
    whole, in part, or not at all; what arrived of it are whole events, in order, or what is sent next completes what is
    not whole.

    **Order.**  Events arrive in the order in which they were sent, unless the class says otherwise.

    **The loop lives.**  Nothing blocks the event loop: what the system may make wait is done in a thread.
    """

    name: str = ""
    """What it is called in statistics and messages, before what errors say; by default its class's name."""
    flush_every: float | None = None
    """Seconds after which what has been sent is flushed though more may come; None: only at the end."""
    when_full: WhenFull = "block"
    queue_size: int = 8 << 20
    retry_for: float = inf
    dead_letters: str | None = None
    spool: str | None = None
    durable: bool = False
    spool_size: int = 1 << 30
    spool_fsync: Literal["never", "batch"] | float = "never"
    address_example: ClassVar[str] = ""
    """An address of such a sink, for messages."""

    def __init__(
        self,
        *,
        when_full: WhenFull = when_full,
        queue_size: Size = queue_size,
        retry_for: Seconds = retry_for,
        dead_letters: str | None = dead_letters,
        spool: str | None = spool,
        durable: bool = durable,
        spool_size: Size = spool_size,
        spool_fsync: Literal["never", "batch"] | Seconds = spool_fsync,
    ) -> None:
        check_choice("when_full", when_full, WhenFull)
        if queue_size < 1:
            raise ArgumentError(f"queue_size={queue_size} is impossible: give bytes, 1 or more")
        if not retry_for >= 0:
            raise ArgumentError(f"retry_for={retry_for} is impossible: give seconds, 0 or more")
        if spool is None and (durable or when_full == "spill"):
            what = "durable=True" if durable else 'when_full="spill"'
            raise ArgumentError(f"{what} needs a folder for what is kept: give spool= as well")
        if spool is not None and not durable and when_full != "spill":
            raise ArgumentError(f'spool={spool!r} is for when_full="spill" or durable=True: give one of them')
        self.when_full = when_full
        self.spool = spool
        self.durable = durable
        self.spool_size = spool_size
        self.spool_fsync = spool_fsync
        self.queue_size = queue_size
        self.retry_for = retry_for
        self.dead_letters = dead_letters
        self.name = self.name or type(self).__name__

    @classmethod
    def from_url(cls, url: SinkURL) -> Self:
        """The sink that an address means.

        Here: no host and no path, and an option for each parameter of the class.  Raises ArgumentError.
        """
        if url.host or url.path:
            raise ArgumentError(
                f"{url.text!r}: {url.scheme}: takes no host and no path, only options: {url.scheme}:?…"
            )
        return cls(**url.arguments(cls))

    async def open(self) -> None:
        """Get ready; called once, before anything is sent.  Raises SinkError."""

    @abstractmethod
    async def send(self, batch: EventBatch[Any]) -> Awaitable[None] | None:
        """Take a batch; None when it has arrived, or what to await for that."""

    async def flush(self) -> None:
        """Return when all that was acknowledged is where it survives what the class says it survives.

        Raises SinkUnavailableError if that cannot be now, SinkError.
        """

    async def reopen(self) -> None:
        """Open anew what may have been moved away meanwhile (a file, by logrotate).  Raises as `send` does."""

    async def aclose(self, deadline: float = CLOSING) -> None:
        """Give up what `open` took, in at most so many seconds.  Called once, last.

        Until then what has been taken and not acknowledged may still arrive; after it, nothing does.  What an awaitable
        stands for that has not returned by then, or is cancelled, counts as not arrived.
        Raises nothing that is not a bug.
        """

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


def open_sink(address: str, /, **options: object) -> Sink:
    """The sink that an address such as `stdout:` or `file:exec.jsonl?rotate=100MB&keep=10` means, not yet open.

    Which kinds there are, installed packages say: the entry points of the group `ebpfstream.sinks`, by scheme.  The
    options are the parameters of the sink's class.  They stand in the address, or beside it as text or values:
    `open_sink("file:exec.jsonl", rotate="100MB", keep=10)`; True is yes, None is none.  Raises ArgumentError, which
    says what there is; for an option, also one that is given in both, OptionError.
    """
    url = SinkURL.parse(address).with_options(options)
    offers = [offer for offer in entry_points(group=ENTRY_POINTS) if offer.name == url.scheme]
    if not offers:
        raise ArgumentError(f"{address!r}: there is no sink {url.scheme!r}{_what_there_is(url.scheme)}")
    if len({offer.value for offer in offers}) > 1:
        packages = " and ".join(sorted(offer.dist.name if offer.dist else offer.value for offer in offers))
        raise ArgumentError(f"{address!r}: the packages {packages} both offer it: uninstall one")
    return _load(offers[0]).from_url(url)


def _sink_schemes() -> list[str]:
    """The schemes of all sinks that are installed."""
    return sorted({offer.name for offer in entry_points(group=ENTRY_POINTS)})


def _what_there_is(scheme: str) -> str:
    schemes = _sink_schemes()
    if hint := did_you_mean(f"{name}:" for name in near(scheme, schemes)):
        return hint
    if schemes:
        return f"; there are {', '.join(f'{name}:' for name in schemes)}"
    return ": sinks are found once ebpfstream is installed (pip install .)"


def _load(offer: EntryPoint) -> type[Sink]:
    try:
        found = offer.load()
    except (ImportError, AttributeError) as error:
        package = offer.dist.name if offer.dist else "its package"
        raise ArgumentError(
            f"the sink {offer.name}: cannot be loaded ({error}): "
            f"pip install '{package}[{offer.name}]' brings what it needs"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Sink)):
        raise ArgumentError(f"the sink {offer.name}: cannot be used: {offer.value} is no subclass of Sink")
    return found
