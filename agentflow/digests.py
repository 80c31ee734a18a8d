"""BLAKE2b, from which all digests here are made."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hashlib import blake2b
else:
    try:
        from _blake2 import blake2b  # the one that hashlib gives, which loads OpenSSL besides
    except ImportError:
        from hashlib import blake2b

__all__ = ["blake2b"]
