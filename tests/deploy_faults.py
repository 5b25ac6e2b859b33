"""What can be wrong with a deployment, each injected on purpose into a copy of an artifact or into the engine that serves it."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file

from deploy_targets.artifact import PROBES_FILE, Manifest, SamplingRecord, read_manifest, write_manifest
from deploy_targets.catalog import make_quantizer
from deploy_targets.fingerprint import write_fingerprint
from deploy_targets.gguf_file import GGUF_FILE, read_gguf
from deploy_targets.probes import ProbeSet, write_probes
from deploy_targets.profile import TargetProfile
from deploy_targets.protocols import Engine
from deploy_targets.types import WEIGHTS_FILE, Generation, Sampling, TokenScores, TokenSequence
from deploy_targets.weights_file import tensor_layout, weights_name, write_version

TOLERANCE = 0.03
"""Of the demo model on its task, whose gap is 0.01 by 4 bits on every engine."""
EOS = SamplingRecord(max_tokens=8, stop_token_ids=(2,))


def make_artifact(profile: TargetProfile, model_dir: Path, probes: ProbeSet, folder: Path, *, scaffold: bool = True) -> Manifest:
    """The model of `model_dir` for the target, with fingerprint and manifest, as an export leaves it.

    Without `scaffold` there is no graph of an ONNX target: nothing can serve it then.
    """
    quantizer = make_quantizer(profile, model_dir)
    folder.mkdir()
    tensors = load_file(model_dir / WEIGHTS_FILE)
    write_version(folder / weights_name(quantizer), quantizer, tensors.items(), model_dir, 4 * len(tensors) + 16)
    if scaffold:
        quantizer.scaffold(model_dir, folder)
    write_probes(folder / PROBES_FILE, probes)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    learned = ((name, tensor.float().numpy()) for name, tensor in tensors.items())
    config = json.loads((model_dir / "config.json").read_text())
    write_fingerprint(folder, profile, EOS, probes.temperature, config, shapes, learned)
    return write_manifest(
        folder,
        profile=profile,
        weight_version=probes.weight_version,
        source_model=model_dir.name,
        floor=0.0,
        tolerance=TOLERANCE,
        sampling=EOS,
    )


def reseal(folder: Path, **changed: Any) -> None:
    """Write the manifest anew, as whoever changed a file might: all hashes agree again."""
    old = read_manifest(folder)
    fields = ("profile", "weight_version", "source_model", "floor", "tolerance", "sampling", "final_gap", "task")
    write_manifest(folder, **{**{name: getattr(old, name) for name in fields}, **changed})


# Bytes of the artifact.


def flip_byte(folder: Path) -> None:
    """The high bits of one byte in the middle of the largest tensor of layer 1."""
    path = folder / (GGUF_FILE if (folder / GGUF_FILE).is_file() else WEIGHTS_FILE)
    layout = read_gguf(path).tensors if path.name == GGUF_FILE else tensor_layout(path)
    _, _, offset, length = max(
        (entry for name, entry in layout.items() if "norm" not in name and ".1." in name), key=lambda entry: entry[3]
    )
    place = offset + length // 2
    data = bytearray(path.read_bytes())
    data[place] ^= 0x50
    path.write_bytes(data)


def edit_gguf(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """`edit` name -> (bytes of each row, ggml type) of the GGUF file, and write it anew with the metadata it had."""
    from gguf import GGUFReader, GGUFValueType, GGUFWriter

    reader = GGUFReader(folder / GGUF_FILE)
    tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    edit(tensors)
    writer = GGUFWriter(folder / "new.gguf", reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)
    for name, (data, ggml_type) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(data), raw_dtype=ggml_type)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    del reader
    (folder / "new.gguf").replace(folder / GGUF_FILE)


def edit_tensors(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """`edit` the tensors of the weights file, whose places in the file stay what they are where names and shapes do."""
    path = folder / WEIGHTS_FILE
    tensors = load_file(path)
    before = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    edit(tensors)
    if before != {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}:
        save_file(tensors, path, {"format": "pt"})
        return
    data = bytearray(path.read_bytes())
    for name, (_, _, offset, length) in tensor_layout(path).items():
        data[offset : offset + length] = tensors[name].contiguous().flatten().view(tensor_bytes()).numpy().tobytes()
    path.write_bytes(data)


def tensor_bytes() -> Any:
    import torch

    return torch.uint8


def swap_scales(folder: Path) -> None:
    """The scales of the same matrix in layers 0 and 1."""

    def edit(tensors: dict[str, Any]) -> None:
        first = next(name for name in sorted(tensors) if "down_proj" in name and "scale" in name and ".0." in name)
        second = first.replace(".0.", ".1.")
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()

    edit_tensors(folder, edit)


def drop_bias(folder: Path) -> None:
    """One bias of layer 1 becomes zero."""

    def edit(tensors: dict[str, Any]) -> None:
        tensors[bias_of(tensors)].zero_()

    if (folder / GGUF_FILE).is_file():
        _, _, offset, length = (tensors := read_gguf(folder / GGUF_FILE).tensors)[bias_of(tensors)]
        data = (folder / GGUF_FILE).read_bytes()
        (folder / GGUF_FILE).write_bytes(data[:offset] + bytes(length) + data[offset + length :])
    else:
        edit_tensors(folder, edit)


def remove_bias(folder: Path) -> None:
    """One bias of layer 1 is not in the file."""
    edit_tensors(folder, lambda tensors: tensors.pop(bias_of(tensors)))


def bias_of(tensors: Mapping[str, Any]) -> str:
    return next(name for name in sorted(tensors) if name.endswith("bias") and ".1." in name)


def nan_in_expert(folder: Path) -> None:
    def edit(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.experts.2.up_proj.weight"][3, 4] = math.nan

    edit_tensors(folder, edit)


def add_zero_kv_scale(folder: Path) -> None:
    import torch

    edit_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.attn.k_scale": torch.zeros(1)}))


def untie(folder: Path) -> None:
    """An output head of its own, the embedding of the other end."""
    if (folder / GGUF_FILE).is_file():
        edit_gguf(
            folder,
            lambda tensors: tensors.update({"output.weight": (tensors["token_embd.weight"][0][::-1], *tensors["token_embd.weight"][1:])}),
        )
        return

    def edit(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()

    edit_tensors(folder, edit)
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))


def older_weights(folder: Path, profile: TargetProfile, model_dir: Path) -> None:
    """What was published one step before."""
    import torch

    generator = torch.Generator().manual_seed(0)
    quantizer = make_quantizer(profile, model_dir)
    tensors = {
        name: tensor + 0.05 * tensor.float().std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(model_dir / WEIGHTS_FILE).items()
    }
    stored = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    write_version(folder / weights_name(quantizer), quantizer, stored.items(), model_dir, 4 * len(tensors) + 16)


def quantize_head(folder: Path, profile: TargetProfile, model_dir: Path) -> None:
    """To 4 bits, where the scheme of `profile` leaves it alone, or gives it more."""
    if (folder / GGUF_FILE).is_file():
        edit_gguf(folder, quantize_gguf_head)
        return
    scheme = profile.scheme.model_copy(update={"ignore": ()})
    quantizer = make_quantizer(profile.model_copy(update={"scheme": scheme}), model_dir)
    tensors = load_file(model_dir / WEIGHTS_FILE)
    write_version(folder / WEIGHTS_FILE, quantizer, tensors.items(), model_dir, 4 * len(tensors) + 16)
    if (folder / "model.onnx").is_file():
        quantizer.scaffold(model_dir, folder)
        return
    manifest_config = json.loads((folder / "config.json").read_text())
    quantizer.scaffold(model_dir, folder)
    edit_json(
        folder / "config.json", lambda config: config["quantization_config"].update(ignore=manifest_config["quantization_config"]["ignore"])
    )


def quantize_gguf_head(tensors: dict[str, Any]) -> None:
    from gguf import GGMLQuantizationType, quants

    data, ggml_type = tensors["output.weight"]
    assert ggml_type != GGMLQuantizationType.Q4_0
    tensors["output.weight"] = quants.quantize(quants.dequantize(data, ggml_type), GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0


# Settings.


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text("utf-8"))
    edit(data)
    path.write_text(json.dumps(data), "utf-8")


def edit_graph(folder: Path, edit: Callable[[Any], None]) -> None:
    import onnx

    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    edit(model.graph)
    onnx.save(model, str(folder / "model.onnx"))


def wrong_group_size(folder: Path) -> None:
    def in_graph(graph: Any) -> None:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name == "block_size":
                    attribute.i = 64

    if (folder / "model.onnx").is_file():
        edit_graph(folder, in_graph)
    else:
        edit_json(
            folder / "config.json",
            lambda config: config["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=64),
        )


def edit_header(folder: Path, key: bytes, value: bytes) -> None:
    """Another number under `key` of a GGUF file's metadata, of four bytes behind the four of its type."""
    data = (folder / GGUF_FILE).read_bytes()
    place = data.index(key) + len(key) + 4
    (folder / GGUF_FILE).write_bytes(data[:place] + value + data[place + len(value) :])


