"""The llama.cpp engine: what the contract suite cannot say for all engines alike."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from deploy_targets.errors import ArtifactError, EngineError, ProfileError
from deploy_targets.gguf_file import GGUF_FILE
from deploy_targets.types import WEIGHTS_FILE, Sampling, TokenSequence, WeightFile
from tests.conftest import TinyModels

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("gguf")

from deploy_targets.engines.llamacpp import LlamaCppEngine  # noqa: E402
from deploy_targets.engines.llamacpp_context import Context, passes  # noqa: E402
from tests.unit.deploy_targets.test_gguf_quantizer import LLAMA3, quantizer, write  # noqa: E402

OPTIONS: dict[str, Any] = {"max_model_len": 64, "num_threads": 1, "max_batch_size": 8, "max_batch_tokens": 64}
PROMPTS = [[3 + (7 * i + j) % 33 for j in range(1 + 3 * i)] for i in range(7)]


def artifact(model_dir: Path, folder: Path, name: str) -> Path:
    folder.mkdir()
    write(model_dir, name, folder / GGUF_FILE)
    quantizer(model_dir, name).scaffold(model_dir, folder)
    return folder


def engine_of(folder: Path, **options: object) -> LlamaCppEngine:
    return LlamaCppEngine(folder, {**OPTIONS, **options}, 1)


@pytest.fixture(scope="module")
def folder(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artifact(tiny_models("qwen3"), tmp_path_factory.mktemp("gguf") / "served", "Q8_0")


def sequences(model_len: int = 40) -> list[TokenSequence]:
    return [TokenSequence((*prompt, *[5 + (i * 11) % 30 for i in range(model_len - len(prompt))]), len(prompt)) for prompt in PROMPTS]


def logps(engine: LlamaCppEngine) -> np.ndarray:
    return np.concatenate([score.logps for score in engine.score(sequences())])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("qwen3", {}),
        ("qwen2", {"tied": True}),
        ("llama", {}),
        ("llama", {"extra_config": {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}}),
        ("qwen3", {"extra_config": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}}}),
    ],
)
def test_in_float32_the_model_is_that_of_transformers(
    family: str, options: dict[str, Any], tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Nothing is rounded here, so that a wrong name, order of rows, norm or frequency shows in full."""
    model_dir = tiny_models(family, **options)  # type: ignore[arg-type]
    engine = engine_of(artifact(model_dir, tmp_path / "served", "F32"), kv_cache_dtype="f32")
    try:
        found = logps(engine)
    finally:
        engine.close()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    expected = []
    with torch.no_grad():
        for sequence in sequences():
            tokens = torch.tensor([sequence.tokens])
            rows = torch.log_softmax(model(tokens).logits[0, sequence.prompt_len - 1 : -1], dim=-1)
            expected.append(rows.gather(1, tokens[0, sequence.prompt_len :, None])[:, 0].numpy())
    np.testing.assert_allclose(found, np.concatenate(expected), rtol=0, atol=1e-4)


