"""The folder of a run remembers what was trained in it: other data is refused, damage is survived, and nothing in it can run code."""

import json
import os
import re
import shutil
from itertools import islice

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from imprompt.config import TrainConfig
from imprompt.config.common import all_options
from imprompt.errors import UserError
from imprompt.training import run_options, start_training, train_adapter
from imprompt.training.state_files import list_checkpoints, read_state_file, write_state_file

SMALL = TrainConfig.from_options(
    max_train_steps=4, train_batch_size=2, lr_warmup_steps=0, learning_rate=3e-3, ema_decay=0.5, num_validation_images=0,
    checkpointing_steps=2, sanity_check=False, mixed_precision="float32",
)  # fmt: skip


def train(folder, stop=None, **options):
    """The notices, those about captions aside, and the first `stop` steps of a small training."""
    notices = []
    steps, _ = start_training(SMALL.with_options(output_dir=str(folder), **options), on_notice=notices.append)
    taken = list(islice(steps, stop))
    return [notice for notice in notices if not notice.startswith("data: ")], taken


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with three images."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("a", "b", "c"):
        Image.new("RGB", (64, 64), ("red", "green", "blue")[ord(name) - ord("a")]).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def complete(tmp_path_factory, images):
    """The folder of a complete run on these images, with the states of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("complete")
    assert train(folder, data=str(images))[0] == []
    return folder


@pytest.fixture
def run(complete, tmp_path):
    """A copy of the complete run."""
    return shutil.copytree(complete, tmp_path / "run")


def test_a_complete_run_says_so(run, images):
    assert train(run, data=str(images)) == (["already complete: 4 of 4 steps"], [])


def test_a_resumed_run_says_where_it_continues_and_which_options_changed(run, images):
    notices, steps = train(run, data=str(images), max_train_steps=5, learning_rate=1e-3, weight_decay=0.5)
    assert notices == [
        "max train steps changed from 4 to 5", "learning rate changed from 0.003 to 0.001", "weight decay changed from 0.01 to 0.5",
        "resuming from step 4",
    ]  # fmt: skip
    assert [step.index for step in steps] == [5]
    assert train(run, data=str(images), max_train_steps=5, learning_rate=1e-3, weight_decay=0.5)[0] == ["already complete: 5 of 5 steps"]


@pytest.mark.parametrize(
    "options",
    [
        {"data": "mini"}, {"method": "simple"}, {"train_batch_size": 3}, {"seed": 1}, {"optimizer": "adamw"}, {"ema_decay": 0.9},
        {"random_flip": True}, {"default_caption": "a cat"}, {"text_drop_prob": 0.5}, {"num_validation_images": 1}, {"resolution": 32},
        {"gradient_accumulation_steps": 2}, {"adapter": "mini"},
    ],
)  # fmt: skip
def test_a_run_is_not_continued_with_anything_that_changes_what_is_trained(run, images, options):
    name = next(iter(options))
    with pytest.raises(UserError, match=rf"was started with {name} = .*; continue with what .* another --output-dir, or start anew"):
        train(run, **{"data": str(images)} | options)
    assert len(list_checkpoints(run)) == 2


def test_a_run_is_not_continued_when_images_were_added(run, images, tmp_path):
    more = shutil.copytree(images, tmp_path / "more")
    os.rename(more, tmp_path / "same")
    train(tmp_path / "other", data=str(tmp_path / "same"), max_train_steps=2)
    Image.new("RGB", (64, 64)).save(tmp_path / "same" / "d.png")
    with pytest.raises(UserError, match=r"was started with 3 records, and now there are 4; continue with what it was started with"):
        train(tmp_path / "other", data=str(tmp_path / "same"), max_train_steps=4)


def test_every_option_is_compared_unless_it_is_known_to_have_no_effect():
    known = {option.name for option in all_options(TrainConfig)}
    assert known >= run_options.WITHOUT_EFFECT_ON_TRAINING | run_options.ADJUSTABLE | run_options.PATH_OPTIONS


def test_an_adapter_without_a_state_is_not_replaced(tmp_path, complete, images):
    shutil.copy(complete / "adapter.safetensors", tmp_path / "adapter.safetensors")
    with pytest.raises(UserError, match="holds an adapter and no state to continue from; choose another --output-dir"):
        train(tmp_path, data=str(images))
    assert load_file(tmp_path / "adapter.safetensors")


class Hostile:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_nothing_in_a_state_can_run_code(run, images, tmp_path):
    """Every file of a state is replaced by a pickle that makes a folder; then pickles lie next to them under Accelerate's names."""
    for path in list((run / "state" / "step-4").iterdir()):
        original = path.read_bytes()
        torch.save(Hostile(tmp_path / "code"), path)
        assert train(run, data=str(images))[0][0].startswith("the state step-4 cannot be read")
        path.write_bytes(original)
        if path.name != "state.json":
            shutil.rmtree(run / "state" / "step-4")
            train(run, data=str(images))
    for name in ("custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "data-0.pt"):
        torch.save(Hostile(tmp_path / "code"), run / "state" / "step-4" / name)
    train(run, data=str(images))
    assert not (tmp_path / "code").exists()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state.json", "cut"), ("state.json", "not ours"), ("run.safetensors", "flipped"), ("run.safetensors", "empty"),
        ("rank-0.safetensors", "missing"), ("rank-0.safetensors", "cut"),
    ],
)  # fmt: skip
def test_a_damaged_state_gives_way_to_the_one_before(run, complete, images, name, damage):
    path = run / "state" / "step-4" / name
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:middle], "empty": b"", "flipped": content, "not ours": b"[" * 3000}[damage])
    notices, steps = train(run, data=str(images))
    assert re.match(rf"the state step-4 cannot be read \(.*{name}.*\); continuing from the one before", notices[0])
    assert notices[1:] == ["resuming from step 2"] and [step.index for step in steps] == [3, 4]
    a, b = (load_file(folder / "adapter.safetensors") for folder in (run, complete))
    assert all(a[key].equal(b[key]) for key in a)


