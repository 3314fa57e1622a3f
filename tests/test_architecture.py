"""What the code as a whole has to keep to: who imports whom, sizes, the command line, the presets' values."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fvlm import presets
from fvlm.config import Config, flatten, validate
from ray_jobs.options import parse

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("fvlm/**/*.py"), *ROOT.glob("ray_jobs/**/*.py")])
LONGEST_FILE, LONGEST_FUNCTION = 400, 60

LAYERS = {
    # A part of the product -> the parts it may import, itself left out.
    "errors": set(),
    "files": {"errors"},
    "hub_files": {"errors"},
    "locks": {"errors", "files"},
    "config": {"errors"},
    "presets": {"errors", "config"},
    "batch": {"errors"},
    "ranks": set(),
    "wsl2": set(),
    "proxies": set(),
    "resources": set(),
    "entry_point": {"errors", "files"},
    "model": {"errors", "files", "hub_files", "config", "batch", "ranks"},
    "data": {"errors", "files", "locks", "hub_files", "config", "batch", "entry_point"},
    "train": {
        "errors",
        "files",
        "locks",
        "config",
        "presets",
        "batch",
        "ranks",
        "wsl2",
        "proxies",
        "resources",
        "model",
        "data",
    },
    "convert": {"errors", "files", "config", "presets", "batch", "entry_point", "model", "data", "train"},
    "checks": {"errors", "files", "hub_files", "config", "batch", "wsl2", "resources", "model", "data", "train"},
}


def test_what_a_rank_begins_with_leaves_transformers_for_later():
    """Its import takes seconds, in which the ingest starts; and Ray Train's controller would import it too."""
    code = "import sys, ray_jobs.rank; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_library_works_where_ray_cannot_be_imported():
    modules = [name_of(path) for path in SOURCES if name_of(path).startswith("fvlm")]
    assert len(modules) > 20
    code = f"import sys, importlib\nsys.modules['ray'] = None\nfor m in {modules!r}: importlib.import_module(m)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [p for p in SOURCES if "fvlm" in p.relative_to(ROOT).parts], ids=name_of)
def test_imports_run_one_way_and_model_and_data_do_not_know_each_other(path):
    own = name_of(path).split(".")[1:2]
    for name in imported(path):
        assert name.split(".")[0] not in ("ray", "ray_jobs"), f"{name_of(path)} imports {name}"
        if name.startswith("fvlm.") and own:
            part = name.split(".")[1]
            # `from fvlm import presets` names a part, `from fvlm import __version__` does not
            if part in LAYERS:
                assert part in LAYERS[own[0]] | {own[0]}, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno + 1 <= LONGEST_FUNCTION, node.name


def attributes_read() -> Iterator[tuple[str | None, str]]:
    """(name before the dot, attribute) of every attribute that the product reads, config.py's own checks left out."""
    for path in SOURCES:
        if path == ROOT / "fvlm" / "presets.py":
            continue
        tree: ast.AST = ast.parse(path.read_text())
        if path == ROOT / "fvlm" / "config.py":
            # `run_name` and `run_dir` read keys on others' behalf; `validate` does not make a key useful.
            (tree,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                before = node.value
                name = before.attr if isinstance(before, ast.Attribute) else getattr(before, "id", None)
                yield name, node.attr


def test_every_config_key_is_read_somewhere():
    read = set(attributes_read())
    holders = {"config", "data", "scale", "self", "train", "optim", "model", "objective", "log", "eval"}
    for field in dataclasses.fields(Config):
        assert ("config", field.name) in read or ("self", field.name) in read, f"nothing reads {field.name}"
        if field.default is dataclasses.MISSING:  # a section
            for key in dataclasses.fields(field.default_factory):
                assert any((name, key.name) in read for name in holders), f"nothing reads {field.name}.{key.name}"


OPTIONS = """
    --feed-test --step-ms --feed-seconds
    --run --runs-dir --import-checkpoint --ingest-memory
    --model.vision --model.language --model.init --model.query-width --model.deep-query --model.no-deep-query
    --model.visual-norm --model.train-vision --model.no-train-vision
    --objective.fine-iterations --objective.lambda-recon --objective.coarse-every
    --objective.caption-start --objective.no-caption-start
    --data.path --data.num-frames --data.frame-size --data.global-batch --data.lanes --data.window-steps
    --data.max-caption-tokens --data.train-eos --data.no-train-eos --data.decode-threads
    --data.on-corrupt --data.max-corrupt --data.cache-dir --data.cache-gb
    --optim.lr --optim.weight-decay --optim.beta1 --optim.beta2 --optim.eps --optim.warmup-steps --optim.grad-clip
    --train.max-steps --train.seed --train.precision --train.log-every --train.save-every --train.keep-last
    --train.milestones --train.ratio-window --train.checkpoint-dir --train.max-skipped
    --train.compile --train.compile-cache --train.memory --train.cuda-graphs
    --train.deterministic --train.no-deterministic
    --eval.path --eval.every --eval.clips --eval.pictures
    --scale.workers --scale.device --scale.cpus-per-worker --scale.max-failures --scale.hang-s
    --scale.min-workers --scale.strategy --scale.store-wait-s --scale.room-wait-s
    --log.wandb-project --log.wandb --log.samples --log.no-samples
""".split()  # noqa: SIM905  (a list is four times as long)


def test_the_command_line_is_what_people_have_in_their_scripts(capsys):
    """An option may be added here. One that is renamed or dropped breaks somebody's command."""
    with pytest.raises(SystemExit) as end:
        parse(["demo", "--help"])
    assert end.value.code == 0
    offered = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]", capsys.readouterr().out))
    assert offered - {"--help", "--preset"} == set(OPTIONS)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset_is_valid_and_knows_its_name(name):
    config = presets.get(name)
    assert validate(config) is config
    assert config.preset == config.run_name == name
    assert presets.get(name) == config  # nothing in it depends on when it is asked


def test_joint_multifine_is_the_experiment_that_has_been_running():
    """The design's section 2, written out by hand."""
    values = flatten(presets.get("joint_multifine").to_dict())
    wanted = {
        "model.vision": "facebook/dinov2-small",
        "model.language": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "model.init": "hub",
        "model.query_width": 384,
        "model.deep_query": True,
        "model.visual_norm": "batch",
        "model.train_vision": True,
        "objective.fine_iterations": 2,
        "objective.lambda_recon": 0.5,
        "objective.coarse_every": 10,
        "objective.caption_start": False,
        "data.num_frames": 8,
        "data.frame_size": 256,
        "data.global_batch": 16,
        "data.max_caption_tokens": 64,
        "data.train_eos": False,
        "optim.lr": 3e-5,
        "optim.weight_decay": 0.01,
        "optim.warmup_steps": 500,
        "optim.grad_clip": 1.0,
        "optim.beta1": 0.9,  # AdamW's own defaults from here
        "optim.beta2": 0.999,
        "optim.eps": 1e-8,
        "train.max_steps": 100_000,
        "train.precision": "bf16",
        "train.ratio_window": 100,
        "train.milestones": [2_000, 10_000, 20_000],
        "log.wandb_project": "foveated-vlm-joint",
    }
    assert {key: values[key] for key in wanted} == wanted


def test_new_presets_have_the_corrected_labels_and_optimized_224_is_what_its_name_says():
    for name in presets.PRESETS.keys() - {"joint_multifine"}:
        config = presets.get(name)
        assert config.data.train_eos and config.objective.caption_start, name
    optimized = presets.get("optimized_224")
    assert (optimized.data.frame_size, optimized.objective.fine_iterations) == (224, 1)
