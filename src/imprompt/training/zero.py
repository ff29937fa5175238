"""ZeRO-2 of DeepSpeed: what each process has of the optimizer, without the files of DeepSpeed, which run code when they are read."""

from collections.abc import Mapping
from typing import Any


def never_compile_deepspeed_ops() -> None:
    """Keep DeepSpeed from compiling its reduction through shared memory, which only inference uses, when training starts on the CPU.

    That takes minutes, and a process that is killed meanwhile leaves a lock for which all later ones wait forever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def get_zero_state(optimizer: Any) -> dict[str, Any]:
    """What this process has of a ZeRO-2 optimizer of DeepSpeed: its part of the weights in float32, and of the base optimizer."""
    scaler = {name: value for name, value in vars(optimizer.loss_scaler).items() if isinstance(value, (bool, int, float))}
    return {
        "weights": list(optimizer.single_partition_of_fp32_groups),
        "optimizer": optimizer.optimizer.state_dict()["state"],
        "loss_scaler": scaler,
    }


def set_zero_state(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Continue from `get_zero_state`, with as many processes as there were then."""
    for own, saved in zip(optimizer.single_partition_of_fp32_groups, state["weights"], strict=True):
        own.data.copy_(saved)
    base = optimizer.optimizer
    base.load_state_dict({"state": state["optimizer"], "param_groups": base.state_dict()["param_groups"]})
    for name, value in state["loss_scaler"].items():
        if name in vars(optimizer.loss_scaler):
            setattr(optimizer.loss_scaler, name, value)
