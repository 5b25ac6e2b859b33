"""The command line. Nothing heavy is imported before a command runs, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer
from typer.core import TyperGroup

from deploy_targets.errors import EXIT_FAILED, EXIT_INTERRUPTED, DeployTargetsError, UsageError

if TYPE_CHECKING:
    from rich.console import Console


class _Commands(TyperGroup):
    """Says that it was interrupted, where typer would exit without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail("interrupted", EXIT_INTERRUPTED)


app = typer.Typer(
    name="hetero-rl",
    cls=_Commands,
    help="Train high-fidelity, serve low-cost: the engine you deploy makes the rollouts, a bf16 learner learns from them.",
    epilog="Examples:  hetero-rl train --target int4-onnx   ·   hetero-rl verify-deploy runs/RUN/artifact   ·   hetero-rl doctor",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
targets_app = typer.Typer(help="Deployment targets: what there is, what is in a profile, what runs here.", no_args_is_help=True)
app.add_typer(targets_app, name="targets")

ConfigOption = Annotated[list[Path] | None, typer.Option("--config", "-c", help="TOML file; may be given several times, later ones win.")]
SetOption = Annotated[Optional[list[str]], typer.Option("--set", "-s", help="table.key=value, wins over every file.")]  # noqa: UP045
CheckpointOption = Annotated[str, typer.Option("--checkpoint", help="Of the run: newest, best (by deployed accuracy), or a step.")]
TargetOption = Annotated[Optional[str], typer.Option("--target", "-t", help="A name of `targets list`, or your own profile.toml.")]  # noqa: UP045


@app.command(epilog="Example:  hetero-rl train --target int4-onnx --config configs/demo.toml --set loop.num_steps=60")
def train(
    target: TargetOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    run_dir: Annotated[Optional[Path], typer.Option(help="Run folder; default runs/TARGET-DATE-TIME.")] = None,  # noqa: UP045
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --run-dir from its newest checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and show the resolved config; train nothing.")] = False,
) -> None:
    """Train against a deployment target, export the artifact, draw the report."""
    from hetero_rl.commands import run_training

    raise typer.Exit(run_training(_console(), target, config or [], settings or [], run_dir, resume=resume, dry_run=dry_run))


@app.command(
    epilog="Example:  hetero-rl export runs/RUN --bundle model.tar.zst   ·   hetero-rl export runs/RUN/artifact --bundle model.tar.zst"
)
def export(
    run: Annotated[Path, typer.Argument(help="Run folder, or the artifact folder of an earlier export.")],
    out: Annotated[Optional[Path], typer.Option(help="Folder of the artifact; must not exist.")] = None,  # noqa: UP045
    bundle: Annotated[Optional[Path], typer.Option(help="The artifact as one file that travels (tar, zstd); must not exist.")] = None,  # noqa: UP045
    sign: Annotated[Optional[Path], typer.Option(help="Sign the artifact with this private key (PEM, elliptic curve).")] = None,  # noqa: UP045
    target: TargetOption = None,
    checkpoint: CheckpointOption = "newest",
) -> None:
    """Export a checkpoint of a run as an artifact; --target: for another target. An artifact is packed or signed as it is."""
    from hetero_rl.commands import run_export

    run_export(_console(), run, target, out, bundle, sign, checkpoint)


@app.command(epilog="Example:  hetero-rl probe Qwen/Qwen3-0.6B --out qwen3.st --prompts prompts.jsonl --target q4_k_m-llamacpp")
def probe(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the high-fidelity model (safetensors).")],
    out: Annotated[Path, typer.Option(help="File to be written, or a folder for probes.st.")],
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help='JSON lines: {"prompt": text or chat messages} or {"prompt_tokens": [ids]}; default: samples without a prompt.'),
    ] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    target: TargetOption = None,
    tokens: Annotated[Optional[int], typer.Option(min=512, help="Scored tokens; default: those of the target's profile.")] = None,  # noqa: UP045
) -> None:
    """Record what any model says: verify-deploy --probes FILE then holds a quantized artifact of it against that, whoever made it.

    Prompts are those of --prompts, or the task of --config; --set loop.max_response_tokens=256, loop.temperature=0.7. Nothing is trained.
    """
    from hetero_rl.commands import run_probe

    run_probe(_console(), model, out, config or [], settings or [], target, prompts, tokens)


