"""A small training of the embedded model: it learns, resumes to the bit, writes its checkpoints, and trains only the adapter."""

import json
import sys
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

import imprompt
from imprompt.config import TrainConfig
from imprompt.core.optim import lr_multiplier
from imprompt.errors import UserError
from imprompt.training import log_steps, train_adapter
from imprompt.training.state_files import read_state_file

SMALL = TrainConfig.from_options(
    max_train_steps=6, train_batch_size=4, lr_warmup_steps=2, learning_rate=3e-3, ema_decay=0.5, num_validation_images=3,
    validation_num_inference_steps=2, validation_steps=4, checkpointing_steps=2, checkpoints_total_limit=2, sanity_check=False,
    mixed_precision="float32",
)  # fmt: skip


def run_training(folder, stop=None, **options):
    """The first `stop` steps of a small training, with its log."""
    config = SMALL.with_options(output_dir=str(folder), **options)
    return list(islice(log_steps(config, train_adapter(config)), stop))


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("complete")
    return folder, run_training(folder)


def test_every_step_is_yielded(complete_run):
    _, steps = complete_run
    assert [s.index for s in steps] == [1, 2, 3, 4, 5, 6]
    assert [s.validation is not None for s in steps] == [False, False, False, True, False, True]
    assert all(s.grad_norm > 0 and s.loss > 0 and s.images_per_second > 0 for s in steps)
    gaps = {"val/uncond_gap", "val/shuffled_reference_gap"}
    assert set(steps[-1].validation.metrics) == {"val/loss", "CLIP-I (mini)", "CLIP-T (mini)"} | gaps


def test_the_folder_has_checkpoints_log_and_page(complete_run):
    folder, _ = complete_run
    assert sorted(p.name for p in folder.glob("adapter*")) == ["adapter-4.safetensors", "adapter-6.safetensors", "adapter.safetensors"]
    assert sorted(p.name for p in (folder / "state").iterdir()) == ["step-4", "step-6"]
    assert [line["step"] for line in read_log(folder) if "val/loss" in line] == [4, 6]
    assert {"loss", "lr", "grad_norm", "images_per_second", "nonfinite_steps", "unreadable"} < set(read_log(folder)[-1])
    assert (folder / "curves.png").stat().st_size > 1000 and (folder / "best.safetensors").exists()
    page = (folder / "index.html").read_text("utf-8")
    assert page.count("data:image/png") == 3 and "://" not in page


def test_the_adapter_is_a_public_file_that_generates(complete_run):
    folder, _ = complete_run
    path = folder / "adapter.safetensors"
    spec = imprompt.load(path).spec
    assert (spec.adapter_type, spec.num_tokens, spec.base_model) == ("base", 4, "mini")
    assert len(imprompt.generate("examples/cat.png", adapter=str(path), num_inference_steps=2, num_images=1)) == 1


