"""TargetProfile: one TOML file that says how a target quantizes, serves, samples and is judged."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deploy_targets.errors import PlugInError, ProfileError, UnknownNameError, UsageError
from deploy_targets.plugins import PlugIn, find_plugins


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SchemeSpec(_Table):
    """How the weights are stored on the target."""

    quantizer: str
    """Catalog name of the quantizer, e.g. `compressed-tensors` or `onnx-matmulnbits`."""
    name: str = "BF16"
    """The scheme as vLLM and llm-compressor write it: W4A16, W8A8, FP8_DYNAMIC, BF16."""
    bits: int = Field(16, ge=1, le=32)
    """Bits of a stored weight."""
    group_size: int | None = Field(None, ge=1)
    """Input channels that share one scale; None where the scheme has no groups."""
    symmetric: bool = True
    """Whether the grid is symmetric around zero (no zero points)."""
    provider: Literal["cpu", "cuda"] | None = None
    """For ONNX schemes: the execution provider that the graph is made for, which the engine's must be; `cpu` by default."""
    algorithm: Literal["rtn", "gptq", "awq"] = "rtn"
    """How INT4 values are found: round-to-nearest, or by the inputs that layers see in the run's own rollouts (GPTQ, AWQ)."""
    clip: Literal["absmax", "mse"] = "absmax"
    """Where an INT4 grid ends: at the largest value of its group, or where the values of the group have the least square error."""
    act_order: bool = False
    """GPTQ quantizes input channels by falling mean square instead of in their order; groups stay where they are."""
    ignore: tuple[str, ...] | None = None
    """Modules kept in high precision, as exact names or regular expressions after `re:` (llm-compressor's notation).

    Absent, the quantizer has its own default (compressed-tensors: `lm_head`); an empty list keeps nothing.
    """

    @model_validator(mode="after")
    def _provider_is_for_onnx(self) -> SchemeSpec:
        if self.provider is not None and not self.quantizer.startswith("onnx-"):
            raise ValueError(f"provider has no effect with quantizer {self.quantizer!r}; leave it out")
        return self

    def int4_keys(self) -> list[str]:
        """The keys given here that only INT4 weights in vLLM's formats have."""
        fields = type(self).model_fields
        return [f"scheme.{key}" for key in ("algorithm", "clip", "act_order") if getattr(self, key) != fields[key].default]

    @field_validator("ignore")
    @classmethod
    def _patterns_compile(cls, ignore: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for pattern in ignore or ():
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return ignore


class EngineSpec(_Table):
    """The runtime that serves the target."""

    name: str
    """Catalog name of the engine, e.g. `vllm`, `onnxruntime`, `transformers`."""
    process: Literal["shared", "own"] = "shared"
    """`own` hosts the engine in a process of its own, so that its threads and memory are not the learner's."""
    publish: Literal["in_place", "rebuild"] = "in_place"
    """How new weights get into the engine: swapped while it runs, or by starting it anew on them (slow, for engines that cannot swap)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The engine's own options; the engine validates them and refuses unknown keys."""

    @model_validator(mode="after")
    def _threads_need_a_process(self) -> EngineSpec:
        # PyTorch's threads belong to the whole process: in a shared one they would be taken from the learner, or never set.
        if self.process == "shared" and self.name in ("transformers", "vllm") and self.options.get("num_threads") is not None:
            raise ValueError(f"the option num_threads of {self.name!r} has no effect in a shared process; set engine.process = 'own'")
        return self


class HardwareSpec(_Table):
    """What the target needs in order to run."""

    devices: tuple[Literal["cpu", "cuda"], ...] = ("cpu",)
    """Devices the target can run on, any one of them suffices."""
    memory_gib: float | None = Field(None, gt=0)
    """Memory of the device in GiB, which preflight holds the model against; None: that of the machine at hand."""
    cpu_features: tuple[str, ...] = ()
    """Instruction sets that its kernels need on a CPU, as Linux names them; without meaning on a GPU."""
    min_compute_capability: float | None = Field(None, gt=0)
    """Compute capability that its kernels need of a GPU, as NVIDIA numbers it (8.9 is Ada, 9.0 Hopper); without meaning on a CPU."""
    packages: tuple[str, ...] = ()
    """Importable packages that must be present."""
    extra: str = ""
    """The pip extra that brings `packages`."""
    cpu_extra: str = ""
    """The extra for a machine without a GPU, where it is another one."""


LOWER_BOUNDED = ("greedy_agreement",)
"""Gates on measures that should be high; all others are upper bounds."""


class GateSpec(_Table):
    """What `verify-deploy` holds the measurements against: beyond `warn` is a warning, beyond `fail` with the whole interval a failure."""

    gap_mean_warn: float = 1.0
    """Mean abs(dp), in units of the tolerance the run was trained under."""
    gap_mean_fail: float = 1.5
    """See `gap_mean_warn`."""
    kl_k3_warn: float = 0.05
    """Mean k3 estimate of KL(engine || learner) per token, nats."""
    kl_k3_fail: float = 0.2
    """See `kl_k3_warn`."""
    greedy_agreement_warn: float = 0.95
    """Share of probe tokens at which engine and learner have the same most probable token, lower bound."""
    greedy_agreement_fail: float = 0.85
    """See `greedy_agreement_warn`."""
    accuracy_drop_warn: float = 0.03
    """Task accuracy at export minus the one measured here on the same problems, upper bound."""
    accuracy_drop_fail: float = 0.08
    """See `accuracy_drop_warn`."""

    @field_validator("*")
    @classmethod
    def _nan_is_no_bound(cls, bound: float) -> float:
        # Every comparison with NaN is false: the gate would pass whatever is measured. Infinity is how to switch one off.
        if math.isnan(bound):
            raise ValueError("nan is no bound; give a number, or inf (-inf for a lower bound) for a gate that never fails")
        return bound

    @model_validator(mode="after")
    def _fail_lies_beyond_warn(self) -> GateSpec:
        wrong = []
        for gate in ("gap_mean", "kl_k3", "greedy_agreement", "accuracy_drop"):
            warn, fail = getattr(self, f"{gate}_warn"), getattr(self, f"{gate}_fail")
            lower = gate in LOWER_BOUNDED
            if fail > warn if lower else fail < warn:
                wrong.append(f"{gate}_fail = {fail:g} must be {'at most' if lower else 'at least'} {gate}_warn = {warn:g}")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


def parse_bounds(settings: Sequence[str]) -> dict[str, float]:
    """Bounds of gates by name, from "name=number" each; later ones win.

    Raises `UnknownNameError` for a bound that does not exist, `UsageError` for what is no number.
    """
    bounds = {}
    for setting in settings:
        name, _, value = (part.strip() for part in setting.partition("="))
        if name not in GateSpec.model_fields:
            raise UnknownNameError("gate", name, GateSpec.model_fields)
        try:
            bounds[name] = float(value)
        except ValueError:
            example = GateSpec.model_fields[name].default
            raise UsageError(f"the gate {setting!r} must be name=number, e.g. {name}={example:g}") from None
    return bounds


def with_bounds(gates: GateSpec, bounds: Mapping[str, float]) -> GateSpec:
    """`gates` with other `bounds`. Raises `ProfileError` for bounds that are none or do not go together."""
    try:
        return GateSpec.model_validate({**gates.model_dump(), **bounds})
    except ValidationError as error:
        raise ProfileError("the gates cannot be changed like that", validation_lines(error)) from None


class ProbeSpec(_Table):
    """Golden probes that an export records (docs/probes.md): their size and shares; the rest is sampled on the task by what is deployed."""

    num_tokens: int = Field(6144, ge=512)
    """Scored tokens of all probes, about."""
    greedy: float = Field(0.1, ge=0, le=1)
    """Share of greedy continuations."""
    long: float = Field(0.1, ge=0, le=1)
    """Share of tokens at the end of contexts as long as the target allows."""
    rare: float = Field(0.08, ge=0, le=1)
    """Share of tokens from all over the vocabulary."""
    certain: float = Field(0.05, ge=0, le=1)
    """Share of tokens the learner is nearly certain of, at most: one that never is has none."""
    long_len: int | None = Field(None, ge=16)
    """Tokens of a long context; unset: the most that target and model allow."""

    @model_validator(mode="after")
    def _shares_leave_policy_samples(self) -> ProbeSpec:
        if self.policy < 0.25:
            raise ValueError(
                f"greedy, long, rare and certain leave {self.policy:.0%} for samples on the task, which the gates on the gap rest on; "
                "leave at least 25%"
            )
        return self

    @property
    def policy(self) -> float:
        """Share of samples on the task."""
        return 1 - self.greedy - self.long - self.rare - self.certain


class TargetProfile(_Table):
    """One deployment target. Copy a file of `deploy_targets/profiles/` to make your own."""

    name: str
    """What the user types after --target."""
    description: str
    """One line for `targets list`."""
    engine: EngineSpec
    """The runtime."""
    scheme: SchemeSpec
    """The checkpoint format."""
    hardware: HardwareSpec = HardwareSpec()
    """What must be present."""
    max_model_len: int = Field(1024, ge=2)
    """Longest prompt + response in tokens that the target serves; a model with fewer positions sets the limit."""
    gates: GateSpec = GateSpec()
    """Bounds of `verify-deploy`."""
    tolerance: float | None = Field(None, gt=0)
    """Mean abs(dp) for artifacts that hetero-rl did not make, which bring none of their own; `verify-deploy --tolerance` wins."""
    probes: ProbeSpec = ProbeSpec()
    """What an export records for `verify-deploy`."""
    constraint: dict[str, Any] = Field(default_factory=dict)
    """Recommended `[constraint]` table for runs against this target; the user's config wins over it."""

    @model_validator(mode="after")
    def _graph_is_made_for_its_provider(self) -> TargetProfile:
        # A graph for CPUs has attention in float32, which CUDA would leave to the CPU without a word; one for CUDA names it to genai.
        served_by = self.engine.options.get("execution_provider", "CPUExecutionProvider")
        on_cuda = served_by == "CUDAExecutionProvider"
        if self.engine.name == "onnxruntime" and on_cuda != (self.scheme.provider == "cuda"):
            fix = "set it to 'cuda'" if on_cuda else "leave it out"
            raise ValueError(f"scheme.provider is {self.scheme.provider!r} for execution_provider {served_by!r} of the engine: {fix}")
        return self


def parse_profile(text: str, source: str) -> TargetProfile:
    """Validate the TOML `text` of a profile; `source` names it in errors.

    `extends = "NAME"` takes every key that the text does not give from the target NAME, except name and description.
    Raises `ProfileError` with every offending key at once, `UnknownNameError` for a NAME that is no target.
    """
    try:
        return TargetProfile.model_validate(_extended(text, ()))
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{source} is not valid TOML", [str(error)]) from None
    except RecursionError:
        raise ProfileError(f"{source} is not a valid target profile", ["extends: the profiles extend each other in a circle"]) from None
    except ValidationError as error:
        raise ProfileError(f"{source} is not a valid target profile", validation_lines(error)) from None


def _extended(text: str, path: tuple[str, ...]) -> dict[str, Any]:
    """The tables of `text` over those of the profiles it extends."""
    given = tomllib.loads(text)
    base = given.pop("extends", None)
    if base is None:
        return given
    if base in path:
        raise RecursionError
    inherited = _extended(profile_text(str(base)), (*path, base))
    return _merged({key: value for key, value in inherited.items() if key not in ("name", "description")}, given)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, table by table."""
    both = {key: _merged(below[key], above[key]) for key in below if isinstance(below[key], dict) and isinstance(above.get(key), dict)}
    return {**below, **above, **both}


def validation_lines(error: ValidationError) -> list[str]:
    """One line for each thing pydantic refused: dotted key, reason, the value given."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(top level)"
        reason = "unknown key" if item["type"] == "extra_forbidden" else item["msg"]
        given = "" if item["type"] in ("missing", "extra_forbidden") else f" (got {item['input']!r})"
        lines.append(f"{key}: {reason}{given}")
    return lines


@cache
def _shipped_texts() -> dict[str, str]:
    """Target name -> TOML text of `deploy_targets/profiles/`."""
    return {
        file.name.removesuffix(".toml"): file.read_text("utf-8")
        for file in sorted((resources.files("deploy_targets") / "profiles").iterdir(), key=lambda file: file.name)
        if file.name.endswith(".toml")
    }


def find_targets() -> tuple[dict[str, TargetProfile], dict[str, str]]:
    """Every target that has a name, and name -> why it cannot be used, which only plug-ins can cause.

    A plug-in lists `NAME = "package"` under the entry-point group `deploy_targets.profiles` and has `NAME.toml` in that package.
    """
    texts = _shipped_texts()
    plugins, reasons = find_plugins("profile", texts)
    profiles = {name: parse_profile(text, f"{name}.toml") for name, text in texts.items() if name not in reasons}
    for name, plugin in plugins.items():
        try:
            profiles[name] = _plugin_profile(plugin)
        except PlugInError as error:
            reasons[name] = error.offenders[0]
    return dict(sorted(profiles.items())), reasons


def _plugin_profile(plugin: PlugIn) -> TargetProfile:
    """The profile of a plug-in. Raises `PlugInError` for a file that is missing, does not validate or has another name in it."""
    text, file = plugin.text(), f"{plugin.name}.toml"
    try:
        profile = parse_profile(text, file)
        wrong = "" if profile.name == plugin.name else f"{file} has name = {profile.name!r}, which must be the entry point's and the file's"
    except UsageError as error:
        wrong = "; ".join(line.lstrip(" -") for line in str(error).splitlines())
    if wrong:
        raise PlugInError("profile", plugin.name, f"package {plugin.package!r}: {wrong}")
    return profile


def shipped_profiles() -> dict[str, TargetProfile]:
    """Every target that can be used by its name: those of `deploy_targets/profiles/` and of installed plug-ins."""
    return find_targets()[0]


def profile_text(name: str) -> str:
    """The TOML file of a target that has a name, to be copied. Raises `UnknownNameError` or, for a broken plug-in, `PlugInError`."""
    texts = _shipped_texts()
    plugins, reasons = find_plugins("profile", texts)
    if name in reasons:
        raise PlugInError("profile", name, reasons[name])
    if name in plugins:
        return plugins[name].text()
    if name not in texts:
        raise UnknownNameError("target", name, {*texts, *plugins})
    return texts[name]


def load_profile(name_or_path: str) -> TargetProfile:
    """A target by name, or the user's own by the path of its TOML file.

    Raises `UnknownNameError` for an unknown name, `ProfileError` for a file that does not validate or that has
    the name of another target, `PlugInError` for a name that plug-ins made unusable.
    """
    if not name_or_path.endswith(".toml"):
        plugin = find_plugins("profile", _shipped_texts())[0].get(name_or_path)
        return _plugin_profile(plugin) if plugin else parse_profile(profile_text(name_or_path), f"{name_or_path}.toml")
    path = Path(name_or_path)
    if not path.is_file():
        raise UsageError(f"target profile {path} does not exist; give a TOML file or one of the names in `hetero-rl targets list`")
    profile = parse_profile(path.read_text("utf-8"), str(path))
    # An artifact, a report and a gate would pass for those of the other target.
    if profile != shipped_profiles().get(profile.name, profile):
        taken = [f"name: {profile.name!r} is taken"]
        raise ProfileError(f"{path} differs from the target whose name it has", taken, "Give it a name of its own")
    return profile
