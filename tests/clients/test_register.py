"""Registration under a name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import transformers
from clients import families
from clients.test_workloads import tokens
from transformers import AutoConfig, AutoModelForCausalLM, BloomConfig, LlamaConfig

from fa4_ext.integrations.transformers import _register, attention, masks, register


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


def test_importing_the_library_does_not_import_transformers():
    code = "import sys, fa4_ext, fa4_ext.integrations; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_configuration_is_saved_with_no_trace(tmp_path):
    model = AutoModelForCausalLM.from_config(
        families.small(LlamaConfig()), attn_implementation="fa4_ext"
    )
    model.save_pretrained(tmp_path)
    assert "fa4_ext" not in AutoConfig.from_pretrained(tmp_path).to_json_string()
