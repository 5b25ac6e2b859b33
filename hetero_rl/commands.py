"""What the commands of `cli.py` do, once their arguments are read."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy_targets.artifact import MANIFEST_FILE, PROBES_FILE, Manifest, check_artifact
from deploy_targets.blame import with_blame
from deploy_targets.catalog import open_engine
from deploy_targets.ci_report import write_junit, write_markdown
from deploy_targets.comparison import compare, print_comparison, read_report, write_comparison
from deploy_targets.errors import EXIT_SIGNAL, PreflightError, UsageError
from deploy_targets.gates import EXIT_CODES, Report
from deploy_targets.inspection import explained, inspect_artifact
from deploy_targets.preflight import check_target
from deploy_targets.probes import ProbeSet, read_probes, write_probes
from deploy_targets.profile import GateSpec, TargetProfile, load_profile, parse_bounds, with_bounds
from deploy_targets.report import print_table, write_html
from deploy_targets.signing import check_private_key, sign_file
from deploy_targets.verify import verify
from hetero_rl.config import NVME_IS_NOT_RESTORED, RunConfig, TargetConfig, load_config
from hetero_rl.delivery import Trust, checked_artifact, opened_engine, sign_and_pack
from hetero_rl.errors import RunFolderError
from hetero_rl.foreign import Foreign
from hetero_rl.inputs import check_inputs
from hetero_rl.launch import follow_run, quieten, ranks_on_ray
from hetero_rl.ray_cluster import check_cluster
from hetero_rl.recipe_text import recipe_lines
from hetero_rl.run_folder import (
    PROFILE_FILE,
    RunFolder,
    check_free,
    check_output,
    check_same_run,
    create_run,
    default_run_dir,
    locked,
    open_run,
    told_of_a_full_disk,
)
from hetero_rl.unused_settings import unused_settings

if TYPE_CHECKING:
    from rich.console import Console


def run_training(
    console: Console,
    target: str | None,
    files: Sequence[Path],
    settings: Sequence[str],
    run_dir: Path | None,
    *,
    resume: bool,
    dry_run: bool,
) -> int:
    """`train`; returns the exit code."""
    if resume:
        run, config, profile = _resumed(target, files, settings, run_dir)
    else:
        config, profile = load_config(files, settings, target)
    _prepare_process(may_be_launched=True)
    if config.learner.launcher == "ray" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("learner.launcher = 'ray' starts the ranks itself: run the command without torchrun or deepspeed")
    if int(os.environ.get("RANK", "0")) > 0:
        if not dry_run:
            follow_run(config, profile)
        return 0
    if not resume:
        check_free(run_dir or default_run_dir(profile.name))
    inputs = check_inputs(config, profile)
    check_cluster(config)
    for sentence in () if resume else unused_settings(config):
        _warn(console, sentence)
    if dry_run:
        console.print_json(config.model_dump_json())
        for line in recipe_lines(config, profile):
            console.print(line, highlight=False, soft_wrap=True)
        fits = f"target {profile.name}: {profile.scheme.name} on {profile.engine.name}; everything fits"
        console.print(f"{fits}. Nothing was started.", highlight=False)
        return 0
    if not resume:
        run = create_run(run_dir or default_run_dir(profile.name), config, profile)
    from hetero_rl.loop import train
    from hetero_rl.run_report import write_run_report
    from hetero_rl.view import View

    ranks = ranks_on_ray(config, profile) if config.learner.launcher == "ray" else nullcontext()
    with locked(run.path), ranks, View(console) as view, told_of_a_full_disk(run.path):
        result = train(config, profile, run, view, inputs, resume=resume)
    report = write_run_report(run.path, run.path / "report.html")
    if result.artifact is None:
        console.print(
            f"stopped after step {result.step}"
            + ("" if config.learner.offload == "nvme" else f"; continue with: hetero-rl train --resume --run-dir {run.path}"),
            highlight=False,
            soft_wrap=True,
        )
        return EXIT_SIGNAL + (result.stopped_by or signal.SIGINT)
    if result.start_accuracy is not None and result.final_accuracy is not None:
        console.print(
            f"deployed accuracy {result.start_accuracy:.1%} -> {result.final_accuracy:.1%} on {config.evaluation.num_final_problems} "
            f"held-out problems, decoded by {profile.name}",
            highlight=False,
            soft_wrap=True,
        )
    for name, path in {"artifact": result.artifact, "report": report, "curves": run.path / "tensorboard"}.items():
        console.print(f"{name:<9}{path}", highlight=False, soft_wrap=True)
    console.print(f"next:    hetero-rl verify-deploy {result.artifact}", highlight=False, soft_wrap=True)
    return 0


def run_export(
    console: Console, source: Path, target: str | None, out: Path | None, bundle: Path | None, sign: Path | None, which: str = "newest"
) -> None:
    """`export`: a checkpoint of a run (`newest`, `best`, or a step), quantized, served, probed, sealed; for another `target` on request.

    Where `source` is an artifact already, its bytes stay as they are: it is only signed and packed.
    """
    is_artifact = (source / MANIFEST_FILE).is_file()
    if is_artifact and (out is not None or target is not None):
        raise UsageError(
            f"{source} is an artifact already: give --bundle or --sign. --out and --target want the run folder that it came from"
        )
    if is_artifact and which != "newest":
        raise UsageError(f"{source} is an artifact already: --checkpoint wants the run folder that it came from")
    if out is None and bundle is None and not (is_artifact and sign):
        raise UsageError("export needs --out FOLDER, --bundle FILE or both" + (", or --sign KEY" if is_artifact else ""))
    for path, option in ((out, "--out"), (bundle, "--bundle")):
        if path is not None and path.exists():
            raise UsageError(f"{path} exists already; give another {option}")
        check_output(path, option)
    folder = source if is_artifact else out
    if bundle is not None and folder is not None and bundle.resolve().is_relative_to(folder.resolve()):
        raise UsageError(f"--bundle {bundle} lies in the artifact {folder}, which holds nothing but its own files")
    if sign is not None:
        check_private_key(sign)
    if is_artifact:
        check_artifact(source)
        sign_and_pack(console, source, bundle, sign)
        return
    with tempfile.TemporaryDirectory(dir=(out or bundle or source).resolve().parent) as scratch:
        folder = out or Path(scratch) / "artifact"
        accuracy = _export_run(console, source, target, folder, which)
        console.print(f"deployed accuracy {accuracy:.1%}", highlight=False)
        sign_and_pack(console, folder, bundle, sign)
    if out is not None:
        console.print(f"artifact {out}", highlight=False, soft_wrap=True)


def _export_run(console: Console, run_path: Path, target: str | None, out: Path, which: str) -> float:
    run, config, profile, same_target = _opened(run_path, target)
    _prepare_process()
    inputs = check_inputs(config, profile)
    from hetero_rl.checkpoint import chosen_checkpoint
    from hetero_rl.export import export_artifact
    from hetero_rl.floor import measure_start
    from hetero_rl.parts import assemble
    from hetero_rl.view import View

    checkpoint = chosen_checkpoint(run.checkpoints, which, lambda text: _warn(console, text))
    if checkpoint is None:
        raise RunFolderError(f"run {run_path} has no checkpoint yet, so there is nothing to export")
    with View(console) as view, tempfile.TemporaryDirectory(dir=out.parent) as serving, ExitStack() as stack:
        parts = assemble(config, profile, Path(serving) / "serving", view, stack, inputs, checkpoint, same_target=same_target, trains=False)
        view.phase(f"exporting {checkpoint.name}")
        return export_artifact(config, profile, parts, parts.restored or measure_start(config, parts), out)


def run_probe(
    console: Console,
    model: str,
    out: Path,
    files: Sequence[Path],
    settings: Sequence[str],
    target: str | None,
    prompts_file: Path | None,
    num_tokens: int | None,
) -> None:
    """`probe`: golden probes of a model that hetero-rl never trained, into the file `out`, or `probes.st` in the folder `out`."""
    of_task = bool(files) or any(setting.strip().startswith("task.") for setting in settings)
    if of_task and prompts_file is not None:
        raise UsageError("give prompts by --prompts, or a task by --config or --set task...; not both")
    path = out / PROBES_FILE if out.is_dir() else out
    if path.exists():
        raise UsageError(f"{path} exists already; give another --out")
    check_output(path, "--out")
    config, profile = load_config(files, settings, target)
    named = target is not None or "name" in config.target.model_fields_set
    _prepare_process()
    from hetero_rl.probe import record_model, summary

    with console.status(f"recording probes of {model}"):
        probes, prompts = record_model(
            model, config, profile if named else None, prompts_file, of_task=of_task, num_tokens=num_tokens
        )  # fmt: skip
        write_probes(path, probes)
    for name, line in summary(probes, prompts, path, target).items():
        console.print(f"{name:<9}{line}", highlight=False, soft_wrap=True, markup=False)


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where `verify-deploy` writes its report; None: not."""

    json: Path | None = None
    html: Path | None = None
    junit: Path | None = None
    markdown: Path | None = None

    def check(self) -> None:
        """Raises `UsageError` for a file that could not be written, before anything is measured."""
        for name in ("json", "html", "junit", "markdown"):
            check_output(getattr(self, name), f"--{name}")

    def write(self, report: Report) -> None:
        """Write `report` to each of the files."""
        if self.json is not None:
            self.json.write_text(json.dumps(report.to_json(), indent=2) + "\n", "utf-8")
        if self.html is not None:
            write_html(report, self.html)
        if self.junit is not None:
            write_junit(report, self.junit)
        if self.markdown is not None:
            write_markdown(report, self.markdown)


