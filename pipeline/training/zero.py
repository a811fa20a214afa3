"""DeepSpeed ZeRO-1 and ZeRO-2 through Accelerate, with the arithmetic and the checkpoints of DDP.

    accelerate launch --config_file configs/accelerate/zero2.yaml pipeline/train_vqvae.py ...
    ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_CONFIG_FILE=configs/deepspeed/zero2.json \\
        torchrun --nproc_per_node 8 pipeline/train_vqvae.py ...

DeepSpeed lays all parameters end to end in one flat buffer per parameter group, of which each rank
owns an equal part: it keeps Adam's moments for its part only, and under ZeRO-2 the averaged
gradient too. Parameters, gradients and moments are fp32; bf16 is autocast around `forward`, as
under DDP, so codebooks and other buffers keep their dtype.

Here `optimizer` is what `accelerator.prepare` returned. deepspeed is imported by accelerate, and
only where the launcher asks for it.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    convert_outputs_to_fp32,
    is_deepspeed_available,
    is_transformers_available,
)
from torch import nn

from pipeline.stage import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"
MOMENTS = ("exp_avg", "exp_avg_sq")


def is_requested() -> bool:
    """True if the launcher asks for DeepSpeed; known before there is an Accelerator."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def is_zero(accelerator: Accelerator) -> bool:
    """True if this Accelerator trains through DeepSpeed."""
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def make_plugin() -> DeepSpeedPlugin:
    """The launcher's DeepSpeed config, for `Accelerator(deepspeed_plugin=...)`.

    Raises UserError for what would not train as DDP does: other stages, casting, offloading.
    """
    if "LOCAL_RANK" not in os.environ:
        raise UserError("DeepSpeed needs a launcher: start with accelerate launch or torchrun")
    if not (is_deepspeed_available() and is_transformers_available()):
        raise UserError("DeepSpeed is not installed: pip install deepspeed transformers")
    file = os.environ.get(CONFIG_FILE)
    if file and not Path(file).is_file():
        # our launcher configs name theirs relative to the checkout; commands run from anywhere
        if not (ROOT / file).is_file():
            raise UserError(f"{CONFIG_FILE}: {file} does not exist; give its full path")
        file = str(ROOT / file)
    try:
        plugin = DeepSpeedPlugin(hf_ds_config=file)
    except ValueError as error:
        raise UserError(
            f"the DeepSpeed config cannot be used: {str(error).splitlines()[0]} (beside a "
            "DeepSpeed file, precision goes on the command line: --mixed_precision bf16)"
        ) from error
    refuse(plugin.deepspeed_config)
    # Left out or "auto", these would be filled in from the launcher's precision as a cast.
    for section in ("bf16", "fp16"):
        plugin.deepspeed_config[section] = {"enabled": False}
    if not torch.cuda.is_available():
        # A kernel for inference that DeepSpeed would compile now: over a minute, and a compiler.
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return plugin


def refuse(config: Mapping[str, Any]) -> None:
    """Raises UserError, in one line, for a DeepSpeed config that does not train as DDP does."""
    zero = config["zero_optimization"]
    if zero.get("stage") not in (1, 2):
        raise UserError(
            f"ZeRO stage {zero.get('stage')} is not supported, use 1 or 2: stage 3 partitions the "
            "weights, which checkpoints and the weight average read whole, and a model this small "
            "gains nothing by it"
        )
    for section in ("bf16", "fp16", "torch_autocast"):
        if config.get(section, {}).get("enabled", False) is True:
            raise UserError(
                f"the DeepSpeed config enables {section}, which casts weights or gradients; remove "
                "it and give the precision to the launcher (--mixed_precision bf16, or "
                "ACCELERATE_MIXED_PRECISION=bf16)"
            )
    for section in ("offload_optimizer", "offload_param"):
        if (zero.get(section) or {}).get("device") not in (None, "none"):
            raise UserError(f"the DeepSpeed config has {section}; remove it, the model is small")
    for section in ("optimizer", "scheduler", "data_types"):
        if section in config:
            raise UserError(f"the DeepSpeed config has {section}, which the stage sets; remove it")
    if precision() not in ("no", "bf16"):
        raise UserError(f"mixed precision {precision()} is not supported with DeepSpeed, use bf16")


def precision() -> str:
    """The launcher's precision; under DeepSpeed `accelerator.mixed_precision` says what DeepSpeed
    casts to, which here is nothing."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()


def autocast(accelerator: Accelerator) -> Any:
    """`accelerator.autocast()`, which under DeepSpeed does nothing, in the launcher's precision."""
    if not is_zero(accelerator):
        return accelerator.autocast()
    device, enabled = accelerator.device.type, precision() == "bf16"
    return torch.autocast(device, dtype=torch.bfloat16, enabled=enabled)


