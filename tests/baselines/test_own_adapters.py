"""OSF, OFT and CorDA: the base stays as it is, and what is saved is a plain adapter that gives the same logits."""

import math

import pytest
import torch
from peft import LoraConfig, PeftModel

from twinweave.baselines.corda import least_used_directions
from twinweave.errors import RecipeError, UnsupportedModelError
from twinweave.imsm.starts import START
from twinweave.methods import Settings, get_method, load_plain
from twinweave.rehearsal import Materials

OWN = ["peft_osf", "peft_oft", "peft_corda"]


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens(2, 7)).logits


def build(name, base, config, materials):
    return get_method(name).build(base, config, Settings(), materials)


def train_a_little(model, task):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(**task).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_modules": "all-linear"},
        {"lora_dropout": 0.3, "use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        {"use_dora": True},
    ],
)
def test_trained_and_saved_it_is_a_plain_adapter_on_the_untouched_base(
    name, changes, make_base, make_peft, materials, task, tokens, tmp_path
):
    base = make_base()
    before, weights = logits(base, tokens), {n: p.clone() for n, p in base.named_parameters()}
    model = build(name, base, make_peft("lora", **changes), materials()).eval()
    assert torch.allclose(logits(model, tokens), before, atol=1e-5)  # it starts as the base
    train_a_little(model, task)
    assert (logits(model, tokens) - before).abs().max() > 0.05
    named = dict(model.named_parameters())
    kept = {n.replace(".base_layer", "").removeprefix("base_model.model."): p for n, p in named.items()}
    assert all(torch.equal(kept[n], w) for n, w in weights.items())
    model.save_pretrained(str(tmp_path))
    loaded = load_plain(str(tmp_path), make_base()).eval()
    assert isinstance(loaded, PeftModel)
    assert torch.allclose(logits(loaded, tokens), logits(model, tokens), atol=2e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), before)


@pytest.mark.parametrize("name", OWN)
def test_other_adapters_in_the_recipe_say_where_and_the_rest_is_the_methods_own(
    name, make_base, make_peft, materials, tokens
):
    for kind in ("ia3", "adalora", "oft"):
        model = build(name, make_base(), make_peft(kind, target_modules=["q_proj", "down_proj"],
                      **({"feedforward_modules": []} if kind == "ia3" else {})), materials())  # fmt: skip
        assert model.peft_config["default"].target_modules == {"q_proj", "down_proj"}
        assert model.get_nb_trainable_parameters()[0] > 0


def test_the_sizes_follow_the_rank(make_base, make_peft, materials):
    config = make_peft("lora", r=3)
    osf = build("peft_osf", make_base(), config, None)
    layer = osf.base_model.model.model.layers[0].self_attn.v_proj  # [16, 32]
    assert {n: tuple(p.shape) for n, p in layer.osf_svd_params["default"].items()} == {
        "U_low": (16, 3),
        "S_low": (3,),
        "V_low": (3, 32),
    }
    assert len(osf.peft_config["default"].rank_pattern) == 4  # the adapted layers, and no other
    oft = build("peft_oft", make_base(), make_peft("lora", r=4), None)
    assert oft.base_model.model.model.layers[0].self_attn.q_proj.oft_block_size["default"] == 16
    sizes = [build(n, make_base(), config, None).get_nb_trainable_parameters()[0] for n in ("peft", "peft_corda")]
    assert sizes[0] == sizes[1]


def test_osf_trains_only_within_the_complement_of_the_large_directions(make_base, make_peft, task):
    model = build("peft_osf", make_base(), make_peft("lora"), None)
    model(**task).loss.backward()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    u, _, vh = torch.linalg.svd(layer.get_base_layer().weight)
    gradient = {n: p.grad for n, p in layer.osf_svd_params["default"].items()}
    assert gradient["U_low"].norm() > 0
    assert (u[:, :-4].T @ gradient["U_low"]).norm() < 1e-4 * gradient["U_low"].norm()
    assert (gradient["V_low"] @ vh[:-4].T).norm() < 1e-4 * gradient["V_low"].norm()