def run_comparison(console: Console, a: Path, b: Path, html_file: Path | None) -> None:
    """`compare`: two reports side by side."""
    check_output(html_file, "--html")
    reports = read_report(a), read_report(b)
    print_comparison(compare(*reports), console)
    if html_file is not None:
        write_comparison(*reports, html_file)


def run_verify(
    console: Console,
    artifact: Path,
    outputs: Outputs,
    reward_name: str | None,
    settings: Sequence[str],
    *,
    full: bool,
    keep: Path | None,
    server: str | None,
    model: str | None,
    trust: Trust,
    foreign: Foreign,
    learner: Path | None,
) -> int:
    """`verify-deploy`, its gates changed by `settings`; returns the exit code of the verdict.

    With a `learner`, a folder, activations are compared too (`--bisect`).
    """
    outputs.check()
    trust.check(outputs.json)
    bounds = parse_bounds(settings)
    if model is not None and server is None:
        raise UsageError("--model names a model of a running server: give --server URL too")
    with ExitStack() as stack:
        if foreign.is_given:
            profile = foreign.profile(artifact, keep, trust, reward_name)
            folder, manifest, probes = foreign.opened(artifact, profile, stack)
        else:
            folder, manifest = checked_artifact(artifact, keep, trust, stack)
            probes = read_probes(folder / PROBES_FILE)
        gates = with_bounds(manifest.profile.gates, bounds)
        report = _measured(console, folder, manifest, probes, reward_name, server, model, gates, learner, full=full)
    print_table(report, console)
    outputs.write(report)
    if outputs.json is not None and trust.sign_report is not None:
        sign_file(outputs.json, trust.sign_report)
    return EXIT_CODES[report.verdict]


