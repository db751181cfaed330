"""Decoders that count positions and compute their loss by themselves: what they are given, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from ds_cp.models import counted, trial
from ds_cp.models.twin import twin
from scripts import models_map
from tests.unit.test_models import attached

IDS = torch.arange(3, 40).unsqueeze(0)


def model_of(model_type: str) -> PreTrainedModel:
    config = models_map.config_of(model_type)
    return twin(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)


@pytest.mark.parametrize("model_type", ["bart", "marian", "bigbird_pegasus", "whisper"])
def test_labels_are_those_of_their_own_tokens_and_positions_those_of_their_documents(model_type: str) -> None:
    model = model_of(model_type)
    batch, documents = trial.rows()[1]
    wanted, gradients = trial.alone(model, batch, documents)
    handle = attached(model, "reference")
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    assert abs(float(loss.detach()) - wanted) < 1e-5 * wanted
    for name, found in trial.gradients(model).items():
        torch.testing.assert_close(found, gradients[name], rtol=1e-4, atol=1e-6)
    one = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert float(one.detach()) != pytest.approx(wanted, rel=1e-3), "as one document it is another loss"
    handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_temperature_of_attention_goes_by_the_position_in_the_document() -> None:
    model = model_of("llama4_text")
    batch, documents = trial.rows()[1]
    wanted, _ = trial.alone(model, batch, documents)
    own = {name: module.attn_temperature_tuning for name, module in counted.tempered(model).items()}
    assert len(own) == 1
    handle = attached(model, "reference")
    assert float(model(**batch).loss.detach()) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="position_ids that do not count from 0"):
        model(input_ids=IDS, position_ids=torch.arange(37).unsqueeze(0) + 5)
    handle.remove()
    assert {name: module.attn_temperature_tuning for name, module in counted.tempered(model).items()} == own


def test_what_counts_by_itself_is_found() -> None:
    assert [type(table).__name__ for table in counted.tables(model_of("bart"))] == ["BartLearnedPositionalEmbedding"]
    assert counted.tables(model_of("opt")) == [], "its decoder takes position_ids"
    assert counted.computes_its_loss(model_of("bart"))
    assert not counted.computes_its_loss(model_of("opt"))


def test_positions_that_the_model_would_not_count_are_refused() -> None:
    model = model_of("bart")
    attached(model, "reference")
    with pytest.raises(ValueError, match="position_ids that do not count from 0"):
        model(input_ids=IDS, labels=IDS, position_ids=torch.arange(37).unsqueeze(0) + 5)


def test_targets_counted_as_shifted_are_refused_under_their_unshifted_name() -> None:
    model = model_of("bart")
    attached(model, "reference")
    with pytest.raises(ValueError, match=r"BartForCausalLM takes label i as the target of token i.*name them shift_labels"):
        model(input_ids=IDS, labels=IDS, num_items_in_batch=36)
    wanted = model(input_ids=IDS, labels=IDS).loss
    torch.testing.assert_close(model(input_ids=IDS, shift_labels=IDS, num_items_in_batch=37).loss, wanted)
