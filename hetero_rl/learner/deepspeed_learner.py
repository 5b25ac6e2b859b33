"""The bf16 learner on DeepSpeed: scores tokens, takes optimizer steps, hands out its weights."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deploy_targets.errors import UsageError
from deploy_targets.protocols import CalibratedQuantizer, Quantizer
from deploy_targets.quantizers.kv_cache import CacheRounding
from deploy_targets.saved_names import saved_views
from deploy_targets.types import Sampling, TokenSequence
from hetero_rl.algorithm.discrepancy import token_gap
from hetero_rl.algorithm.kinds import PAIRED, AdvantageForm
from hetero_rl.algorithm.losses import response_scales
from hetero_rl.algorithm.signals import group_costs
from hetero_rl.config import AlgorithmConfig, ConstraintConfig, LearnerConfig
from hetero_rl.errors import DivergedError
from hetero_rl.learner.attention import follows_cache_rounding, follows_packing, register
from hetero_rl.learner.batch_parts import split_batch
from hetero_rl.learner.batching import MicroBatch, Routes, Tokens, micro_batches
from hetero_rl.learner.compute import choose_dtype, compute_in_float32
from hetero_rl.learner.deepspeed_engine import backend, read_masters, start_engine, write_masters
from hetero_rl.learner.describe import Description, describe
from hetero_rl.learner.fake_quant import add_twin, random_errors
from hetero_rl.learner.generate import generate_responses
from hetero_rl.learner.gram import input_grams
from hetero_rl.learner.model import check_head, load_causal_lm, stored_tensors
from hetero_rl.learner.objective import LossSums, objective
from hetero_rl.learner.policy import NOTHING, Beside, Policy, TokenStats
from hetero_rl.learner.ranks import END, join, on_every_rank
from hetero_rl.learner.routing import check_routes
from hetero_rl.types import TrainSequence

NUM_SNAPSHOTS = 2
"""What a run one step off needs at a time: the weights that its rollouts were made with, and those of the next."""
NOISE_SEEDS = 1_000_003
"""Of a run: more than it has updates, so that two runs draw different noise."""


@dataclass(frozen=True, slots=True)
class LearnerScores:
    """Teacher-forced scores of one sequence: `logps` float32 [num_scored] (nats), `greedy_tokens` int64 [num_scored]."""

    logps: NDArray[np.float32]
    greedy_tokens: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What one call of `Learner.update` measured: sums over the tokens, the mean gradient norm of its steps, the last learning rate."""

    sums: LossSums
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
        max_response_tokens: int,
        seed: int,
        cache_rounding: CacheRounding | None = None,
    ) -> None:
        """Load the model of `model_dir` and wrap it; `num_updates` is the length of the learning-rate schedule.

        `cache_rounding`: what the target's KV cache makes of keys and values; the twin does the same where the model lets it.
        """
        self.config, self.algorithm, self.constraint, self.temperature = learner, algorithm, constraint, temperature
        self._max_response_tokens = max_response_tokens
        self._seed = seed
        self.ranks = join(backend())
        torch.manual_seed(seed)
        lm = load_causal_lm(model_dir)
        check_head(lm)
        self._stored = stored_tensors(lm, model_dir)
        # Measured where it is not given, and not everywhere alike.
        compute_dtype = self.ranks.agreed(choose_dtype(learner.compute_dtype, lm))
        self.compute_dtype = str(compute_dtype).removeprefix("torch.")
        # Where only the proof of a publish runs the twin, and that once, it is not worth a second copy of the model.
        keep = constraint.signal in PAIRED or learner.forward == "fake_quant" or algorithm.score_centering
        self._quantizer = quantizer
        self.twins = add_twin(lm, quantizer, self._stored, keep=keep)
        if compute_dtype is torch.float32:
            compute_in_float32(lm)
        self.packed = follows_packing(lm)
        if cache_rounding is not None:
            lm.set_attn_implementation(register())
        self.cache_rounding = cache_rounding if cache_rounding is not None and follows_cache_rounding(lm) else None
        self._as_twin = learner.forward == "fake_quant"
        if not self.has_twin and (self._as_twin or algorithm.score_centering):
            asked = "algorithm.score_centering = true" if algorithm.score_centering else "learner.forward = 'fake_quant'"
            raise UsageError(f"{asked} needs the target's rounding, and this target rounds nothing that is known here. Leave it out")
        self._tied = bool(getattr(lm.config, "tie_word_embeddings", False))
        policy = Policy(lm, self.twins, learner.logit_chunk_elements, self.cache_rounding, routing_replay=algorithm.routing_replay)
        self._engine = start_engine(policy, learner, num_updates)
        self.device: torch.device = self._engine.device
        self._skipped_in_a_row, self._num_updates = 0, 0
        self._snapshots: dict[int, dict[str, Tensor]] = {}
        self._num_snapshots = 0
        self._masters: dict[str, Tensor] = {}

    @property
    def has_twin(self) -> bool:
        """Whether the target computes otherwise than the learner, as far as is known: rounded weights, inputs, keys or values."""
        return bool(self.twins) or self.cache_rounding is not None

    @property
    def policy(self) -> Policy:
        """The module under DeepSpeed's wrapper."""
        return self._engine.module  # type: ignore[no-any-return]

    @on_every_rank
    def score(
        self, sequences: Sequence[TokenSequence], *, as_twin: bool | None = None, routes: Sequence[Routes | None] = ()
    ) -> list[LearnerScores]:
        """Log-probs of the response tokens under the current weights, at the rollout temperature; no gradient.

        `as_twin` scores with the fake-quantized weights: what the target should answer, up to its kernels' rounding. None: as the
        learner learns (`learner.forward`). `routes`: those that the engine gave for each sequence, which are followed with
        `algorithm.routing_replay` alone.
        """
        prompts = [sequence.tokens[: sequence.prompt_len] for sequence in sequences]
        responses = [sequence.tokens[sequence.prompt_len :] for sequence in sequences]
        scores: dict[int, LearnerScores] = {}
        with torch.no_grad():
            batches = self._micro_batches(prompts, responses, routes if self.algorithm.routing_replay else (), self.ranks.size)
            for batch, _ in self.ranks.share(batches):
                stats = self._forward(batch, as_twin=self._as_twin if as_twin is None else as_twin)
                for (index, logps), (_, greedy) in zip(batch.unflatten(stats.logp), batch.unflatten(stats.greedy), strict=True):
                    scores[index] = LearnerScores(logps, greedy)
        everyones = {index: score for part in self.ranks.gathered(scores) for index, score in part.items()}
        return [everyones[index] for index in range(len(sequences))]

    @on_every_rank
    def describe(self, sequences: Sequence[TokenSequence], *, routes: Sequence[Routes | None] = ()) -> list[Description]:
        """What the current weights say about the response tokens, in full and in two precisions: `score`, for golden probes."""
        prompts = [sequence.tokens[: sequence.prompt_len] for sequence in sequences]
        responses = [sequence.tokens[sequence.prompt_len :] for sequence in sequences]

        def forward(batch: MicroBatch, num_top: int) -> TokenStats:
            return self._forward(batch, as_twin=self._as_twin, num_top=num_top)

        batches = self._micro_batches(prompts, responses, routes if self.algorithm.routing_replay else ())
        return describe(forward, batches, is_float32=self.compute_dtype == "float32")

    @on_every_rank
    def update(self, sequences: Sequence[TrainSequence], multiplier: float) -> UpdateStats:
        """`updates_per_rollout` optimizer steps on one batch of rollouts.

        Raises:
            DivergedError: `max_skipped_in_a_row` steps in a row had a loss or gradient that was not finite, or nothing to learn from.
            EngineError: routes that are to be replayed are missing, or are none of this model.
        """
        check_routes([sequence.routes for sequence in sequences], self.policy.routers, replay=self.algorithm.routing_replay)
        num_updates = self.config.updates_per_rollout
        centered = self.constraint.signal == "advantage" and self.constraint.advantage_form.endswith("centered")
        if num_updates > 1 or centered:
            sequences = self._with_old_logp(sequences)
        if centered:
            sequences = with_group_costs(sequences, self.constraint.advantage_form)
        share = math.ceil(len(sequences) / num_updates)
        steps = [self._step(sequences[start : start + share], multiplier) for start in range(0, len(sequences), share)]
        return UpdateStats(
            sum((step.sums for step in steps), LossSums()),
            float(np.mean([step.grad_norm for step in steps])),
            steps[-1].lr,
            sum(step.num_skipped for step in steps),
        )

    def _step(self, sequences: Sequence[TrainSequence], multiplier: float) -> UpdateStats:
        """One optimizer step on one batch."""
        lengths = [int(np.isfinite(sequence.engine_logp).sum()) for sequence in sequences]
        num_tokens = sum(lengths)
        if num_tokens == 0:
            # A step of zero gradient would still move the weights by the optimizer's averages.
            self._count_skips(1, "the engine gave no finite log-prob for any sampled token")
            return UpdateStats(LossSums(), 0.0, float(self._engine.get_lr()[0]), 1)
        scales = response_scales(lengths, self.algorithm.normalization, self._max_response_tokens)
        sequences = [replace(sequence, loss_scale=scale) for sequence, scale in zip(sequences, scales, strict=True)]
        seed = self._seed * NOISE_SEEDS + self._num_updates
        with random_errors(self.twins, seed) if self.constraint.signal == "flatness" else nullcontext():
            sums = self._backward(sequences, num_tokens, multiplier)
        lr = float(self._engine.get_lr()[0])
        self._engine.step()
        self.forget_twins()
        self._num_updates += 1
        num_skipped = 0 if self._engine.was_step_applied() else 1
        grad_norm = float(self._engine.get_global_grad_norm() or 0.0)
        loss = (sums.policy_loss + sums.cost) / num_tokens
        self._count_skips(num_skipped, f"loss or gradient was not finite (loss {loss:g}, gradient norm {grad_norm:g})")
        return UpdateStats(sums, grad_norm, lr, num_skipped)

    def _backward(self, sequences: Sequence[TrainSequence], num_tokens: int, multiplier: float) -> LossSums:
        """Accumulate the gradient of the objective's mean over `num_tokens`, those of all ranks; returns what all of them summed."""
        sums = LossSums()
        for part in split_batch(sequences, self.constraint, multiplier, self._num_updates):
            beside = Beside(part.grey_box, self.algorithm.centering if part.with_gradient else None)
            with torch.set_grad_enabled(part.with_gradient):
                prompts, responses, routes = zip(*((s.prompt, s.tokens, s.routes) for s in part.sequences), strict=True)
                for batch, counts in self.ranks.share(self._micro_batches(prompts, responses, routes, self.ranks.size)):
                    stats = self._forward(batch, beside, as_twin=self._as_twin)
                    loss, found = objective(stats, batch, part.sequences, self.algorithm, self.constraint, multiplier, part.cost_scale)
                    if part.with_gradient:
                        # DeepSpeed takes the mean of the ranks' gradients, and the sum is meant.
                        self._engine.backward(loss * (self.ranks.size if counts else 0) / num_tokens)
                    sums = sums + found if counts else sums
        return sum(self.ranks.gathered(sums), LossSums())

    def _with_old_logp(self, sequences: Sequence[TrainSequence]) -> list[TrainSequence]:
        """Fill in the learner's log-probs under the weights of now, for sequences that have none yet."""
        missing = [i for i, sequence in enumerate(sequences) if sequence.learner_old_logp is None]
        scores = self.score([sequences[i].sequence for i in missing], routes=[sequences[i].routes for i in missing])
        filled = list(sequences)
        for i, score in zip(missing, scores, strict=True):
            filled[i] = replace(sequences[i], learner_old_logp=score.logps)
        return filled

    def _forward(self, batch: MicroBatch, beside: Beside = NOTHING, *, as_twin: bool = False, num_top: int = 0) -> TokenStats:
        stats: TokenStats = self._engine(batch, self.temperature, beside=beside, as_twin=as_twin, num_top=num_top)
        return stats

    def _micro_batches(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Tokens], routes: Sequence[Routes | None], num_shares: int = 1
    ) -> Iterator[MicroBatch]:
        """At least `num_shares` of them, where there are as many sequences."""
        known = [array for array in routes if array is not None]
        given = known if len(known) == len(prompts) else None
        most = self.config.tokens_per_micro_batch
        if num_shares > 1:
            most = min(most, math.ceil(sum(len(p) + len(r) for p, r in zip(prompts, responses, strict=True)) / num_shares))
        return micro_batches(prompts, responses, most, self.device, packed=self.packed, routes=given)

    def _count_skips(self, num_skipped: int, why: str) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if num_skipped else 0
        if self._skipped_in_a_row >= self.config.max_skipped_in_a_row:
            raise DivergedError(
                f"{self._skipped_in_a_row} optimizer steps in a row were skipped; of the last, {why}. Lower learner.lr (now "
                f"{self.config.lr:g}), resume from an earlier checkpoint, or look at what the engine and the reward function return"
            )

    @on_every_rank
    def greedy_responses(self, prompts: Sequence[Sequence[int]], max_tokens: int, stop_token_ids: Sequence[int]) -> list[list[int]]:
        """Greedy continuations by the bf16 weights, stop token included, in order."""
        sampling = Sampling(max_tokens, temperature=0.0, stop_token_ids=tuple(stop_token_ids))
        return generate_responses(self.policy.lm, prompts, sampling, self.config.tokens_per_micro_batch, self.device)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The bf16 weights as a saved checkpoint has them (`saved_views`), one at a time; under ZeRO-3 each is gathered and let go."""
        import deepspeed

        if self.config.zero_stage == 3 and self.ranks.size > 1 and self.ranks.leads and not self.ranks.are_together:
            # Not before the first is asked for: until then other calls may come between.
            self.ranks.tell("named_tensors", (), {})
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

    @on_every_rank
    def input_grams(self, sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
        """Weight name -> mean of x x^T over the inputs of each quantized layer while the model reads `sequences`; see gram.py."""
        return input_grams(self.policy.lm, self.twins, [sequence.tokens for sequence in sequences], self.config.tokens_per_micro_batch)

    @on_every_rank
    def calibrate(self, sequences: Sequence[TokenSequence]) -> None:
        """Have a calibrated quantizer round by what the layers see of `sequences`, each rank its own: each has a twin."""
        assert isinstance(self._quantizer, CalibratedQuantizer)
        self._quantizer.calibrate(self.named_tensors(), self.input_grams(sequences))
        self.forget_twins()

    def forget_twins(self) -> None:
        """Drop all rounded weights; due after every change of the weights or of how they are rounded."""
        for layer in self.twins:
            layer.forget()

    @on_every_rank
    def snapshot(self) -> int:
        """Keep a copy of the bf16 weights, on each rank its own; returns its number. The `NUM_SNAPSHOTS` newest are kept."""
        self._num_snapshots += 1
        self._snapshots[self._num_snapshots] = self._copied()
        for old in list(self._snapshots)[:-NUM_SNAPSHOTS]:
            del self._snapshots[old]
        return self._num_snapshots

    @on_every_rank
    def score_snapshot(
        self, snapshot: int, sequences: Sequence[TokenSequence], routes: Sequence[Routes | None] = ()
    ) -> list[LearnerScores]:
        """`score` under the weights of a `snapshot` (rollouts of an older version); the current weights come back after it."""
        current = self._copied()
        self._copy_in(self._snapshots[snapshot])
        try:
            return self.score(sequences, routes=routes)
        finally:
            self._copy_in(current)

    @on_every_rank
    def keep_masters(self) -> None:
        """Keep a copy of the fp32 master weights, in place of the last; not under ZeRO-3."""
        self._masters = read_masters(self._engine)

    @on_every_rank
    def restore_masters(self) -> None:
        """Undo the steps since `keep_masters`: weights alone, the optimizer's averages and the schedule stay."""
        write_masters(self._engine, self._masters)
        self._copy_in(self._masters)

    def _copied(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.policy.named_parameters()}

    def _copy_in(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.policy.named_parameters():
                parameter.copy_(weights[name])
        self.forget_twins()

    @on_every_rank
    def save(self, folder: Path) -> None:
        """Write master weights, optimizer and scheduler state into `folder`."""
        client_state = {"skipped_in_a_row": self._skipped_in_a_row, "num_updates": self._num_updates}
        self._engine.save_checkpoint(str(folder), tag="learner", client_state=client_state, save_latest=False)
        self.ranks.wait()

    @on_every_rank
    def load(self, folder: Path) -> None:
        """Restore what `save` wrote."""
        if not (folder / "learner").is_dir():
            raise UsageError(f"checkpoint {folder} holds no learner state; resume from an older checkpoint")
        _, client_state = self._engine.load_checkpoint(str(folder), tag="learner")
        self._skipped_in_a_row, self._num_updates = int(client_state["skipped_in_a_row"]), int(client_state["num_updates"])
        self.forget_twins()

    def load_weights(self, folder: Path) -> None:
        """The weights alone of what `save` wrote, by any number of ranks under any stage of ZeRO: for all but training, without ZeRO."""
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        assert self.config.zero_stage == 0
        if any((folder / "learner").glob("*_optim_states.pt")):
            with redirect_stdout(io.StringIO()):  # it says what it reads, part by part
                masters = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="learner")
            self._copy_in(masters)
        else:
            self.load(folder)

    def close(self) -> None:
        """Release DeepSpeed's hooks and buffers; rank 0 lets the others go."""
        if self.ranks.size > 1 and self.ranks.leads:
            with suppress(RuntimeError):  # where they are gone already
                self.ranks.tell(END)
        self._engine.destroy()


def with_group_costs(sequences: Sequence[TrainSequence], form: AdvantageForm) -> list[TrainSequence]:
    """Fill in what a centred advantage side takes from the cost of each token; the responses to one prompt are a group."""
    costs = [token_gap(old, sequence.engine_logp) for sequence in sequences if (old := sequence.learner_old_logp) is not None]
    found = group_costs(form, costs, [sequence.prompt for sequence in sequences])
    return [replace(sequence, group_cost=cost) for sequence, cost in zip(sequences, found, strict=True)]
