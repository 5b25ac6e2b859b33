"""What INT4 costs the demo model by how its values are found, at equal bits and group size; and the time that finding them takes."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.common import Measurement, arguments, in_turns, measurement, summary, write
from deploy_targets.profile import SchemeSpec
from deploy_targets.quantizers.compressed_tensors import CompressedTensorsQuantizer
from deploy_targets.types import WEIGHTS_FILE
from hetero_rl.learner.fake_quant import TwinLayer, add_twin, twin
from hetero_rl.learner.gram import input_grams
from hetero_rl.model import load_tokenizer, resolve_model, stop_tokens
from hetero_rl.publish import NUM_CALIBRATION_SEQUENCES
from hetero_rl.tasks import load_task
from hetero_rl.tasks.base import Task
from hetero_rl.tasks.config import ArithmeticConfig

GROUP_SIZE = 32
BASELINE = "rtn"
SCHEMES: dict[str, dict[str, Any]] = {
    "rtn": {},
    "rtn_mse": {"clip": "mse"},
    "rtn_asymmetric": {"symmetric": False},
    "rtn_asymmetric_mse": {"symmetric": False, "clip": "mse"},
    "gptq": {"algorithm": "gptq"},
    "gptq_mse": {"algorithm": "gptq", "clip": "mse"},
    "gptq_act_order": {"algorithm": "gptq", "act_order": True},
    "gptq_asymmetric_act_order": {"algorithm": "gptq", "symmetric": False, "act_order": True},
    "awq": {"algorithm": "awq"},
    "awq_mse": {"algorithm": "awq", "clip": "mse"},
    "awq_asymmetric": {"algorithm": "awq", "symmetric": False},
    "awq_asymmetric_mse": {"algorithm": "awq", "symmetric": False, "clip": "mse"},
}
MAX_TOKENS, TOKENS_PER_BATCH = 8, 8192


@dataclass(frozen=True, slots=True)
class Drawn:
    """Prompts with the responses that the bf16 model sampled to them; `prompt_lens` are the lengths of the prompts."""

    sequences: list[list[int]]
    prompt_lens: list[int]


def draw(lm: Any, task: Task, stops: Sequence[int], count: int, seed: int) -> Drawn:
    """Responses to `count` training problems, sampled at temperature 1."""
    torch.manual_seed(seed)
    sequences, lengths = [], []
    by_length: dict[int, list[list[int]]] = {}
    for problem in task.train_problems(seed, count):
        prompt = list(task.encode_prompt(problem))
        by_length.setdefault(len(prompt), []).append(prompt)
    for length, prompts in sorted(by_length.items()):
        ids = torch.tensor(prompts)
        out = lm.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=True, top_k=0,
            eos_token_id=list(stops) or None, pad_token_id=0,
        )  # fmt: skip
        for row in out.tolist():
            end = next((place + 1 for place in range(length, len(row)) if row[place] in stops), len(row))
            sequences.append(row[:end])
            lengths.append(length)
    return Drawn(sequences, lengths)


def response_logps(lm: Any, drawn: Drawn) -> Tensor:
    """Log-probs of the whole vocabulary at every response token: float32 [num_tokens, vocab_size]."""
    longest = max(map(len, drawn.sequences))
    ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in drawn.sequences])
    with torch.no_grad():
        logps = torch.log_softmax(lm(ids, use_cache=False).logits.float(), dim=-1)
    rows = zip(logps, drawn.sequences, drawn.prompt_lens, strict=True)
    return torch.cat([row[prompt_len - 1 : len(tokens) - 1] for row, tokens, prompt_len in rows])


@contextmanager
def rounded_by(twins: list[TwinLayer], quantizer: CompressedTensorsQuantizer) -> Iterator[None]:
    """Within the block the model computes with what `quantizer` makes of its weights."""
    for layer in twins:
        layer.adopt(layer.weight_name, quantizer)
    with twin(twins):
        yield


def twin_kl(lm: Any, twins: list[TwinLayer], quantizer: CompressedTensorsQuantizer, calibration: Drawn, probe: Drawn) -> float:
    """Mean KL(model || its rounded twin) per token of the responses in `probe`, nats."""
    if quantizer.needs_calibration:
        quantizer.calibrate(lm.named_parameters(), input_grams(lm, twins, calibration.sequences, TOKENS_PER_BATCH))
    plain = response_logps(lm, probe)
    with rounded_by(twins, quantizer):
        served = response_logps(lm, probe)
    return float((plain.exp() * (plain - served)).sum(-1).mean())


def quantizer_for(model_dir: Path, keys: Mapping[str, Any]) -> CompressedTensorsQuantizer:
    scheme = SchemeSpec(quantizer="compressed-tensors", name="W4A16", bits=4, group_size=GROUP_SIZE, **keys)
    return CompressedTensorsQuantizer(scheme, json.loads((model_dir / "config.json").read_text("utf-8")))


def quality(lm: Any, model_dir: Path, num_probes: int, rounds: int) -> dict[str, list[float]]:
    """Scheme -> KL by round; every round draws its own calibration and probe responses, the same for all schemes."""
    tokenizer = load_tokenizer(model_dir)
    task, stops = load_task(ArithmeticConfig(type="arithmetic", digits=3), tokenizer, 0), stop_tokens(model_dir, tokenizer)
    twins = add_twin(lm, quantizer_for(model_dir, {}))
    found: dict[str, list[float]] = {name: [] for name in SCHEMES}
    for seed in range(rounds):
        calibration = draw(lm, task, stops, NUM_CALIBRATION_SEQUENCES, 1000 + seed)
        probe = draw(lm, task, stops, num_probes, 2000 + seed)
        for name, keys in SCHEMES.items():
            found[name].append(twin_kl(lm, twins, quantizer_for(model_dir, keys), calibration, probe))
    return found


def seconds(model_dir: Path, rounds: int) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """Scheme -> seconds to calibrate and to quantize the model of `model_dir`; seconds to gather the Gram matrices of 64 x 64 tokens."""
    from safetensors.torch import load_file

    from hetero_rl.learner.model import load_causal_lm

    lm, tensors = load_causal_lm(model_dir), load_file(model_dir / WEIGHTS_FILE)
    twins = add_twin(lm, quantizer_for(model_dir, {}))
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(3, 36, (NUM_CALIBRATION_SEQUENCES, 65), generator=generator).tolist()
    grams: dict[str, Tensor] = {}

    def gather() -> float:
        start = time.perf_counter()
        grams.update(input_grams(lm, twins, sequences, TOKENS_PER_BATCH))
        return time.perf_counter() - start

    def timed(keys: Mapping[str, Any]) -> dict[str, float]:
        quantizer = quantizer_for(model_dir, keys)
        start = time.perf_counter()
        if quantizer.needs_calibration:
            quantizer.calibrate(tensors.items(), grams)
        calibrated = time.perf_counter()
        for _ in quantizer.quantize(tensors.items()):
            pass
        return {"calibrate": calibrated - start, "quantize": time.perf_counter() - calibrated}

    gathered = [gather() for _ in range(rounds + 1)][1:]
    runs = in_turns({name: lambda keys=keys: timed(keys) for name, keys in SCHEMES.items()}, rounds, warmups=0)
    return {name: {key: [run[key] for run in done] for key in ("calibrate", "quantize")} for name, done in runs.items()}, gathered


def case(name: str, kls: Mapping[str, list[float]], times: Mapping[str, list[float]], millions: float) -> Measurement:
    """KL of one scheme against round-to-nearest, and its milliseconds per 100M parameters."""
    spread = {
        f"{key}_ms_per_100m": dict(zip(("median", "low", "high"), summary([1e5 * s / millions for s in runs]), strict=True))
        for key, runs in times.items()
    }
    return measurement(
        kls[name], "nats per token, KL(bf16 || INT4)", baseline=kls[BASELINE], inverse=True,
        ratio_of="KL of symmetric absmax round-to-nearest / this one's", **spread,
    )  # fmt: skip


def main() -> None:
    from hetero_rl.learner.model import load_causal_lm

    options = arguments("quantizers", __doc__)
    torch.set_num_threads(options.threads)
    model_dir = resolve_model("demo")
    num_probes = 32 if options.quick else 512
    kls = quality(load_causal_lm(model_dir), model_dir, num_probes, options.rounds)
    with tempfile.TemporaryDirectory() as temporary:
        timed_on = models.tiny(Path(temporary) / "m", quick=True) if options.quick else models.medium(Path(temporary) / "m")
        times, gathered = seconds(timed_on, 2)
        sizes = models.describe(timed_on)
    millions = sizes["num_parameters"] / 1e6
    settings = {
        "demo": models.describe(model_dir), "group_size": GROUP_SIZE, "calibration_sequences": NUM_CALIBRATION_SEQUENCES,
        "probe_prompts": num_probes, "seeds": list(range(options.rounds)), "timed_on": sizes,
        "gram_ms_per_100m_for_4096_tokens": [1e5 * s / millions for s in gathered],
    }  # fmt: skip
    write(options, {name: case(name, kls, times[name], millions) for name in SCHEMES}, "gptq_act_order", settings)


if __name__ == "__main__":
    main()
