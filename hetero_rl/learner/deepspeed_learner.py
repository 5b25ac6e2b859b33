"""The bf16 learner on DeepSpeed: scores tokens, takes optimizer steps, hands out its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deploy_targets.errors import UsageError
from deploy_targets.protocols import Quantizer
from deploy_targets.saved_names import saved_views
from deploy_targets.types import TokenSequence
from hetero_rl.algorithm import corrections, losses, signals
from hetero_rl.algorithm.discrepancy import GapSums, masked_mean, split_gap
from hetero_rl.config import AlgorithmConfig, ConstraintConfig, LearnerConfig
from hetero_rl.errors import DivergedError
from hetero_rl.learner.attention import follows_packing
from hetero_rl.learner.batching import MicroBatch, Tokens, micro_batches
from hetero_rl.learner.compute import choose_dtype, compute_in_float32
from hetero_rl.learner.deepspeed_engine import start_engine
from hetero_rl.learner.fake_quant import add_twin
from hetero_rl.learner.gram import input_grams
from hetero_rl.learner.model import check_head, load_causal_lm, stored_tensors
from hetero_rl.learner.policy import Policy, TokenStats
from hetero_rl.types import TrainSequence


@dataclass(frozen=True, slots=True)
class LearnerScores:
    """Teacher-forced scores of one sequence: `logps` float32 [num_scored] (nats), `greedy_tokens` int64 [num_scored]."""

    logps: NDArray[np.float32]
    greedy_tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What one call of `Learner.update` measured; means over the tokens with a finite engine log-prob."""

    gap: GapSums
    policy_loss: float
    constraint_cost: float
    entropy_nats: float
    clip_fraction: float
    grad_norm: float
    lr: float
    num_skipped: int


