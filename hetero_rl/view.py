"""What a person sees while a run goes on: a live panel in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deploy_targets.profile import TargetProfile
from hetero_rl.algorithm.tolerance import out_of_reach
from hetero_rl.checkpoint import LoopState
from hetero_rl.config import RunConfig
from hetero_rl.metrics import PHASES
from hetero_rl.recipe_text import pieces, recipe_lines

SPARKS = "▁▂▃▄▅▆▇█"


class View:
    """Shows phases, steps and warnings on a console."""

    def __init__(self, console: Console) -> None:
        """A console that is no terminal gets plain lines."""
        self._console = console
        self._live: Live | None = None
        self._rows: list[dict[str, float]] = []
        self._accuracy: dict[str, float] = {}
        self._num_steps = 0
        self._first_step = 0
        self._max_skipped = 0
        self._started = 0.0
        self._title = ""

    def __enter__(self) -> View:
        """The view itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the last picture on the screen."""
        self._stop_live()

    def phase(self, text: str) -> None:
        """Say what is being done before or after the steps."""
        self._stop_live()
        self._console.print(f"[dim]·[/dim] {text}", highlight=False)

    def warn(self, text: str) -> None:
        """Say something that needs attention."""
        self._console.print(f"[yellow]warning:[/yellow] {text}", highlight=False, soft_wrap=True)

    def start(self, config: RunConfig, profile: TargetProfile, state: LoopState) -> None:
        """The steps begin."""
        self._num_steps, self._first_step, self._started = config.loop.num_steps, state.step, time.monotonic()
        self._max_skipped = config.learner.max_skipped_in_a_row
        self._title = f"{profile.name} · {profile.scheme.name} · {config.model.path} · signal {config.constraint.signal}"
        for line in recipe_lines(config, profile) if state.step == 0 else [pieces(config)]:
            self._console.print(f"[dim]·[/dim] {line}", highlight=False)
        self._console.print(
            f"[dim]·[/dim] floor {state.floor.mean:.4f} on {state.floor.num_tokens} tokens (95 % interval {state.floor.low:.4f} to "
            f"{state.floor.high:.4f}); tolerance {state.tolerance:.4f}",
            highlight=False,
        )
        caution = out_of_reach(config.constraint.signal, state.tolerance, state.floor)
        if caution and state.step == 0:
            self.warn(caution)
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=False)
            self._live.start()

    def step(self, row: dict[str, float]) -> None:
        """A line of metrics.jsonl was written."""
        if row["step"]:
            self._rows.append(row)
        if row.get("learner/skipped_steps"):
            self.warn(
                f"step {row['step']:.0f}: {row['learner/skipped_steps']:.0f} optimizer steps were skipped, for want of a finite loss, "
                "gradient or engine log-prob; the weights stay as they were. The run goes on, and stops after "
                f"{self._max_skipped} in a row (learner.max_skipped_in_a_row)"
            )
        self._accuracy |= {name: value for name, value in row.items() if name.startswith("eval/")}
        if self._live is not None:
            self._live.update(self._panel())
        elif "eval/deployed_accuracy" in row or row["step"] % 10 == 0:
            self._console.print(self._line(row), highlight=False, soft_wrap=True)

    def _stop_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, row: dict[str, float]) -> str:
        parts = [f"step {row['step']:.0f}/{self._num_steps}"]
        if "reward/mean" in row:
            parts.append(f"reward {row['reward/mean']:.3f}")
        parts.append(f"gap {row['constraint/engine_gap']:.4f}/{row['constraint/tolerance']:.4f}")
        parts.append(f"lambda {row['constraint/lambda']:.3f}")
        if "perf/step_s" in row:
            parts += [f"{row['perf/step_s']:.2f} s", f"{row['perf/rollout_tokens_per_s']:.0f} tokens/s", f"left {self._time_left()}"]
        if "eval/deployed_accuracy" in row:
            parts.append(f"deployed accuracy {row['eval/deployed_accuracy']:.1%}, learner {row['eval/learner_accuracy']:.1%}")
        return "  ".join(parts)

    def _panel(self) -> RenderableType:
        if not self._rows:
            return Panel("first step …", title=self._title)
        row = self._rows[-1]
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column(justify="right")
        table.add_column()
        done = int(row["step"])
        table.add_row("step", f"{done}/{self._num_steps}", _bar(done / self._num_steps, 40) + Text(f"  {self._time_left()} left", "dim"))
        table.add_row("reward", f"{row['reward/mean']:.3f}", self._spark("reward/mean"))
        if self._accuracy:
            deployed, learner = self._accuracy["eval/deployed_accuracy"], self._accuracy["eval/learner_accuracy"]
            table.add_row("deployed accuracy", f"{deployed:.1%}", Text(f"learner in bf16 {learner:.1%}", "dim"))
        gap, tolerance = row["constraint/gap_ema"], row["constraint/tolerance"]
        verdict = Text("inside the tolerance", "green") if gap <= tolerance else Text("above the tolerance", "yellow")
        table.add_row(
            "discrepancy", f"{gap:.4f}", self._spark("constraint/gap_ema") + Text(f"  tolerance {tolerance:.4f}, ", "dim") + verdict
        )
        table.add_row("lambda", f"{row['constraint/lambda']:.3f}", self._spark("constraint/lambda"))
        seconds = "  ".join(f"{name} {row[key]:.2f}" for name, key in PHASES.items() if key in row)
        table.add_row("seconds", f"{row['perf/step_s']:.2f}", Text(seconds, "dim"))
        table.add_row("rollout", f"{row['perf/rollout_tokens_per_s']:,.0f}", Text("tokens/s", "dim"))
        return Panel(Group(table), title=self._title, border_style="cyan", expand=False)

    def _spark(self, name: str, width: int = 32) -> Text:
        values = [row[name] for row in self._rows if row[name] == row[name]]
        if not values:
            return Text("")
        size = -(-len(values) // width)
        means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
        low, high = min(means), max(means)
        scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
        return Text("".join(SPARKS[round((mean - low) * scale)] for mean in means), "cyan")

    def _time_left(self) -> str:
        done = len(self._rows)
        if not done:
            return "?"
        remaining = (time.monotonic() - self._started) / done * (self._num_steps - self._first_step - done)
        return f"{remaining / 60:.0f} min" if remaining >= 90 else f"{remaining:.0f} s"


def _bar(share: float, width: int) -> Text:
    filled = round(share * width)
    return Text("━" * filled, "cyan") + Text("━" * (width - filled), "dim")
