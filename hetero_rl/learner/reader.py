"""A model that is only read: scored and sampled from like the learner, without DeepSpeed, gradients or optimizer state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from deploy_targets.types import Sampling, TokenSequence
from hetero_rl.config import LearnerConfig
from hetero_rl.learner.attention import follows_packing
from hetero_rl.learner.batching import MicroBatch, Routes, micro_batches
from hetero_rl.learner.compute import choose_dtype, compute_in_float32
from hetero_rl.learner.describe import Description, describe
from hetero_rl.learner.generate import generate_responses
from hetero_rl.learner.model import check_head, load_causal_lm
from hetero_rl.learner.policy import Policy, TokenStats


class ReadOnlyModel:
    """One transformers causal LM in the dtype it is stored in, on the first GPU or the CPU."""

    def __init__(self, model_dir: Path, learner: LearnerConfig, temperature: float) -> None:
        """Load the model of `model_dir`. bf16 weights are computed with as a learner would; others in float32, which loses nothing.

        Raises `UsageError` where transformers cannot load it, or where its logits are more than the output head's product.
        """
        lm = load_causal_lm(model_dir, dtype="auto")
        if lm.dtype != torch.bfloat16:
            lm = lm.float()
        lm.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
        check_head(lm)
        dtype = choose_dtype(learner.compute_dtype, lm) if lm.dtype == torch.bfloat16 else torch.float32
        if dtype != lm.dtype:
            compute_in_float32(lm)
        self.compute_dtype = str(dtype).removeprefix("torch.")
        self.vocab_size = int(lm.config.get_text_config().vocab_size)
        self._policy = Policy(lm, [], learner.logit_chunk_elements)
        self._device = lm.get_input_embeddings().weight.device
        self._temperature, self._config, self._packed = temperature, learner, follows_packing(lm)

    def describe(self, sequences: Sequence[TokenSequence], *, routes: Sequence[Routes | None] = ()) -> list[Description]:
        """What the weights say about the response tokens, in full and in two precisions; it goes its own routes whatever is given."""
        prompts = [sequence.tokens[: sequence.prompt_len] for sequence in sequences]
        responses = [sequence.tokens[sequence.prompt_len :] for sequence in sequences]

        def forward(batch: MicroBatch, num_top: int) -> TokenStats:
            stats: TokenStats = self._policy(batch, self._temperature, num_top=num_top)
            return stats

        batches = micro_batches(prompts, responses, self._config.tokens_per_micro_batch, self._device, packed=self._packed)
        return describe(forward, batches, is_float32=self.compute_dtype == "float32")

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[TokenSequence]:
        """One response to each prompt, in order."""
        responses = generate_responses(self._policy.lm, prompts, sampling, self._config.tokens_per_micro_batch, self._device)
        return [TokenSequence((*prompt, *response), len(prompt)) for prompt, response in zip(prompts, responses, strict=True)]