def configure(
    accelerator: Accelerator, model: nn.Module, micro_batch_size: int, gradient_clip: float
) -> None:
    """What DeepSpeed has to know before `accelerator.prepare(model, optimizer)`.

    Then `accelerator.accumulate` and `accelerator.backward` are used as under DDP, but with the
    last micro-batch of a step `backward` also reduces, clips and steps: the learning rate has to
    be set, and the loss found finite, before it. `optimizer.step` and `zero_grad` do nothing.
    `accelerator.clip_grad_norm_` only tells the norm before clipping, infinite where the gradient
    was not finite, and then nothing was updated.

    Args:
        micro_batch_size: images per process and backward pass.
        gradient_clip: largest global norm of the gradient.
    """
    plugin: Any = accelerator.state.deepspeed_plugin
    config = plugin.deepspeed_config
    config.pop("train_batch_size", None)  # it is the product of the others
    config["train_micro_batch_size_per_gpu"] = micro_batch_size
    config["gradient_accumulation_steps"] = accelerator.gradient_accumulation_steps
    config["gradient_clipping"] = float(gradient_clip)
    # DeepSpeed's broadcast of the weights fails with channels_last ones, and its flat buffer could
    # not keep them; activations stay in the layout of the images.
    model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    if precision() == "bf16":
        # The wrapper that accelerate puts around a model under DDP. DeepSpeed's own autocast
        # section would also reduce the gradients in bf16, and leaves the outputs in it.
        model.forward = convert_outputs_to_fp32(autocast(accelerator)(model.forward))


def discard_gradients(optimizer: Any) -> None:
    """Forgets the micro-batches accumulated so far, so that the next `backward` begins a step.

    Call it on all ranks or on none: the micro-batches' gradients have been summed over them.
    """
    zero = _zero(optimizer)
    zero.zero_grad()  # ZeRO-1 accumulates in the parameters
    for group in range(len(zero.bit16_groups)):  # ZeRO-2 in its parts; as after an overflow
        zero.averaged_gradients[group] = None
        zero.all_grad_tensors[group] = None


# Tensors by parameter. DeepSpeed's own access (safe_get_full_optimizer_state and its like) raises
# before the first step, does not reach Adam's step count, and adds up zero-filled copies, one
# all-reduce for each tensor, which loses the sign of a zero. The flat buffers are simpler: every
# parameter is a view into its group's, so its place there is its storage offset.


def optimizer_tensors(optimizer: Any, model: nn.Module) -> dict[str, torch.Tensor]:
    """Adam's state as `pipeline.training.checkpoint.optimizer_tensors` gives it under DDP: whole
    moments and step counts by parameter name, none before the first step. Collective."""
    zero, tensors = _zero(optimizer), {}
    for part, flat, places in _groups(zero, model):
        state = zero.optimizer.state.get(part, {})
        if not state:
            continue
        moments = {}
        for key in MOMENTS:
            moments[key] = torch.empty(flat.shape, dtype=state[key].dtype, device=flat.device)
            dist.all_gather_into_tensor(moments[key], state[key], group=zero.dp_process_group)
        for name, parameter, place in places:
            tensors[f"{name}.step"] = state["step"].clone()
            for key in MOMENTS:
                tensors[f"{name}.{key}"] = moments[key][place].view_as(parameter)
    return tensors


def load_optimizer_tensors(
    optimizer: Any, model: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> None:
    """The inverse of `optimizer_tensors`, and `refresh_weights`: load the module's weights first.

    Raises UserError if parameters of a group were stepped differently often.
    """
    refresh_weights(optimizer)
    zero, state = _zero(optimizer), {}
    for group, (part, flat, places) in enumerate(_groups(zero, model)):
        steps = [tensors[key] for name, _, _ in places if (key := f"{name}.step") in tensors]
        if not steps:
            continue
        if len(steps) != len(places) or any(step != steps[0] for step in steps):
            raise UserError(
                "this checkpoint has parameters that were stepped differently often, which ZeRO "
                "cannot keep apart; resume it without DeepSpeed"
            )
        state[group] = {"step": steps[0].clone()}
        rank = dist.get_rank(zero.dp_process_group)
        for key in MOMENTS:
            whole = torch.zeros(flat.shape, dtype=tensors[f"{places[0][0]}.{key}"].dtype)
            for name, _, place in places:
                whole[place] = tensors[f"{name}.{key}"].reshape(-1)
            state[group][key] = whole.split(part.numel())[rank].to(part.device, copy=True)
    # DeepSpeed's own links to the old moments are renewed at the next step
    zero._hp_optimizer_states_linked = False
    adam = zero.optimizer
    adam.load_state_dict({"state": state, "param_groups": adam.state_dict()["param_groups"]})


def refresh_weights(optimizer: Any) -> None:
    """To be called after the module's weights were set: the part of them that this rank steps is
    a copy, and the next step would bring the old weights back."""
    _zero(optimizer).refresh_fp32_params()


def is_partitioned(optimizer: Any) -> bool:
    """True if this prepared optimizer keeps parts only, so that its state is read from here."""
    return hasattr(getattr(optimizer, "optimizer", None), "bit16_groups_flat")


def _zero(optimizer: Any) -> Any:
    """DeepSpeed's ZeRO optimizer in accelerate's wrapper; its `.optimizer` is our Adam."""
    return optimizer.optimizer


Places = list[tuple[str, torch.Tensor, slice]]


def _groups(zero: Any, model: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor, Places]]:
    """For each parameter group: the fp32 part that this rank steps, the flat buffer of all
    parameters, and name, parameter and place in the buffer of each."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parts = zero.single_partition_of_fp32_groups
    for parameters, flat, part in zip(
        zero.bit16_groups, zero.bit16_groups_flat, parts, strict=True
    ):
        places = []
        for parameter in parameters:
            name = names[id(parameter)]
            if parameter.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
                raise RuntimeError(f"{name} does not lie in DeepSpeed's flat buffer")
            start = parameter.storage_offset() - flat.storage_offset()
            places.append((name, parameter, slice(start, start + parameter.numel())))
        yield part, flat, places
