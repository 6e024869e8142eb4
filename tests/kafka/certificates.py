"""Certificates for TLS, by an authority that is made for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trustme
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

if TYPE_CHECKING:
    from pathlib import Path


def make(authority: Path, server: Path, client: Path, client_name: str) -> None:
    """Write an authority's certificate, and two by it, each with its key: this machine's, and a client's."""
    ca = trustme.CA()
    _write_pem(ca.issue_cert("localhost", common_name=client_name), client)  # Java wants a name there
    _write_pem(ca.issue_cert("127.0.0.1", "localhost"), server)
    ca.cert_pem.write_to_path(authority)


def _write_pem(certificate: trustme.LeafCert, path: Path) -> None:
    """Kafka reads private keys in PKCS #8 alone."""
    key = load_pem_private_key(certificate.private_key_pem.bytes(), None)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(pem + b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
