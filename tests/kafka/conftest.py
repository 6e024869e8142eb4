"""The broker that tests share."""

from __future__ import annotations

import re
import secrets
from functools import cache
from typing import TYPE_CHECKING

import pytest

from tests.kafka import client, jars
from tests.kafka.broker import Cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.kafka.proxy import Proxy


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: those start brokers."""
    if item.get_closest_marker("kafka") and (reason := _missing()):
        pytest.skip(reason)


@cache
def _missing() -> str:
    try:
        jars.get()
    except jars.JarsError as error:
        return str(error)
    return ""


@pytest.fixture(scope="package")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One node with every listener, for all tests that do not hurt it."""
    with Cluster(tmp_path_factory.mktemp("kafka")) as cluster:
        yield cluster


@pytest.fixture
def topic(broker: Cluster, request: pytest.FixtureRequest) -> str:
    """A topic of 3 partitions that no other test knows; named after this one."""
    name = f"{re.sub(r'[^a-z0-9]+', '-', request.node.name)}-{secrets.token_hex(4)}"
    client.create_topic(broker.servers, name)
    return name


@pytest.fixture
def proxy(broker: Cluster) -> Iterator[Proxy]:
    """The way to the PROXIED listener of `broker`; whatever a test did to it ends with the test."""
    proxy = broker.proxies[1]
    yield proxy
    proxy.release()
    proxy.cut()
