"""The step's benchmark counts what it says it counts, and all of it runs, at a tiny size, by the GPU's own script."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks" / "step"))
from compare import Bench, Spec, compare
from counts import Counts, count
from parts import loss_curve, readings, sweep
from variants import base_model, build, caption_batches, latent_shape, learnable_batches, make_config

from fvlm.batch import IGNORE, Batch
from fvlm.errors import UserError
from fvlm.train.flops import clip_flops

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "tests" / "benchmarks"
CPU = torch.device("cpu")
TINY = {"data.global_batch": 2, "data.num_frames": 3, "data.frame_size": 28, "data.max_caption_tokens": 24}


def bench(**changes) -> Bench:
    return Bench(CPU, **{"repeats": 2, "present_repeats": 1, "warmup": 1, "budget_s": 600.0} | changes)


@pytest.fixture(scope="module")
def program():
    """The program as a module."""
    spec = importlib.util.spec_from_file_location("bench_step", BENCHMARKS / "step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_model_of_fewer_layers_leaves_the_preset_as_it_is():
    short, whole = (base_model(make_config("demo", layers)) for layers in (1, None))
    assert len(short.llm.model.layers) == 1
    assert len(whole.llm.model.layers) > 1


def test_operations_are_those_of_the_formulas_with_attention_and_what_is_computed_again():
    b, s, d, heads = 2, 5, 12, 3
    first, second = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def mlp(x):
        return second(F.gelu(first(x)))

    def step(recompute: bool):
        x = torch.randn(b, s, d, requires_grad=True)
        q = x.unflatten(-1, (heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        y = checkpoint(mlp, y, use_reentrant=False) if recompute else mlp(y)
        y.sum().backward()
        return torch.tensor(1.5)

    result, plain = count(lambda: step(False))
    product, attention = 2 * b * s * d * 4 * d, 2 * b * s * s * d
    assert result == 1.5
    assert plain.products == 3 * 2 * product
    assert (plain.attention, plain.attention_backward) == (7 * attention, 5 * attention)
    assert plain.useful == pytest.approx(6 * product + 6 * attention)
    # The last product is not made again: nobody needs what came out of it.
    assert count(lambda: step(True))[1].products == plain.products + product


def test_operators_are_counted_without_views_and_up_to_clipping_apart():
    weight = torch.ones(3, 3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1, foreach=False)

    def step():
        (weight.view(9) * 2).sum().backward()  # mul, sum; backward: ones_like, mul, and expand, which is a view
        nn.utils.clip_grad_norm_([weight], 1.0, foreach=False)
        optimizer.step()

    step()
    optimizer.zero_grad()
    counts = count(step)[1]
    assert counts.operators_model == 4
    assert counts.operators > 4 + 3  # norm, its inverse, clipping, the update


@functools.cache
def full_size_counts(name: str) -> Counts:
    """Of one of the real experiment's steps, for one clip, on tensors that have shapes and no values."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "_no_grad_trunc_normal_", lambda tensor, *_args, **_kwargs: tensor)
        # Tensors without values cannot move, and a copy of one belongs to a copy of its mode.
        patch.setattr(nn.Module, "to", lambda module, *_args, **_kwargs: module)
        real = copy.deepcopy
        patch.setattr(copy, "deepcopy", lambda it, *memo: it if isinstance(it, nn.Module) else real(it, *memo))
        # Of real tensors it sees that plain causality will do; of these it cannot, and would build masks.
        patch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **_: None)
        config = make_config("joint_multifine", **{"data.global_batch": 1})
        t, side, length = config.data.num_frames, config.data.frame_size, config.data.max_caption_tokens
        with FakeTensorMode():
            ids = torch.empty(1, length, dtype=torch.int64)
            frames = torch.empty(1, t, side, side, 3, dtype=torch.uint8)
            batch = Batch(frames, torch.empty(1, t, *latent_shape(config)).half(), ids, ids, ("a",))
            variant = build(name, "fp32", config, base_model(config), CPU)
            return count(lambda: variant.plain(batch))[1]


