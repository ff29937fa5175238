"""Training on the embedded model, small: it learns, resumes to the bit, keeps what it should, and touches only the adapter."""

import json
import sys
from dataclasses import replace
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

import imprompt
from imprompt.config import Train
from imprompt.errors import UserError
from imprompt.training import recorded, train
from imprompt.training.loop import share

SMALL = Train(
    steps=6, batch=4, warmup=2, lr=3e-3, ema=0.5, validation=3, validation_steps=2, validate_every=4, save_every=2, keep=2, preflight=False,
    precision="float32",
)  # fmt: skip


def run(folder, stop=None, **choices):
    choice = replace(SMALL, out=str(folder), **choices)
    return list(islice(recorded(choice, train(choice)), stop))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


def test_every_step_is_handed_out(whole):
    _, steps = whole
    assert [s.index for s in steps] == [1, 2, 3, 4, 5, 6]
    assert [s.findings is not None for s in steps] == [False, False, False, True, False, True]
    assert all(s.norm > 0 and s.loss > 0 and s.images_per_second > 0 for s in steps)
    assert set(steps[-1].findings.figures) == {"validation", "gap to no reference", "gap to a wrong reference", "CLIP-I", "CLIP-T"}


def test_the_folder_holds_what_a_run_keeps(whole):
    folder, _ = whole
    assert sorted(p.name for p in folder.glob("adapter*")) == ["adapter-4.safetensors", "adapter-6.safetensors", "adapter.safetensors"]
    assert sorted(p.name for p in (folder / "state").iterdir()) == ["step-4", "step-6"]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation" in line] == [4, 6]
    assert (folder / "curves.png").stat().st_size > 1000 and (folder / "best.safetensors").exists()
    page = (folder / "index.html").read_text("utf-8")
    assert page.count("data:image/png") == 3 and "://" not in page


def test_the_adapter_is_a_public_file_that_generates(whole):
    folder, _ = whole
    path = folder / "adapter.safetensors"
    ip = imprompt.load(path)
    assert (ip.spec.kind, ip.spec.tokens, ip.spec.base) == ("global", 4, "mini")
    assert len(imprompt.generate("examples/cat.png", adapter=str(path), steps=2, count=1)) == 1


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_resumed_equals_uninterrupted_to_the_bit(whole, tmp_path, stop):
    folder, steps = whole
    run(tmp_path, stop=stop)
    rest = run(tmp_path)
    assert rest[0].index == stop // 2 * 2 + 1 and [s.loss for s in rest] == [s.loss for s in steps[rest[0].index - 1 :]]
    for name in ("adapter.safetensors", "best.safetensors"):
        a, b = load_file(folder / name), load_file(tmp_path / name)
        assert all(torch.equal(a[key], b[key]) for key in a)
    numbers = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert numbers == sorted(set(numbers))


def test_a_finished_run_is_left_alone_and_never_starts_anew_only_when_told(whole, tmp_path):
    run(tmp_path, steps=2)
    assert run(tmp_path, steps=2) == []
    assert len(run(tmp_path, steps=2, resume="never")) == 2


def test_starting_anew_forgets_an_older_and_longer_run(tmp_path):
    run(tmp_path, steps=6)
    assert [s.index for s in run(tmp_path, stop=2, steps=6, resume="never")] == [1, 2]
    assert [p.name for p in (tmp_path / "state").glob("step-*")] == ["step-2"] and not (tmp_path / "adapter-6.safetensors").exists()
    assert run(tmp_path, steps=6)[0].index == 3


def test_a_wrong_reference_is_another_picture_even_in_batches_of_one(tmp_path):
    findings = run(tmp_path, steps=1, batch=1)[-1].findings
    assert findings.figures["gap to a wrong reference"] != 0


def test_after_an_error_in_the_preflight_the_base_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["imprompt.training.sanity_check"], "without_gradient", lambda module: ["image_proj"])
    with pytest.raises(UserError, match="receive no gradient"):
        run(tmp_path / "a", preflight=True)
    assert len(run(tmp_path / "b", steps=1)) == 1


