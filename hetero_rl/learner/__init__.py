"""The bf16 learner. `deepspeed_learner.py` is the only file of the project that imports DeepSpeed."""
