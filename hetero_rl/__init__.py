"""RL post-training under a discrepancy constraint: the deployment engine makes the rollouts, a bf16 learner learns from them."""

__version__ = "0.1.0"