def test_osf_says_what_it_cannot_adapt(make_base, make_peft):
    with pytest.raises(UnsupportedModelError, match="no linear layers of torch"):
        build("peft_osf", make_base("gpt2"), make_peft("lora", "gpt2"), None)


# --- CorDA ----------------------------------------------------------------------------------------------------------


def test_the_least_used_directions_are_those_whose_loss_costs_least():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 10, generator=generator)
    inputs = torch.randn(500, 10, generator=generator) * torch.linspace(0.1, 3, 10)
    covariance = inputs.T @ inputs / len(inputs)
    a, b = least_used_directions(weight, covariance, 4)
    assert a.shape == (4, 10)
    assert b.shape == (12, 4)
    damped = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(10)
    values = torch.linalg.svdvals(weight.double() @ damped.double())
    cost = torch.linalg.norm(b.double() @ a.double() @ damped.double())
    assert cost.item() == pytest.approx(values[-4:].square().sum().sqrt().item(), rel=1e-3)  # Eckart and Young
    plain_a, plain_b = least_used_directions(weight, torch.eye(10), 4)
    on_text = [torch.linalg.norm(inputs @ (q @ p).T) for p, q in ((a, b), (plain_a, plain_b))]
    assert on_text[0] < on_text[1]
    whole_a, whole_b = least_used_directions(weight, covariance, 10)
    assert torch.allclose(whole_b @ whole_a, weight, atol=1e-3)
    with pytest.raises(ValueError, match="rank 11"):
        least_used_directions(weight, covariance, 11)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_corda_starts_with_the_covariances_of_the_general_text(arch, make_base, make_peft, materials):
    given, base = materials(), make_base(arch)
    name = "transformer.h.1.attn.c_attn" if arch == "gpt2" else "model.layers.1.self_attn.v_proj"
    seen = []
    hook = base.get_submodule(name).register_forward_hook(lambda module, args, output: seen.append(args[0][0]))
    for row in given.rehearsal.rows:
        base(input_ids=torch.tensor([row["input_ids"]]))
    hook.remove()
    covariance = torch.stack([x.T @ x / len(x) for x in seen]).mean(0).detach()
    weight = base.get_submodule(name).weight.detach()
    a, b = least_used_directions(weight.T if arch == "gpt2" else weight, covariance, 4)

    model = build("peft_corda", base, make_peft("lora", arch), given)
    layer = model.base_model.model.get_submodule(name)
    start = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert start.norm() > 1e-3
    assert torch.allclose(start, b @ a, atol=1e-4)
    frozen = layer.scaling[START] * layer.lora_B[START].weight @ layer.lora_A[START].weight
    assert torch.allclose(frozen, -start, atol=1e-6)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".default." in n for n in trained)
    assert not model.base_model.model.training  # as it was


def test_corda_is_saved_as_lora_of_twice_the_rank(make_base, make_peft, materials, tmp_path):
    model = build("peft_corda", make_base(), make_peft("lora", use_rslora=True), materials())
    model.save_pretrained(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "adapter_config.json",
                                                          "adapter_model.safetensors"]  # fmt: skip
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.init_lora_weights) == (8, True)
    assert config.lora_alpha / math.sqrt(8) == pytest.approx(8 / math.sqrt(4))


def test_what_corda_cannot_start_is_our_error(make_base, make_peft, materials):
    with pytest.raises(UnsupportedModelError, match="linear layers only"):
        build("peft_corda", make_base(), make_peft("lora", target_modules=["embed_tokens"]), materials())
    with pytest.raises(UnsupportedModelError, match="rank 30"):
        build("peft_corda", make_base(), make_peft("lora", r=30), materials())
    with pytest.raises(RecipeError, match="rehearsal is off"):
        build("peft_corda", make_base(), make_peft("lora"), Materials(0, 10))
