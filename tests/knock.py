"""Knocks at ports of Ray nodes with every request that Ray knows, and says what each was answered.

A program of its own, for it runs in another network namespace than the tests: `python knock.py < JSON > JSON`.
in:  {"targets": [[address, port], ...], "token": str or null}; "http" and "grpc", lists, narrow the requests down
out: an object for each target, in their order: {"protocol": "http", "grpc" or "", "answers": {request: answer}}; an
     answer is the status of HTTP, the name of gRPC's status, or "" where the connection broke. A port that has fallen
     silent is asked nothing more.
"""

from __future__ import annotations

import http.client
import importlib
import json
import pkgutil
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import ray
from ray.core import generated

RAY = Path(ray.__file__).parent
PATIENCE_S = 5.0
SYNC = "/ray.rpc.syncer.RaySyncer/StartSync"
"""Ray nodes tell each other of their resources by it."""


def http_requests() -> list[str]:
    """`METHOD PATH` of every route of the dashboard, its agents and the agents of runtime environments."""
    found = {"GET /", "GET /metrics", "GET /static/js/main.js", "GET /no-such-page"}
    for file in (*RAY.glob("dashboard/**/*.py"), *RAY.glob("_private/runtime_env/agent/*.py")):
        text = file.read_text()
        for method, path in re.findall(r"(?:outes\.|router\.add_)(get|post|put|delete|patch)\(\s*\"(/[^\"]*)\"", text):
            found.add(f"{method.upper()} {re.sub(r'{[^}]*}', 'x', path)}")
    return sorted(found)


def grpc_methods() -> list[str]:
    """`/SERVICE/METHOD` of every service that Ray's programs and Python modules name, and of gRPC's own."""
    found = {"/grpc.health.v1.Health/Check", "/grpc.channelz.v1.Channelz/GetServers"}
    for program in ("gcs/gcs_server", "raylet/raylet"):
        names = re.findall(rb"/ray\.rpc\.[\w.]+/[A-Z]\w+", (RAY / "core" / "src" / "ray" / program).read_bytes())
        found |= {name.decode() for name in names}
    for module in pkgutil.iter_modules(generated.__path__):
        if module.name.endswith("_pb2"):
            services = importlib.import_module(f"{generated.__name__}.{module.name}").DESCRIPTOR.services_by_name
            found |= {
                f"/{service.full_name}/{method.name}" for service in services.values() for method in service.methods
            }
    return sorted(found)


def ask_http(address: str, port: int, request: str, token: str | None) -> int:
    """Raises OSError or HTTPException when what listens there is no web server."""
    method, path = request.split(" ")
    connection = http.client.HTTPConnection(address, port, timeout=PATIENCE_S)
    try:
        connection.request(method, path, headers={"Authorization": f"Bearer {token}"} if token else {})
        return connection.getresponse().status
    finally:
        connection.close()


def ask_grpc(channel: grpc.Channel, method: str, token: str | None) -> str:
    metadata = [("authorization", f"Bearer {token}")] if token else []
    if method == SYNC:  # without a node's id Ray aborts; see the test
        metadata.append(("node_id", "ab" * 28))
    try:
        channel.unary_unary(method)(b"", timeout=PATIENCE_S, metadata=metadata)
    except grpc.RpcError as error:
        return error.code().name
    return "OK"


def knock(address: str, port: int, token: str | None, pages: list[str], methods: list[str]) -> dict[str, object]:
    answers: dict[str, object] = {}
    try:
        for page in pages:
            answers[page] = ask_http(address, port, page, token)
        return {"protocol": "http", "answers": answers}
    except (OSError, http.client.HTTPException):
        if answers:
            return {"protocol": "http", "answers": answers | {page: ""}}
    with grpc.insecure_channel(f"{address}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(PATIENCE_S)
        except grpc.FutureTimeoutError:
            return {"protocol": "", "answers": {}}
        for method in methods:
            answers[method] = ask_grpc(channel, method, token)
            if answers[method] in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                break
        return {"protocol": "grpc", "answers": answers}


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    pages, methods = asked.get("http") or http_requests(), asked.get("grpc") or grpc_methods()
    with ThreadPoolExecutor(16) as pool:
        found = pool.map(lambda target: knock(*target, asked["token"], pages, methods), asked["targets"])
        json.dump(list(found), sys.stdout)