@app.command("verify-deploy", epilog="Example:  hetero-rl verify-deploy model.tar.zst --json verdict.json --html verdict.html")
def verify_deploy(
    artifact: Annotated[Path, typer.Argument(help="Artifact folder or bundle; with --probes a folder or GGUF file of another tool.")],
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the report as JSON.")] = None,  # noqa: UP045
    html_file: Annotated[Optional[Path], typer.Option("--html", help="Write the report as one HTML file.")] = None,  # noqa: UP045
    junit: Annotated[Optional[Path], typer.Option(help="Write the gates as JUnit XML, a test case to a gate.")] = None,  # noqa: UP045
    markdown: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help='Write a summary as Markdown; "$GITHUB_STEP_SUMMARY" is appended to.'),
    ] = None,
    reward: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Your own module:function, when the artifact was trained with one; code named in an artifact is never run by itself."
        ),
    ] = None,
    gate: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Another bound than the artifact's, e.g. gap_mean_fail=2.0; may be given several times, the report says so."),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Measure everything, also where the verdict is clear before.")] = False,
    keep: Annotated[Optional[Path], typer.Option(help="Unpack the bundle into this folder, which must not exist, and keep it.")] = None,  # noqa: UP045
    server: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Measure the vLLM or llama.cpp server that runs at this URL, instead of starting an engine; its key: HETERO_RL_API_KEY."
        ),
    ] = None,
    model: Annotated[Optional[str], typer.Option(help="Which model of the --server, where it serves several.")] = None,  # noqa: UP045
    require_signature: Annotated[
        bool, typer.Option("--require-signature", help="Refuse an artifact that the key of --public-key did not sign.")
    ] = False,
    public_key: Annotated[Optional[Path], typer.Option(help="Public key (PEM) for --require-signature.")] = None,  # noqa: UP045
    sign_report: Annotated[Optional[Path], typer.Option(help="Sign the --json report with this private key, into FILE.sig.")] = None,  # noqa: UP045
    probes: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Probes, as the command probe makes them, for an artifact without a manifest."),
    ] = None,
    target: Annotated[Optional[str], typer.Option("--target", "-t", help="What serves an artifact without a manifest.")] = None,  # noqa: UP045
    tolerance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0, help="Mean abs(dp) to be allowed, for an artifact without a manifest; default: the profile's."),
    ] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Compare activations, layer by layer, with those of the --learner; needs hetero-rl[train].")
    ] = False,
    learner: Annotated[Optional[Path], typer.Option(help="Folder of the high-fidelity model, for --bisect.")] = None,  # noqa: UP045
) -> None:
    """Hold an artifact against what the learner recorded, on this machine. Exit code 0: pass or warn, 3: fail, 4: undecided."""
    from hetero_rl.commands import Outputs, run_verify
    from hetero_rl.delivery import Trust
    from hetero_rl.foreign import Foreign

    if bisect != (learner is not None):
        raise UsageError("--bisect and --learner FOLDER go together: activations are held against those of the model itself")
    trust = Trust(require_signature, public_key, sign_report)
    raise typer.Exit(
        run_verify(
            _console(), artifact, Outputs(json_file, html_file, junit, markdown), reward, gate or [],
            full=full, keep=keep, server=server, model=model, trust=trust, foreign=Foreign(probes, target, tolerance), learner=learner,
        )
    )  # fmt: skip


