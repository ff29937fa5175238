"""What a user gives is what is used: no option is overridden, and no value out of range is accepted."""

import inspect
import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import imprompt
from imprompt.cli import COMMANDS, build_app, describe_option
from imprompt.config import (
    PER_SUBJECT_METHODS,
    ConvertConfig,
    EvaluateConfig,
    GenerateConfig,
    InspectConfig,
    PersonalizeConfig,
    TrainConfig,
)
from imprompt.config.common import UNSET, Option, Options, all_options
from imprompt.errors import UserError

CONFIGS = [kind for kind, _ in COMMANDS.values()]
REQUIRED: dict[type, dict[str, Any]] = {
    PersonalizeConfig: {"data": "images"},
    InspectConfig: {"file": "a.bin"},
    ConvertConfig: {"source": "a.bin", "target": "b.bin"},
}
EVERY_OPTION = [pytest.param(kind, one, id=f"{kind.__name__}-{one.name}") for kind in CONFIGS for one in all_options(kind)]
NUMERIC = [param for param in EVERY_OPTION if param.values[1].type in (int, float) and not param.values[1].repeatable]

# Valid values of options whose text is parsed, and what an option needs in addition.
TEXT = {"resolution": "64x32", "image_weights": "1", "scale_per_block": "style", "method": None, "aggregation": "average", "paper": None}
NEEDS: dict[str, dict[str, Any]] = {
    "strength": {"init_image": "a.png"}, "mask_image": {"inpaint_image": "a.png"}, "inpaint_image": {"mask_image": "a.png"},
    "image_weights": {"image": ("a.png",)}, "end_at": {"start_at": 0.0}, "targets_per_subject": {"min_images_per_subject": 2},
    "subject_split": {"min_images_per_subject": 2}, "num_references": {"min_images_per_subject": 2},
    "min_distinct_references": {"num_references": 9}, "num_inference_steps": {},
}  # fmt: skip


def valid_values(one: Option) -> st.SearchStrategy[Any]:
    """Values inside an option's declared range."""
    limits = one.field.metadata["limits"]
    if one.repeatable and one.type is float:
        return st.just((0.5,))
    if one.repeatable:
        return st.just((f"{one.name}=image.png",)) if one.name == "control" else st.just(("image=a.png",))
    if one.choices:
        return st.sampled_from(one.choices)
    if one.type is bool:
        return st.booleans()
    if one.type is str:
        return st.just(TEXT.get(one.name) or "text")
    if one.type is int:
        low = limits.get("ge", limits.get("gt", -1) + 1)
        return st.integers(int(low), min(int(limits.get("le", low + 50)), int(low) + 50))
    low, high = limits.get("ge", limits.get("gt", 0.0)), limits.get("le", limits.get("lt", 10.0))
    return st.floats(low, high, exclude_min="gt" in limits, exclude_max="lt" in limits, allow_subnormal=False)


@pytest.mark.parametrize(("kind", "one"), EVERY_OPTION)
def test_an_option_that_is_given_is_never_overridden(kind: type[Options], one: Option):
    """For every option, also where the value equals a default, with every kind of base model and method."""
    if one.name in ("method", "paper"):
        pytest.skip("it decides about the others")

    @settings(max_examples=8, derandomize=True, deadline=None, database=None)
    @given(value=valid_values(one))
    def check(value: Any) -> None:
        for model, method in itertools.product(("mini", "folder/model"), methods_of(kind, one)):
            needed = {name: needed for name, needed in NEEDS.get(one.name, {}).items() if name in option_names(kind)}
            options = REQUIRED.get(kind, {}) | needed | method | ({"model": model} if "model" in option_names(kind) else {})
            try:
                config = kind.from_options(**options | {one.name: value})
                filled = config.with_defaults() if hasattr(config, "with_defaults") else config
            except UserError:
                continue  # it does not go together with this method, which is reported instead of ignored
            assert filled.to_options()[one.name] == value

    check()


def option_names(kind: type[Options]) -> set[str]:
    return {one.name for one in all_options(kind)}


def methods_of(kind: type[Options], one: Option) -> list[dict[str, Any]]:
    if kind is not TrainConfig:
        return [{}]
    return [{}, {"deepspeed": True} if one.name != "deepspeed" else {}, {"min_images_per_subject": 10}] + [
        {"method": method, "class_noun": "cat"} for method in PER_SUBJECT_METHODS
    ]


def test_options_that_equal_a_default_stay():
    """The case that was found: a validation of 16 images became none."""
    given = {"num_validation_images": 16, "checkpointing_steps": 500, "checkpoints_total_limit": 2, "sanity_check": True}
    filled = TrainConfig.from_options(method="dreambooth", class_noun="cat", **given).with_defaults().to_options()
    assert {name: filled[name] for name in given} == given


@pytest.mark.parametrize(("kind", "one"), NUMERIC)
def test_a_number_out_of_range_is_one_sentence(kind: type[Options], one: Option):
    limits = one.field.metadata["limits"]
    step = 1 if one.type is int else 1e-3
    outside = [limits[name] - step for name in ("ge",) if name in limits] + [limits[name] for name in ("gt", "lt") if name in limits]
    outside += [limits["le"] + (1 if one.type is int else 1e-3)] if "le" in limits else []
    assert one.type is float or one.name == "num_processes" or (outside and "le" in limits), (
        "a whole number has a smallest and a largest value"
    )
    for value in [*outside, *([math.nan, math.inf, -math.inf] if one.type is float else []), "many", True]:
        with pytest.raises(UserError) as error:
            kind.from_options(**REQUIRED.get(kind, {}) | {one.name: value})
        sentence = str(error.value)
        assert sentence.startswith(f"{one.name}: expected ") and "received" in sentence and "\n" not in sentence


@pytest.mark.parametrize("kind", CONFIGS)
def test_option_names_are_unique_and_described(kind):
    names = [one.name for one in all_options(kind)]
    assert len(names) == len(set(names))
    assert all(describe_option(one) for one in all_options(kind))


@pytest.mark.parametrize("kind", CONFIGS)
def test_flat_options_and_parts_are_the_same_thing(kind):
    config = kind.from_options(**REQUIRED.get(kind, {}))
    assert kind.from_options(**config.to_options()) == config == config.with_options()


def test_an_unknown_option_is_named():
    with pytest.raises(UserError, match=r"unknown option 'lr'; expected one of method, adapter"):
        TrainConfig.from_options(lr=1e-4)


@pytest.mark.parametrize(("function", "kind"), [("generate", GenerateConfig), ("train", TrainConfig)])
def test_the_signature_shows_typed_keywords(function, kind):
    signature = inspect.signature(getattr(imprompt, function))
    for one in all_options(kind):
        parameter = signature.parameters[one.name]
        assert parameter.annotation is not inspect.Parameter.empty
        assert one.name == "image" or parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default in (one.field.default, ())


def test_the_command_line_has_every_option():
    app = build_app()
    for name, kind in (("generate", GenerateConfig), ("train", TrainConfig), ("evaluate", EvaluateConfig)):
        flags = {flag for argument in app[name].assemble_argument_collection() for flag in argument.names}
        assert {"--" + one.name.replace("_", "-") for one in all_options(kind)} <= flags


assert UNSET is None


def test_every_count_has_an_upper_bound():
    """A typo of many digits is refused instead of filling the memory or the process table."""
    for kind, one in (param.values for param in NUMERIC):
        limits = one.field.metadata["limits"]
        assert one.type is float or (kind, one.name) == (kind, "seed") or {"le", "lt"} & set(limits), f"{kind.__name__}.{one.name}"