class Learner:
    """One transformers causal LM in bf16 with fp32 master weights under DeepSpeed."""

    def __init__(
        self,
        model_dir: Path,
        quantizer: Quantizer,
        learner: LearnerConfig,
        algorithm: AlgorithmConfig,
        constraint: ConstraintConfig,
        *,
        temperature: float,
        num_updates: int,
        seed: int,
    ) -> None:
        """Load the model of `model_dir` and wrap it; `num_updates` is the length of the learning-rate schedule."""
        self.config, self.algorithm, self.constraint, self.temperature = learner, algorithm, constraint, temperature
        torch.manual_seed(seed)
        lm = load_causal_lm(model_dir)
        check_head(lm)
        self._stored = stored_tensors(lm, model_dir)
        compute_dtype = choose_dtype(learner.compute_dtype, lm)
        self.compute_dtype = str(compute_dtype).removeprefix("torch.")
        # Without the grey box only the proof of a publish runs the twin, once: not worth a second copy of the model.
        self.twins = add_twin(lm, quantizer, self._stored, keep=constraint.signal == "grey_box")
        if compute_dtype is torch.float32:
            compute_in_float32(lm)
        self.packed = follows_packing(lm)
        self._tied = bool(getattr(lm.config, "tie_word_embeddings", False))
        self._engine = start_engine(Policy(lm, self.twins, learner.logit_chunk_elements), learner, num_updates)
        self.device: torch.device = self._engine.device
        self._skipped_in_a_row = 0

    @property
    def policy(self) -> Policy:
        """The module under DeepSpeed's wrapper."""
        return self._engine.module  # type: ignore[no-any-return]

    def score(self, sequences: Sequence[TokenSequence], *, as_twin: bool = False) -> list[LearnerScores]:
        """Log-probs of the response tokens under the current weights, at the rollout temperature; no gradient.

        `as_twin` scores with the fake-quantized weights: what the target should answer, up to its kernels' rounding.
        """
        prompts = [sequence.tokens[: sequence.prompt_len] for sequence in sequences]
        responses = [sequence.tokens[sequence.prompt_len :] for sequence in sequences]
        scores: dict[int, LearnerScores] = {}
        with torch.no_grad():
            for batch in self._micro_batches(prompts, responses):
                stats = self._forward(batch, as_twin=as_twin)
                for (index, logps), (_, greedy) in zip(batch.unflatten(stats.logp), batch.unflatten(stats.greedy), strict=True):
                    scores[index] = LearnerScores(logps, greedy)
        return [scores[index] for index in range(len(sequences))]

    def update(self, sequences: Sequence[TrainSequence], multiplier: float) -> UpdateStats:
        """`updates_per_rollout` optimizer steps on one batch of rollouts.

        Raises:
            DivergedError: loss or gradient was not finite `max_skipped_in_a_row` times in a row.
        """
        num_updates = self.config.updates_per_rollout
        if num_updates > 1:
            sequences = self._with_old_logp(sequences)
        share = math.ceil(len(sequences) / num_updates)
        steps = [self._step(sequences[start : start + share], multiplier) for start in range(0, len(sequences), share)]
        gap = sum((step.gap for step in steps), GapSums())

        def mean(field: str) -> float:
            return float(np.mean([getattr(step, field) for step in steps]))

        means = {field: mean(field) for field in ("policy_loss", "constraint_cost", "entropy_nats", "clip_fraction", "grad_norm")}
        return UpdateStats(gap=gap, lr=steps[-1].lr, num_skipped=sum(step.num_skipped for step in steps), **means)

    def _step(self, sequences: Sequence[TrainSequence], multiplier: float) -> UpdateStats:
        """Accumulate the gradient of one batch over its micro-batches, then one optimizer step."""
        num_tokens = max(1, sum(int(np.isfinite(sequence.engine_logp).sum()) for sequence in sequences))
        totals: dict[str, float] = {}
        gap = GapSums()
        teaching, silent = self.split_by_gradient(sequences, multiplier)
        for part in (teaching, silent):
            with torch.set_grad_enabled(part is teaching):
                for batch in self._micro_batches([sequence.prompt for sequence in part], [sequence.tokens for sequence in part]):
                    loss, batch_gap, sums = self._loss(batch, part, multiplier)
                    if part is teaching:
                        self._engine.backward(loss / num_tokens)
                    gap = gap + batch_gap
                    for name, value in sums.items():
                        totals[name] = totals.get(name, 0.0) + value / num_tokens
        lr = float(self._engine.get_lr()[0])
        self._engine.step()
        self.forget_twins()
        num_skipped = 0 if self._engine.was_step_applied() else 1
        grad_norm = float(self._engine.get_global_grad_norm() or 0.0)
        self._count_skips(num_skipped, grad_norm, totals["policy_loss"] + totals["constraint_cost"])
        return UpdateStats(gap=gap, grad_norm=grad_norm, lr=lr, num_skipped=num_skipped, **totals)

    def split_by_gradient(
        self, sequences: Sequence[TrainSequence], multiplier: float
    ) -> tuple[Sequence[TrainSequence], Sequence[TrainSequence]]:
        """(those with a gradient, those that are only measured): without a constraint at work, an advantage of 0 has no gradient.

        All of them when none has one: DeepSpeed takes no step without a backward pass.
        """
        constrained = self.constraint.signal != "off" and multiplier > 0.0
        teaching = [sequence for sequence in sequences if constrained or sequence.advantage != 0.0]
        if len(teaching) in (0, len(sequences)):
            return sequences, []
        return teaching, [sequence for sequence in sequences if sequence.advantage == 0.0]

    def _loss(self, batch: MicroBatch, sequences: Sequence[TrainSequence], multiplier: float) -> tuple[Tensor, GapSums, dict[str, float]]:
        """Policy loss plus lambda times the constraint's cost, summed over the tokens with a finite engine log-prob."""
        signal = self.constraint.signal
        stats = self._forward(batch, with_twin_kl=signal == "grey_box" and multiplier > 0.0)
        engine_logp = batch.flatten([sequence.engine_logp for sequence in sequences], self.device)
        advantage = batch.flatten([np.full(len(sequence.tokens), sequence.advantage) for sequence in sequences], self.device)
        known = [sequence.learner_old_logp for sequence in sequences]
        old_logp = (
            stats.logp.detach() if known[batch.indices[0]] is None else batch.flatten([a for a in known if a is not None], self.device)
        )
        gap = split_gap(stats.logp.detach(), old_logp, engine_logp)

        mask = torch.isfinite(engine_logp)
        engine_logp = torch.where(mask, engine_logp, old_logp)
        weight = corrections.tis_weights(old_logp, engine_logp, self.algorithm.tis_cap) if self.algorithm.correction == "tis" else 1.0
        if signal == "advantage":
            advantage = signals.advantage_side(advantage, stats.logp, engine_logp, multiplier)
        clip = (self.algorithm.clip_low, self.algorithm.clip_high)
        policy_loss = torch.where(mask, losses.ppo_clip_loss(stats.logp, old_logp, advantage, weight, *clip), 0.0).sum()

        cost = torch.zeros_like(policy_loss)
        if stats.twin_kl is not None:
            cost = torch.where(mask, stats.twin_kl, 0.0).sum()
        elif signal == "loss":
            cost = torch.where(mask, signals.loss_side_cost(stats.logp, engine_logp), 0.0).sum()
        with torch.no_grad():
            clipped = torch.where(mask, losses.clip_fraction(stats.logp, old_logp, advantage, *clip), 0.0).sum()
            entropy = masked_mean(stats.entropy, mask) * mask.sum()
        sums = {"policy_loss": policy_loss, "constraint_cost": cost, "entropy_nats": entropy, "clip_fraction": clipped}
        return policy_loss + multiplier * cost, gap, {name: float(total.detach()) for name, total in sums.items()}

    def _with_old_logp(self, sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
        """Fill in the learner's log-probs under the weights of now, for sequences that have none yet."""
        missing = [i for i, sequence in enumerate(sequences) if sequence.learner_old_logp is None]
        scores = self.score([sequences[i].sequence for i in missing])
        filled = list(sequences)
        for i, score in zip(missing, scores, strict=True):
            filled[i] = replace(sequences[i], learner_old_logp=score.logps)
        return filled

    def _forward(self, batch: MicroBatch, *, with_twin_kl: bool = False, as_twin: bool = False) -> TokenStats:
        stats: TokenStats = self._engine(batch, self.temperature, with_twin_kl=with_twin_kl, as_twin=as_twin)
        return stats

    def _micro_batches(self, prompts: Sequence[Sequence[int]], responses: Sequence[Tokens]) -> Iterator[MicroBatch]:
        return micro_batches(prompts, responses, self.config.tokens_per_micro_batch, self.device, packed=self.packed)

    def _count_skips(self, num_skipped: int, grad_norm: float, loss: float) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if num_skipped else 0
        if self._skipped_in_a_row >= self.config.max_skipped_in_a_row:
            raise DivergedError(
                f"loss or gradient was not finite {self._skipped_in_a_row} steps in a row (loss {loss:g}, gradient norm {grad_norm:g}). "
                f"Lower learner.lr (now {self.config.lr:g}) or resume from an earlier checkpoint"
            )

    def greedy_responses(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop_token_ids: Sequence[int]) -> list[list[int]]:
        """Greedy continuations by the bf16 weights, stop token included, in order."""
        lm: Any = self.policy.lm
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        longest = max(len(prompt) for prompt in prompts) + max_tokens
        num_rows = max(1, self.config.tokens_per_micro_batch // longest)
        responses: dict[int, list[int]] = {}
        with torch.no_grad():
            for start in range(0, len(order), num_rows):
                rows = order[start : start + num_rows]
                width = max(len(prompts[i]) for i in rows)
                ids = torch.zeros((len(rows), width), dtype=torch.int64, device=self.device)
                mask = torch.zeros_like(ids)
                for row, index in enumerate(rows):
                    ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
                    mask[row, width - len(prompts[index]) :] = 1
                pad = stop_token_ids[0] if stop_token_ids else 0
                out = lm.generate(
                    ids,
                    attention_mask=mask,
                    max_new_tokens=max_tokens,
                    do_sample=False,
                    eos_token_id=list(stop_token_ids) or None,
                    pad_token_id=pad,
                )
                for row, index in enumerate(rows):
                    responses[index] = _up_to_stop(out[row, width:].tolist(), stop_token_ids)
        return [responses[index] for index in range(len(prompts))]

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The bf16 weights as a saved checkpoint has them (`saved_views`), one at a time; under ZeRO-3 each is gathered and let go."""
        import deepspeed

        output = self.policy.lm.get_output_embeddings()
        output_name = next((name for name, module in self.policy.lm.named_modules() if module is output), None)
        for name, parameter in self.policy.lm.named_parameters(remove_duplicate=False):
            if self._tied and name == f"{output_name}.weight":
                continue
            if self.config.zero_stage == 3:
                with deepspeed.zero.GatheredParameters(parameter):
                    yield from saved_views(name, parameter.detach().clone(), self._stored)
            else:
                yield from saved_views(name, parameter.detach(), self._stored)

    @property
    def num_tensors(self) -> int:
        """An upper bound on how many tensors `named_tensors` gives."""
        return len(self._stored)

    def input_grams(self, sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
        """Weight name -> mean of x x^T over the inputs of each quantized layer while the model reads `sequences`; see gram.py."""
        return input_grams(self.policy.lm, self.twins, [sequence.tokens for sequence in sequences], self.config.tokens_per_micro_batch)

    def forget_twins(self) -> None:
        """Drop all rounded weights; due after every change of the weights or of how they are rounded."""
        for layer in self.twins:
            layer.forget()

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the bf16 weights, by parameter name."""
        return {name: parameter.detach().clone() for name, parameter in self.policy.named_parameters()}

    def score_snapshot(self, snapshot: dict[str, Tensor], sequences: Sequence[TokenSequence]) -> list[LearnerScores]:
        """`score` under the weights of a `snapshot` (rollouts of an older version); the current weights come back after it."""
        current = self.snapshot()
        self._copy_in(snapshot)
        try:
            return self.score(sequences)
        finally:
            self._copy_in(current)

    def _copy_in(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.policy.named_parameters():
                parameter.copy_(weights[name])

    def save(self, folder: Path) -> None:
        """Write master weights, optimizer and scheduler state into `folder`."""
        self._engine.save_checkpoint(
            str(folder), tag="learner", client_state={"skipped_in_a_row": self._skipped_in_a_row}, save_latest=False
        )

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""
        if not (folder / "learner").is_dir():
            raise UsageError(f"checkpoint {folder} holds no learner state; resume from an older checkpoint")
        _, client_state = self._engine.load_checkpoint(str(folder), tag="learner")
        self._skipped_in_a_row = int(client_state["skipped_in_a_row"])
        self.forget_twins()

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers."""
        self._engine.destroy()


def _up_to_stop(tokens: list[int], stop_token_ids: Sequence[int]) -> list[int]:
    for position, token in enumerate(tokens):
        if token in stop_token_ids:
            return tokens[: position + 1]
    return tokens