def other_rope_theta(folder: Path) -> None:
    def in_graph(graph: Any) -> None:
        import onnx

        for tensor in graph.initializer:
            if tensor.name in ("cos_cache", "sin_cache"):
                num_positions, width = tensor.dims
                angles = np.arange(num_positions)[:, None] * 500000.0 ** (-np.arange(width) / width)
                table = np.cos(angles) if tensor.name == "cos_cache" else np.sin(angles)
                tensor.CopyFrom(onnx.numpy_helper.from_array(table.astype(np.float32), tensor.name))

    if (folder / "model.onnx").is_file():
        edit_graph(folder, in_graph)
    elif (folder / GGUF_FILE).is_file():
        edit_header(folder, b"rope.freq_base", struct.pack("<f", 500000.0))
    else:
        edit_json(folder / "config.json", lambda config: config["rope_parameters"].update(rope_theta=500000.0))


def other_eos(folder: Path) -> None:
    if (folder / GGUF_FILE).is_file():
        edit_header(folder, b"tokenizer.ggml.eos_token_id", struct.pack("<I", 5))
    for name in ("genai_config.json", "generation_config.json", "config.json"):
        if (folder / name).is_file():
            edit_json(folder / name, lambda config: config.get("model", config).update(eos_token_id=5))


def other_chat_template(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template="{{ messages[0].content }}"))