def test_resumed_equals_uninterrupted_to_the_bit(complete_run, tmp_path):
    """Interrupted after step 1, before there is a checkpoint, and after steps 3 and 5; every second step writes one."""
    folder, steps = complete_run
    for stop, expected in ((1, steps[:1]), (3, steps[:3]), (3, steps[2:5]), (None, steps[4:])):
        resumed = run_training(tmp_path, stop=stop)
        assert [(s.index, s.loss) for s in resumed] == [(s.index, s.loss) for s in expected]
    for name in ("adapter.safetensors", "best.safetensors"):
        a, b = load_file(folder / name), load_file(tmp_path / name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    logged = [line["step"] for line in read_log(tmp_path)]
    assert logged == sorted(set(logged))


def test_a_complete_run_is_not_repeated_except_on_request(tmp_path):
    options = {"max_train_steps": 2, "num_validation_images": 0}
    run_training(tmp_path, **options)
    assert run_training(tmp_path, **options) == []
    assert len(run_training(tmp_path, **options, resume_from_checkpoint="never")) == 2


def test_starting_anew_deletes_an_earlier_and_longer_run(tmp_path):
    run_training(tmp_path, num_validation_images=0)
    assert (tmp_path / "adapter-6.safetensors").exists()
    assert [s.index for s in run_training(tmp_path, stop=2, resume_from_checkpoint="never", num_validation_images=0)] == [1, 2]
    assert [p.name for p in (tmp_path / "state").glob("step-*")] == ["step-2"] and not (tmp_path / "adapter-6.safetensors").exists()
    assert run_training(tmp_path, stop=1, num_validation_images=0)[0].index == 3


def test_the_shuffled_reference_is_another_image_even_in_batches_of_one(tmp_path):
    result = run_training(tmp_path, max_train_steps=1, train_batch_size=1)[-1].validation
    assert result.metrics["val/shuffled_reference_gap"] != 0


def test_a_failed_sanity_check_restores_the_base_model(tmp_path, monkeypatch):
    monkeypatch.setattr("imprompt.core.optim.parameters_without_grad", lambda module: ["image_proj"])
    with pytest.raises(UserError, match="receive no gradient"):
        run_training(tmp_path / "a", sanity_check=True)
    assert len(run_training(tmp_path / "b", max_train_steps=1, num_validation_images=0)) == 1


def test_two_trainings_in_one_process_may_differ_in_precision(tmp_path):
    for dtype in ("bfloat16", "float32"):
        assert len(run_training(tmp_path / dtype, max_train_steps=1, num_validation_images=0, mixed_precision=dtype)) == 1


@pytest.mark.parametrize("method", ["ip-adapter-plus", "ip-adapter-full-face", "simple", "simple-plus"])
def test_other_methods_train(tmp_path, method):
    steps = run_training(tmp_path, method=method, max_train_steps=2)
    assert len(steps) == 2 and steps[-1].validation.metrics["CLIP-I (mini)"] < 1
    characteristic = {
        "ip-adapter-plus": "ip_adapter.1.to_k_ip.weight",
        "ip-adapter-full-face": "image_proj.proj.3.weight",
        "simple": "image_proj.proj.weight",
        "simple-plus": "image_proj.latents",
    }
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert characteristic[method] in tensors and ("simple" not in method or not any(k.startswith("ip_adapter") for k in tensors))


def test_muon_trains_the_matrices_and_resumes_to_the_bit(tmp_path):
    options = {"optimizer": "muon", "num_validation_images": 0, "method": "ip-adapter-plus", "max_train_steps": 4}
    complete = run_training(tmp_path / "a", **options)
    first = run_training(tmp_path / "b", stop=2, **options)
    assert [s.loss for s in first + run_training(tmp_path / "b", **options)] == [s.loss for s in complete]
    state = read_state_file(tmp_path / "a" / "state" / "step-4" / "run.safetensors")
    assert ["momentum_buffer" in next(iter(saved.values())) for saved in state["optimizers"]] == [True, False]


def test_muon_in_float16_is_refused(tmp_path):
    with pytest.raises(UserError, match="muon trains in bfloat16 or float32"):
        run_training(tmp_path, optimizer="muon", mixed_precision="float16")


def test_tensorboard_gets_values_and_images(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_training(tmp_path, report_to="tensorboard", max_train_steps=4)
    events = event_accumulator.EventAccumulator(str(next((tmp_path / "tracker").glob("events*")).parent))
    events.Reload()
    assert {"loss", "lr", "grad_norm", "val/loss", "CLIP-I (mini)"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["samples"]
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4] and [e.step for e in events.Images("samples")] == [4]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["imprompt.training.loop"], "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed; install it with: pip install wandb"):
        run_training(tmp_path, report_to="wandb")


def test_an_adapter_file_is_fine_tuned(complete_run, tmp_path):
    folder, _ = complete_run
    path = folder / "adapter.safetensors"
    steps = run_training(tmp_path, adapter=str(path), max_train_steps=1, learning_rate=1e-9, ema_decay=0.0)
    a, b = load_file(path), load_file(tmp_path / "adapter.safetensors")
    assert len(steps) == 1 and all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)


def test_gradients_accumulate_to_the_same_step(tmp_path):
    """Two batches of two images give the step of one batch of four."""
    options = {"max_train_steps": 2, "ema_decay": 0.0, "num_validation_images": 0}
    whole = run_training(tmp_path / "a", train_batch_size=4, **options)
    halves = run_training(tmp_path / "b", train_batch_size=2, gradient_accumulation_steps=2, **options)
    assert [s.loss for s in halves] == pytest.approx([s.loss for s in whole], rel=1e-5)
    assert [s.grad_norm for s in halves] == pytest.approx([s.grad_norm for s in whole], rel=1e-4)


def test_the_learning_rate_warms_up_and_follows_its_schedule():
    cosine = [lr_multiplier(step, 10, 4, "cosine") for step in range(11)]
    assert cosine[:4] == [0.25, 0.5, 0.75, 1.0]
    assert cosine[10] == pytest.approx(0) and 0 < cosine[9] < cosine[5] < 1
    assert lr_multiplier(7, 10, 4, "linear") == pytest.approx(0.5) and lr_multiplier(9, 10, 4, "constant") == 1


def test_a_method_that_is_not_that_of_the_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="mini is a base adapter; expected ip-adapter, received ip-adapter-full-face"):
        run_training(tmp_path, adapter="mini", method="ip-adapter-full-face")
