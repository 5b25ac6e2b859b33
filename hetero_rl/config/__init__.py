"""The config tree: one owner per value, unknown keys refused, every field explained under it.

A run is described by TOML files (later ones win over earlier ones) and `--set table.key=value` over both.
"""

from hetero_rl.config.files import load_config
from hetero_rl.config.learning import BF16_GAP, NVME_IS_NOT_RESTORED, AlgorithmConfig, ConstraintConfig, LearnerConfig
from hetero_rl.config.run import CheckpointConfig, EvaluationConfig, LoopConfig, ModelConfig, RunConfig, TargetConfig
from hetero_rl.config.serving import EngineEntry, PoolConfig, RayConfig

__all__ = [
    "BF16_GAP", "NVME_IS_NOT_RESTORED", "AlgorithmConfig", "CheckpointConfig", "ConstraintConfig", "EngineEntry", "EvaluationConfig",
    "LearnerConfig", "LoopConfig", "ModelConfig", "PoolConfig", "RayConfig", "RunConfig", "TargetConfig", "load_config",
]  # fmt: skip
