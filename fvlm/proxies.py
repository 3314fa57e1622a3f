"""Proxies of the environment, which are for the world outside: nobody reaches this machine's own ports through one."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from requests.utils import get_environ_proxies, select_proxy

LOOPBACK = ("localhost", "127.0.0.1", "127.0.0.0/8", "::1")
"""Programs differ in what they understand: names, addresses, or nets."""
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy")
EXCEPTIONS = ("no_proxy", "NO_PROXY", "no_grpc_proxy")
"""Some programs look at the first alone, some at the second; gRPC at the third where it is there."""


def keep_loopback_direct() -> None:
    """From now on no program of this process and of its children asks a proxy for a loopback address."""
    environment = {name.lower() for name, value in os.environ.items() if value}
    if not environment & set(PROXIES):
        return
    for name in EXCEPTIONS:
        if name == "no_grpc_proxy" and name not in os.environ:
            continue  # gRPC looks at no_proxy then
        given = os.environ.get(name) or os.environ.get(name.upper()) or os.environ.get(name.lower()) or ""
        names = [word.strip() for word in given.split(",") if word.strip()]
        if "*" not in names:
            os.environ[name] = ",".join([*names, *(word for word in LOOPBACK if word not in names)])


def proxy_between(url: str) -> str:
    """The proxy that a request to `url` goes through, without its password; "" where it goes straight."""
    proxy = select_proxy(url, get_environ_proxies(url))
    if not proxy:
        return ""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
