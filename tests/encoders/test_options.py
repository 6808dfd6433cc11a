"""Options handed to transformers: what it would keep silently or refuse unnamed is said by key."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import BertConfig, PretrainedConfig, ResNetConfig, ViTConfig

from mlip.encoders.options import tower_config


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        (ResNetConfig, {"hidden_size": 12}, "no option 'hidden_size'; the nearest is 'hidden_s"),
        (BertConfig, {"hiden_size": 12}, "no option 'hiden_size'; the nearest is 'hidden_size'"),
        (ViTConfig, {"drop_path_rate": 0.1}, "no option 'drop_path_rate'"),
        (ViTConfig, {"num_channels": 3}, "num_channels follows from data.channels"),
        (BertConfig, {"vocab_size": 30522}, "vocab_size follows from the tokenizer"),
        (ResNetConfig, {"layer_type": "wide"}, "refuses these values"),
        (BertConfig, {"hidden_size": "wide"}, "refuses these values"),
    ],
)
def test_an_option_that_cannot_be_honoured_names_the_setting(
    kind: type[PretrainedConfig], options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=f"model.text.options: .*{expected}"):
        tower_config(kind, "model.text.options", options)


def test_options_win_over_defaults_and_keep_their_values() -> None:
    made = tower_config(ViTConfig, "key", {"hidden_size": 48, "patch_size": 8}, num_channels=1)
    assert (made.hidden_size, made.patch_size, made.num_channels) == (48, 8, 1)
