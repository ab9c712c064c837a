"""Registration under a name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import transformers
from clients import families
from clients.configuration_by_index import ByIndexConfig
from clients.modeling_by_index import ByIndexModel
from clients.own_attention import DerivedConfig, OwnConfig, OwnModel
from clients.test_workloads import tokens
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from fa4_ext.integrations.transformers import _register, attention, masks, models, register


def test_registering_again_changes_where_masks_are_made_alone():
    made = []
    for masks_in_graphs in (False, True, True, False):
        register(masks_in_graphs=masks_in_graphs)
        assert transformers.AttentionInterface()["fa4_ext"] is attention.attention
        made.append(transformers.AttentionMaskInterface()["fa4_ext"])
    assert made[0] is made[3] is not masks.make_mask
    assert made[1] is made[2] is masks.make_mask


@pytest.mark.parametrize("name", ["my_flash", "flash_attention_2", "org/kernel", "sdpa", "eager"])
def test_a_name_that_transformers_reads_differently_is_refused(name):
    with pytest.raises(ValueError, match="transformers"):
        register(name)


def test_any_other_name_works():
    register("another")
    model = AutoModelForCausalLM.from_config(
        families.small(LlamaConfig()), attn_implementation="another"
    )
    assert model.config._attn_implementation == "another"


def test_an_implementation_is_set_after_the_model_was_built(calls):
    model = AutoModelForCausalLM.from_config(families.small(LlamaConfig()))
    model.set_attn_implementation("fa4_ext")
    model(tokens())
    assert (calls.kernels, calls.elsewhere) == (2, 0)


def test_an_old_transformers_is_refused_with_the_versions_that_were_tested(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    with pytest.raises(ImportError, match=r"5\.24 or newer, found 4\.57\.1; tested: 5\.24\.0"):
        _register._require_version()


def test_a_model_that_computes_attention_by_itself_is_refused():
    """It would add the boolean mask to its scores."""
    model = AutoModelForCausalLM.from_config(
        families.small(BloomConfig()), attn_implementation="fa4_ext"
    )
    with pytest.raises(ValueError, match="does not call attention through transformers' interface"):
        model(tokens())


@pytest.mark.parametrize("config", [OwnConfig, DerivedConfig])
def test_such_a_model_is_refused_in_one_file_with_its_configuration(config):
    model = OwnModel._from_config(config(), attn_implementation="fa4_ext")
    with pytest.raises(ValueError, match="OwnModel does not call attention through transformers'"):
        model(tokens() % 16)


def test_a_model_is_found_that_was_defined_after_the_question(monkeypatch):
    """An answer of no models is not kept."""

    class LaterConfig(PreTrainedConfig):
        pass

    models.refuse_own_attention(LaterConfig)
    monkeypatch.setattr(OwnModel, "config_class", LaterConfig)
    with pytest.raises(ValueError, match="OwnModel does not call attention"):
        models.refuse_own_attention(LaterConfig)


def test_a_model_runs_that_looks_attention_up_in_an_older_way(calls):
    ids, padding = tokens() % 16, torch.ones(tokens().shape, dtype=torch.long)
    padding[0, :3] = 0
    expected, actual = (
        ByIndexModel._from_config(ByIndexConfig(), attn_implementation=name)
        for name in ("sdpa", "fa4_ext")
    )
    actual.load_state_dict(expected.state_dict())
    for mask in (None, padding):
        seen = torch.ones_like(padding).bool() if mask is None else mask.bool()
        wanted, got = (model(ids, mask)[seen] for model in (expected, actual))
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert (calls.kernels, calls.elsewhere) == (2, 0)


def test_importing_the_library_does_not_import_transformers():
    code = "import sys, fa4_ext, fa4_ext.integrations; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_configuration_is_saved_with_no_trace(tmp_path):
    model = AutoModelForCausalLM.from_config(
        families.small(LlamaConfig()), attn_implementation="fa4_ext"
    )
    model.save_pretrained(tmp_path)
    assert "fa4_ext" not in AutoConfig.from_pretrained(tmp_path).to_json_string()