@app.command(epilog="Example:  hetero-rl compare laptop.json server.json --html both.html")
def compare(
    a: Annotated[Path, typer.Argument(help="A report that verify-deploy --json wrote.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    html_file: Annotated[Optional[Path], typer.Option("--html", help="Write the comparison as one HTML file.")] = None,  # noqa: UP045
) -> None:
    """Lay two verifications side by side: machines, engines or artifacts."""
    from hetero_rl.commands import run_comparison

    run_comparison(_console(), a, b, html_file)


@app.command("eval", epilog="Example:  hetero-rl eval --target int4-vllm --config configs/demo.toml   ·   hetero-rl eval runs/RUN")
def evaluate(
    run: Annotated[Optional[Path], typer.Argument(help="Run folder; without one, the model of the config as it is.")] = None,  # noqa: UP045
    target: TargetOption = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    json_file: Annotated[Optional[Path], typer.Option("--json", help="Write the numbers as JSON.")] = None,  # noqa: UP045
    checkpoint: CheckpointOption = "newest",
) -> None:
    """Measure deployed and bf16 accuracy and the discrepancy, without training; RUN with --target: its weights on another target."""
    from hetero_rl.commands import run_evaluation

    run_evaluation(_console(), run, target, config or [], settings or [], json_file, checkpoint)


@app.command(epilog="Example:  hetero-rl report runs/RUN")
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: Annotated[Optional[Path], typer.Option(help="HTML file; default RUN/report.html.")] = None,  # noqa: UP045
) -> None:
    """Draw a run: one HTML file with the curves, the config and the versions."""
    from hetero_rl.run_folder import check_output
    from hetero_rl.run_report import write_run_report

    check_output(out, "--out")
    path = write_run_report(run, out or run / "report.html")
    _console().print(f"report   {path}", highlight=False, soft_wrap=True)


@app.command(
    "target-agent",
    epilog="Example:  hetero-rl target-agent --target int4-onnx --bind 192.168.1.7:8470 --token-file token --tls-cert c --tls-key k",
)
def target_agent(
    token_file: Annotated[Path, typer.Option(help="File with the token that clients must have; readable by you alone.")],
    target: Annotated[str, typer.Option("--target", "-t", help="A name of `targets list`, or your own profile.toml.")],
    bind: Annotated[str, typer.Option(help="HOST:PORT to listen at.")] = "127.0.0.1:8470",
    tls_cert: Annotated[Optional[Path], typer.Option(help="Certificate (PEM) of this machine.")] = None,  # noqa: UP045
    tls_key: Annotated[Optional[Path], typer.Option(help="Its private key (PEM).")] = None,  # noqa: UP045
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Without TLS beyond this machine, where the network is trusted.")
    ] = False,
    max_file_mib: Annotated[int, typer.Option(min=1, help="Longest file that is accepted, packed or unpacked.")] = 32768,
    folder: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Where received files are kept while it runs; default: the temporary folder."),
    ] = None,
) -> None:
    """Serve this machine's engine to trainings elsewhere: they send weights, it samples and scores."""
    from deploy_targets.agent.command import parse_binding, read_token, serve
    from deploy_targets.profile import load_profile

    profile, token = load_profile(target), read_token(token_file)
    binding = parse_binding(bind, tls_cert, tls_key, plain_http=plain_http)
    serve(profile, binding, token, folder, max_file_mib << 20, lambda text: _console().print(text, highlight=False, soft_wrap=True))


@targets_app.command("list")
def targets_list() -> None:
    """All shipped targets."""
    from hetero_rl.doctor import targets_table

    _console().print(targets_table())


@targets_app.command("show", epilog="Example:  hetero-rl targets show int4-onnx > my-target.toml")
def targets_show(name: Annotated[str, typer.Argument(help="Name of a target.")]) -> None:
    """The profile of a target, as the TOML file to copy."""
    from deploy_targets.profile import profile_text

    sys.stdout.write(profile_text(name))


@targets_app.command("check")
def targets_check(name: Annotated[Optional[str], typer.Argument(help="One target; default all.")] = None) -> None:  # noqa: UP045
    """Which targets can run on this machine, and what the others need."""
    from hetero_rl.doctor import check_table

    table, runnable = check_table(name)
    _console().print(table)
    if name is not None and not runnable:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def doctor() -> None:
    """Versions, processor features, GPUs, and which targets can run here."""
    from hetero_rl.doctor import print_doctor

    print_doctor(_console())


@app.callback(invoke_without_command=True)
def version_option(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    local_rank: Annotated[
        int, typer.Option("--local_rank", hidden=True, help="What the deepspeed launcher adds; it sets LOCAL_RANK too.")
    ] = 0,
) -> None:
    """Options of the program itself."""
    if version:
        import hetero_rl

        typer.echo(hetero_rl.__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: errors of ours become one message and their exit code; HETERO_RL_DEBUG=1 shows the traceback."""
    try:
        app()
    except DeployTargetsError as error:
        if os.environ.get("HETERO_RL_DEBUG"):
            raise
        _fail(str(error), error.exit_code)
    except OSError as error:
        if os.environ.get("HETERO_RL_DEBUG"):
            raise
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else str(error), EXIT_FAILED)


def _fail(message: str, exit_code: int) -> NoReturn:
    typer.secho("error: ", fg=typer.colors.RED, bold=True, nl=False, err=True)
    typer.echo(message, err=True)
    sys.stderr.flush()
    raise SystemExit(exit_code)


def _console() -> Console:
    from rich.console import Console

    return Console()


if __name__ == "__main__":
    main()
