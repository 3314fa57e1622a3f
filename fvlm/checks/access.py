"""What a run reaches out for: weights on the hub, W&B, tokens, ports. No finding ever holds a secret."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import requests
import torch
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers

from fvlm.checks.finding import Finding, of_error
from fvlm.config import Config
from fvlm.data.text import TOKENIZER, published_tokenizer, require_tokens_fit
from fvlm.errors import UserError
from fvlm.hub_files import CONFIG, REFUSALS, TOKEN_CURE, ModelFiles, NotHere
from fvlm.model.families import OPTIONS, make_module
from fvlm.model.hub import Architecture, Part, kept_architecture, named_architecture, published_part
from fvlm.model.weights import INDEX, PICKLES, WEIGHTS, require_weights
from fvlm.train.wandb_choice import wandb_choice, wandb_key

DEADLINE_S = 4.0
PRIVATE = 0o600
RAYS_PORTS = 7
"""As cluster/local/start.sh: the base port and the next six."""


# ---- weights


def look_at_hub(config: Config, begun: bool) -> list[Finding]:
    """Config, tokenizer and weights of both models: opened where they are on this machine, as a start opens them.

    begun: the run has a checkpoint and a tokenizer, so nothing is fetched any more
    """
    if begun:
        try:
            kept_architecture(config) or named_architecture(config.model)
        except UserError as error:
            return [of_error("weights", error)]
        return [Finding("ok", "weights", "the run's checkpoint has them")]
    if config.model.init != "hub":
        return [Finding("ok", "weights", "random: nothing is fetched")]
    try:
        kept = kept_architecture(config)
    except UserError as error:
        return [of_error("weights", error)]
    return [_published(part, config, kept) for part in reversed(OPTIONS)]


def _published(part: str, config: Config, kept: Architecture | None) -> Finding:
    option, name = OPTIONS[part], str(getattr(config.model, part))
    what = f"weights {name}"
    is_folder = ModelFiles(option, name).is_folder
    if is_folder and (missing := _missing(Path(name), part, config)):
        cure = f"{option} takes a whole folder of save_pretrained, or a name on the hub."
        return Finding("FAIL", what, f"the folder has no {', '.join(missing)}", cure)
    try:
        pinned = kept.part(part) if kept and kept.part(part).revision else None
        _open(part, pinned or published_part(part, name, local_only=True), wants_weights=not config.import_checkpoint)
    except NotHere:
        return _on_hub(option, name)
    except UserError as error:
        return of_error(what, error)
    return Finding("ok", what, "a local folder" if is_folder else f"in {constants.HF_HUB_CACHE}")


def _missing(folder: Path, part: str, config: Config) -> list[str]:
    def has(file: str) -> bool:
        return (folder / file).is_file() or (folder / file).is_symlink()

    wanted = [CONFIG, *[TOKENIZER] * (part == "language")]
    any_weights = config.import_checkpoint or any(map(has, (WEIGHTS, INDEX, *PICKLES)))
    return [*[WEIGHTS] * (not any_weights), *(file for file in wanted if not has(file))]


def _open(part: str, found: Part, wants_weights: bool) -> None:
    """Raises UserError, NotHere among them, unless a start finds on this machine what it needs of this model."""
    files = ModelFiles(OPTIONS[part], found.name, found.revision, local_only=True)
    if part == "language":
        require_tokens_fit(published_tokenizer(files), int(found.config["vocab_size"]), files.where)
    with torch.device("meta"):
        module = make_module(part, found.config, repr(found.name))
    if wants_weights:
        require_weights(part, module, files)


def _on_hub(option: str, name: str) -> Finding:
    what = f"weights {name}"
    cure = (
        f"`hf download {name}` where there is a network, and copy the cache ({constants.HF_HUB_CACHE}, or HF_HOME); "
        f"or {option} with a folder, or --model.init random."
    )
    if constants.HF_HUB_OFFLINE:
        return Finding("FAIL", what, "not in the cache, and HF_HUB_OFFLINE forbids to fetch them", cure)
    problem = _unreachable(f"{constants.ENDPOINT}/{name}/resolve/main/config.json")
    if problem:
        cure = f"{TOKEN_CURE}; or {cure}" if REFUSALS[401] in problem else cure
        return Finding("FAIL", what, f"not in the cache, and {problem}", cure)
    return Finding("note", what, f"not in the cache; the first start fetches them from {_host(constants.ENDPOINT)}")


def _host(url: str) -> str:
    """Without a name and a password that the URL may hold."""
    return urlsplit(url).netloc.rpartition("@")[2]


def _unreachable(url: str) -> str:
    """Why `url`, of a model on the hub, cannot be had; "" when it can."""
    host = _host(url)
    try:
        answer = requests.head(url, headers=build_hf_headers(), timeout=DEADLINE_S, allow_redirects=True)
    except requests.RequestException as error:
        return f"{host} cannot be reached ({type(error).__name__})"
    if answer.status_code in REFUSALS:
        return f"{host} refuses: {REFUSALS[answer.status_code]} (HTTP {answer.status_code})"
    return "" if answer.ok else f"{host} answers with HTTP {answer.status_code}"


# ---- W&B


def look_at_wandb(config: Config) -> list[Finding]:
    choice, key = wandb_choice(config), wandb_key()
    value = choice.said.removeprefix("W&B: ")
    if choice.mode == "off":
        return [Finding("ok", "W&B", value)]
    found = look_at_secret("W&B", Path(key)) if key and key != "WANDB_API_KEY" else []
    if choice.mode == "offline":
        cure = f"`wandb sync {config.run_dir}/wandb/offline-*` sends it later; `wandb login` makes it online."
        return [*found, Finding("note", "W&B", value, cure)]
    if not key:
        cure = "`wandb login`, or WANDB_API_KEY in the environment, or --log.wandb offline."
        return [*found, Finding("FAIL", "W&B", f"{value}, and there is no key", cure)]
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = _host(url)
    if not answers(urlsplit(url).hostname or "", urlsplit(url).port or 443):
        cure = "A start waits for it. --log.wandb offline, until the network is back."
        return [*found, Finding("warn", "W&B", f"there is a key in {key}, and {host} cannot be reached", cure)]
    return [*found, Finding("ok", "W&B", f"online at {host}, with the key in {key}")]


def look_at_secret(what: str, path: Path) -> list[Finding]:
    """Nothing where nobody else may read it."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return [Finding("warn", f"{what} secret", f"{path} has mode {mode:o}: others may read it", f"chmod 600 {path}")]
    return []


