"""GGUF headers read without trust, artifacts whose weights are a GGUF file, and the tokenizer that the file carries."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from deploy_targets.artifact import PROBES_FILE, SamplingRecord, check_artifact, write_manifest
from deploy_targets.errors import ArtifactError
from deploy_targets.gguf_file import BLOCKS, GGUF_FILE, read_gguf
from deploy_targets.profile import load_profile
from deploy_targets.types import WEIGHTS_FILE
from tests.conftest import TinyModels
from tests.models import tiny_model

llama_cpp = pytest.importorskip("llama_cpp")
gguf = pytest.importorskip("gguf")

from deploy_targets.quantizers.gguf_metadata import SPLITS  # noqa: E402
from tests.unit.deploy_targets.test_gguf_quantizer import write  # noqa: E402


@pytest.fixture(scope="module")
def file(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tiny_models("qwen3"), "Q4_K_M", tmp_path_factory.mktemp("gguf") / GGUF_FILE)


def damaged(file: Path, folder: Path, at: int, data: bytes) -> Path:
    content = bytearray(file.read_bytes())
    content[at : at + len(data)] = data
    path = folder / GGUF_FILE
    path.write_bytes(content)
    return path


def test_the_header_says_what_ggufs_own_reader_says(file: Path) -> None:
    header, reader = read_gguf(file), gguf.GGUFReader(file)
    expected = {t.name: (t.tensor_type.name, tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes) for t in reader.tensors}
    assert header.tensors == expected
    assert header.metadata["general.architecture"] == "qwen3"
    assert header.metadata["qwen3.block_count"] == 2
    assert set(header.metadata) == {name for name in reader.fields if not name.startswith("GGUF.")}


def test_every_kind_of_damage_is_said(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    end = min(start for _, _, start, _ in read_gguf(file).tensors.values())
    info = data.index(b"blk.0.attn_k.weight") + len(b"blk.0.attn_k.weight")  # dimensions, sizes, type, offset follow
    for at, changed, fragment in (
        (0, b"GGML", "does not start with the letters GGUF"),
        (4, struct.pack("<I", 2), "version 2"),
        (8, struct.pack("<Q", 1 << 40), "tensors"),
        (16, struct.pack("<Q", 1 << 40), "metadata entries"),
        (24, struct.pack("<Q", 1 << 62), "truncated"),
        (info, struct.pack("<I", 5), "5 dimensions"),
        (info + 4, struct.pack("<Q", 1 << 60), "a dimension of"),
        (info + 4, struct.pack("<Q", 33), "no whole blocks"),
        (info + 20, struct.pack("<I", 77), "unknown or unused ggml type 77"),
        (info + 24, struct.pack("<Q", 32), "overlaps or is not aligned"),
        (info + 24, struct.pack("<Q", 1 << 40), "beyond the end"),
        (data.index(b"blk.0.attn_k.weight"), b"blk.0.attn_q.weight", "stands twice"),
    ):
        with pytest.raises(ArtifactError, match=fragment) as raised:
            read_gguf(damaged(file, tmp_path, at, changed))
        assert GGUF_FILE in str(raised.value)
    path = tmp_path / GGUF_FILE
    for length in (0, 3, 4, 20, end // 2, end - 33, end, len(data) - 33):
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError, match="not a GGUF file"):
            read_gguf(path)
    with pytest.raises(ArtifactError, match=r"nowhere\.gguf: cannot be read"):
        read_gguf(tmp_path / "nowhere.gguf")


def test_no_random_damage_hangs_or_reaches_beyond_the_file(file: Path, tmp_path: Path) -> None:
    size = file.stat().st_size
    end = min(start for _, _, start, _ in read_gguf(file).tensors.values())
    rng, num_refused = np.random.default_rng(0), 0
    for _ in range(400):
        path = damaged(file, tmp_path, int(rng.integers(0, end - 4)), rng.bytes(4))
        try:
            tensors = read_gguf(path).tensors
        except ArtifactError:
            num_refused += 1
        else:
            assert all(0 <= start <= start + length <= size for _, _, start, length in tensors.values())
    assert num_refused > 50


def test_an_artifact_names_the_tensor_that_was_changed(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / GGUF_FILE).write_bytes(file.read_bytes())
    (folder / PROBES_FILE).write_bytes(b"probes")
    sealed = {
        "profile": load_profile("q4_k_m-llamacpp"), "weight_version": 1, "source_model": "tiny", "floor": 0.0, "tolerance": 0.0,
        "sampling": SamplingRecord(max_tokens=4, stop_token_ids=()),
    }  # fmt: skip
    manifest = write_manifest(folder, **sealed)  # type: ignore[arg-type]
    assert set(manifest.tensors) == set(read_gguf(file).tensors)
    assert check_artifact(folder) == manifest
    _, _, start, length = read_gguf(file).tensors["blk.1.ffn_up.weight"]
    damaged(file, folder, start + length // 2, b"\x55\xaa")
    with pytest.raises(ArtifactError, match=r"model\.gguf: tensor 'blk\.1\.ffn_up\.weight' was changed"):
        check_artifact(folder)
    (folder / WEIGHTS_FILE).write_bytes(b"more")
    with pytest.raises(ArtifactError, match=r"model\.gguf: is a second file of weights"):
        write_manifest(folder, **sealed)  # type: ignore[arg-type]


TEXT = "It's 12345 + 67 = 12412; we'll see... naïve café ¿qué? 你好\n\n  def f(x):\n\treturn x  # ok\r\n"


def bpe_model(folder: Path, pre_tokenizer: object) -> Path:
    """A tiny model under a byte-level BPE tokenizer trained on a few sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, "we see that it is 12 and the return of the café we see"] * 4, trainer)
    tiny_model("qwen3", folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def stored_tokens(model_dir: Path, out: Path, vocab_size: int, text: str) -> list[int]:
    """The token ids that llama.cpp splits `text` into, by the tokenizer in the file alone."""
    config = json.loads((model_dir / "config.json").read_text("utf-8"))
    writer = gguf.GGUFWriter(out, "qwen3")
    from deploy_targets.quantizers.gguf_metadata import add_metadata

    add_metadata(writer, {**config, "vocab_size": vocab_size}, gguf.LlamaFileType.ALL_F32, model_dir)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    loaded = llama_cpp.Llama(str(out), vocab_only=True, verbose=False)
    try:
        tokens: list[int] = loaded.tokenize(text.encode(), add_bos=False, special=False)
        assert loaded.detokenize(tokens).decode() == text
        return tokens
    finally:
        loaded.close()


@pytest.mark.parametrize("kind", ["gpt-2", *SPLITS.values()])
def test_llama_cpp_splits_text_as_the_models_tokenizer_does(kind: str, tmp_path: Path) -> None:
    regex = {name: pattern for pattern, name in SPLITS.items()}.get(kind)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex is None)
    split = byte_level if regex is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), byte_level])
    model_dir = bpe_model(tmp_path / "model", split)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokens = stored_tokens(model_dir, tmp_path / GGUF_FILE, tokenizer.get_vocab_size() + 5, TEXT)
    assert tokens == tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert len(tokens) < len(TEXT.encode())


def test_a_tokenizer_without_an_equal_leaves_token_ids_alone(tmp_path: Path) -> None:
    model_dir = bpe_model(tmp_path / "model", pre_tokenizers.Whitespace())
    path = write(model_dir, "Q8_0", tmp_path / GGUF_FILE)
    assert read_gguf(path).metadata["tokenizer.ggml.model"] == "no_vocab"
    assert read_gguf(path).metadata["qwen3.vocab_size"] == 36
    (model_dir / "tokenizer.json").write_text('{"model": 3}', "utf-8")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        write(model_dir, "Q8_0", tmp_path / GGUF_FILE)


def test_blocks_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    sizes = {int(kind): (kind.name, *size) for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {index: sizes[index] for index in BLOCKS} == BLOCKS