def test_the_present_style_costs_what_was_measured_of_the_present_script():
    """538 GFLOP a clip and 36,100 kernels were measured of it, attention's operations left out."""
    assert full_size_counts("present").products / 1e9 == pytest.approx(538, rel=0.01)
    assert full_size_counts("present").operators_model == pytest.approx(36_100, rel=0.04)


def test_our_step_costs_what_the_mathematics_needs_and_what_the_trainer_counts_for_mfu():
    present, ours = full_size_counts("present"), full_size_counts("eager")
    config = make_config("joint_multifine")
    assert [ours.useful] == clip_flops(config, latent_shape(config), [config.data.max_caption_tokens])
    assert (ours.products / 1e9, ours.attention / 1e9) == pytest.approx((426, 52), abs=0.5)
    assert ours.products / 1e9 <= 430
    assert ours.operators_model <= 0.4 * 36_100
    assert ours.operators <= 0.4 * present.operators


def test_variants_agree_and_every_figure_is_there():
    config = make_config("demo", 2, **TINY)  # of one layer the operators around the layers are too many
    specs = [Spec(name, precision) for precision in ("fp32", "bf16") for name in ("present", "eager")]
    rows = compare(bench(), config, specs)
    assert [(row.variant, row.precision) for row in rows] == [(spec.name, spec.precision) for spec in specs]
    fp32, bf16 = [row.loss_diff for row in rows[:2]], [row.loss_diff for row in rows[2:]]
    assert fp32[0] == 0 and fp32[1] <= 1e-5
    assert all(0 < difference < 0.02 for difference in bf16)
    for row in rows:
        assert len(row.ms_all) == (1 if row.variant == "present" else 2)
        assert row.clips_s == pytest.approx(2000 / row.ms)
        assert row.gflop_clip > 0 and row.gflop_clip_attention > 0 and row.mfu > 0 and row.operators
        assert row.kernels is row.launches is row.graphs is None
    assert rows[0].gflop_clip > rows[1].gflop_clip and rows[0].operators_model > 2 * rows[1].operators_model
    # One numerator for all: the present style's operations are more, its share of the chip's best is not.
    assert rows[0].mfu / rows[1].mfu == pytest.approx(rows[1].ms / rows[0].ms)


def test_a_variant_that_cannot_be_here_is_said_and_the_others_go_on(capsys):
    config, specs = make_config("demo", 1, **TINY), [Spec("graphs", "fp32"), Spec("eager", "fp32")]
    recorded, eager = compare(bench(), config, specs)
    assert recorded.ms is None and "not on a CUDA GPU" in recorded.note and eager.ms and not eager.note
    assert [row["variant"] for row in readings(bench(), config, specs)] == ["eager fp32"]
    assert "graphs fp32: --train.cuda-graphs on: this run is not on a CUDA GPU" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_ends_the_sweep_and_is_said(monkeypatch, capsys):
    def build_small(name, precision, config, base, device, attention="sdpa"):
        if config.data.global_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")  # no GPU here to fill
        return build(name, precision, config, base, device, attention)

    monkeypatch.setattr("compare.build", build_small)
    config = make_config("demo", 1, **TINY)
    out = sweep(bench(), config, [Spec("eager", "fp32")], [2, 4, 8])
    assert [(row["batch"], row["note"]) for row in out["rows"]] == [(2, ""), (4, "out of memory")]
    assert out["note"] == "batch 4 does not fit; larger ones were not tried"
    assert "out of memory" in capsys.readouterr().out


def test_without_time_nothing_is_lost_in_silence():
    config = make_config("demo", 1, **TINY)
    late = bench(budget_s=0.0, repeats=5)
    out = sweep(late, config, [Spec("eager", "fp32")], [2, 4])
    assert out == {"rows": [], "note": "batch sizes [2, 4] were not measured: out of time"}
    (row,) = compare(late, config, [Spec("eager", "fp32")])
    assert len(row.ms_all) == 3 and row.note == "cut at 3 repetitions: out of time"


