"""What crosses the border between a learner and a serving engine: token ids, log-probs, weights.

Every log-prob in these types says whose it is (the engine that made the object), at what temperature,
and under which `weight_version`; nothing here holds text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WEIGHTS_FILE = "model.safetensors"
"""Where a target keeps its weights, in one safetensors file; targets with a format of their own name it (`FileQuantizer`)."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How an engine draws tokens.

    `temperature` 0 means greedy; log-probs are then those at temperature 1. There is no top-p or top-k:
    the learner would have to renormalise over the same truncated set, and a setting that one side
    ignores is worse than one that does not exist.

    Request i of a call draws from a generator that depends on (`seed`, i) or on `seed` and the whole
    call, so that the same call gives the same tokens.
    """

    max_tokens: int
    temperature: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values that no engine can honour."""
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")


@dataclass(frozen=True, slots=True)
class Generation:
    """One sampled response.

    `tokens`: int32 [num_tokens], the stop token included when there was one.
    `logps`: float32 [num_tokens], the engine's log-prob (nats) of each sampled token, after temperature.
    A log-prob the engine could not give is NaN, never 0.
    `routes`: int16 [num_inputs, num_expert_layers, top_k], the experts that the engine sent each token to in each layer that has
    experts, lowest layer first. Every token that was an input has them: the prompt and the response without its last token,
    num_inputs = len(prompt) + num_tokens - 1. None where the engine was not asked for them or cannot tell.
    """

    prompt: tuple[int, ...]
    tokens: NDArray[np.int32]
    logps: NDArray[np.float32]
    weight_version: int
    temperature: float
    finish_reason: Literal["stop", "length"]
    routes: NDArray[np.int16] | None = None

    def __post_init__(self) -> None:
        """Routes belong to tokens one by one."""
        num_inputs = len(self.prompt) + len(self.tokens) - 1
        if self.routes is not None and len(self.routes) != num_inputs:
            raise ValueError(f"routes of {len(self.routes)} tokens were given for {num_inputs} that were inputs")

    @property
    def sequence(self) -> TokenSequence:
        """The prompt and the sampled tokens, ready to be scored. Raises `ValueError` where nothing was sampled."""
        return TokenSequence((*self.prompt, *self.tokens.tolist()), len(self.prompt))


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt and the response to be scored after it: `tokens[prompt_len:]` are the scored tokens."""

    tokens: tuple[int, ...]
    prompt_len: int

    def __post_init__(self) -> None:
        """A scored token needs at least one token before it."""
        if not 1 <= self.prompt_len < len(self.tokens):
            raise ValueError(f"prompt_len must lie in [1, {len(self.tokens) - 1}], got {self.prompt_len}")


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Teacher-forced scores of the response tokens of one `TokenSequence`.

    `logps`: float32 [num_scored], log-prob (nats) of each given token after temperature; NaN where the
    engine gave none. `greedy_tokens`: int32 [num_scored], the engine's most probable token there.
    """

    logps: NDArray[np.float32]
    greedy_tokens: NDArray[np.int32]
    weight_version: int
    temperature: float


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One version of the weights in the target's checkpoint format: the file and its version."""

    path: Path
    weight_version: int


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine a measurement was made on."""

    cpu: str
    num_cores: int
    memory_gib: float
    gpus: tuple[str, ...] = ()
    cpu_features: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Server:
    """A server that ran already when it was asked: all that it says about itself. Nothing proves which bytes it loaded."""

    url: str
    model: str
    software: Literal["vllm", "llamacpp"]
    version: str
    """Of the software, `unknown` where the server does not say it."""
    max_model_len: int | None
    """Longest prompt + response it takes, in tokens; None where it does not say it."""
    is_local: bool
    """Whether it runs on the machine that asked."""
