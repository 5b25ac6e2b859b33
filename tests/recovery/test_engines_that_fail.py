"""A real engine that hangs, or answers what it should not: one clear error and a resume; nothing at all where others serve."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hetero_rl.metrics import read_metrics
from tests.command_line import with_settings
from tests.faulty_engine import faulty_target
from tests.recovery.conftest import LONGEST_RUN_S, NUM_FAULTS, Undisturbed, faults, finished, is_undisturbed, start, train, undisturbed_run

pytestmark = pytest.mark.timeout(1800)
FEW = NUM_FAULTS < 10
WRONG = {
    "too_few": "answers to", "too_many": "answers to", "short_logps": "tokens and log-probs", "empty": "has 0 tokens",
    "too_long": "tokens; 1 to 8", "unknown_ids": "outside the vocabulary", "negative_ids": "outside the vocabulary",
    "other_prompt": None, "version": "is of version", "positive": "log-probs above 0", "raises": "a bug of the runtime",
}  # fmt: skip
"""What an answer of `generate` can be -> what the error says. An engine elsewhere cannot change a prompt: it is not asked for one."""
DEADLINE_S = 15 if FEW else 40
"""No honest call takes as long, on a machine with much else to do."""
Survived = Callable[[], None]


@pytest.fixture
def target(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    return faulty_target(tmp_path)


@pytest.mark.parametrize("kind", faults(["unknown_ids"] if FEW else [kind for kind in WRONG if WRONG[kind]], "engine's `generate`: {}"))
def test_a_wrong_answer_ends_the_run_and_costs_no_step(
    kind: str, undisturbed: Undisturbed, target: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    profile, environment = target
    out, _ = (process := start(tmp_path, train(profile), **environment, ENGINE_FAULT=f"generate:4:{kind}")).communicate(
        timeout=LONGEST_RUN_S
    )
    assert process.returncode == 1, out
    # An engine in a process of its own shows the end of its log, which may hold one of its own.
    assert "Traceback" not in out.partition("Its last lines")[0], out
    assert WRONG[kind] in out
    out, _ = start(tmp_path, [], **environment).communicate(timeout=LONGEST_RUN_S)
    assert is_undisturbed(tmp_path / "run", undisturbed), out


@pytest.mark.fault("engine gives other tokens than it sampled, from the start")
def test_tokens_that_were_not_sampled_are_refused_at_the_start(target: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    profile, environment = target
    process = start(tmp_path, train(profile), **environment, ENGINE_FAULT="generate:0:other_ids")
    out, _ = process.communicate(timeout=LONGEST_RUN_S)
    assert process.returncode == 1, out
    assert "scores its own words otherwise than it sampled them" in out


@pytest.mark.fault("engine's log-probs of what it sampled are NaN")
def test_missing_log_probs_are_masked_and_counted(target: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    profile, environment = target
    process = start(tmp_path, train(profile), **environment, ENGINE_FAULT="generate:4:nan")
    out, _ = process.communicate(timeout=LONGEST_RUN_S)
    assert process.returncode == 0, out
    last = read_metrics(tmp_path / "run")[-1]
    assert last["engine/nonfinite_logprobs"] > 0
    assert last["constraint/engine_gap"] is not None
    assert last["learner/grad_norm"] is not None


@pytest.mark.parametrize(
    "fault",
    faults(["update:0:version"] if FEW else ["update:0:version", "update:1:raises", "score:3:nan"], "engine's publish: {} (call, from)"),
)
def test_a_publish_that_goes_wrong_starts_the_engine_anew(
    fault: str, undisturbed: Undisturbed, target: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    profile, environment = target
    process = start(tmp_path, train(profile), **environment, ENGINE_FAULT=fault)
    out, _ = process.communicate(timeout=LONGEST_RUN_S)
    assert process.returncode == 0, out
    assert "failed its proof, and the engine was started anew" in out
    assert is_undisturbed(tmp_path / "run", undisturbed)


@pytest.mark.fault("the engine is gone amid a publish, and does not start again")
def test_no_step_is_lost_where_no_engine_takes_its_weights(
    undisturbed: Undisturbed, target: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    profile, environment = target
    command = [*train(profile), *with_settings("checkpoint.every_steps=100")]
    process = start(tmp_path, command, **environment, ENGINE_FAULT="update:1:gone", ENGINE_GONE=str(tmp_path / "gone"))
    out, _ = process.communicate(timeout=LONGEST_RUN_S)
    assert process.returncode == 1, out
    assert "its machine is gone" in out
    assert "saved a checkpoint of step 2" in out
    (tmp_path / "gone").unlink()
    out, _ = start(tmp_path, [], **environment).communicate(timeout=LONGEST_RUN_S)
    assert is_undisturbed(tmp_path / "run", undisturbed), out


POOL = f"[[engines]]\ncount = 2\n[pool]\nrestart_after_s = 0.2\ndeadline_s = {DEADLINE_S}\n"
IN_A_POOL = [
    "generate:4:hangs", "generate:5:version", "score:5:hangs", "update:1:hangs", "generate:5:too_few", "generate:5:short_logps",
    "generate:5:unknown_ids", "generate:0:other_ids", "generate:5:empty", "generate:5:positive", "generate:5:raises", "generate:5:killed",
    "score:5:nan", "score:5:killed", "update:1:version", "update:1:killed",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed_pool(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("pool")
    (folder / "pool.toml").write_text(POOL)
    return undisturbed_run(folder, *train(), "--config", "pool.toml")


@pytest.mark.parametrize("fault", faults(IN_A_POOL[1:2] if FEW else IN_A_POOL, "one engine of a pool: {} (call, from)"))
def test_one_of_a_pool_costs_nothing(
    fault: str, undisturbed_pool: Undisturbed, target: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    profile, environment = target
    (tmp_path / "pool.toml").write_text(POOL)
    process = start(
        tmp_path, [*train(profile), "--config", "pool.toml"], **environment, ENGINE_FAULT=fault, ENGINE_FAULT_CLAIM=str(tmp_path / "claim")
    )
    out, _ = process.communicate(timeout=LONGEST_RUN_S)
    assert process.returncode == 0, out
    assert " is out: " in out, out
    assert finished(tmp_path / "run")[:2] == undisturbed_pool[:2]


@pytest.mark.variant
@pytest.mark.fault("the only engine hangs past its deadline")
def test_the_only_engine_hangs(target: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """With fewer engines than are asked for the run saves and ends; a resume may have another number of them."""
    profile, environment = target
    (tmp_path / "pool.toml").write_text(POOL.replace("count = 2", "count = 1"))
    process = start(tmp_path, [*train(profile), "--config", "pool.toml"], **environment, ENGINE_FAULT="generate:6:hangs")
    out, _ = process.communicate(timeout=LONGEST_RUN_S)
    assert process.returncode == 1, out
    assert "did not answer 'generate' within" in out
    assert "fewer than pool.min_engines = 1" in out
    process = start(tmp_path, [], **environment)
    out, _ = process.communicate(timeout=LONGEST_RUN_S)
    assert process.returncode == 0, out
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]
    shutil.rmtree(tmp_path / "run")