# ---- a cluster of this machine


@dataclass(frozen=True)
class LocalCluster:
    """What cluster/local/start.sh made or would make, by the same variables."""

    folder: Path
    ports: dict[str, int]
    """Purpose -> port; Ray's own under FVLM_BASE_PORT."""
    process: int | None
    """Of its head, while that lives."""
    store_bytes: int

    @classmethod
    def of(cls, env: Mapping[str, str]) -> LocalCluster:
        """Raises ValueError for a setting that is no number."""
        folder = Path(env.get("FVLM_CLUSTER_DIR") or "~/.fvlm-cluster").expanduser().absolute()
        base = int(env.get("FVLM_BASE_PORT") or 6379)
        ports = {
            "FVLM_DASHBOARD_PORT": int(env.get("FVLM_DASHBOARD_PORT") or 8265),
            "FVLM_METRICS_PORT": int(env.get("FVLM_METRICS_PORT") or 8080),
        } | {f"FVLM_BASE_PORT+{n}": base + n for n in range(RAYS_PORTS)}
        process, store = None, int(env.get("FVLM_OBJECT_STORE_MB") or 2048) << 20
        try:
            number = int((folder / "pid").read_text())
            command = psutil.Process(number).cmdline()
            if f"--temp-dir={folder / 'ray'}" in command:
                process = number
                store = next(int(w.partition("=")[2]) for w in command if w.startswith("--object-store-memory="))
        except (OSError, ValueError, StopIteration, psutil.Error):
            pass
        return cls(folder, ports, process, store)

    def owns(self, process: int) -> bool:
        """start.sh opens a session of its own."""
        try:
            return self.process is not None and os.getsid(process) == self.process
        except OSError:
            return False