def test_batches_slots_and_threads_change_no_token_in_float32(tiny_models: TinyModels, tmp_path: Path) -> None:
    served = artifact(tiny_models("qwen3"), tmp_path / "served", "F32")
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    sampling = Sampling(max_tokens=30, seed=4, stop_token_ids=(2, 5, 9))
    answers = []
    for options in ({}, {"max_batch_size": 1}, {"max_batch_size": 32, "num_threads": 2}, {"num_threads": 2, "threads_per_batch": 2}):
        engine = engine_of(served, kv_cache_dtype="f32", **options)
        try:
            answers.append(engine.generate(prompts, sampling))
            scores = engine.score([g.sequence for g in answers[-1]])
        finally:
            engine.close()
        for generation, score in zip(answers[-1], scores, strict=True):
            np.testing.assert_allclose(generation.logps, score.logps, rtol=0, atol=1e-4)
    assert len({len(generation.tokens) for generation in answers[0]}) > 3, "responses of one length move no slot"
    for other in answers[1:]:
        for first, second in zip(answers[0], other, strict=True):
            np.testing.assert_array_equal(first.tokens, second.tokens)
            np.testing.assert_allclose(first.logps, second.logps, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{"flash_attention": True}, {"kv_cache_dtype": "q8_0", "flash_attention": True}, {"kv_cache_dtype": "bf16"}, {"kv_cache_dtype": "f32"}],
)
def test_other_caches_and_attention_change_little(folder: Path, options: dict[str, Any]) -> None:
    reference, other = engine_of(folder), engine_of(folder, **options)
    try:
        gap = np.abs(logps(reference) - logps(other))
        assert 0 < gap.max() < 0.2
    finally:
        reference.close()
        other.close()


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"kv_cache_dtype": "q8_0"}, "needs flash_attention = true"),
        ({"kv_cache_dtype": "q3"}, "kv_cache_dtype"),
        ({"max_batch_size": 257}, "max_batch_size"),
        ({"top_k": 40}, "top_k: unknown key"),
    ],
)
def test_options_that_cannot_be_are_refused(folder: Path, options: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ProfileError) as raised:
        engine_of(folder, **options)
    assert fragment in str(raised.value)