def _measured(
    console: Console,
    folder: Path,
    manifest: Manifest,
    probes: ProbeSet,
    reward_name: str | None,
    server: str | None,
    model: str | None,
    gates: GateSpec,
    learner: Path | None,
    *,
    full: bool,
) -> Report:
    if server is None:
        _require_runnable(manifest.profile)
    _prepare_process()
    from hetero_rl.model import resolve_model
    from hetero_rl.tasks.rewards import artifact_reward

    reward = None if manifest.task is None else artifact_reward(manifest.task.reward, reward_name)
    if manifest.task is not None and reward is None:
        _warn(
            console,
            f"the task accuracy is not measured: the reward of the training was {manifest.task.reward!r}, "
            "and code that an artifact names is never run by itself. Give it with --reward module:function",
        )
    with console.status("reading the artifact") as status:
        inspection = inspect_artifact(folder, manifest, probes)
        with explained(inspection), ExitStack() as stack:
            engine, asked = opened_engine(folder, manifest, server, model)
            stack.callback(engine.close)
            if asked is not None:
                where = "" if asked.is_local else "; the hardware in the report is that of this machine, not the server's"
                console.print(
                    f"server   {asked.url}, {asked.software} {asked.version}, model {asked.model}{where}", highlight=False, soft_wrap=True
                )
            report = verify(
                folder, engine, manifest, probes, reward=reward, server=asked, gates=gates, full=full, inspection=inspection,
                progress=lambda what, done, total: status.update(f"{what} {done}/{total}"),
            )  # fmt: skip
        status.update("looking for the cause")
        if learner is not None:
            from hetero_rl.bisect import compare_activations

            report = replace(report, activations=compare_activations(folder, manifest, probes, resolve_model(str(learner))))
        again = None if asked is not None else lambda profile: open_engine(profile, folder, manifest.weight_version)
        return with_blame(report, probes, again)