def look_at_cluster(env: Mapping[str, str]) -> list[Finding]:
    """Ports, token, and whether a named cluster answers."""
    try:
        cluster = LocalCluster.of(env)
    except ValueError as error:
        return [Finding("warn", "cluster", f"a setting of cluster/local/start.sh is no number: {error}")]
    return [_ports(cluster), *look_at_token(cluster, env), *_named(env)]


def _ports(cluster: LocalCluster) -> Finding:
    taken = {name: port for name, port in cluster.ports.items() if answers("127.0.0.1", port)}
    holders = _listeners()
    foreign = {name: port for name, port in taken.items() if not cluster.owns(holders.get(port, -1))}
    ports = ", ".join(str(port) for port in sorted(set(cluster.ports.values())))
    if foreign:
        each = [f"{port} ({_name_of(holders.get(port))})" for port in foreign.values()]
        variables = sorted({name.partition("+")[0] for name in foreign})
        return Finding(
            "warn",
            "ports",
            f"taken by others: {', '.join(each)}",
            f"cluster/local/start.sh would refuse to start: give it others with {' and '.join(variables)}. "
            "`ray_jobs.train` alone needs none of them.",
        )
    if cluster.process is not None:
        return Finding("ok", "ports", f"held by our own cluster of {cluster.folder} (process {cluster.process})")
    return Finding("ok", "ports", f"{ports} are free for cluster/local/start.sh")


def _listeners() -> dict[int, int]:
    """Port -> process, as far as this user may know."""
    try:
        return {c.laddr.port: c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid}
    except psutil.Error:
        return {}


def _name_of(process: int | None) -> str:
    try:
        return f"{psutil.Process(process).name()}, process {process}" if process else "another user's process"
    except psutil.Error:
        return f"process {process}"


def look_at_token(cluster: LocalCluster, env: Mapping[str, str]) -> list[Finding]:
    """Whether this shell has the token of our own cluster, and whether nobody else has."""
    own, given = cluster.folder / "token", env.get("RAY_AUTH_TOKEN_PATH", "")
    mode = env.get("RAY_AUTH_MODE", "").lower()
    found = []
    for path in dict.fromkeys([own, Path(given).expanduser()] if given else [own]):
        if path.is_file():
            found += look_at_secret("token", path)
    lines = f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={own}"
    if (
        mode == "token"
        and given
        and not (Path(given).expanduser().is_file() and Path(given).expanduser().stat().st_size)
    ):
        found.append(Finding("FAIL", "token", f"RAY_AUTH_TOKEN_PATH {given} is not there or empty", lines))
    elif mode == "token" and not given and not env.get("RAY_AUTH_TOKEN"):
        found.append(Finding("FAIL", "token", "RAY_AUTH_MODE is token, and no token is given", lines))
    elif mode == "disabled":
        found.append(
            Finding("warn", "token", "RAY_AUTH_MODE is disabled: whoever reaches the ports runs code here", lines)
        )
    elif cluster.process is not None and mode != "token":
        found.append(Finding("warn", "token", "our own cluster asks for its token, and this shell has none", lines))
    if found:
        return found
    text = "given to this shell" if mode == "token" else "none needed: a cluster that a command starts makes its own"
    return [Finding("ok", "token", text)]


def _named(env: Mapping[str, str]) -> list[Finding]:
    """The cluster of RAY_ADDRESS, if it names one."""
    address = env.get("RAY_ADDRESS", "")
    if address in ("", "local", "auto"):
        return []
    if address.startswith(("http://", "https://")):
        cure = "`unset RAY_ADDRESS` to train here; `ray_jobs.submit` takes it with --address."
        return [
            Finding("FAIL", "RAY_ADDRESS", f"{address} is that of a dashboard, which `ray_jobs.train` cannot use", cure)
        ]
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit() and answers(host, int(port)):
        return [Finding("ok", "RAY_ADDRESS", f"{address} answers")]
    return [Finding("FAIL", "RAY_ADDRESS", f"no cluster answers at {address}", "Start it, or `unset RAY_ADDRESS`.")]


def answers(host: str, port: int) -> bool:
    """Whether somebody takes a connection."""
    try:
        socket.create_connection((host, port), timeout=DEADLINE_S).close()
    except OSError:
        return False
    return True
