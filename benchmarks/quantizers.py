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
from deploy_targets.quantizers.awq import output_error
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
        layer.adopt(layer.weight_name, quantizer, keep=True)
    with twin(twins):
        yield


def twin_kl(lm: Any, twins: list[TwinLayer], quantizer: CompressedTensorsQuantizer, probe: Drawn) -> float:
    """Mean KL(model || its rounded twin) per token of the responses in `probe`, nats."""
    plain = response_logps(lm, probe)
    with rounded_by(twins, quantizer):
        served = response_logps(lm, probe)
    return float((plain.exp() * (plain - served)).sum(-1).mean())


def layer_error(twins: list[TwinLayer], quantizer: CompressedTensorsQuantizer, grams: Mapping[str, Tensor]) -> float:
    """Mean over the layers of |E x|^2 / |W x|^2 on the inputs whose mean Gram matrices are `grams`; E is what rounding adds to W."""
    shares = []
    for layer in twins:
        weight, gram = layer.weight.detach().float(), grams[layer.weight_name]
        shares.append(output_error(quantizer.dequantized(layer.weight_name, weight) - weight, gram) / output_error(weight, gram))
    return sum(shares) / len(shares)


def quantizer_for(model_dir: Path, keys: Mapping[str, Any]) -> CompressedTensorsQuantizer:
    scheme = SchemeSpec(quantizer="compressed-tensors", name="W4A16", bits=4, group_size=GROUP_SIZE, **keys)
    return CompressedTensorsQuantizer(scheme, json.loads((model_dir / "config.json").read_text("utf-8")))


def quality(lm: Any, model_dir: Path, num_probes: int, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Scheme -> KL by round, and error of the layers by round, on the probes.

    Every round draws its own calibration and probe responses, the same for all schemes.
    """
    tokenizer = load_tokenizer(model_dir)
    task, stops = load_task(ArithmeticConfig(type="arithmetic", digits=3), tokenizer, 0), stop_tokens(model_dir, tokenizer)
    twins = add_twin(lm, quantizer_for(model_dir, {}))
    kls: dict[str, list[float]] = {name: [] for name in SCHEMES}
    errors: dict[str, list[float]] = {name: [] for name in SCHEMES}
    for seed in range(rounds):
        calibration = draw(lm, task, stops, NUM_CALIBRATION_SEQUENCES, 1000 + seed)
        probe = draw(lm, task, stops, num_probes, 2000 + seed)
        grams, unseen = (input_grams(lm, twins, drawn.sequences, TOKENS_PER_BATCH) for drawn in (calibration, probe))
        for name, keys in SCHEMES.items():
            quantizer = quantizer_for(model_dir, keys)
            if quantizer.needs_calibration:
                quantizer.calibrate(lm.named_parameters(), grams)
            kls[name].append(twin_kl(lm, twins, quantizer, probe))
            errors[name].append(layer_error(twins, quantizer, unseen))
    return kls, errors


def seconds(model_dir: Path, rounds: int) -> tuple[dict[str, dict[str, list[float]]], list[float]]:
    """Scheme -> seconds per 100M weights to calibrate and to quantize, on two layers of the model of `model_dir`.

    And the seconds that all of the model takes to gather the Gram matrices of 64 x 64 tokens.
    """
    from safetensors.torch import load_file

    from hetero_rl.learner.model import load_causal_lm

    lm = load_causal_lm(model_dir)
    tensors = {name: tensor for name, tensor in load_file(model_dir / WEIGHTS_FILE).items() if ".layers.0." in name or ".layers.1." in name}
    per_100m = 1e8 / sum(tensor.numel() for tensor in tensors.values())
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
            quantizer.calibrate(tensors.items(), {name: gram for name, gram in grams.items() if name in tensors})
        calibrated = time.perf_counter()
        for _ in quantizer.quantize(tensors.items()):
            pass
        return {"calibrate": per_100m * (calibrated - start), "quantize": per_100m * (time.perf_counter() - calibrated)}

    gathered = [gather() for _ in range(rounds + 1)][1:]
    runs = in_turns({name: lambda keys=keys: timed(keys) for name, keys in SCHEMES.items()}, rounds, warmups=0)
    return {name: {key: [run[key] for run in done] for key in ("calibrate", "quantize")} for name, done in runs.items()}, gathered


def spread(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(("median", "low", "high"), summary(values), strict=True))


def case(runs: list[float], baseline: list[float], errors: list[float], times: Mapping[str, list[float]]) -> Measurement:
    """KL of one scheme against round-to-nearest, the error of its layers, and its milliseconds per 100M parameters."""
    return measurement(
        runs, "nats per token, KL(bf16 || INT4)", baseline=baseline, inverse=True,
        ratio_of="KL of symmetric absmax round-to-nearest / this one's", layer_error=spread(errors),
        **{f"{key}_ms_per_100m": spread([1e3 * second for second in taken]) for key, taken in times.items()},
    )  # fmt: skip


def main() -> None:
    from hetero_rl.learner.model import load_causal_lm

    options = arguments("quantizers", __doc__)
    torch.set_num_threads(options.threads)
    model_dir = resolve_model("demo")
    num_probes = 32 if options.quick else 512
    kls, errors = quality(load_causal_lm(model_dir), model_dir, num_probes, options.rounds)
    with tempfile.TemporaryDirectory() as temporary:
        timed_on = models.tiny(Path(temporary) / "m", quick=True) if options.quick else models.medium(Path(temporary) / "m")
        times, gathered = seconds(timed_on, 2)
        sizes = models.describe(timed_on)
    settings = {
        "demo": models.describe(model_dir), "group_size": GROUP_SIZE, "calibration_sequences": NUM_CALIBRATION_SEQUENCES,
        "probe_prompts": num_probes, "seeds": list(range(options.rounds)), "timed_on": sizes,
        "gram_ms_for_4096_tokens": [1e3 * second for second in gathered],
    }  # fmt: skip
    cases = {name: case(kls[name], kls[BASELINE], errors[name], times[name]) for name in SCHEMES}
    write(options, cases, "gptq_act_order", settings)


if __name__ == "__main__":
    main()
