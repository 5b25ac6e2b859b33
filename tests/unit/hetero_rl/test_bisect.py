"""Which module counts as the first that departs."""

from __future__ import annotations

import math

from hetero_rl.bisect import departures


def squares(**errors: float) -> dict[str, tuple[float, float, float]]:
    """(local, in place, output) of modules whose local error is given."""
    return {f"model.{name.replace('_', '.')}": (error**2 * 4, error**2 * 16, 4.0) for name, error in errors.items()}


def test_a_module_beyond_its_error_at_export_departs() -> None:
    found = departures(
        squares(layers_0_up=0.1, layers_1_up=0.31, norm=0.03), 1, {"model.layers.0.up.weight": 0.1, "model.layers.1.up.weight": 0.1}
    )
    assert [module.name for module in found.modules if module.departs] == ["model.layers.1.up", "model.norm"]
    assert found.first is not None
    assert (round(found.first.local_error, 3), round(found.first.error, 3)) == (0.31, 0.62)


def test_without_an_export_modules_of_one_kind_are_compared() -> None:
    found = departures(squares(layers_0_up=0.1, layers_1_up=0.12, layers_2_up=0.5, head=0.11, norm=0.0), 1, {})
    assert found.first is not None
    assert found.first.name == "model.layers.2.up"
    assert departures(squares(layers_0_up=0.1, layers_1_up=0.12), 1, {}).first is None
    assert departures({"model.up": (math.inf, math.inf, 1.0)}, 1, {}).first is not None
