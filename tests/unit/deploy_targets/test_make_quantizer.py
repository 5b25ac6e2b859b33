"""A quantizer that lacks a part of the protocol is refused when it is made, not hours later when the part is called."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy_targets import catalog
from deploy_targets.errors import ProfileError
from deploy_targets.profile import parse_profile
from deploy_targets.quantizers.none import NoQuantizer
from tests.plugins import profile


class WithoutTwin:
    """Everything but what the learner computes with in the target's place."""

    deterministic = True

    def __init__(self, *arguments: object) -> None:
        """Take what quantizers are given."""

    offenders = quantizes = quantize = NoQuantizer.quantize


def test_every_missing_part_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(catalog.QUANTIZERS, "half", f"{__name__}:WithoutTwin")
    with pytest.raises(ProfileError, match="the quantizer 'half' is not whole") as caught:
        catalog.make_quantizer(parse_profile(profile("mine", quantizer="half"), "mine.toml"), tmp_path)
    assert [line.partition(":")[0] for line in caught.value.offenders] == ["dequantized", "scaffold"]
    assert "WithoutTwin has none" in caught.value.offenders[0]
