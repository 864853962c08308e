"""Names, revisions and uploads, without a network: a cache as the hub's client lays it out, and a captured upload."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM
from transformers.utils import hub

from twinweave import IMSMModel
from twinweave.errors import DamagedFileError

ONE, TWO = "1" * 40, "2" * 40


@pytest.fixture
def ids(tokens):
    return tokens(2, 8)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits


def snapshot(cache: Path, name: str, commit: str, *references: str) -> Path:
    """The folder of one commit of `name` in a cache of the hub."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for reference in references:
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / reference).write_text(commit)
    return repository / "snapshots" / commit


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_revision_of_a_model_and_of_its_base(cache, make_base, make_imsm, perturb, ids):
    for seed, commit, reference in ((0, ONE, "main"), (1, TWO, "v2")):
        make_base(seed=seed).save_pretrained(snapshot(cache, "some/base", commit, reference))
    base = AutoModelForCausalLM.from_pretrained("some/base", revision="v2")
    model = make_imsm(base=base, peft_changes={"revision": "v2"})  # PEFT's place for the base's
    model.save_pretrained(snapshot(cache, "me/woven", ONE, "main"))
    first = logits(model, ids)
    perturb(model, seed=5)
    model.save_pretrained(snapshot(cache, "me/woven", TWO, "better"))
    second = logits(model, ids)
    assert not torch.equal(first, second)
    assert torch.equal(logits(IMSMModel.from_pretrained("me/woven"), ids), first)
    again = IMSMModel.from_pretrained("me/woven", revision="better")
    assert torch.equal(logits(again, ids), second)
    local = snapshot(cache, "me/woven", TWO)
    assert torch.equal(logits(IMSMModel.from_pretrained(local, revision="main"), ids), second)  # a folder has only one
    with pytest.raises(DamagedFileError, match="nowhere"):
        IMSMModel.from_pretrained("me/woven", revision="nowhere")


def test_what_would_be_pushed(make_imsm, make_base, tmp_path, monkeypatch, ids):
    kept = {}

    class Api:
        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **kwargs):
            for operation in operations:
                kept[operation.path_in_repo] = Path(operation.path_or_fileobj).read_bytes()

    def new_card(repo_id, tags=None, token=None):
        return ModelCard.from_template(hub.ModelCardData(tags=tags or []))

    monkeypatch.setattr(hub, "hf_api", Api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", new_card)
    model = make_imsm()
    model.push_to_hub("me/woven", tags=["mine"])
    assert set(kept) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "imsm_config.json", "imsm_gate.safetensors",
    }  # fmt: skip
    for name, content in kept.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits(IMSMModel.from_pretrained(tmp_path, make_base()), ids), logits(model, ids))
    card = ModelCard.load(tmp_path / "README.md")
    assert set(card.data["tags"]) >= {"imsm", "twinweave", "lora", "mine"}
    assert 'tw.IMSMModel.from_pretrained("me/woven")' in card.text


def test_the_card_says_it_once(make_imsm, tmp_path):
    model = make_imsm()
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("## Two memories") == 1
    assert text.count("- twinweave") == 1