def test_where_all_states_are_damaged_nothing_is_begun_anew(run, images):
    for path in (run / "state").rglob("run.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot be continued: the state step-4 .* there is no other; start anew with --resume-from"):
        train(run, data=str(images))


def test_states_of_earlier_versions_are_named(run, images):
    for path in (run / "state").rglob("state.json"):
        path.unlink()
        (path.parent / "data-0.pt").touch()
    with pytest.raises(UserError, match=r"another version of imprompt \(state 2, expected 3\); use another --output-dir, or --resume"):
        train(run, data=str(images))
    assert len(train(run, data=str(images), max_train_steps=1, resume_from_checkpoint="never")[1]) == 1


def test_what_is_no_state_is_left_alone(run, images):
    (run / "state" / "step-9.bak").mkdir()
    (run / "state" / "step-old").mkdir()
    (run / "state" / "step-9").touch()
    (run / "state" / ".step-5").symlink_to(run / "log.jsonl")
    (run / "adapter-old.safetensors").write_bytes(b"mine")
    assert len(train(run, data=str(images), max_train_steps=6)[1]) == 2
    assert (run / "adapter-old.safetensors").read_bytes() == b"mine" and (run / "state" / "step-9.bak").exists()


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 3000, b'{"options": 3}', b"[]"])
def test_damaged_options_are_one_sentence(run, images, content):
    (run / "run.json").write_bytes(content)
    with pytest.raises(UserError, match=r"run.json is damaged .*delete it to continue"):
        train(run, data=str(images))
    (run / "run.json").unlink()
    assert train(run, data=str(images))[0][0].startswith("run.json is missing")


def test_two_trainings_do_not_share_a_folder(tmp_path, images):
    steps = train_adapter(SMALL.with_options(output_dir=str(tmp_path), data=str(images)))
    next(steps)
    with pytest.raises(UserError, match=r"another training is running in .*; wait until it ends, or choose another --output-dir"):
        train(tmp_path, data=str(images))
    steps.close()
    assert len(train(tmp_path, data=str(images))[1]) == 4


def test_a_run_that_is_asked_to_stop_saves_its_state_and_continues_to_the_bit(tmp_path, complete, images):
    options, seen = SMALL.with_options(output_dir=str(tmp_path), data=str(images), checkpointing_steps=100), []
    steps, _ = start_training(options, should_stop=lambda: len(seen) == 2)
    for step in steps:
        seen.append(step.index)
    assert seen == [1, 2, 3] and [path.name for path in list_checkpoints(tmp_path)] == ["step-3"]
    notices, steps = train(tmp_path, data=str(images), checkpointing_steps=100)
    assert notices == ["resuming from step 3"] and [step.index for step in steps] == [4]
    a, b = (load_file(folder / "adapter.safetensors") for folder in (tmp_path, complete))
    assert all(a[key].equal(b[key]) for key in a)


@pytest.mark.parametrize("steps", [3, 100])
def test_a_training_that_diverges_ends_with_a_sentence_and_saves_nothing(tmp_path, images, monkeypatch, steps):
    compute = torch.nan
    monkeypatch.setattr("imprompt.training.loop.compute_loss", lambda method, *_: next(method.module.parameters()).sum() * compute)
    with pytest.raises(UserError, match=r"training has diverged: .*loss.* nan.*; nothing was saved .* smaller --learning-rate"):
        train(tmp_path, data=str(images), max_train_steps=steps, checkpointing_steps=100)
    assert not (tmp_path / "adapter.safetensors").exists() and not list_checkpoints(tmp_path)


def test_values_of_a_state_file_keep_their_types(tmp_path):
    shared = torch.arange(6.0)
    value = {
        "list": [1, 2.5, None, True, "ä\udcff"], "tuple": (1, ("a",), []), 3: {"inf": float("inf")},
        "tensors": [shared, shared[2:4], torch.tensor(3), torch.eye(3).T],
    }  # fmt: skip
    write_state_file(tmp_path / "a.safetensors", value)
    read = read_state_file(tmp_path / "a.safetensors")
    tensors, expected = read.pop("tensors"), value.pop("tensors")
    assert read == value and all(a.equal(b) for a, b in zip(tensors, expected, strict=True))
    with pytest.raises(TypeError, match=r"state.x: a Path|state.x: a PosixPath"):
        write_state_file(tmp_path / "b.safetensors", {"x": tmp_path})


def test_the_log_is_read_whatever_is_in_it(run, images):
    log = run / "log.jsonl"
    log.write_bytes(
        b'{"step": 1, "loss": 2}\n\xff\xfe\n[]\n' + b"[" * 3000 + b'\n{"step": "x"}\n{"step": 1e400}\n{"step": 2, "loss": "x"}\n{"ste'
    )
    from imprompt.training.run_log import RunLog

    assert RunLog(run, "", {}).read_lines() == [{"step": 1, "loss": 2}]
    json.dumps(RunLog(run, "", {}).read_lines())
