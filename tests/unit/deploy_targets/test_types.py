"""The carriers of the border."""

import numpy as np
import pytest

from deploy_targets.types import Generation, TokenSequence


def generation(prompt: tuple[int, ...], tokens: list[int]) -> Generation:
    return Generation(prompt, np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), 3, 1.0, "length")


def test_the_sequence_of_a_generation_scores_its_sampled_tokens() -> None:
    """Prompt first, then the response, as plain Python integers (they cross a process border as JSON)."""
    sequence = generation((5, 6), [7, 8, 9]).sequence
    assert sequence == TokenSequence((5, 6, 7, 8, 9), 2)
    assert {type(token) for token in sequence.tokens} == {int}


def test_a_generation_without_tokens_has_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="prompt_len must lie in"):
        _ = generation((5, 6), []).sequence
