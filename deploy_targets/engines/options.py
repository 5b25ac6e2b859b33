"""The options of every shipped engine by its name, to be checked before anything starts: no runtime is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy_targets.engines.fake_options import FakeOptions
from deploy_targets.engines.llamacpp_options import LlamaCppOptions
from deploy_targets.engines.onnx_options import OnnxRuntimeOptions
from deploy_targets.engines.requests import EngineOptions, parse_options
from deploy_targets.engines.transformers_options import TransformersOptions
from deploy_targets.engines.vllm_options import VllmOptions
from deploy_targets.errors import ListedError

OPTIONS: Mapping[str, type[EngineOptions]] = {
    "fake": FakeOptions,
    "llamacpp": LlamaCppOptions,
    "onnxruntime": OnnxRuntimeOptions,
    "transformers": TransformersOptions,
    "vllm": VllmOptions,
}
"""Name of a shipped engine -> what its `[engine.options]` may hold. Engines of plug-ins check theirs when they start."""
RETURN_ROUTES = "return_routes"
"""The option of engines that can fill `Generation.routes`, the shipped ones and those of plug-ins."""


def options_problems(engine: str, options: Mapping[str, Any]) -> list[str]:
    """What is wrong with the `[engine.options]` of the `engine`, one line each; none for an engine that is not shipped."""
    if engine not in OPTIONS:
        return []
    try:
        parse_options(OPTIONS[engine], options, engine)
    except ListedError as error:
        known = f"; {engine} knows {', '.join(sorted(OPTIONS[engine].model_fields))}"
        return [f"engine.options: {line}{known if line.endswith('unknown key') else ''}" for line in error.offenders]
    return []


def parsed_options(engine: str, options: Mapping[str, Any]) -> EngineOptions:
    """The `[engine.options]` of a shipped engine; of others, what every engine has by default. Raises `ProfileError` for wrong ones."""
    return parse_options(OPTIONS[engine], options, engine) if engine in OPTIONS else EngineOptions()
