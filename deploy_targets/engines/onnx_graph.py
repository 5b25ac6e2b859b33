"""A decoder graph of onnxruntime-genai's builder: its names and sizes, sessions over it, and plain forward passes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from deploy_targets.engines.requests import Layout, check_layout, read_layout
from deploy_targets.errors import ArtifactError, EngineError
from deploy_targets.types import WEIGHTS_FILE
from deploy_targets.weights_file import tensor_layout

GRAPH_FILE = "model.onnx"
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
}
_CACHE_DTYPES: dict[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}


@dataclass(frozen=True, slots=True)
class Graph:
    """What a session does not say by itself: names, sizes and the initializers that an update must bring."""

    path: Path
    past_names: tuple[str, ...]
    present_names: tuple[str, ...]
    num_kv_heads: int
    head_dim: int
    context_length: int
    vocab_size: int
    layout: Layout | None
    """None where the graph brings its weights in files of its own, as the builder leaves it: they cannot be swapped."""

    @classmethod
    def of(cls, artifact_dir: Path) -> Graph:
        """Read `genai_config.json` and the header of the weights file. Raises `ArtifactError` where one is missing or unreadable."""
        if not (artifact_dir / GRAPH_FILE).is_file():
            raise ArtifactError(f"{artifact_dir} is not an ONNX artifact: {GRAPH_FILE} is missing")
        try:
            model = json.loads((artifact_dir / "genai_config.json").read_text("utf-8"))["model"]
            decoder = model["decoder"]
            layers = range(decoder["num_hidden_layers"])
            inputs, outputs = decoder["inputs"], decoder["outputs"]
            return cls(
                path=artifact_dir / GRAPH_FILE,
                past_names=tuple(inputs[key] % i for i in layers for key in ("past_key_names", "past_value_names")),
                present_names=tuple(outputs[key] % i for i in layers for key in ("present_key_names", "present_value_names")),
                num_kv_heads=decoder["num_key_value_heads"],
                head_dim=decoder["head_size"],
                context_length=model["context_length"],
                vocab_size=model["vocab_size"],
                layout=read_layout(artifact_dir / WEIGHTS_FILE) if (artifact_dir / WEIGHTS_FILE).is_file() else None,
            )
        except (OSError, ValueError, KeyError) as error:
            raise ArtifactError(f"{artifact_dir} is not an ONNX artifact of onnxruntime-genai's builder: {error!r}") from error

    def session(self, weights: Path, provider: str, num_threads: int) -> tuple[ort.InferenceSession, Any]:
        """A session over this graph with the weights of another file, and what must live as long as the session.

        The file is mapped, not read; a graph that brings its own weights keeps them. Raises `EngineError` naming every tensor that is
        missing, unknown or of another shape or dtype than the graph's, or every input that only other graphs have.
        """
        if self.layout is not None:
            check_layout(self.layout, weights)
        values = {} if self.layout is None else _mapped(weights)
        options = ort.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that spin between calls would take the cores from the learner.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            options.add_external_initializers(list(values), list(values.values()))
            session = ort.InferenceSession(str(self.path), options, providers=[provider])
        except Exception as error:  # onnxruntime's exceptions share no base class below Exception
            raise EngineError(f"onnxruntime cannot serve {weights}: {error}") from error
        if provider not in session.get_providers():
            # onnxruntime only logs that a provider's libraries did not load, and goes on with the CPU.
            raise EngineError(f"onnxruntime could not start {provider} and fell back to the CPU; install its libraries (CUDA, cuDNN)")
        unknown = {value.name for value in session.get_inputs()} ^ {"input_ids", "attention_mask", *self.past_names}
        if unknown:
            raise EngineError(
                f"{self.path} takes other inputs than the graphs that are served here, which have GroupQueryAttention and no positions: "
                f"{', '.join(sorted(unknown))}. Build it with onnxruntime-genai's builder, -e cpu or -e cuda"
            )
        return session, values

    def cache_dtype(self, session: ort.InferenceSession) -> np.dtype[Any]:
        """The type of keys, values and logits in the graph of `session`: float32 or float16."""
        found = {value.name: value.type for value in session.get_inputs()}[self.past_names[0]]
        return _CACHE_DTYPES[found]

    def prefill(self, session: ort.InferenceSession, rows: Sequence[Sequence[int]], with_cache: bool) -> list[NDArray[np.floating[Any]]]:
        """One pass over `rows` of token ids, padded on the right, where GroupQueryAttention is exact (on the left it is not).

        Returns logits [num_rows, max_len, vocab], then (with `with_cache`) keys and values of each layer
        [num_rows, num_kv_heads, max_len, head_dim], all of `cache_dtype`; entries beyond a row's length are noise.
        """
        lengths = np.array([len(row) for row in rows])
        mask = np.arange(lengths.max()) < lengths[:, None]
        ids = np.zeros(mask.shape, np.int64)
        ids[mask] = np.concatenate([np.asarray(row, np.int64) for row in rows])
        empty = np.zeros((len(rows), self.num_kv_heads, 0, self.head_dim), self.cache_dtype(session))
        feed = {"input_ids": ids, "attention_mask": mask.astype(np.int64), **dict.fromkeys(self.past_names, empty)}
        outputs: list[NDArray[np.floating[Any]]] = session.run(["logits", *(self.present_names if with_cache else ())], feed)
        return outputs


def _mapped(path: Path) -> dict[str, ort.OrtValue]:
    """Every tensor of a safetensors file as an OrtValue over the mapped file."""
    values = {}
    data = np.memmap(path, np.uint8, "r")
    for name, (dtype, shape, offset, length) in tensor_layout(path).items():
        if offset + length > len(data):
            raise EngineError(f"{path} is truncated: tensor {name!r} ends beyond the file")
        values[name] = ort.OrtValue.ortvalue_from_numpy(data[offset : offset + length].view(_DTYPES[dtype]).reshape(shape))
    return values