def run_evaluation(
    console: Console,
    run_path: Path | None,
    target: str | None,
    files: Sequence[Path],
    settings: Sequence[str],
    json_file: Path | None,
    which: str = "newest",
) -> None:
    """`eval`: accuracy on both machines and the gap, for a checkpoint of a run or for a model as it is."""
    check_output(json_file, "--json")
    run, same_target = None, True
    if run_path is not None:
        if files or settings:
            raise UsageError("eval takes a run folder or --config/--set, not both")
        run, config, profile, same_target = _opened(run_path, target)
    else:
        config, profile = load_config(files, settings, target)
    _prepare_process()
    inputs = check_inputs(config, profile)
    from hetero_rl.checkpoint import chosen_checkpoint
    from hetero_rl.floor import measure_start
    from hetero_rl.loop import evaluate
    from hetero_rl.parts import assemble
    from hetero_rl.view import View

    checkpoint = chosen_checkpoint(run.checkpoints, which, lambda text: _warn(console, text)) if run is not None else None
    if run is not None and checkpoint is None:
        raise RunFolderError(f"run {run_path} has no checkpoint yet")
    with View(console) as view, tempfile.TemporaryDirectory() as serving, ExitStack() as stack:
        parts = assemble(config, profile, Path(serving) / "serving", view, stack, inputs, checkpoint, same_target=same_target, trains=False)
        view.phase("measuring")
        gap = measure_start(config, parts).floor
        numbers: dict[str, Any] = evaluate(parts, config.evaluation.num_final_problems)
        num_problems = len(parts.task.heldout_problems(config.evaluation.num_final_problems))
    numbers |= {
        "constraint/engine_gap": gap.mean,
        "constraint/engine_gap_interval": [gap.low, gap.high],
        "num_problems": num_problems,
    }
    console.print(
        f"deployed accuracy {numbers['eval/deployed_accuracy']:.1%}   bf16 accuracy {numbers['eval/learner_accuracy']:.1%}   "
        f"engine gap {gap.mean:.4f} (95 % interval {gap.low:.4f} to {gap.high:.4f})",
        highlight=False,
        soft_wrap=True,
    )
    if json_file is not None:
        json_file.write_text(json.dumps(numbers, indent=2) + "\n", "utf-8")


def _opened(run_path: Path, target: str | None) -> tuple[RunFolder, RunConfig, TargetProfile, bool]:
    """A run as one process opens it, as if for `target`, where one is given; and whether that is the run's own."""
    run, config, own = open_run(run_path)
    _require_whole_checkpoints(config)
    config = config.model_copy(update={"learner": config.learner.in_one_process()})
    profile = own if target is None else load_profile(target)
    if profile != own:
        # How it was trained is no matter of another target, whose engine may know of no routes.
        algorithm = config.algorithm.model_copy(update={"routing_replay": False})
        config = config.model_copy(update={"target": TargetConfig(name=str(target)), "algorithm": algorithm})
    return run, config, profile, profile == own


def _resumed(
    target: str | None, files: Sequence[Path], settings: Sequence[str], run_dir: Path | None
) -> tuple[RunFolder, RunConfig, TargetProfile]:
    if run_dir is None:
        raise UsageError("--resume needs --run-dir, the folder of the run to continue")
    run, old, profile = open_run(run_dir)
    _require_whole_checkpoints(old)
    if target is None and not files and not settings:
        return run, old, profile
    # Settings are laid over the run's own, so that --resume --set evaluation.every_steps=5 is enough.
    new, profile_of_now = load_config(files, settings, target, base=old)
    check_same_run(old, new)
    if profile_of_now != profile:
        raise RunFolderError(
            f"a resumed run must keep its target, but the profile {new.target.name!r} is not the one that {run_dir} was started with "
            f"({run_dir / PROFILE_FILE}). Resume without --target, --config and --set, or start a new run"
        )
    return run, new, profile


def _require_whole_checkpoints(config: RunConfig) -> None:
    if config.learner.offload == "nvme":
        raise RunFolderError(f"a run with learner.offload = 'nvme' has no checkpoint to go on from: {NVME_IS_NOT_RESTORED}")


def _warn(console: Console, text: str) -> None:
    console.print(f"[yellow]warning:[/yellow] {text}", highlight=False, soft_wrap=True)


def _require_runnable(profile: TargetProfile) -> None:
    reasons = check_target(profile)
    if reasons:
        raise PreflightError(f"target {profile.name!r} cannot run on this machine", reasons, "`hetero-rl targets check` shows what can")


def _require_one_process(launchers: Sequence[str]) -> None:
    """A launcher's many processes would each do the whole job. Raises `UsageError`."""
    for name in launchers:
        if os.environ.get(name, "1") != "1":
            raise UsageError(
                f"{name} = {os.environ[name]} says that a launcher started several processes. `hetero-rl train` works with torchrun and "
                "deepspeed, which set RANK; every other command is one process: start it directly"
            )


def _prepare_process(*, may_be_launched: bool = False) -> None:
    """Before anything heavy is imported: one process, or (`may_be_launched`) one of the ranks that torchrun or deepspeed started."""
    is_ranked = "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    if not (may_be_launched and is_ranked):
        _require_one_process(("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    quieten()
