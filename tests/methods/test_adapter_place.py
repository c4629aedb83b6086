"""Where LoRA's and AdaLoRA's adapters sit."""

from __future__ import annotations

import pytest

from errata.kit.adapter_place import AdapterPlaceConfig
from errata.model.anatomy import Anatomy
from errata_adalora.config import AdaloraConfig
from errata_lora.config import LoraConfig
from tests.families import architectures, build


@pytest.mark.parametrize("config", [LoraConfig, AdaloraConfig])
def test_without_a_place_the_adapter_sits_where_facts_are_best_written(
    config: type[AdapterPlaceConfig],
) -> None:
    anatomy = Anatomy.of(build("gpt2")[0], architectures())
    bare = config().for_model(anatomy)
    assert (bare.layers, bare.target_modules) == ((anatomy.early,), ("mlp_out",))
    assert bare.for_model(anatomy) == bare
    named = config(target_modules=("attention_in",)).for_model(anatomy)
    assert named.layers is None  # all blocks, as published
    assert config(layers=(-1,)).for_model(anatomy).layers == (anatomy.n_layers - 1,)