def swap_token_ids(folder: Path) -> None:
    def edit(tokenizer: dict[str, Any]) -> None:
        vocab = tokenizer["model"]["vocab"]
        one, other = sorted(vocab, key=vocab.__getitem__)[10:12]
        vocab[one], vocab[other] = vocab[other], vocab[one]

    if (folder / GGUF_FILE).is_file():
        swap_gguf_tokens(folder)
    else:
        edit_json(folder / "tokenizer.json", edit)


def swap_gguf_tokens(folder: Path) -> None:
    """Two neighbours of one character in the header of a GGUF file, which holds the vocabulary that llama.cpp uses."""
    data = bytearray((folder / GGUF_FILE).read_bytes())
    place = data.index(b"tokenizer.ggml.tokens")
    one = next(i for i in range(place + 33, len(data)) if data[i : i + 8] == data[i + 9 : i + 17] == struct.pack("<Q", 1))
    assert data[one + 8] != data[one + 17]
    data[one + 8], data[one + 17] = data[one + 17], data[one + 8]
    (folder / GGUF_FILE).write_bytes(data)


def shorter(profile: TargetProfile) -> TargetProfile:
    return profile.model_copy(update={"max_model_len": 16})


# The engine.


@dataclass
class Wrapped:
    """A running engine with a fault; everything else goes through."""

    engine: Engine
    asked: int = 0

    @property
    def weight_version(self) -> int:
        return self.engine.weight_version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        return self.engine.generate(prompts, sampling)

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        return self.engine.score(sequences, temperature)

    def update(self, weights: Any) -> int:
        return self.engine.update(weights)

    def close(self) -> None:
        self.engine.close()


class IgnoresTemperature(Wrapped):
    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        return [replace(score, temperature=temperature) for score in self.engine.score(sequences, 1.0)]


class TopP(Wrapped):
    """What it samples is renormalised over nine tenths of the probability."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Generation]:
        drawn = self.engine.generate(prompts, sampling)
        return [replace(one, logps=np.minimum(one.logps - np.float32(math.log(0.9)), 0)) for one in drawn]


class TopPEverywhere(Wrapped):
    """The same of scores, where tokens outside have none."""

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        def cut(logps: Any) -> Any:
            return np.where(logps < math.log(0.001), np.nan, np.minimum(logps - math.log(0.9), 0)).astype(np.float32)

        return [replace(score, logps=cut(score.logps)) for score in self.engine.score(sequences, temperature)]


class OtherToken(Wrapped):
    """The log-prob of each token is that of its neighbour's id."""

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        scores = self.engine.score(sequences, temperature)
        found = []
        for sequence, score in zip(sequences, scores, strict=True):
            logps = []
            for place in range(sequence.prompt_len, len(sequence.tokens)):
                neighbour = sequence.tokens[place] ^ 1
                asked = TokenSequence((*sequence.tokens[:place], neighbour), place)
                logps.append(self.engine.score([asked], temperature)[0].logps[0])
            found.append(replace(score, logps=np.array(logps, np.float32)))
        return found


class StalePrefix(Wrapped):
    """What was asked before is answered from a cache that other weights filled."""

    def score(self, sequences: Sequence[TokenSequence], temperature: float = 1.0) -> list[TokenScores]:
        seen: set[Any] = self.__dict__.setdefault("seen", set())
        scores = self.engine.score(sequences, temperature)
        found = []
        for sequence, score in zip(sequences, scores, strict=True):
            stale = np.roll(score.logps, 1).astype(np.float32)
            found.append(replace(score, logps=stale) if sequence.tokens in seen else score)
            seen.add(sequence.tokens)
        return found
