"""The parts of a run, put together: task, learner, engine."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from deploy_targets.catalog import is_rebuilt, make_quantizer
from deploy_targets.engines.options import RETURN_ROUTES
from deploy_targets.errors import UsageError
from deploy_targets.profile import TargetProfile
from deploy_targets.protocols import Quantizer
from deploy_targets.quantizers.kv_cache import cache_rounding
from deploy_targets.types import Sampling
from hetero_rl.algorithm.kinds import PAIRED
from hetero_rl.checkpoint import LoopState, load_state
from hetero_rl.config import NVME_IS_NOT_RESTORED, RunConfig
from hetero_rl.inputs import Inputs as Inputs
from hetero_rl.inputs import check_inputs
from hetero_rl.learner.deepspeed_learner import Learner
from hetero_rl.model import stop_tokens
from hetero_rl.pool import engine_starter
from hetero_rl.publish import Publisher
from hetero_rl.tasks.base import Task
from hetero_rl.view import View


@dataclass(frozen=True, slots=True)
class Parts:
    """What every command that touches a model works with. `sampling` is that of rollouts, its seed still 0.

    `restored` is the state of the checkpoint that learner and engine were put back to, None for a fresh start.
    """

    task: Task
    sampling: Sampling
    learner: Learner
    publisher: Publisher
    restored: LoopState | None


def assemble(
    config: RunConfig,
    profile: TargetProfile,
    serving: Path,
    view: View,
    stack: ExitStack,
    inputs: Inputs | None = None,
    checkpoint: Path | None = None,
    *,
    same_target: bool = True,
    trains: bool = True,
) -> Parts:
    """Load the learner, from `checkpoint` if given, and start the engine on its weights; `stack` closes them.

    `inputs` are checked here when not given. Not `same_target`: the checkpoint's run was for another target, and gives its weights alone.
    Not `trains`: the weights alone are taken of it, in one process, whatever the number of ranks that made it.
    """
    inputs = inputs or check_inputs(config, profile)
    model_dir, tokenizer, task = inputs.model_dir, inputs.tokenizer, inputs.task
    quantizer = make_quantizer(profile, model_dir)
    sampling = Sampling(config.loop.max_response_tokens, config.loop.temperature, stop_token_ids=stop_tokens(model_dir, tokenizer))
    state = None if checkpoint is None else load_state(checkpoint)
    view.phase("loading the learner")
    learner = make_learner(config, profile, inputs, quantizer, None if state is None else state.compute_dtype)
    stack.callback(learner.close)
    view.phase(f"the learner computes in {learner.compute_dtype}{', responses share their prompt' if learner.packed else ''}")
    if config.constraint.signal in PAIRED and not learner.has_twin:
        view.warn(
            f"target {profile.name!r} quantizes no layer: constraint.signal = {config.constraint.signal!r} has no twin to pull on, "
            "so the gap is only measured"
        )
    if config.learner.offload == "nvme":
        view.warn(f"learner.offload = 'nvme': this run cannot be resumed, nor its checkpoints exported. {NVME_IS_NOT_RESTORED}")
    if checkpoint is not None:
        view.phase(f"restoring {checkpoint.name}")
        if trains:
            check_ranks(state, learner, config.learner.zero_stage)
            learner.load(checkpoint)
        else:
            learner.load_weights(checkpoint)
    anew = ", and anew for every update: it cannot swap weights while it runs" if is_rebuilt(profile, model_dir) else ""
    engines = f"the {config.num_engines} engines" if config.engines else "the engine"
    view.phase(f"starting {engines} of {profile.name}{anew}")
    if not same_target:
        state = None
    version, calibration = (0, ()) if state is None else (state.weight_version, state.calibration)
    served = returning_routes(profile) if config.algorithm.routing_replay else profile
    starter = engine_starter(config, served, int(learner.policy.lm.config.get_text_config().vocab_size), view.warn)
    publisher = Publisher(learner, quantizer, served, model_dir, serving, version, calibration, starter)
    stack.callback(publisher.close)
    if state is not None:
        publisher.num_rebuilds = state.num_rebuilds
        publisher.calibrate(list(state.probes), state.reference_gap)
    return Parts(task, sampling, learner, publisher, state)


def make_learner(
    config: RunConfig, profile: TargetProfile, inputs: Inputs, quantizer: Quantizer, compute_dtype: str | None = None
) -> Learner:
    """The learner of a run; `compute_dtype` is that of the checkpoint it goes on from."""
    return Learner(
        inputs.model_dir,
        quantizer,
        config.learner if compute_dtype is None else config.learner.model_copy(update={"compute_dtype": compute_dtype}),
        config.algorithm,
        config.constraint,
        temperature=config.loop.temperature,
        num_updates=config.loop.num_steps * config.learner.updates_per_rollout,
        max_response_tokens=config.loop.max_response_tokens,
        seed=config.loop.seed,
        cache_rounding=cache_rounding(profile),
    )


def check_ranks(state: LoopState | None, learner: Learner, zero_stage: int) -> None:
    """ZeRO spreads the optimizer over the ranks. Raises `UsageError` where there are others than the checkpoint was made by."""
    if state is not None and zero_stage and state.num_ranks != learner.ranks.size:
        raise UsageError(
            f"the checkpoint was made by {state.num_ranks} ranks with learner.zero_stage = {zero_stage}, and each holds its own part: "
            f"go on with {state.num_ranks}, not {learner.ranks.size} (with zero_stage = 0 any number goes on)"
        )


def returning_routes(profile: TargetProfile) -> TargetProfile:
    """The target as training runs it with `algorithm.routing_replay`; what ships is `profile` as it is."""
    options = {**profile.engine.options, RETURN_ROUTES: True}
    return profile.model_copy(update={"engine": profile.engine.model_copy(update={"options": options})})
