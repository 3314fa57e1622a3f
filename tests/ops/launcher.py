"""Files of Ray's cluster launcher: checked by Ray, and where Ray leaves things open, by what will read them."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import click
import jsonschema
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start as ray_start

from ops.manifests import unknown_settings
from ops.shell import shellcheck
from ops.tools import checkers

COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
START_OPTIONS = {option for parameter in ray_start.params for option in parameter.opts}


def load(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def problems(path: Path) -> list[str]:
    """All that is wrong with the file."""
    config = load(path)
    try:
        validate_config(prepare_config(config))
    except (jsonschema.ValidationError, ValueError, RuntimeError, click.ClickException) as error:
        return [str(error)]
    found = [f"provider: unknown {key}" for key in config["provider"].keys() - ray_schema("provider")]
    for name, node in config.get("available_node_types", {}).items():
        found += [f"{name}: unknown resource {key}" for key in node["resources"].keys() - {"CPU", "GPU"}]
        found += [f"{name}: {text}" for text in NODES[config["provider"]["type"]](node["node_config"])]
    lines = [line for part in COMMANDS for line in config.get(f"{part}_commands", [])]
    found += shellcheck("\n".join(lines), "SC2164,SC2002")  # a `cd` that fails ends the command, of which it is one
    for line in lines:
        found += [f"`ray start` has no {option}" for option in start_options(line) - START_OPTIONS]
    return found + unknown_settings(settings("\n".join(lines)))


def start_options(command: str) -> set[str]:
    """The options in what follows `ray start`."""
    _, _, rest = command.partition("ray start ")
    return set(re.findall(r"(?<![\w-])--[\w-]+", rest))


def settings(script: str) -> set[str]:
    """RAY_... variables that a script sets."""
    return set(re.findall(r"\b(RAY_\w+)=", script))


@cache
def ray_schema(section: str) -> frozenset[str]:
    """The keys of a section that Ray knows: its schema lists them, and lets others pass."""
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    return frozenset(schema["properties"][section]["properties"])


def of_aws(node: dict[str, Any]) -> list[str]:
    """A node's config against what EC2's RunInstances takes; Ray fills in the rest."""
    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    report = botocore.validate.ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node}, shape)
    return [report.generate_report()] if report.has_errors() else []


def of_gcp(node: dict[str, Any]) -> list[str]:
    """A node's config against the Instance of Google's Compute Engine."""
    schemas = google_schemas()
    return list(unknown_to_google(node, "Instance", schemas))


def of_own_machines(node: dict[str, Any]) -> list[str]:
    return [f"unknown {key}" for key in node]


NODES = {"aws": of_aws, "gcp": of_gcp, "local": of_own_machines}


@cache
def google_schemas() -> dict[str, Any]:
    (path,) = checkers().parent.glob(
        "lib/python*/site-packages/googleapiclient/discovery_cache/documents/compute.v1.json"
    )
    return json.loads(path.read_text())["schemas"]


def unknown_to_google(value: Any, kind: str, schemas: dict[str, Any]) -> list[str]:
    """Keys and values of enumerations that the type `kind` does not have."""
    found = []
    for key, part in value.items():
        wanted = schemas[kind]["properties"].get(key)
        if wanted is None:
            found.append(f"{kind} has no {key}")
            continue
        if "enum" in wanted and part not in wanted["enum"]:
            found.append(f"{kind}.{key} cannot be {part}")
        wanted, parts = (wanted["items"], part) if wanted.get("type") == "array" else (wanted, [part])
        for one in parts if "$ref" in wanted else []:
            found += unknown_to_google(one, wanted["$ref"], schemas)
        if wanted.get("type") == "object" and "properties" in wanted:
            found += [
                f"{kind}.{key} has no {name}" for one in parts for name in one.keys() - wanted["properties"].keys()
            ]
    return found