def test_the_loss_curve_learns_and_bf16_follows_float32():
    config = make_config("demo", 1, **TINY)
    out = loss_curve(bench(), config, "eager", 60)
    assert out["last_loss"] < 0.9 * out["first_loss"]
    assert len(out["fp32"]) == len(out["bf16"]) == 60
    assert out["fp32"] != out["bf16"] and abs(out["drift"]) < 0.05


def test_batches_have_captions_of_many_lengths_and_a_lesson():
    config = make_config("joint_multifine", **{"data.global_batch": 8, "data.frame_size": 16, "data.num_frames": 2})
    batches = [batch.check() for batch in caption_batches(config, CPU, 30)]
    lengths = torch.cat([(batch.labels != IGNORE).sum(1) for batch in batches])
    assert lengths.min() < 10 and lengths.max() == 64
    assert len({batch.caption_ids.shape[1] for batch in batches}) > 1  # padded as the product pads
    batch = next(learnable_batches(config, CPU)).check()
    assert 1 < len({tuple(ids.tolist()) for ids in batch.caption_ids}) < 8  # few things, told again and again


def test_it_needs_torch_transformers_and_numpy_alone():
    blocked = ["ray", "psutil", "pyarrow", "av", "tyro", "matplotlib", "wandb", "requests", "simplejpeg", "aiohttp"]
    script = str(BENCHMARKS / "step.py")
    code = (
        f"import sys, runpy\nfor name in {blocked}: sys.modules[name] = None\n"
        f"sys.argv = [{script!r}, '--help']\nrunpy.run_path({script!r}, run_name='__main__')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd="/", env=environment
    )
    assert done.returncode == 0 and "--loss-curve" in done.stdout, done.stderr


def test_wrong_options_are_told_in_one_line(program, capsys):
    for options, told in (
        (["--variants", "present,fast"], "no fast; there are present, eager"),
        (["--precision", "fp16"], "fp32, bf16, or fp32,bf16"),
        (["--sweep", "8,many"], "--sweep 8,many: numbers with commas between them"),
        (["--merge", "a.json"], "--merge needs --json"),
    ):
        with pytest.raises(SystemExit) as end:
            program.parse(options)
        assert end.value.code == 2 and told in capsys.readouterr().err
    for options, told in (
        (["--preset", "demo", "--fine", "0"], r"--objective.fine-iterations is 0; it must be above 0"),
        (["--preset", "nothing"], "no preset 'nothing'; there are demo"),
    ):
        with pytest.raises(UserError, match=told):
            program.main(program.parse(options))