def test_the_high_level_api_of_llama_cpp_serves_the_artifact(folder: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    """The native consumer, which reads the file alone: same greedy tokens, and text in and out by the tokenizer in the file."""
    engine = engine_of(folder)
    prompt = [10, 11, 5, 12, 15]
    try:
        (ours,) = engine.generate([prompt], Sampling(max_tokens=8, temperature=0))
    finally:
        engine.close()
    theirs = llama_cpp.Llama(str(folder / GGUF_FILE), n_ctx=64, n_threads=1, verbose=False)
    try:
        text = "12+34=46, ab"
        tokens = theirs.tokenize(text.encode(), add_bos=False, special=False)
        vocabulary = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
        assert tokens == [vocabulary[character] for character in text]
        assert theirs.detokenize(tokens).decode() == text
        assert theirs.token_eos() == 2
        stream = theirs.generate(prompt, temp=0.0, repeat_penalty=1.0)
        assert [next(stream) for _ in range(8)] == ours.tokens.tolist()
        answer = theirs.create_completion("12+34=", max_tokens=4, temperature=0.0)
        assert answer["usage"]["completion_tokens"] <= 4
    finally:
        theirs.close()


def test_a_file_with_other_metadata_is_refused_and_changes_nothing(folder: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    other = tiny_models("qwen3", extra_config={"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}})
    engine = engine_of(folder)
    try:
        before = logps(engine)
        with pytest.raises(EngineError, match=r"qwen3\.rope\.freq_base"):
            engine.update(WeightFile(write(other, "Q8_0", tmp_path / "other.gguf"), 2))
        assert engine.weight_version == 1
        np.testing.assert_array_equal(logps(engine), before)
    finally:
        engine.close()
        engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.score(sequences())


class CountedContext(Context):
    """Counts the contexts that are open; making one fails where `outcomes` says so, for the next ones in order."""

    num_open, most_open = 0, 0
    outcomes: list[bool] = []

    def __init__(self, *arguments: Any) -> None:
        if CountedContext.outcomes and not CountedContext.outcomes.pop(0):
            raise EngineError("no memory for a context")
        super().__init__(*arguments)
        CountedContext.num_open += 1
        CountedContext.most_open = max(CountedContext.most_open, CountedContext.num_open)

    def close(self) -> None:
        CountedContext.num_open -= bool(self.pointer)
        super().close()


@pytest.fixture
def _counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy_targets.engines.llamacpp.Context", CountedContext)
    for name, value in {"num_open": 0, "most_open": 0, "outcomes": []}.items():
        monkeypatch.setattr(CountedContext, name, value)


@pytest.mark.usefixtures("_counted")
def test_an_update_holds_one_set_of_caches(folder: Path) -> None:
    engine = engine_of(folder, num_threads=3)
    before = logps(engine)
    assert engine.update(WeightFile(folder / GGUF_FILE, 2)) == 2
    np.testing.assert_array_equal(logps(engine), before)
    assert (CountedContext.num_open, CountedContext.most_open) == (3, 3)
    engine.close()
    assert CountedContext.num_open == 0


@pytest.mark.usefixtures("_counted")
def test_an_update_without_memory_for_its_caches_leaves_the_old_version_in_service(folder: Path) -> None:
    engine = engine_of(folder, num_threads=3)
    before = logps(engine)
    CountedContext.outcomes += [True, False]
    with pytest.raises(EngineError, match="no memory"):
        engine.update(WeightFile(folder / GGUF_FILE, 2))
    assert (engine.weight_version, CountedContext.num_open) == (1, 3)
    np.testing.assert_array_equal(logps(engine), before)
    CountedContext.outcomes += [True, False, True, False]
    with pytest.raises(EngineError, match="no memory"):
        engine.update(WeightFile(folder / GGUF_FILE, 2))
    assert CountedContext.num_open == 0
    with pytest.raises(EngineError, match="closed"):
        engine.score(sequences())


def test_what_llama_cpp_refuses_is_an_engine_error_with_its_words(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = bytearray((folder / GGUF_FILE).read_bytes())
    at = data.index(b"qwen3.attention.head_count_kv") + len(b"qwen3.attention.head_count_kv") + 4
    data[at : at + 4] = struct.pack("<I", 3)
    (tmp_path / GGUF_FILE).write_bytes(data)
    with pytest.raises(EngineError, match="Its last messages"):
        engine_of(tmp_path)


def test_a_config_of_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 40}), "utf-8")
    with pytest.raises(ArtifactError, match="vocab_size 40"):
        engine_of(tmp_path)


def test_a_file_without_a_folder_around_it_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    """As other tools leave it, without config.json: vocabulary and longest sequence are those of its metadata."""
    (tmp_path / GGUF_FILE).write_bytes((folder / GGUF_FILE).read_bytes())
    alone, whole = engine_of(tmp_path, max_model_len=5000, max_batch_size=1), engine_of(folder, max_model_len=5000, max_batch_size=1)
    assert (alone._max_model_len, alone._vocab_size) == (whole._max_model_len, whole._vocab_size) == (512, 36)
    np.testing.assert_array_equal(logps(alone), logps(whole))
    alone.close()
    whole.close()


def test_a_message_of_llama_cpp_never_reaches_the_terminal(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = engine_of(folder)
    engine.generate(PROMPTS, Sampling(max_tokens=2))
    engine.close()
    assert capfd.readouterr() == ("", "")


def test_passes_hold_whole_sequences_within_tokens_and_slots() -> None:
    assert passes([3, 3, 3, 3], 6, 8) == [range(0, 2), range(2, 4)]
    assert passes([1, 1, 1, 1, 1], 100, 2) == [range(0, 2), range(2, 4), range(4, 5)]
    assert passes([9, 1, 9], 4, 8) == [range(0, 1), range(1, 2), range(2, 3)]
    assert passes([], 4, 8) == []


def test_weights_change_what_is_served(folder: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    tensors = load_file(tiny_models("qwen3") / WEIGHTS_FILE)
    made = quantizer(tiny_models("qwen3"), "Q8_0")
    engine = engine_of(folder)
    try:
        before = logps(engine)
        for name in tensors:
            moved = {**tensors, name: tensors[name] * 1.5}
            made.write(tmp_path / "moved.gguf", made.quantize(moved.items()), tiny_models("qwen3"))
            engine.update(WeightFile(tmp_path / "moved.gguf", 2))
            assert np.abs(logps(engine) - before).max() > 1e-3, name
    finally:
        engine.close()
