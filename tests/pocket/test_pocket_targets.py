"""What the base does not know can be taught: plain LoRA learns each target to 90 % of test rows it never saw."""

from pathlib import Path

import pytest

from twinweave.compare import train
from twinweave.pocket import TASKS, demo_recipe
from twinweave.training import load_recipe

EPOCHS = {"reverse": 4, "shift": 8, "newcomers": 40}


@pytest.mark.parametrize("target", EPOCHS)
def test_lora_learns_the_target(target: str, tmp_path: Path) -> None:
    task = next({k: v for k, v in task.items() if k != "role"} for task in TASKS if task["name"] == target)
    recipe = load_recipe(
        demo_recipe(), [f"train.data=pocket:{target}/train", "method=peft", "retained=[]", f"output={tmp_path / 'run'}"]
    ).model_copy(update={"target": load_recipe({"base": "pocket", "train": "x", "target": task}).target})
    recipe.training.epochs = EPOCHS[target]
    if target == "newcomers":  # a fact that is held out cannot be known, so the best model is the one of the last step
        recipe.train.validation = "pocket:newcomers/train"
    results = train(recipe)
    assert results["base"]["target_score"] <= 0.2
    assert results["runs"][0]["target_score"] >= 0.9