def gpu_script(tmp_path: Path, *words: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "OUT": str(tmp_path / "out")}
    command = [str(BENCHMARKS / "gpu.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_gpu_script_says_so(tmp_path):
    done = gpu_script(tmp_path, "step")
    assert done.returncode == 2 and "no torch that sees a CUDA GPU" in done.stderr and "--dry-run" in done.stderr
    done = gpu_script(tmp_path, "--dry-run", "everything")
    assert done.returncode == 2 and "no part everything; there are parity, step and run" in done.stderr


def test_the_gpu_script_s_parity_runs_at_a_tiny_size(tmp_path):
    done = gpu_script(tmp_path, "--dry-run", "parity", timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "parity.json").read_text())
    checks = {row["what"]: row for row in found["checks"]}
    assert all(row["kept"] for row in checks.values()) and found["machine"]["torch"] == torch.__version__
    exact = checks["fp32 eager: gradients, together"]
    assert 0 < exact["value"] < 1e-5 < checks["bf16 eager: gradients, together"]["value"]
    assert exact["worst"] < 1e-3 and not exact["worst_tensor"].endswith(("k_proj.bias", "key.bias"))
    assert {"eager: the host waits for the GPU within a step", "speed: estimated GB"} < checks.keys()


def test_a_figure_beyond_its_bound_is_a_failure(monkeypatch):
    spec = importlib.util.spec_from_file_location("parity", BENCHMARKS / "gpu" / "parity.py")
    parity = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "parity", parity)  # where its dataclasses look for their module
    spec.loader.exec_module(parity)
    checks = parity.Checks()
    checks.add("a figure", 1e-6, 1e-5)
    checks.add("a fact", True, True)
    checks.add("a figure without a bound", 7.0)
    assert checks.kept
    checks.add("another", 2e-5, 1e-5)
    assert not checks.kept and [row["kept"] for row in checks.rows] == [True, True, True, False]
    checks = parity.Checks()
    checks.add("a fact", False, True)
    assert not checks.kept


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_gpu_script_s_step_runs_in_full_at_a_tiny_size(tmp_path):
    done = gpu_script(tmp_path, "--dry-run", "step", timeout=850)
    assert done.returncode == 0, done.stdout + done.stderr
    merged = json.loads((tmp_path / "out" / "step.json").read_text())
    assert merged["missing"] == []
    assert {name: sorted(run["parts"]) for name, run in merged["runs"].items()} == {
        "main": ["captions", "compare", "profile", "readings"],
        "sweep": ["sweep"],
        "choices": ["compare"],
        "deterministic": ["compare"],
        "fp32": ["compare"],
        "curve": ["loss_curve"],
    }
    assert merged["machine"]["torch"] == torch.__version__ and merged["machine"]["date"]
    main = merged["runs"]["main"]["parts"]
    rows = {row["variant"]: row for row in main["compare"]}
    assert list(rows) == ["present", "eager", "compiled"] and not any(row["note"] for row in rows.values())
    assert rows["compiled"]["loss"] == pytest.approx(rows["eager"]["loss"], rel=1e-3)
    assert rows["compiled"]["graphs"] > 0 and rows["compiled"]["breaks"] == 0
    assert main["captions"]["recompilations"] == 0 and main["captions"]["steps"] == 12
    assert {row["variant"] for row in main["readings"]} == {"eager bf16", "compiled bf16"}
    assert (tmp_path / "out" / "profile.txt").stat().st_size > 1000 and len(main["profile"]["top"]) == 12
    assert max(row["loss_diff"] for row in merged["runs"]["fp32"]["parts"]["compare"]) <= 1e-5
    measured = [row["batch"] for row in merged["runs"]["sweep"]["parts"]["sweep"]["rows"]]
    assert measured == [2, 4]
    assert merged["runs"]["curve"]["parts"]["loss_curve"]["steps"] == 24


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_speed_table_has_every_row(program, tmp_path):
    tiny = "--device cpu --preset demo --layers 1 --batch 2 --frames 2 --size 28 --caption 24 --repeats 1 --warmup 1"
    program.main(
        program.parse([*tiny.split(), "--variants", "eager", "--table", "--json", str(tmp_path / "table.json")])
    )
    table = json.loads((tmp_path / "table.json").read_text())["parts"]["table"]
    assert {row["row"] for row in table} == {
        "base", "batch-20", "no-sdpa", "no-compile", "one-fine", "224px", "optimized", "coarse-interval"
    }  # fmt: skip


def test_a_part_that_was_cut_is_named_when_results_are_joined(program, tmp_path):
    (tmp_path / "main.json").write_text(json.dumps({"machine": {"chip": "x"}, "parts": {"compare": []}}))
    files = [str(tmp_path / "main.json"), str(tmp_path / "sweep.json")]
    program.main(program.parse(["--merge", *files, "--json", str(tmp_path / "all")]))
    merged = json.loads((tmp_path / "all").read_text())
    assert merged["missing"] == ["sweep"] and merged["machine"] == {"chip": "x"}
    assert merged["runs"]["main"]["parts"] == {"compare": []}
