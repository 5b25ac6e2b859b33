"""What the learner, and a model that is only read, say about tokens: against plain transformers, in both precisions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deploy_targets.errors import UsageError
from deploy_targets.types import Sampling
from hetero_rl.config import LearnerConfig
from hetero_rl.learner.compute import Float32Arithmetic
from hetero_rl.learner.describe import NUM_TOP, Description
from hetero_rl.learner.generate import generate_responses
from hetero_rl.learner.model import load_causal_lm
from hetero_rl.learner.reader import ReadOnlyModel
from tests.conftest import TinyModels
from tests.learners import MakeLearner, as_sequences, sequences
from tests.models import EOS_ID, Family

CPU = torch.device("cpu")
BATCH = as_sequences(sequences())


def expected_in_float32(model_dir: Path) -> list[Description]:
    """By a model that really is in float32, one sequence at a time."""
    lm, made = load_causal_lm(model_dir).float(), []
    for sequence in BATCH:
        with torch.no_grad():
            logp = lm(torch.tensor([sequence.tokens])).logits[0, sequence.prompt_len - 1 : -1].log_softmax(-1)
        top = logp.topk(NUM_TOP)
        given = logp[torch.arange(len(logp)), torch.tensor(sequence.tokens[sequence.prompt_len :])].numpy()
        entropy = torch.distributions.Categorical(logits=logp).entropy()
        made.append(Description(given, given, entropy.numpy(), logp.argmax(-1).numpy(), top.indices.numpy(), top.values.numpy()))
    return made


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "phi3", "qwen3_moe"])
def test_float32_arithmetic_is_that_of_a_float32_model(family: Family, tiny_models: TinyModels) -> None:
    """Bit for bit, for families with fused layers and experts too; the weights stay what they are."""
    model_dir = tiny_models(family)
    lm, exact = load_causal_lm(model_dir), load_causal_lm(model_dir).float()
    ids = torch.tensor([s.tokens[:4] for s in BATCH if len(s.tokens) >= 4])
    with torch.no_grad():
        with Float32Arithmetic():
            found = lm(input_ids=ids, use_cache=False).logits
        expected, coarse = (model(input_ids=ids, use_cache=False).logits.float() for model in (exact, lm))
    assert torch.equal(found, expected)
    assert (coarse - expected).abs().max() > 1e-3
    assert {parameter.dtype for parameter in lm.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("options", [{"compute_dtype": "float32"}, {"compute_dtype": "bfloat16"}, {"logit_chunk_elements": 1024}])
def test_descriptions_of_the_learner(options: dict[str, object], make_learner: MakeLearner, model_dir: Path) -> None:
    learner = make_learner(tokens_per_micro_batch=64, **options)
    found, scores = learner.describe(BATCH), learner.score(BATCH)
    tolerance = 1e-4 if learner.compute_dtype == "float32" else 0.05
    for said, score, expected in zip(found, scores, expected_in_float32(model_dir), strict=True):
        np.testing.assert_array_equal(said.logps, score.logps)
        np.testing.assert_array_equal(said.greedy_tokens, score.greedy_tokens)
        np.testing.assert_allclose(said.logps_fp32, expected.logps_fp32, atol=1e-4)
        np.testing.assert_allclose(said.entropy, expected.entropy, atol=tolerance)
        np.testing.assert_allclose(said.top_logps, expected.top_logps, atol=tolerance)
        assert said.top_ids.shape == (len(score.logps), NUM_TOP)
        np.testing.assert_array_equal(said.top_ids[:, 0], said.greedy_tokens)
        if learner.compute_dtype == "float32":
            np.testing.assert_array_equal(said.top_ids, expected.top_ids)
            np.testing.assert_array_equal(said.logps_fp32, said.logps)
    if learner.compute_dtype == "bfloat16":
        assert max(np.abs(said.logps - said.logps_fp32).max() for said in found) > 1e-3


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_descriptions_under_zero(zero_stage: int, make_learner: MakeLearner, model_dir: Path) -> None:
    learner = make_learner(zero_stage=zero_stage, compute_dtype="bfloat16")
    for said, expected in zip(learner.describe(BATCH), expected_in_float32(model_dir), strict=True):
        np.testing.assert_allclose(said.logps_fp32, expected.logps_fp32, atol=1e-4)
    learner.update(sequences(), 0.0)  # the float32 pass has left DeepSpeed's hooks in place
    after = learner.describe(BATCH)
    assert max(np.abs(said.logps - said.logps_fp32).max() for said in after) < 0.1
    again = learner.score(BATCH)
    assert max(np.abs(said.logps - score.logps).max() for said, score in zip(after, again, strict=True)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_descriptions_of_a_model_that_is_only_read(dtype: torch.dtype, model_dir: Path, tmp_path: Path) -> None:
    """Stored in 16 bits other than bf16, or in 32, it is computed with in float32."""
    load_causal_lm(model_dir).to(dtype).save_pretrained(tmp_path)
    model = ReadOnlyModel(tmp_path, LearnerConfig(compute_dtype="bfloat16"), temperature=1.0)
    assert model.compute_dtype == ("bfloat16" if dtype == torch.bfloat16 else "float32")
    for said, expected in zip(model.describe(BATCH), expected_in_float32(model_dir), strict=True):
        # The tiny model's weights are bf16 numbers; float16 holds those of its size but for the smallest.
        np.testing.assert_allclose(said.logps_fp32, expected.logps_fp32, atol=1e-3 if dtype == torch.float16 else 1e-4)


def test_a_model_whose_logits_are_more_than_the_heads_product(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3ForCausalLM

    plain = Qwen3ForCausalLM.forward

    def capped(self: Qwen3ForCausalLM, *args: object, **kwargs: object) -> object:
        out = plain(self, *args, **kwargs)
        out.logits = 0.1 * torch.tanh(out.logits)
        return out

    monkeypatch.setattr(Qwen3ForCausalLM, "forward", capped)
    with pytest.raises(UsageError, match="changes its logits"):
        ReadOnlyModel(model_dir, LearnerConfig(), temperature=1.0)


def test_samples_follow_the_whole_distribution(model_dir: Path) -> None:
    """No top-k or top-p of transformers' defaults: first tokens of 4,000 samples against the model's probabilities."""
    lm = load_causal_lm(model_dir).float()
    prompt = (1, 5, 9)
    drawn = [tokens[0] for tokens in generate_responses(lm, [prompt] * 4000, Sampling(1, temperature=1.5, seed=3), 4096, CPU)]
    with torch.no_grad():
        p = (lm(torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1).double().numpy()
    counts = np.bincount(drawn, minlength=len(p))
    chi2 = float(((counts - 4000 * p) ** 2 / (4000 * p)).sum())
    assert chi2 < len(p) - 1 + 4 * np.sqrt(2 * (len(p) - 1))


def test_samples_follow_from_the_seed_and_stop(model_dir: Path) -> None:
    lm = load_causal_lm(model_dir)
    prompts = [(1, 5, 9), (1,), (4, 4, 4, 4, 4)] * 8
    first, again, other = (generate_responses(lm, prompts, Sampling(30, 1.0, seed, (EOS_ID,)), 200, CPU) for seed in (0, 0, 1))
    assert first == again != other
    assert all(EOS_ID not in tokens[:-1] for tokens in first)
    assert {len(tokens) for tokens in first} >= {30}
    assert any(tokens[-1] == EOS_ID for tokens in first)
