"""DeepSpeed around the policy: optimizer, schedule, ZeRO."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from typing import Any

import torch

from hetero_rl.config import LearnerConfig
from hetero_rl.learner.extensions import alone_with_extensions
from hetero_rl.learner.fake_quant import TwinExperts
from hetero_rl.learner.policy import Policy


def backend() -> str:
    """What ranks talk by on this machine."""
    return "nccl" if torch.cuda.is_available() else "gloo"


def start_engine(policy: Policy, config: LearnerConfig, num_updates: int) -> Any:
    """A DeepSpeed engine in bf16 with fp32 master weights, among the ranks that `ranks.join` found.

    `num_updates` is the length of the learning-rate schedule.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder import AsyncIOBuilder

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On its first start on a machine DeepSpeed compiles its shared-memory communication, and what reads disks, and says so on stdout.
    with contextlib.redirect_stdout(io.StringIO()):
        # Loaded before ranks wait for each other: the one that waits for the lock would be waited for.
        with alone_with_extensions():
            build_shm_op()
            if config.nvme_path is not None:
                AsyncIOBuilder().load(verbose=False)
        deepspeed.init_distributed(dist_backend=backend(), verbose=False)

    def schedule(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        progress = (step - config.warmup_steps) / max(1, num_updates - config.warmup_steps)
        return config.lr_final_ratio + (1 - config.lr_final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    engine, *_ = deepspeed.initialize(
        model=policy,
        model_parameters=[parameter for parameter in policy.parameters() if parameter.requires_grad],
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, schedule),
        config={
            "train_micro_batch_size_per_gpu": 1,
            # The number of micro-batches follows from the rollouts' lengths, so the learner says where a step ends.
            "managed_gradient_accumulation": False,
            "gradient_clipping": config.max_grad_norm,
            "bf16": {"enabled": True, "check_grad_overflow": True},
            "zero_optimization": _zero(policy, config),
            "zero_allow_untested_optimizer": True,
            "optimizer": {
                "type": "AdamW",
                # torch's AdamW: DeepSpeed's own is compiled on first use, for minutes, and needs a toolchain.
                "params": {
                    "lr": config.lr,
                    "betas": list(config.betas),
                    "eps": 1e-8,
                    "weight_decay": config.weight_decay,
                    "torch_adam": True,
                },
            },
        },
    )
    return engine


def read_masters(engine: Any) -> dict[str, torch.Tensor]:
    """A copy of the fp32 master weights by parameter name, for ZeRO stages 0 to 2."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization_stage() == 0:
        return {name: master.detach().clone() for name, master in _unsharded_masters(engine).items()}
    return {name: safe_get_full_fp32_param(parameter).detach().clone() for name, parameter in engine.module.named_parameters()}


def write_masters(engine: Any, masters: dict[str, torch.Tensor]) -> None:
    """Put what `read_masters` gave back in place; the bf16 weights are left as they are."""
    from deepspeed.utils import safe_set_full_fp32_param

    if engine.zero_optimization_stage() == 0:
        with torch.no_grad():
            for name, master in _unsharded_masters(engine).items():
                master.copy_(masters[name])
    else:
        for name, parameter in engine.module.named_parameters():
            safe_set_full_fp32_param(parameter, masters[name])


def _unsharded_masters(engine: Any) -> dict[str, torch.Tensor]:
    """The optimizer's own tensors, in the order in which it was given the weights; DeepSpeed's accessors know of none without ZeRO."""
    groups = engine.optimizer.state_dict()["fp32_groups"]
    names = [name for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    return dict(zip(names, (master for group in groups for master in group), strict=True))


def _zero(policy: Policy, config: LearnerConfig) -> dict[str, Any]:
    stage, moved = config.zero_stage, _offload(config)
    if stage < 3 or not any(isinstance(layer, TwinExperts) for layer in policy.twins):
        return {"stage": stage, "overlap_comm": False, **moved}
    # By default DeepSpeed takes the block around the experts as a whole, made for experts that a pass may leave out; fused ones never are.
    # Its hooks on such a block fail where learner and twin both run in one pass. (It warns that no module is taken so: that is meant.)
    return {"stage": stage, "overlap_comm": False, "leaf_module": {"classes": []}, **moved}


def _offload(config: LearnerConfig) -> dict[str, Any]:
    if config.offload == "none":
        return {}
    # Only a GPU copies faster from pinned memory.
    place: dict[str, Any] = {"device": config.offload, "pin_memory": torch.cuda.is_available()}
    if config.nvme_path is not None:
        place["nvme_path"] = str(config.nvme_path.resolve())
    return {"offload_optimizer": place, **({"offload_param": place} if config.offload_weights else {})}
