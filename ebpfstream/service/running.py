"""The service: every source of a configuration forwarded to its sinks, until a signal ends it."""

from __future__ import annotations

import logging
import signal
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Final

import anyio

from ebpfstream.asking import Asked
from ebpfstream.errors import EbpfStreamError
from ebpfstream.kernel import privileges
from ebpfstream.kernel.bpf import wait_for_running_programs
from ebpfstream.service import config, logs
from ebpfstream.service.config import Config
from ebpfstream.service.endpoint import Endpoint
from ebpfstream.service.instance import Instance
from ebpfstream.service.metrics import LedgerCollector
from ebpfstream.service.notify import Notifier
from ebpfstream.service.part import Part
from ebpfstream.service.reload import difference, merged
from ebpfstream.statistics import INCOMPLETE, ForwardStatistics

FAILED: Final = 1
"""The exit status when something cannot be opened, or a sink fails for good."""

_LATE: Final = 30.0
"""Seconds after which a sink that repeats by itself, as Kafka's does, counts as unavailable."""

_log = logging.getLogger("ebpfstream.service")


def run(path: Path) -> int:
    """Run a configuration until SIGTERM or SIGINT; the exit status: 0, FAILED or INCOMPLETE.

    INCOMPLETE it is when something that a sink had accepted has neither arrived nor is in its spool.

    SIGHUP lets files be opened anew, and applies what has changed in the configuration as far as that can be while it
    runs; the log says what needs a restart.  When something cannot be opened, or a sink fails for good, the log has the
    error and the status is FAILED; every other sink has got then what was read until that happened.

    Raises ConfigError.
    """
    read = config.load(path)
    with logs.configure(read.service.log_level, read.service.log_format):
        try:
            with Instance(path, read.service.lock_folder):
                return Service(path, read).run()
        except EbpfStreamError as error:
            _log.error("%s", error)
            return FAILED


class Service:
    """One run of a configuration: attached, privileges dropped, forwarded, ended."""

    def __init__(self, path: Path, read: Config) -> None:
        self._path = path
        self._config = read
        self._notifier = Notifier()
        self._parts = {source.name: Part(source, read.service.deadline) for source in read.sources}
        self._failed = False
        self._asked = Asked()
        self._ending = False

    def run(self) -> int:
        """Until a signal; the exit status.  Raises EbpfStreamError."""
        settings = self._config.service
        endpoint = None
        if settings.listen:  # its socket is made now: a low port needs privileges
            endpoint = Endpoint(settings.listen, LedgerCollector(self._ledgers), self._not_ready)
        try:
            # Capabilities are those of threads (capabilities(7)): what needs them is done in an event loop whose
            # threads end with it.
            anyio.run(self._attach)
            if settings.drop_privileges:
                needs = [one for part in self._parts.values() for one in part.needs]
                kept = privileges.drop(user=settings.user, keep=needs, works=self._work)
                _log.info("privileges dropped", extra={"kept": [one.name for one in kept]})
            anyio.run(self._forward, endpoint)
        finally:
            if endpoint is not None:
                endpoint.close()
        if self._failed:
            return FAILED
        sinks = [sink for ledger in self._ledgers().values() for sink in ledger.sinks]
        return INCOMPLETE if any(sink.dropped or sink.in_flight for sink in sinks) else 0

    def _ledgers(self) -> dict[str, ForwardStatistics]:
        return {name: part.forwarding.statistics() for name, part in self._parts.items()}

    def _work(self) -> None:
        """What has to work until the end."""
        self._ledgers()
        wait_for_running_programs()

    def _not_ready(self) -> list[str]:
        """What is not as it should be, a line for each."""
        if self._ending:
            return ["it is ending"]
        reasons = []
        for name, part in self._parts.items():
            if not part.forwarding.attached.is_set():
                reasons.append(f"{name}: its sinks are not open yet")
            reasons += [
                f"{name}: {sink.name} is unavailable: {sink.last_error}"
                if sink.away
                else f"{name}: {sink.name} has acknowledged nothing for {sink.lag:.0f} s"
                for sink in part.forwarding.statistics().sinks
                if sink.away or sink.lag > _LATE
            ]
        return reasons

    async def _attach(self) -> None:
        try:
            for part in self._parts.values():
                await part.attach()
        except BaseException:
            await self._close()
            raise

    async def _close(self) -> None:
        for part in self._parts.values():
            await part.close()

    async def _forward(self, endpoint: Endpoint | None) -> None:
        try:
            async with endpoint or nullcontext(), anyio.create_task_group() as tasks:
                tasks.start_soon(self._heed_signals)
                tasks.start_soon(self._feed_watchdog)
                tasks.start_soon(self._announce, endpoint.address if endpoint else None)
                async with anyio.create_task_group() as forwarding:
                    for name, part in self._parts.items():
                        forwarding.start_soon(self._forward_part, name, part)
                tasks.cancel_scope.cancel()
        finally:
            await self._close()

    async def _forward_part(self, name: str, part: Part) -> None:
        """Until its end, which is that of all."""
        try:
            await part.forwarding.run()
        except EbpfStreamError as error:
            self._failed = True
            _log.error("%s: %s", name, error)
        self._end()
        ledger = part.forwarding.statistics()
        _log.info("%s: %s", name, str(ledger).replace("\n", "; "), extra={"ledger": asdict(ledger)})

    async def _announce(self, listen: str | None) -> None:
        """Say that it is ready, when everything is open."""
        for part in self._parts.values():
            await part.forwarding.attached.wait()
        _log.info("forwarding", extra={"sources": list(self._parts), "listen": listen})
        self._notifier.ready(f"forwarding {', '.join(self._parts)}")

    async def _feed_watchdog(self) -> None:
        interval = self._notifier.watchdog_interval
        while interval is not None:
            self._notifier.alive()
            await anyio.sleep(interval)

    # --- signals

    async def _heed_signals(self) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async for number in signals:
                if number == signal.SIGHUP:
                    self._reload()
                else:
                    _log.info("ending", extra={"signal": signal.Signals(number).name})
                    self._end(at_once=self._asked.to_end(number))

    def _end(self, *, at_once: bool = False) -> None:
        """Let every source end: what has happened is delivered until the deadline, or not."""
        if self._ending and not at_once:
            return
        self._ending = True
        self._notifier.stopping()
        for part in self._parts.values():
            part.forwarding.end(0 if at_once else None)

    def _reload(self) -> None:
        self._notifier.reloading()
        for part in self._parts.values():
            part.forwarding.reopen()
        try:
            self._apply(config.load(self._path))
        except EbpfStreamError as error:
            _log.error("the configuration is not applied, or not all of it: %s", error)
        self._notifier.ready()

    def _apply(self, read: Config) -> None:
        changes = difference(self._config, read)
        for name, source in changes.filters.items():
            self._parts[name].set_filters(source)
        for name, source in changes.shaping.items():
            self._parts[name].reshape(source)
        if changes.log_level is not None:
            logs.set_level(changes.log_level)
        self._config = merged(self._config, read)
        _log.info("reloaded", extra={"changed": changes.applicable})
        if changes.restart:
            _log.warning("some of what has changed needs a restart", extra={"keys": changes.restart})