def test_two_trainings_in_one_process_may_differ_in_precision(tmp_path):
    for precision in ("bfloat16", "float32"):
        assert len(run(tmp_path / precision, steps=1, validation=0, precision=precision)) == 1


def test_another_method_does_not_continue_the_run(tmp_path):
    run(tmp_path, steps=2)
    with pytest.raises(UserError, match="cannot be continued from step-2"):
        run(tmp_path, method="simple")


@pytest.mark.parametrize("method", ["ip-adapter-plus", "ip-adapter-full-face", "simple", "simple-plus"])
def test_the_other_methods_train(tmp_path, method):
    steps = run(tmp_path, method=method, steps=2)
    assert len(steps) == 2 and steps[-1].findings.figures["CLIP-I"] < 1
    kinds = {
        "ip-adapter-plus": "ip_adapter.1.to_k_ip.weight",
        "ip-adapter-full-face": "image_proj.proj.3.weight",
        "simple": "image_proj.proj.weight",
        "simple-plus": "image_proj.latents",
    }
    tensors = load_file(tmp_path / "adapter.safetensors")
    assert kinds[method] in tensors and ("simple" not in method or not any(k.startswith("ip_adapter") for k in tensors))


def test_muon_trains_the_matrices_and_resumes_to_the_bit(tmp_path):
    settings = {"optimizer": "muon", "validation": 0, "method": "ip-adapter-plus", "steps": 4}
    whole = run(tmp_path / "a", **settings)
    first = run(tmp_path / "b", stop=2, **settings)
    assert [s.loss for s in first + run(tmp_path / "b", **settings)] == [s.loss for s in whole]
    assert len(list((tmp_path / "a" / "state" / "step-4").glob("optimizer*"))) == 2


def test_muon_in_float16_is_refused(tmp_path):
    with pytest.raises(UserError, match="muon trains in bfloat16 or float32"):
        run(tmp_path, optimizer="muon", precision="float16")


def test_tensorboard_gets_figures_and_pictures(tmp_path):
    event = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, tracker="tensorboard", steps=4)
    told = event.EventAccumulator(str(next((tmp_path / "tracker").glob("events*")).parent))
    told.Reload()
    assert {"loss", "lr", "norm", "validation", "CLIP-I"} <= set(told.Tags()["scalars"]) and told.Tags()["images"] == ["samples"]
    assert [e.step for e in told.Scalars("loss")] == [1, 2, 3, 4] and [e.step for e in told.Images("samples")] == [4]


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["imprompt.training.loop"], "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed; install it with: pip install wandb"):
        run(tmp_path, tracker="wandb")


def test_fine_tunes_from_a_file(whole, tmp_path):
    folder, _ = whole
    tuned = run(tmp_path, adapter=str(folder / "adapter.safetensors"), steps=1, lr=1e-9, ema=0.0)
    a, b = load_file(folder / "adapter.safetensors"), load_file(tmp_path / "adapter.safetensors")
    assert len(tuned) == 1 and all(torch.allclose(a[key], b[key], atol=1e-6) for key in a)


def test_gradients_accumulate_to_the_same_step(tmp_path):
    """Two batches of two make the step that one batch of four makes."""
    settings = {"steps": 2, "ema": 0.0, "validation": 0}
    one = run(tmp_path / "a", batch=4, **settings)
    two = run(tmp_path / "b", batch=2, accumulate=2, **settings)
    assert [s.loss for s in two] == pytest.approx([s.loss for s in one], rel=1e-5)
    assert [s.norm for s in two] == pytest.approx([s.norm for s in one], rel=1e-4)


def test_the_learning_rate_warms_up_and_follows_its_schedule():
    choice = replace(SMALL, steps=10, warmup=4).settled()
    assert [share(s, choice) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert share(10, choice) == pytest.approx(0) and 0 < share(9, choice) < share(5, choice) < 1
    assert share(7, replace(choice, schedule="linear")) == pytest.approx(0.5) and share(9, replace(choice, schedule="constant")) == 1


def test_a_method_that_is_not_the_adapters_is_refused(tmp_path):
    with pytest.raises(UserError, match="mini is a global adapter; expected ip-adapter, received ip-adapter-full-face"):
        run(tmp_path, adapter="mini", method="ip-adapter-full-face")
