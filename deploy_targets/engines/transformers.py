"""A Hugging Face model run by transformers in eager PyTorch: the high-fidelity reference, or with layers of bitsandbytes."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from safetensors import safe_open

from deploy_targets.engines.requests import (
    check_layout,
    check_sequences,
    folder_layout,
    parse_options,
    read_limits,
    response_limits,
)
from deploy_targets.engines.route_log import RouteLog
from deploy_targets.engines.transformers_options import TransformersOptions
from deploy_targets.errors import DeployTargetsError, EngineError
from deploy_targets.families import routes_problem
from deploy_targets.routers import find_routers
from deploy_targets.saved_names import saved_views
from deploy_targets.types import Generation, Sampling, TokenScores, TokenSequence, WeightFile

if TYPE_CHECKING:
    from deploy_targets.engines.bitsandbytes_layers import QuantizedLayers

_BITSANDBYTES = "bitsandbytes"


class TransformersEngine:
    """Batched sampling with a KV cache; prompts are padded on the left, so that all rows end in the same column."""

    def __init__(self, artifact_dir: Path, options: Mapping[str, Any], weight_version: int) -> None:
        """Load the folder. Raises `ProfileError` for wrong options and `EngineError` when it cannot be loaded."""
        self._options = parse_options(TransformersOptions, options, "transformers")
        self._max_model_len, self._vocab_size = read_limits(artifact_dir, self._options.max_model_len)
        self._layout = folder_layout(artifact_dir)
        self.weight_version = weight_version
        device = self._options.device
        with _failures(f"find the device {device!r}"):
            self._device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        dtype = getattr(torch, self._options.dtype)
        has_quantized_layers = _quantized_by(artifact_dir) == _BITSANDBYTES
        placing: dict[str, Any] = {}
        try:
            if has_quantized_layers:
                # Before transformers imports bitsandbytes, so that it is imported quietly.
                from deploy_targets.engines.bitsandbytes_layers import QuantizedLayers

                placing["device_map"] = {"": str(self._device)}  # such layers are made on the device they stay on
            self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                str(artifact_dir),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                **placing,
            ).to(self._device)
        except Exception as error:
            raise EngineError(
                f"transformers {transformers.__version__} cannot load {artifact_dir}: {type(error).__name__}: {error}"
            ) from error
        self._model.eval()
        self._quantized: QuantizedLayers | None = QuantizedLayers(self._model, dtype) if has_quantized_layers else None
        self._parameters = self._named_parameters()
        self._routers = find_routers(self._model) if self._options.return_routes else []
        if self._options.return_routes and not self._routers:
            problem = routes_problem(self._model.config.to_dict()) or "none of its layers has experts"
            raise EngineError(f"return_routes cannot be had from {artifact_dir}: {problem}")

    def _named_parameters(self) -> dict[str, torch.Tensor]:
        """The parameter, or the part of one, behind every name in the weights file but for quantized layers; renamed ones are refused."""
        state = {
            saved_name: view.detach()
            for name, tensor in self._model.state_dict(keep_vars=True).items()
            for saved_name, view in saved_views(name, tensor, self._layout)
        }
        unknown = [name for name in self._layout if name not in state]
        if unknown:
            raise EngineError(
                f"transformers holds these tensors under other names or in other shapes, so they cannot be updated in place: "
                f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}. Use a model family that is stored as it is run"
            )
        return {name: state[name] for name in self._layout if self._quantized is None or not self._quantized.owns(name)}

    def update(self, weights: WeightFile) -> int:
        """Copy the file into the model's parameters, and into new ones for quantized layers; everything is checked before.

        Raises `EngineError` for a file that does not fit or cannot be read, which changes nothing; for a device that fails halfway, after
        which the engine is closed, since it would serve a mix of two versions.
        """
        self._open_model()
        check_layout(self._layout, weights.path)
        with _failures(f"read {weights.path}, nothing was changed"):
            file: Any = safe_open(weights.path, "pt")
            install = None
            if self._quantized is not None:
                install = self._quantized.prepare({name: file.get_tensor(name) for name in self._layout if self._quantized.owns(name)})
        try:
            # One tensor at a time: a second copy of the model would be the most memory that a publish takes.
            with _failures(f"take over {weights.path} and was shut down"), torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(file.get_tensor(name))
                if install is not None:
                    install()
        except EngineError:
            self.close()
            raise
        self.weight_version = weights.weight_version
        return self.weight_version

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        """Sample all prompts in one batch, from one generator made of the seed; equal prompts are computed once.

        Where the logits of a row are not finite its token is an arbitrary one, with a NaN log-prob; the other rows are as without it.
        Raises `EngineError` with what PyTorch says when it fails, for lack of memory for instance.
        """
        routes = RouteLog(self._routers)
        with _failures("generate"), routes.watching():
            return self._generate(prompts, sampling, routes)

    def _generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, routes: RouteLog) -> list[Generation]:
        model = self._open_model()
        if not prompts:
            return []
        allowed = response_limits(prompts, sampling.max_tokens, self._max_model_len, self._vocab_size)
        distinct = list(dict.fromkeys(tuple(prompt) for prompt in prompts))
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        rows = torch.tensor([row_of[tuple(prompt)] for prompt in prompts], device=self._device)

        width = max(map(len, distinct))
        tokens = torch.zeros(len(distinct), width, dtype=torch.long, device=self._device)
        mask = torch.zeros_like(tokens)
        for row, prompt in enumerate(distinct):
            tokens[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        routes.book_prompts(mask, rows)
        cache = output.past_key_values
        cache.batch_select_indices(rows)
        logits, mask, positions = output.logits[rows, -1], mask[rows], positions[rows, -1:]

        generator = torch.Generator(self._device).manual_seed(sampling.seed)
        stops = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=self._device)
        alive = torch.arange(len(prompts), device=self._device)
        """The prompts that the rows of the batch belong to; finished ones leave the batch."""
        sampled = torch.zeros(len(prompts), sampling.max_tokens, dtype=torch.long, device=self._device)
        logps = torch.zeros(len(prompts), sampling.max_tokens, device=self._device)
        lengths = torch.tensor(allowed, device=self._device)
        stopped = torch.zeros(len(prompts), dtype=torch.bool, device=self._device)
        for step in range(max(allowed)):
            log_probs = torch.log_softmax(logits.float() / (sampling.temperature or 1.0), dim=-1)
            chosen = _drawn(log_probs, None if sampling.temperature == 0 else generator)
            sampled[alive, step] = chosen[:, 0]
            logps[alive, step] = log_probs.gather(1, chosen)[:, 0]
            hit_stop = torch.isin(chosen[:, 0], stops)
            stopped[alive[hit_stop]] = True
            lengths[alive[hit_stop]] = step + 1
            ended = lengths[alive] == step + 1
            if bool(ended.all()):
                break
            if bool(ended.any()):
                kept = (~ended).nonzero()[:, 0]
                cache.batch_select_indices(kept)
                alive, chosen, mask, positions = alive[kept], chosen[kept], mask[kept], positions[kept]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions + 1
            output = model(input_ids=chosen, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            routes.book_tokens(alive)
            logits = output.logits[:, -1]
        return [
            Generation(
                prompt=tuple(prompt),
                tokens=sampled[row, :length].cpu().numpy().astype(np.int32),
                logps=logps[row, :length].cpu().numpy().astype(np.float32),
                weight_version=self.weight_version,
                temperature=sampling.temperature,
                finish_reason="stop" if was_stopped else "length",
                routes=routes.routes(row),
            )
            for row, (prompt, length, was_stopped) in enumerate(zip(prompts, lengths.tolist(), stopped.tolist(), strict=True))
        ]

    @torch.inference_mode()
    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        """Teacher forcing, padded on the right (causal attention never sees the padding), a few sequences at a time.

        Log-probs are NaN where the logits are not finite. Raises `EngineError` with what PyTorch says when it fails.
        """
        with _failures("score"):
            return self._score(sequences, temperature)

    def _score(self, sequences: Sequence[TokenSequence], temperature: float) -> list[TokenScores]:
        model = self._open_model()
        check_sequences(sequences, temperature, self._max_model_len, self._vocab_size)
        scores = []
        for begin in range(0, len(sequences), self._options.score_batch_size):
            batch = sequences[begin : begin + self._options.score_batch_size]
            width = max(len(sequence.tokens) for sequence in batch)
            tokens = torch.zeros(len(batch), width, dtype=torch.long, device=self._device)
            for row, sequence in enumerate(batch):
                tokens[row, : len(sequence.tokens)] = torch.tensor(sequence.tokens)
            logits = model(input_ids=tokens, use_cache=False).logits
            for row, sequence in enumerate(batch):
                places = slice(sequence.prompt_len - 1, len(sequence.tokens) - 1)
                log_probs = torch.log_softmax(logits[row, places].float() / temperature, dim=-1)
                given = tokens[row, sequence.prompt_len : len(sequence.tokens)]
                scores.append(
                    TokenScores(
                        logps=log_probs.gather(1, given[:, None])[:, 0].cpu().numpy(),
                        greedy_tokens=log_probs.argmax(dim=-1).cpu().numpy().astype(np.int32),
                        weight_version=self.weight_version,
                        temperature=temperature,
                    )
                )
        return scores

    def _open_model(self) -> Any:
        if self._model is None:
            raise EngineError("this transformers engine is closed")
        return self._model

    def close(self) -> None:
        """Free the model."""
        self._model = self._quantized = None
        self._parameters, self._routers = {}, []
        gc.collect()


def _drawn(log_probs: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """One token a row [num_rows, 1]: drawn with `generator`, or the most probable one without.

    A row that log_softmax could not give, which is NaN as a whole, gets the token that argmax names: torch.multinomial would end the call
    for every row, and on CUDA the process's use of the device.
    """
    most_probable = log_probs.argmax(dim=-1, keepdim=True)
    if generator is None:
        return most_probable
    lost = log_probs.isnan().any(dim=-1, keepdim=True)
    drawn = torch.multinomial(log_probs.exp().masked_fill(lost, 1.0), 1, generator=generator)
    return torch.where(lost, most_probable, drawn)


@contextmanager
def _failures(what: str) -> Iterator[None]:
    """Whatever is raised within becomes an `EngineError` saying that transformers cannot do `what`; errors of ours stay what they are."""
    try:
        yield
    except DeployTargetsError:
        raise
    except Exception as error:  # PyTorch, safetensors and CUDA share no base class below Exception
        raise EngineError(f"transformers {transformers.__version__} cannot {what}: {type(error).__name__}: {error}") from error


def _quantized_by(artifact_dir: Path) -> str | None:
    """The `quant_method` that the folder's config.json names."""
    quantization = json.loads((artifact_dir / "config.json").read_text("utf-8")).get("quantization_config")
    return None if quantization is None else str(quantization.get("quant_method"))
