"""Fetches images from public addresses, and from no others."""

import asyncio
import socket
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from typing import Any

import aiohttp

from .errors import ApiError


_SECONDS = 20
_REDIRECTS = 3
# Addresses of IPv6 that lead to one of IPv4, by a gateway (RFC 6052, RFC 8215).
_GATEWAYS = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))


class PrivateAddressError(OSError):
    """An address is not a public one."""


async def fetch(url: str, max_bytes: int, param: str) -> bytes:
    """
    What is at an address. Every address that is connected to must be public, whatever names or redirects lead to it.

    Args:
        url: An address of http or https.
        max_bytes: The most that is read.
        param: How the request calls it.

    Raises:
        ApiError: it cannot be fetched, is too large, or leads to an address that is not public.
    """
    connector = aiohttp.TCPConnector(socket_factory=_public_socket, force_close=True)
    timeout = aiohttp.ClientTimeout(total=_SECONDS)
    try:
        async with (
            aiohttp.ClientSession(
                connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar()
            ) as session,
            session.get(url, max_redirects=_REDIRECTS) as response,
        ):
            response.raise_for_status()
            content = bytearray()
            async for chunk in response.content.iter_chunked(1 << 16):
                content += chunk
                if len(content) > max_bytes:
                    raise ApiError(
                        400, f"`{param}` has an image of more than {max_bytes:,} bytes at {url[:80]}", param
                    )
            return bytes(content)
    except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
        # Its own words would tell what is inside of the network.
        private = isinstance(getattr(error, "os_error", error), PrivateAddressError)
        reason = "does not lead to a public address" if private else "cannot be fetched"
        raise ApiError(400, f"`{param}` has an image whose address {reason}: {url[:80]}", param) from error


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and leads to no other."""
    return all(each.is_global and not each.is_multicast for each in _reached(ip_address(address.partition("%")[0])))


def _reached(address: IPv4Address | IPv6Address) -> list[IPv4Address | IPv6Address]:
    """An address, and those of IPv4 inside of it."""
    if isinstance(address, IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    inner = [address.sixtofour, *(address.teredo or ())]
    if any(address in gateway for gateway in _GATEWAYS):
        inner.append(IPv4Address(int(address) & 0xFFFFFFFF))
    return [address, *(each for each in inner if each is not None)]


def _public_socket(info: tuple[Any, ...]) -> socket.socket:
    """The socket of a connection. aiohttp asks for it after names are resolved, for every connection."""
    family, kind, protocol, _, address = info
    if not is_public(address[0]):
        raise PrivateAddressError(f"{address[0]} is not public")
    return socket.socket(family, kind, protocol)
